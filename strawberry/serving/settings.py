"""The settings of the server: its command line, and API keys from the environment."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from strawberry.command_line import parse_settings
from strawberry.common import UserError, nearest_file
from strawberry.config import declared, option

REPOSITORY = Path(__file__).resolve().parents[2]
KEY_VARIABLE = "STRAWBERRY_API_KEY"
MIB = 1 << 20
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[0-9]{1,5})?")  # as browsers write it


@dataclass
class Settings:
    models: str = option("bin", "directory of the model files; only the default is made if it is missing")
    data: str = option("data", "directory of uploads, datasets and runs; made if it is missing")
    runs: list[str] = option(
        [], "directory of runs that train.py started, shown on the page; may be repeated; default: that of --models"
    )
    host: str = option("127.0.0.1", "address to listen on; other than this machine's only with a key")
    port: int = option(8000, "port to listen on; 0: a free one, which is printed", low=0, high=65535)
    api_key: list[str] = option(
        [],
        f"key that each request must carry; may be repeated, or given in {KEY_VARIABLE}, separated by spaces, where a "
        "process list does not show it",
    )
    allow_host: list[str] = option([], "another host name of this server; may be repeated")
    allow_origin: list[str] = option(
        [], "another origin whose pages may use this server, such as https://box.example; may be repeated"
    )
    rate: int = option(6000, "requests per minute for each key, or for each address without a key; 0: no limit", low=0)
    batch: int | None = option(None, "sequences generated at once; default: 64 on cuda, 8 elsewhere", low=1, high=2**12)
    queue: int = option(256, "maximum number of waiting completions; further ones get status 503", low=0)
    context: int = option(4096, "maximum tokens of a prompt and its completion", low=1, high=2**20)
    timeout: float = option(600, "maximum seconds for a completion", above=0)
    memory: float = option(0, "GiB for models and their caches; 0: half of the memory", low=0)
    max_body: float = option(2, "maximum MiB of a JSON body", above=0)
    max_upload: float = option(1024, "maximum MiB of an uploaded file", above=0)
    max_jobs: int = option(1, "jobs that run at once; further ones wait", low=1)
    grace: float = option(10, "seconds for running requests to finish when the server stops", low=0)
    device: str = option("auto", "auto: cuda, else mps, else cpu", choices=["auto", "cpu", "cuda", "mps"])
    dtype: str = option(
        "auto",
        "type of the weights; auto: bfloat16 on cuda, float32 elsewhere", choices=["auto", "float32", "bfloat16"]
    )
    quantize: str | None = option(None, "int8: store matrices in 8 bits", choices=["int8"])
    compile: str = option("false", "torch.compile, on cuda only; delays a model's first text",
                          choices=["true", "false"])  # fmt: skip

    def problems(self) -> Iterator[tuple[str, str]]:
        if not is_loopback(self.host) and not self.api_key:
            yield "host", (f"is reached from other machines, which takes a key: set {KEY_VARIABLE} or --api_key; or "
                           "listen at 127.0.0.1")  # fmt: skip
        for origin in self.allow_origin:
            if not ORIGIN.fullmatch(origin):
                yield "allow_origin", (f"{origin} is no origin; write scheme, host and port as a browser's address bar "
                                       "does, without a path: https://box.example")  # fmt: skip
        for key in self.api_key:
            if not key.isascii() or not key.isprintable() or " " in key:
                yield "api_key", "must be of printable ASCII characters, without spaces"


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_folders(settings: Settings) -> None:
    """Raises UserError for each directory of --models and --runs that does not exist or cannot be read. The default of
    --models may be missing: the server makes it."""
    problems = []
    for name, path in [("--models", settings.models), *(("--runs", path) for path in settings.runs)]:
        is_default = name == "--models" and os.path.normpath(path) == declared(Settings)["models"].default
        if os.path.exists(path) and not os.path.isdir(path):
            problems.append(f"{name} {path}: is a file; name a directory")
        elif os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
            problems.append(f"{name} {path}: cannot be read; change its rights, or name another directory")
        elif not os.path.isdir(path) and not is_default:
            problems.append(f"{name} {path}: there is no such directory{nearest_file(path, is_folder=True)}; "
                            "name one that is there, or make it")  # fmt: skip
    if problems:
        raise UserError("; ".join(problems))


def read_command(argv: list[str]) -> Settings:
    """Parse the command line and the environment. Raises UserError that lists all problems."""
    keys = os.environ.get(KEY_VARIABLE, "").split()
    return parse_settings([*argv, *(f"--api_key={key}" for key in keys)], Settings, "models")
