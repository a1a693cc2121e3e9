"""Checkpoints of GPT-2's shape as the initial weights of a tinystar: Hugging Face's directories (safetensors only) and
nanoGPT's ckpt.pt (read with weights_only=True, which runs no code of the file).

    checkpoint = read_checkpoint("hf", "gpt2/")          # or "nanogpt", "out/ckpt.pt"
    copy_weights(checkpoint, model, encoder)             # raises UserError if shapes or tokens differ
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from encoder import unpack
from model import default_ffn_width
from strawberry.common import UserError, first_line, show
from strawberry.huggingface.tokenizer import read_vocabulary
from strawberry.model_file import open_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "vocab.json")
GPT2_TOKENS = 50257
DATASET_OF_GPT2 = "prepare the dataset with --encoder tiktoken:gpt2 and set encoder_path to tiktoken:gpt2"


class Checkpoint(NamedTuple):
    """Another program's checkpoint: its path, what a tinystar must have as model_hyperparams to compute the same, its
    tensors under GPT-2's names, whether its matrices are (in, out), and its vocabulary if it holds one."""

    path: Path
    hyperparams: dict
    tensors: Mapping[str, Tensor]
    is_transposed: bool
    vocabulary: dict[int, bytes] | None


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def read_folder(path: str) -> Checkpoint:
    """A directory that GPT2LMHeadModel.save_pretrained wrote, or a clone of one from the hub."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"init_from: {path} is no directory; name one with config.json and {WEIGHTS}")
    config = read_json(folder / "config.json")
    return Checkpoint(folder, read_config(config, folder), Shards(folder), True, read_vocabulary(folder))


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"init_from: there is no {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"init_from: cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"init_from: {path} is no JSON object")
    return value


GELUS = {"gelu": "GELU", "gelu_new": "GELU_tanh", "gelu_pytorch_tanh": "GELU_tanh"}
FIXED = {  # key of config.json → (its default, the only value that a tinystar computes)
    "model_type": (None, "gpt2"), "layer_norm_epsilon": (1e-5, 1e-5), "scale_attn_weights": (True, True),
    "scale_attn_by_inverse_layer_idx": (False, False), "add_cross_attention": (False, False),
}  # fmt: skip
SIZES = {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": GPT2_TOKENS, "n_positions": 1024}  # GPT2Config's


def read_config(config: dict, folder: Path) -> dict:
    """model_hyperparams of a GPT-2's config.json. Raises UserError, which names the key, if none compute the same."""
    for key, (default, wanted) in FIXED.items():
        if (value := config.get(key, default)) != wanted:
            raise UserError(f"init_from: {folder}/config.json has {key} = {show(value)}; only GPT-2's {show(wanted)} "
                            "is read")  # fmt: skip
    activation = config.get("activation_function", "gelu_new")
    if activation not in GELUS:
        raise UserError(f"init_from: {folder}/config.json has activation_function = {show(activation)}; a tinystar has "
                        f"{', '.join(GELUS)}")  # fmt: skip
    sizes = {key: config.get(key, default) for key, default in SIZES.items()}
    return make_hyperparams(sizes, config.get("n_inner"), GELUS[activation],
                            config.get("tie_word_embeddings", True), f"{folder}/config.json")  # fmt: skip


def make_hyperparams(sizes: dict, n_ffn: int | None, ffn_type: str, tied: bool, where: str) -> dict:
    if wrong := [key for key, value in sizes.items() if type(value) is not int or value < 1]:
        raise UserError(f"init_from: {where} has {wrong[0]} = {show(sizes[wrong[0]])}; a whole number was expected")
    return {
        "arch": "tinystar", "vocab_size": sizes["vocab_size"], "block_size": sizes["n_positions"],
        "n_layer": sizes["n_layer"], "n_head": sizes["n_head"], "n_embd": sizes["n_embd"], "n_qkv": sizes["n_embd"],
        "n_ffn": n_ffn or 4 * sizes["n_embd"], "norm_type": "LayerNorm", "attention_type": "MHA",
        "ffn_type": ffn_type, "pos_encoding": "Learned", "tie_embeddings": tied, "qk_norm": False,
        "logit_softcap": None, "skip_scalars": False, "value_embeddings": False, "n_ffn_experts": 1,
    }  # fmt: skip


