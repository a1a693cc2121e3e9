"""Find a model file, load it for inference, choose its device and dtype."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Protocol

import torch

from model import MODELS, LanguageModel
from strawberry.common import UserError
from strawberry.device import choose_device
from strawberry.model_file import load_model
from strawberry.ops.linear import Int8Weight, quantize_int8
from strawberry.training import checkpoint


class LoadSettings(Protocol):
    device: str
    dtype: str
    quantize: str | None
    compile: str


def load_for_inference(path: Path, settings: LoadSettings):
    """(model, encoder, training record) of a model file, on the device and in the dtype of the settings. Raises
    UserError if the model cannot generate text or has weights that are not finite.
    """
    device = choose_device(settings.device, "--device {}").type
    model, encoder, record = load_model(path, device)
    if settings.compile == "true":
        check_can_compile(device, "--compile true")
    if not model.generates:
        raise UserError(f"{path}: this {model.config.arch} is an encoder: it predicts masked tokens, not text")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path}: the model predicts NaN: its weights are ruined; use an earlier checkpoint")
    dtype = choose_dtype_name(settings, device)
    model = model.to(getattr(torch, dtype))
    about = f"{path}: {model.config.arch}, {model.num_params(non_embedding=False):,} parameters, {device} {dtype}"
    if settings.quantize:
        model, about = quantize_model(model, settings.quantize), f"{about}, {settings.quantize}"
    print(about, file=sys.stderr)
    return model, encoder, record


def check_can_compile(device: str, option: str) -> None:
    """Raises UserError where decode steps are not compiled."""
    if device != "cuda":
        recorded = ", where they are recorded and replayed" if device == "cpu" else ""
        raise UserError(f"{option}: steps are compiled on cuda, and this is {device}{recorded}; leave it out")


def choose_dtype_name(settings: LoadSettings, device: str) -> str:
    return {"auto": "bfloat16" if device == "cuda" else "float32"}.get(settings.dtype, settings.dtype)


MODEL_SUFFIXES = (".safetensors", *(f".{arch}" for arch in MODELS))


def resolve_model_path(name: str | None) -> Path:
    """The model file at `name`, or in the checkpoint directory `name`; None: the newest model in bin/."""
    if name is None:
        found = [path for path in Path("bin").glob("*") if path.suffix in MODEL_SUFFIXES and path.is_file()]
        if not found:
            raise UserError(
                "there is no model in bin/; train one (python train.py --config tiny.json), or name "
                "a model file or a checkpoint directory with --model"
            )
        return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
    return checkpoint.find_model(name, "--model")


@torch.no_grad()
def quantize_model(model: LanguageModel, kind: str = "int8") -> LanguageModel:
    """Quantize the weights that are used only in matrix products to int8, with a scale for each row (as arXiv
    2208.07339, without its outlier decomposition). In place: the model can then generate text, but not train. Norms,
    routers, positional embeddings and weights with any other use, such as retention's, keep their dtype.
    """
    if kind != "int8":
        raise UserError(f"--quantize {kind}: is unknown; use int8")
    for module in model.modules():
        for name in getattr(module, "products", ()):
            weight = getattr(module, name)
            if module.roles[name] != "input":  # not an embedding, of which a token reads one row
                delattr(module, name)
                setattr(module, name, Int8Weight(*quantize_int8(weight)))
    return model
