"""Write a model file as a directory that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from encoder import Encoder
from strawberry.common import UserError, atomic_write
from strawberry.huggingface.layouts import make_layout
from strawberry.huggingface.tokenizer import make_tokenizer, make_tokenizer_config
from strawberry.model_file import write_tensors
from strawberry.outputs import EXPORT_MARK, Output

WEIGHTS = "model.safetensors"
FILES = (WEIGHTS, "tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")


def list_outputs(folder: str | Path) -> list[Output]:
    """Every file that `write_export` writes."""
    return [Output("FOLDER", Path(folder) / name, "export") for name in FILES]


def write_export(model: nn.Module, encoder: Encoder, folder: str | Path) -> str:
    """Write FILES, and return the name of the class in transformers. Raises UserError, before anything is written, if
    no class computes the same, or weights are not finite."""
    config, tensors = make_layout(model)
    if not all(t.isfinite().all() for t in tensors.values()):
        raise UserError("the model predicts NaN: its weights are ruined; use an earlier checkpoint")
    special = {"bos_token_id": encoder.eot, "eos_token_id": encoder.eot, "pad_token_id": encoder.pad}
    contents = {
        "tokenizer.json": make_tokenizer(encoder),
        "tokenizer_config.json": EXPORT_MARK | make_tokenizer_config(encoder, model.config.block_size),
        "generation_config.json": EXPORT_MARK | special | {"do_sample": True},
        "config.json": EXPORT_MARK | config | special,
    }
    atomic_write(Path(folder) / WEIGHTS, lambda file: write_tensors(file, tensors, {"format": "pt"} | EXPORT_MARK))
    for name, content in contents.items():
        indent = None if name == "tokenizer.json" else 1  # its merges would be four lines each
        atomic_write(Path(folder) / name, (json.dumps(content, ensure_ascii=False, indent=indent) + "\n").encode())
    return config["architectures"][0]