class Shards(Mapping):
    """Name → tensor of model.safetensors, or of the files that its index names; each is read when it is asked for."""

    def __init__(self, folder: Path):
        index = folder / INDEX
        if index.is_file():
            files = read_json(index).get("weight_map")
            names = list(files.values()) if isinstance(files, dict) else [files]
            if wrong := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
                raise UserError(f"init_from: {index} names {show(wrong[0])}; a file beside it was expected")
        elif (folder / WEIGHTS).is_file():
            names = [WEIGHTS]
        else:
            pickles = any(folder.glob("*.bin"))
            found = "only a pickle, which can run code and is not read" if pickles else "no weights"
            raise UserError(f"init_from: {folder} has {found}; {WEIGHTS} was expected, which transformers' "
                            "save_pretrained writes")  # fmt: skip
        files = [open_tensors(folder / name) for name in sorted(set(names))]
        # the first checkpoints on the hub lack the prefix
        self.files = {name.removeprefix("transformer."): (file, name) for file in files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        file, key = self.files[name]
        try:
            return file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise UserError(f"init_from: the tensor {key} is damaged: {error}") from error

    def __iter__(self):
        return iter(self.files)

    def __len__(self):
        return len(self.files)


# ---- nanoGPT ---------------------------------------------------------------------------------------------------------


def read_nanogpt(path: str) -> Checkpoint:
    """A ckpt.pt that nanoGPT's train.py wrote. Without biases, ours are zero and learn."""
    if not Path(path).is_file():
        raise UserError(f"init_from: there is no file {path}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file, or one that is no checkpoint, raises
        reason = first_line(error).partition(". ")[0][:200]  # what follows advises to run the file's code
        raise UserError(f"init_from: {path} is not read, since it is damaged or holds more than tensors and plain "
                        f"values ({type(error).__name__}: {reason}); name a ckpt.pt of nanoGPT") from error  # fmt: skip
    args = data.get("model_args") if isinstance(data, dict) else None
    state = data.get("model") if isinstance(data, dict) else None
    if not isinstance(args, dict) or not isinstance(state, dict):
        raise UserError(f"init_from: {path} has no model and model_args; name a ckpt.pt of nanoGPT")
    sizes = {key: args.get("block_size" if key == "n_positions" else key) for key in SIZES}
    hyperparams = make_hyperparams(sizes, None, "GELU", True, f"{path}: model_args")
    # a compiled model's names have a prefix; the head is the embedding
    names = {str(name).removeprefix("_orig_mod.").removeprefix("transformer."): name for name in state}
    tensors = {name: state[key] for name, key in names.items() if isinstance(state[key], Tensor)}
    tensors.pop("lm_head.weight", None)
    if not args.get("bias", True):
        layers = ["ln_f", *(f"h.{i}.{name}" for i in range(min(sizes["n_layer"], len(tensors))) for name in LAYERS)]
        missing = {f"{name}.bias": tensors.get(f"{name}.weight") for name in layers}
        tensors |= {name: w.new_zeros(w.size(0)) for name, w in missing.items() if w is not None and w.dim()}
    return Checkpoint(Path(path), hyperparams, tensors, False, None)


READERS: dict[str, Callable[[str], Checkpoint]] = {"hf": read_folder, "nanogpt": read_nanogpt}


def read_checkpoint(scheme: str, path: str) -> Checkpoint:
    """The checkpoint that `init_from: "<scheme>:<path>"` names. Raises UserError if it cannot be read."""
    return READERS[scheme](path)


def list_files(scheme: str, path: str) -> list[Path]:
    """The files that `read_checkpoint` may read."""
    if scheme != "hf":
        return [Path(path)]
    folder = Path(path)
    return [folder / "config.json", *(folder / name for name in (*TOKENIZERS, INDEX)), *folder.glob("*.safetensors")]


# ---- the same tokens -------------------------------------------------------------------------------------------------


def check_tokens(checkpoint: Checkpoint, encoder) -> None:
    """Raises UserError if an id is another ordinary token in the encoder than in the checkpoint. Special tokens may be
    spelled differently, and the encoder's may have ids above the checkpoint's."""
    data = unpack(encoder.to_bytes())
    specials = set(encoder.specials.values())
    if checkpoint.vocabulary is not None:
        ordinary = {i: encoder.token_bytes(i) for i in range(encoder.vocab_size) if i not in specials}
        theirs = {i: token for i, token in checkpoint.vocabulary.items() if i not in specials}
        different = [i for i in sorted(ordinary.keys() | theirs.keys()) if ordinary.get(i) != theirs.get(i)]
        if different:
            i = different[0]
            raise UserError(f"init_from: token {i} is {show_token(theirs.get(i))} in {checkpoint.path} and "
                            f"{show_token(ordinary.get(i))} in encoder_path ({len(different):,} ids differ); prepare "
                            "the dataset with the checkpoint's tokenizer (for GPT-2's: --encoder tiktoken:gpt2), and "
                            "set encoder_path to it")  # fmt: skip
        return
    vocab_size = checkpoint.hyperparams["vocab_size"]
    if vocab_size >= GPT2_TOKENS:  # nanoGPT rounds it up to 50,304
        if data.get("name") not in ("gpt2", "r50k_base"):
            raise UserError(f"init_from: {checkpoint.path} has {vocab_size:,} token ids and no tokenizer file, so its "
                            f"tokens are GPT-2's, and encoder_path names others; {DATASET_OF_GPT2}")  # fmt: skip
    elif data["kind"] != "chars" or len(data["chars"]) != vocab_size:
        raise UserError(f"init_from: {checkpoint.path} has {vocab_size:,} token ids and no tokenizer file; its tokens "
                        f"can only be the {vocab_size:,} characters of its text: set encoder_path to chars:<that "
                        "text>")  # fmt: skip


def show_token(token: bytes | None) -> str:
    return "nothing" if token is None else show(token.decode("utf-8", "backslashreplace"))


# ---- the same shapes -------------------------------------------------------------------------------------------------

LAYERS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def check_hyperparams(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Raises UserError, which lists every key to set, unless the model computes what the checkpoint does. Its
    block_size may be smaller, its vocab_size larger."""
    c = model.config
    own = {key: getattr(c, key, None) for key in checkpoint.hyperparams}
    if own["arch"] == "tinystar":
        own["n_ffn"] = c.n_ffn or default_ffn_width(c.ffn_type.lower(), c.n_embd)
    fits = {"block_size": operator.le, "vocab_size": operator.ge}
    problems = [f"model_hyperparams.{key}: {show(own[key])} → {show(value)}"
                for key, value in checkpoint.hyperparams.items()
                if not fits.get(key, operator.eq)(own[key], value)]  # fmt: skip
    if problems:
        raise UserError(f"init_from: {checkpoint.path} is of another shape ({'; '.join(problems)}): set them as it has")


@torch.no_grad()
def copy_weights(checkpoint: Checkpoint, model: nn.Module, encoder) -> None:
    """Copy the checkpoint into the model, which then computes the same logits; ids above the checkpoint's get the mean
    of its embeddings, so that they are as improbable as the average token. Raises UserError if shapes or tokens
    differ, before the model is changed."""
    check_hyperparams(checkpoint, model)
    check_tokens(checkpoint, encoder)
    found = [(p, get_tensor(checkpoint, name, p)) for name, p in list_targets(model).items()]
    for p, tensor in found:
        p[: len(tensor)].copy_(tensor)
        if len(tensor) < len(p):
            p[len(tensor) :] = tensor.float().mean(dim=0)


def list_targets(model: nn.Module) -> dict[str, Tensor]:
    """GPT-2's names → our parameters; q, k and v, which are one matrix there, as name[0], name[1] and name[2]."""
    targets = {"wte.weight": model.embed.weight, "wpe.weight": model.positions.weight}
    for i, block in enumerate(model.blocks):
        attn, ffn = block.attn, block.ffn
        parts = (block.norm1, (attn.wq, attn.wk, attn.wv), attn.wo, block.norm2, ffn.w1, ffn.w2)
        for name, layer in zip(LAYERS, parts, strict=True):
            for kind in ("weight", "bias"):
                if isinstance(layer, tuple):
                    targets |= {f"h.{i}.{name}.{kind}[{j}]": getattr(part, kind) for j, part in enumerate(layer)}
                else:
                    targets[f"h.{i}.{name}.{kind}"] = getattr(layer, kind)
    targets |= {f"ln_f.{kind}": getattr(model.norm, kind) for kind in ("weight", "bias")}
    return targets if model.unembed is None else targets | {"lm_head.weight": model.unembed.weight}


def get_tensor(checkpoint: Checkpoint, target: str, p: Tensor) -> Tensor:
    """The tensor for one of `list_targets`. Raises UserError if it is missing or of another shape."""
    name, _, part = target.removesuffix("]").partition("[")
    if name not in checkpoint.tensors:
        raise UserError(f"init_from: {checkpoint.path} has no tensor {name}")
    tensor, n_parts = checkpoint.tensors[name], 3 if part else 1
    is_matrix = tensor.dim() == 2 and name.startswith("h.")
    tensor = tensor.t() if is_matrix and checkpoint.is_transposed else tensor
    rows = {"wte.weight": "vocab_size", "lm_head.weight": "vocab_size", "wpe.weight": "block_size"}
    rows = checkpoint.hyperparams[rows[name]] if name in rows else n_parts * len(p)
    if tuple(tensor.shape) != (rows, *p.shape[1:]):
        raise UserError(f"init_from: {checkpoint.path} is damaged: {name} has shape {tuple(tensor.shape)}, not "
                        f"{(rows, *p.shape[1:])}")  # fmt: skip
    return tensor[: len(p)] if not part else tensor.chunk(3)[int(part)]
