"""Model files: one safetensors file with weights, configuration, encoder and training record. Nothing is unpickled.

save_model, load_model    write and read a model file
read_about, read_encoder  read its metadata without reading its tensors
write_model               returns a writer of a model file, for checkpoints
unique_tensors            a model's parameters and buffers, tied ones once
"""

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from strawberry.common import UserError, atomic_write, nearest_file
from strawberry.config import to_dict
from strawberry.initialization import SkipInit
from strawberry.sharding import copy_to_shard

Writer = Callable[[BinaryIO], Any]  # writes one file of a checkpoint


def write_model(model: nn.Module, encoder, record: dict, tensors: dict[str, Tensor] | None = None) -> Writer:
    """Returns a function that writes a model file, which load_model can read. `tensors`: the model's whole tensors, if
    the model itself is sharded."""
    tensors = unique_tensors(model) if tensors is None else tensors
    metadata = {
        "format": MODEL_FORMAT,
        "version": MODEL_VERSION,
        "model_hyperparams": json.dumps(to_dict(model.config)),
        "encoder": encoder.to_bytes().decode(),
        "encoder_fingerprint": encoder.fingerprint,
        "record": json.dumps(record),
    }
    return lambda file: write_tensors(file, tensors, metadata)


MODEL_FORMAT = "text-model"
MODEL_VERSION = "1"


DTYPES = {  # safetensors' names
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


REPAIR = "copy it anew, or use a checkpoint of its run"
MAX_HEADER = 8 << 20  # bytes; an encoder of 200,000 tokens takes about 5 MB, tensor entries at most 140 MB of memory


def save_model(path, model: nn.Module, encoder, record: dict, tensors: dict[str, Tensor] | None = None) -> None:
    """Write weights, buffers, hyperparameters, encoder and training record atomically to one safetensors file.

    `record`: JSON data about the training. Raises UserError, which names the path, if it cannot be written.
    """
    atomic_write(path, write_model(model, encoder, record, tensors))


def load_model(path, device: str = "cpu") -> tuple[nn.Module, Any, dict]:
    """Returns (model in eval mode on `device`, encoder, training record) from a file that save_model wrote.

    Raises UserError if the file is of another kind, is damaged, or has other tensors than its configuration requires.
    """
    from encoder import Encoder
    from model import build

    with open_tensors(path) as file:
        meta = _checked_metadata(file, path)
        hyperparams, record = (_parse_json_object(meta, key, path) for key in ("model_hyperparams", "record"))
        try:
            encoder = Encoder.from_bytes(meta["encoder"].encode())
            _check_depth(hyperparams, file)
            with SkipInit():
                model = build(hyperparams)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (RuntimeError, MemoryError, OverflowError) as error:  # shapes too large to allocate
            reason = str(error).partition("\n")[0].rpartition("] ")[2]
            raise UserError(f"{path}: no model can be made of its hyperparameters ({reason})") from error
        _check_encoder(encoder, model, meta["encoder_fingerprint"], path)
        copy_weights(model, file, path)
    return model.to(device).eval(), encoder, record


def read_about(path) -> tuple[dict, dict]:
    """(hyperparameters, training record) of a model file, without reading its tensors. Raises UserError if the file is
    not a model file or is damaged."""
    with open_tensors(path) as file:
        meta = _checked_metadata(file, path)
        return _parse_json_object(meta, "model_hyperparams", path), _parse_json_object(meta, "record", path)


def read_encoder(path) -> Any:
    """The encoder of a model file, without reading its tensors. Raises UserError if the file is not a model file or is
    damaged."""
    from encoder import Encoder

    with open_tensors(path) as file:
        meta = _checked_metadata(file, path)
    try:
        return Encoder.from_bytes(meta["encoder"].encode())
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_chat_template(path) -> dict | None:
    """The chat template in a model file's encoder, if it has one, without making the encoder."""
    with open_tensors(path) as file:
        meta = _checked_metadata(file, path)
    if '"chat_template"' not in meta["encoder"]:  # saves parsing a vocabulary
        return None
    return _parse_json_object(meta, "encoder", path).get("chat_template")


def serialize_model(model: nn.Module, encoder, record: dict) -> bytes:
    """The content of a model file."""
    file = io.BytesIO()
    write_model(model, encoder, record)(file)
    return file.getvalue()


def write_tensors(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file tensor by tensor. safetensors' own `save` holds a second copy of all tensors in memory.

    Format: 8 bytes with the header's length; the header as JSON (each tensor's dtype, shape, and start and end of its
    bytes); the bytes, larger dtypes first, then by name. https://github.com/huggingface/safetensors#format
    """
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {"__metadata__": metadata}, 0
    for name, t in order:
        start, end = end, end + t.nbytes
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, t in order:
        if t.numel():
            file.write(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name → parameter or buffer, as in the state dict; a tied tensor has its first name only."""
    first = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def open_tensors(path) -> safe_open:
    """Open the safetensors file at `path`. Raises UserError if it is of another kind or damaged; the header is not read
    if its length exceeds the file's size or MAX_HEADER."""
    if not Path(path).is_file():
        raise UserError(f"there is no model file {path}{nearest_file(path)}")
    try:
        with open(path, "rb") as file:
            start, size = file.read(9), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"cannot read the model file {path}: {error.strerror}") from error
    header = int.from_bytes(start[:8], "little")
    if start[8:] != b"{":
        if start[:1] == b"\x80" or start[:2] == b"PK":  # a header's length may begin with these bytes too
            raise UserError(f"{path} is a pickle, which can run code and is not read; model files are safetensors")
        raise UserError(f"{path} is not a model file: safetensors was expected")
    if header > min(size - 8, MAX_HEADER):
        limit = f"the file has {size}, and {MAX_HEADER} is the most"
        raise UserError(f"{path} is damaged: its header claims {header} bytes; {limit}; {REPAIR}")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}; {REPAIR}") from error


