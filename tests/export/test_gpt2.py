"""--init_from=hf:… and nanogpt:…: logits equal to transformers', and clear errors."""

import json
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import json5
import pytest
import runs
import torch
from exports import GPT2

import encoder as encoders
from model import CONFIGS
from strawberry.common import UserError
from strawberry.huggingface import gpt2
from strawberry.huggingface.tokenizer import make_tokenizer
from strawberry.run_config import load_run, make_run
from strawberry.training import setup

SHAPE = GPT2 | {"vocab_size": 44, "block_size": 24, "n_layer": 2, "n_head": 4, "n_embd": 32}
CASES = {  # checkpoint → (init_from, options that differ)
    "gelu_new": ("hf:gelu_new", {"ffn_type": "GELU_tanh"}),
    "without_head": ("hf:without_head", {"ffn_type": "GELU_tanh"}),
    "untied": ("hf:untied", {"n_ffn": 40, "tie_embeddings": False}),
    "nano_True": ("nanogpt:nano_True.pt", {}),
    "nano_False": ("nanogpt:nano_False.pt", {}),
}


@pytest.fixture
def checkpoints(exchanged, run_folder):
    """The checkpoints that the fresh process wrote, in the working directory of a run."""
    for name in ("gelu_new", "without_head", "untied"):
        shutil.copytree(exchanged.folder / name, name)
    for bias in (True, False):
        shutil.copy(exchanged.folder / f"nano_{bias}.pt", ".")
    return exchanged


