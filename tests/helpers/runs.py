"""A small training run: its corpus, its config, and what it leaves behind."""

import json
from pathlib import Path

import numpy as np
import torch

import encoder as encoders
import train
from model import CONFIGS, build
from strawberry.data.token_file import TokenFileWriter
from strawberry.run_config import load_run
from strawberry.training import plot
from strawberry.training.checkpoint import find_latest
from strawberry.training.signals import Signals
from train import Trainer

TEXT = "".join(f"{word} sat on the mat and saw {n} dogs.\n" for n in range(40) for word in ("a cat", "the owl", "we"))
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .\n"
STRAWBERRY = {
    "vocab_size": 44, "block_size": 16, "n_layer": 1, "r_layer": 1, "n_head": 2, "n_embd": 16, "n_qkv": 16,
    "retention_chunk": 4,
}  # fmt: skip
TINYSTAR = {"arch": "tinystar", "vocab_size": 44, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
MODELS = {"strawberry": STRAWBERRY, "tinystar": TINYSTAR}


def write_corpus(path, text=TEXT):
    encoder = encoders.load("chars:text.txt")
    with TokenFileWriter(path, encoder) as writer:
        for line in text.splitlines(keepends=True):
            writer.add(np.array(encoder.encode(line)))


def write_config(model="strawberry", **changes):
    config = {
        "dataset": {"path": "data.bin", "data_division": 0.8},
        "checkpoints": {"path": "ck", "interval": 4, "keep": 9},
        "model_hyperparams": MODELS[model] | changes.pop("model_hyperparams", {}),
        "optimizer_hyperparams": {"use_muon": True},
        "model_path": "out/tiny.model", "encoder_path": "chars:text.txt", "seed": 5, "device": "cpu", "compile": False,
        "batch_size": 3, "max_iters": 10, "eval_interval": 5, "log_interval": 1, "eval_iters": 2,
        "learning_rate": 3e-3, "warmup_iters": 2, "min_lr": 1e-3, "sample_length": 8,
    }  # fmt: skip
    Path("run.json").write_text(json.dumps(config | changes))


def run(*overrides):
    return train.main(["--config", "run.json", *overrides])


def prepared(*overrides):
    """A trainer before its first step, which keeps its directory from no other one."""
    trainer = Trainer(load_run(["--config", "run.json", *overrides], CONFIGS), Signals())
    trainer.prepare()
    trainer.close()
    return trainer


def metrics(path="ck/metrics.jsonl"):
    return plot.read_metrics(path)


def weights_and_state(root="ck"):
    """(step, weights, optimizer state flattened) of the newest checkpoint."""
    found = find_latest(root)
    hyper = found.meta["run"]["model_hyperparams"]
    model = build(hyper)
    found.load_weights(model)
    state = found.load_state()["optimizer"]["state"]
    flat = {f"{name}.{key}": value for name, values in state.items() for key, value in values.items()}
    return found.step, model.state_dict(), flat


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
