"""Model files as the server lists them: name, path, version, hyperparameters; or the reason why one is damaged."""

import os
from dataclasses import dataclass
from pathlib import Path

from strawberry import model_file as model_files
from strawberry.common import UserError, show
from strawberry.serving.errors import ApiError


@dataclass
class ModelFile:
    name: str  # the name for clients; a checkpoint's differs from its file's name
    path: Path
    stamp: tuple  # changes when the file changes
    hyperparams: dict
    chats: bool = False  # whether its encoder has a chat template

    @property
    def created(self) -> int:
        return self.stamp[0] // 10**9

    @property
    def generates(self) -> bool:
        return self.hyperparams.get("kind") != "encoder"


@dataclass
class DamagedFile:
    """A file that has a model's suffix but cannot be read as a model."""

    name: str
    stamp: tuple
    reason: str

    def error(self) -> ApiError:
        return ApiError(500, f"model = {show(self.name)}: its file is damaged, or is no model file: {self.reason}; "
                        "restore it, or train it again", "model", "model_damaged",
                        {"x-should-retry": "false"})  # fmt: skip


def read_model_file(name: str, path: Path, stamp: tuple) -> ModelFile | DamagedFile:
    """Read a model file's header, without its weights. A file that cannot be read is returned as DamagedFile."""
    try:
        hyperparams = model_files.read_about(path)[0]
        chats = model_files.read_chat_template(path) is not None and hyperparams.get("kind", "decoder") == "decoder"
        for key, kind in (("arch", str), ("vocab_size", int), ("block_size", int)):
            if not isinstance(hyperparams.get(key), kind):
                raise UserError(f"{path}: its hyperparameters have no {key}")
    except UserError as error:
        return DamagedFile(name, stamp, hide_path(str(error), path, name))
    return ModelFile(name, path, stamp, hyperparams, chats)


def hide_path(text: str, path: Path, name: str) -> str:
    """Replace the path of a model's file by the model's name, because clients must not see the server's paths."""
    return text.replace(str(path.resolve()), name).replace(str(path), name)


def file_stamp(about: os.stat_result) -> tuple:
    return (about.st_mtime_ns, about.st_size, about.st_ino)
