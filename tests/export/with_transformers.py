"""What transformers makes of the exports, in a process that cannot import our code: `python -I with_transformers.py`.

Reads manifest.json and inputs.pt in the working directory, writes results.pt, tokens.json, and checkpoints of GPT-2.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch

for name in ("strawberry", "model", "encoder", "export"):
    assert importlib.util.find_spec(name) is None, f"{name} can be imported"

from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel  # noqa: E402

manifest = json.loads(Path("manifest.json").read_text("utf-8"))
idx = torch.load("inputs.pt")


@torch.no_grad()
def run_export(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    logits = model(idx).logits
    text = model.generate(idx[:1, :20], max_new_tokens=8, do_sample=False, eos_token_id=None)
    about = model.generation_config
    return type(model).__name__, str(model.dtype), logits, text, [about.eos_token_id, about.pad_token_id]


def encode(name, strings):
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = [tokenizer(text)["input_ids"] for text in strings]
    decode = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    texts = [tokenizer.decode(row, **decode) for row in ids]
    specials = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.decode([tokenizer.eos_token_id])]
    parsed = AutoTokenizer.from_pretrained(name, split_special_tokens=False)(f"{tokenizer.pad_token}")["input_ids"]
    return {"ids": ids, "texts": texts, "specials": specials, "parsed": parsed}


def make_gpt2(seed, **options):
    """A GPT-2 with every parameter random: the library's norms are one and its biases zero."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 39, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **options)).eval()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model


def as_nanogpt(model, bias, prefix):
    """nanoGPT's ckpt.pt: linear layers are (out, in), and the head is in the state dict too."""
    state = {}
    for name, p in model.state_dict().items():
        if bias or not name.endswith(".bias"):
            state[prefix + name] = p.t().contiguous() if ".c_" in name and p.dim() == 2 else p
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": bias, "vocab_size": 39, "dropout": 0.0}
    return {"model": state, "optimizer": {"state": {}}, "model_args": args, "iter_num": 7,
            "best_val_loss": torch.tensor(1.5), "config": {"dataset": "shakespeare_char", "compile": True}}  # fmt: skip


@torch.no_grad()
def make_checkpoints(tokens):
    found = {}
    for name, options in {"gelu_new": {}, "untied": {"activation_function": "gelu", "n_inner": 40,
                                                     "tie_word_embeddings": False}}.items():  # fmt: skip
        model = make_gpt2(1, **options)
        model.save_pretrained(name, max_shard_size="1GB" if name == "gelu_new" else "40KB")
        found[name] = model(tokens).logits
        if name == "gelu_new":
            model.transformer.save_pretrained("without_head")  # and names without "transformer."
    for bias in (True, False):
        model = make_gpt2(2, activation_function="gelu")
        for name, p in model.named_parameters():
            p.data *= 1.0 if bias or not name.endswith(".bias") else 0.0
        torch.save(as_nanogpt(model, bias, "_orig_mod." if bias else ""), f"nano_{bias}.pt")
        found[f"nano_{bias}"] = model(tokens).logits
    return found


exports = {name: run_export(name) for name in manifest["exports"]}
tokens = {name: encode(name, strings) for name, strings in manifest["strings"].items()}
Path("tokens.json").write_text(json.dumps(tokens), "utf-8")
checkpoints = make_checkpoints(idx[:, :24] % 39)
torch.save({"exports": exports, "checkpoints": checkpoints}, "results.pt")
print(torch.__version__, file=sys.stderr)