def _checked_metadata(file, path) -> dict[str, str]:
    meta = file.metadata() or {}
    if (meta.get("format"), meta.get("version")) != (MODEL_FORMAT, MODEL_VERSION):
        found = f"format {meta.get('format')!r}, version {meta.get('version')!r}"
        raise UserError(f"{path} has {found}; this program reads {MODEL_FORMAT!r}, version {MODEL_VERSION!r}")
    for key in ("model_hyperparams", "encoder", "encoder_fingerprint", "record"):
        if key not in meta:
            raise UserError(f"{path} is damaged: its metadata has no {key}; {REPAIR}")
    return meta


def _parse_json_object(meta: dict[str, str], key: str, path) -> dict:
    try:
        value = json.loads(meta[key])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {key} is no JSON; {REPAIR}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: {key} is no JSON object; {REPAIR}")
    return value


def _check_depth(hyperparams: dict, file) -> None:
    """Raises UserError if n_layer exceeds the number of tensors: each layer has at least one, and building the model of
    a false n_layer could take very long."""
    layers, tensors = hyperparams.get("n_layer"), len(file.keys())
    if isinstance(layers, int) and layers > tensors:
        raise UserError(f"its n_layer is {layers}, and it holds {tensors} tensors")


def _check_encoder(encoder, model: nn.Module, stated: str, path) -> None:
    if encoder.fingerprint != stated:
        found = f"{stated[:12]}, the encoder in it has {encoder.fingerprint[:12]}"
        raise UserError(f"{path} is damaged: it states the encoder fingerprint {found}")
    if encoder.vocab_size > model.config.vocab_size:
        counts = f"encoder has {encoder.vocab_size} tokens, its model's vocab_size is {model.config.vocab_size}"
        raise UserError(f"{path} is damaged: its {counts}")


def _check_tensors(model: nn.Module, file, path) -> dict[str, Tensor]:
    """The model's tensors. Raises UserError unless the file has exactly these names and shapes."""
    own, there = unique_tensors(model), set(file.keys())
    for name, tensor in own.items():
        if name not in there:
            raise UserError(f"{path} does not fit its model: the tensor {name} is missing")
        if (shape := tuple(file.get_slice(name).get_shape())) != tuple(tensor.shape):
            raise UserError(f"{path} does not fit its model: {name} has shape {shape}, not {tuple(tensor.shape)}")
    if extra := sorted(there - own.keys()):
        raise UserError(f"{path} does not fit its model: it holds a tensor {extra[0]}, which the model hasn't got")
    return own


@torch.no_grad()
def copy_weights(model: nn.Module, file, path) -> None:
    """Copy the file's tensors into the model's, which must have the same dtype or a wider one. Raises UserError
    otherwise."""
    for name, tensor, saved in _read_tensors(_check_tensors(model, file, path), file, path):
        if torch.promote_types(saved.dtype, tensor.dtype) != tensor.dtype:
            raise UserError(f"{path} does not fit its model: {name} is {saved.dtype}, and the model has {tensor.dtype}")
        copy_to_shard(tensor, saved)


def _read_tensors(own: dict[str, Tensor], file, path) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, tensor in own.items():
        try:
            yield name, tensor, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged: {name}: {error}") from error