def start(init_from, *overrides, **options):
    runs.write_config("tinystar", model_hyperparams=SHAPE | options)
    return runs.prepared(f"--init_from={init_from}", *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(checkpoints, name):
    init_from, options = CASES[name]
    model = start(init_from, **options).model.eval()
    theirs = checkpoints.checkpoints["gelu_new" if name == "without_head" else name]
    with torch.no_grad():
        logits = model(checkpoints.idx[:, :24] % 39)[0]
    assert theirs.std() > 0.5
    torch.testing.assert_close(logits[..., :39], theirs, rtol=0, atol=1e-4)
    average = theirs.mean(dim=-1, keepdim=True).expand(-1, -1, 5)  # ids that the checkpoint lacks
    torch.testing.assert_close(logits[..., 39:], average, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_shorter_context_and_training(checkpoints):
    """The first positions of a checkpoint, and a run that starts from it, whose file starts another one."""
    model = start("hf:gelu_new", ffn_type="GELU_tanh", block_size=16).model.eval()
    with torch.no_grad():
        logits = model(checkpoints.idx[:, :16] % 39)[0][..., :39]
    torch.testing.assert_close(logits, checkpoints.checkpoints["gelu_new"][:, :16], rtol=0, atol=1e-4)
    runs.write_config("tinystar", model_hyperparams=SHAPE | {"ffn_type": "GELU_tanh"}, max_iters=2)
    assert runs.run("--init_from=hf:gelu_new") == 0
    assert runs.run("--init_from=out/tiny.model,pretrained", "--checkpoints.path=ck2") == 0


@pytest.mark.slow
def test_tokens_must_be_the_same(checkpoints):
    own, other = encoders.load("chars:text.txt"), encoders.from_characters(set(runs.ALPHABET) - {"a"} | {"A"})
    tokenizer = Path("gelu_new/tokenizer.json")
    tokenizer.write_text(json.dumps(make_tokenizer(own)))
    start("hf:gelu_new", ffn_type="GELU_tanh")
    tokenizer.write_text(json.dumps(make_tokenizer(other)))
    with pytest.raises(UserError, match=r'token 13 is "A" in gelu_new and "a" in encoder_path .*--encoder tiktoken'):
        start("hf:gelu_new", ffn_type="GELU_tanh")


@pytest.mark.slow
@pytest.mark.parametrize("init_from,options,message", [
    ("hf:gelu_new", {"n_layer": 1, "block_size": 32},
     r"block_size: 32 → 24; model_hyperparams.n_layer: 1 → 2; model_hyperparams.ffn_type: \"GELU\" → \"GELU_tanh\""),
    ("nanogpt:nano_True.pt", {"pos_encoding": "RoPE", "qk_norm": True}, "pos_encoding.*qk_norm: true → false"),
    ("nanogpt:nano_True.pt", {"vocab_size": 41, "n_ffn": 64}, "n_ffn: 64 → 128"),
])  # fmt: skip
def test_differing_hyperparameters_are_listed(checkpoints, init_from, options, message):
    with pytest.raises(UserError, match=rf"init_from: .* is of another shape .*{message}\): set them as it has"):
        start(init_from, **options)


class Payload:
    """A pickle of it, once unpickled, makes a file."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def edit(path, **changes):
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | changes))


DAMAGED = {
    "no folder": (lambda: None, "hf:none", "none is no directory"),
    "no config": (lambda: Path("gelu_new/config.json").unlink(), "hf:gelu_new", "there is no gelu_new/config.json"),
    "no JSON": (lambda: Path("gelu_new/config.json").write_text("{"), "hf:gelu_new", "cannot read gelu_new/co"),
    "another class": (lambda: edit("gelu_new/config.json", model_type="llama"), "hf:gelu_new", 'model_type = "llama"'),
    "another size": (lambda: edit("gelu_new/config.json", n_embd="x"), "hf:gelu_new", 'n_embd = "x"; a whole number'),
    "relu": (lambda: edit("gelu_new/config.json", activation_function="relu"), "hf:gelu_new",
             'activation_function = "relu"; a tinystar has gelu, gelu_new'),
    "scaled": (lambda: edit("gelu_new/config.json", scale_attn_by_inverse_layer_idx=True), "hf:gelu_new",
               "scale_attn_by_inverse_layer_idx = true; only GPT-2's false"),
    "pickle only": (lambda: Path("gelu_new/model.safetensors").rename("gelu_new/pytorch_model.bin"), "hf:gelu_new",
                    "only a pickle, which can run code and is not read; model.safetensors was expected"),
    "pickle": (lambda: Path("gelu_new/model.safetensors").write_bytes(pickle.dumps(Payload())), "hf:gelu_new",
               "is a pickle|is not a model file"),
    "a file elsewhere": (lambda: edit("untied/model.safetensors.index.json", weight_map={"x": "../x"}), "hf:untied",
                         'names "../x"; a file beside it'),
    "no map": (lambda: edit("untied/model.safetensors.index.json", weight_map=3), "hf:untied", "names 3; a file"),
    "torn": (lambda: Path("nano_True.pt").write_bytes(Path("nano_True.pt").read_bytes()[:3000]),
             "nanogpt:nano_True.pt", "nano_True.pt is not read"),
    "code": (lambda: torch.save({"model": Payload(), "model_args": {}}, "nano_True.pt"), "nanogpt:nano_True.pt",
             "nano_True.pt is not read, since it is damaged or holds more than tensors and plain values "
             r"\(UnpicklingError: Weights only load failed\); name a ckpt.pt"),
    "no checkpoint": (lambda: torch.save({"x": 1}, "nano_True.pt"), "nanogpt:nano_True.pt", "has no model and model"),
    "no tensor": (lambda: cut("transformer.h.1.ln_2.weight"), "nanogpt:nano_True.pt", "has no tensor h.1.ln_2.weight"),
    "another tensor": (lambda: cut("transformer.h.1.ln_2.weight", torch.zeros(3, 3)), "nanogpt:nano_True.pt",
                       r"h.1.ln_2.weight has shape \(3, 3\), not \(32,\)"),
    "no file": (lambda: None, "nanogpt:none.pt", "there is no file none.pt"),
    "a tokenizer of another kind": (
        lambda: Path("gelu_new/tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": {}}}'),
        "hf:gelu_new", 'tokenizer of type "Unigram"'),
    "no tokenizer": (lambda: Path("gelu_new/tokenizer.json").write_text("[]"), "hf:gelu_new", "is no tokenizer"),
}  # fmt: skip


def cut(name, tensor=None):
    """Remove a tensor of the checkpoint, or replace it."""
    data = torch.load("nano_True.pt", weights_only=True)
    del data["model"][f"_orig_mod.{name}"]
    data["model"] |= {} if tensor is None else {name: tensor}
    torch.save(data, "nano_True.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_or_unsuitable_checkpoints_are_named(checkpoints, case):
    damage, init_from, message = DAMAGED[case]
    damage()
    ffn_type = "GELU_tanh" if "gelu_new" in init_from else "GELU"
    with pytest.raises(UserError, match=message):
        start(init_from, ffn_type=ffn_type)
    assert not Path("unpickled").exists() and not Path("ck").exists()


def test_a_checkpoint_without_a_tokenizer_asks_for_the_encoder_by_name(tmp_path):
    """A checkpoint of GPT-2's size without a tokenizer file, and one of another size that characters do not have."""
    own = encoders.from_characters(set("abc"))
    messages = {50257: "GPT-2's.*--encoder tiktoken:gpt2", 50304: "GPT-2's", 65: "the 65 characters"}
    for vocab_size, message in messages.items():
        checkpoint = gpt2.Checkpoint(tmp_path, {"vocab_size": vocab_size}, {}, True, None)
        with pytest.raises(UserError, match=message):
            gpt2.check_tokens(checkpoint, own)
    data = json.loads(encoders.train(["the cat, the hat"], 261).to_bytes())
    named = {key: data[key] for key in ("pattern", "ranks", "specials")} | {"kind": "tiktoken", "name": "gpt2"}
    gpt2.check_tokens(gpt2.Checkpoint(tmp_path, {"vocab_size": 50304}, {}, True, None), encoders.Encoder(named))


def test_the_config_in_the_docs_fits_gpt2():
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
    raw = json5.loads(re.search(r"<!-- test: file finetune.json -->\n```jsonc\n(.*?)```", page, re.S)[1])
    model = SimpleNamespace(config=make_run(raw, CONFIGS).model_hyperparams)
    hyperparams = gpt2.read_config({"model_type": "gpt2"}, Path("gpt2"))  # 124 M's sizes are the defaults
    gpt2.check_hyperparams(gpt2.Checkpoint(Path("gpt2"), hyperparams, {}, True, None), model)
    model.config.n_layer = 11
    with pytest.raises(UserError, match="n_layer: 11 → 12"):
        gpt2.check_hyperparams(gpt2.Checkpoint(Path("gpt2"), hyperparams, {}, True, None), model)


def test_what_a_run_reads_is_never_written(run_folder):
    runs.write_config("tinystar")
    Path("gpt2").mkdir()
    Path("gpt2/model.safetensors").write_bytes(b"x")
    run = load_run(["--config", "run.json", "--init_from=hf:gpt2", "--model_path=gpt2/model.safetensors"], CONFIGS)
    with pytest.raises(UserError, match="model_path: gpt2/model.safetensors is the same file as .* of init_from"):
        setup.check_paths(run, Path("ck"), None)
