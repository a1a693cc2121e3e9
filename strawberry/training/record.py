"""record.json: what a run is, written beside its metrics.jsonl before its first step.

    {"started": 1760000000.0, "command": "python train.py --config tiny.json", "config": "/…/config/tiny.json",
     "run": {every key}, "parameters": 1392649, "parameters_without_embeddings": 344073, "flops_per_token": 1.2e7,
     "tokens_per_step": 2048, "device": "cpu"}

A run that is resumed keeps the time and the command of its start.
"""

import contextlib
import json
import os
import time
from pathlib import Path

import torch

from strawberry.common import UserError, atomic_write
from strawberry.config import to_dict
from strawberry.run_config import find_config
from strawberry.training.console import warn

RECORD = "record.json"
NOTES = "notes.txt"  # what a person wrote about the run, beside it


def read_record(folder: str | os.PathLike) -> dict:
    """The record of the run in `folder`; empty if there is none, or if it is damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        record = json.loads(Path(folder, RECORD).read_bytes())
        return record if isinstance(record, dict) and isinstance(record.get("run"), dict) else {}
    return {}


def write_record(state) -> None:
    """Write the record of a run before its first step, also of a resumed run. A full disk gives a warning."""
    run, model = state.run, state.model
    record = {"started": time.time(), "command": state.command, "config": None}
    with contextlib.suppress(UserError):
        record["config"] = str(find_config(state.config).resolve()) if state.config else None
    if run.init_from == "resume":
        then = read_record(state.root)
        record |= {key: then[key] for key in record if key in then}
    record |= {
        "run": to_dict(run),
        "parameters": model.num_params(non_embedding=False),
        "parameters_without_embeddings": model.num_params(),
        "flops_per_token": state.flops_per_token,
        "tokens_per_step": state.tokens_per_step,
        "device": torch.cuda.get_device_name() if state.device.type == "cuda" else state.device.type,
    }
    try:
        atomic_write(state.root / RECORD, json.dumps(record, indent=1).encode())
    except UserError as error:
        warn(str(error))
