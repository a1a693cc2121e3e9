"""Every preset trains on a GPU compiled and as one CUDA graph, without a warning. `pytest --cuda`."""

import math
import warnings

import numpy as np
import pytest
import torch
import torture

import encoder as encoders
from model import CONFIGS
from strawberry.data.token_file import TokenFileWriter
from strawberry.run_config import load_run
from strawberry.training import plot
from strawberry.training.signals import Signals
from train import Trainer

pytestmark = pytest.mark.cuda

PRESETS = sorted(path.stem for path in (torture.ROOT / "config").glob("*.json") if path.name != "schema.json")
STEPS = 60


def write_token_files() -> None:
    """tokens.bin, one long document, and pairs.bin, in the working directory."""
    with open("text.txt", "w") as file:
        file.write("abcdefghijklmnopqrstuvwxyz .")
    encoder, rng = encoders.load("chars:text.txt"), np.random.default_rng(0)
    with TokenFileWriter("tokens.bin", encoder) as writer:
        for _ in range(8):
            writer.add(rng.integers(0, 28, 20_000))
    with TokenFileWriter("pairs.bin", encoder, kind="pairs") as writer:
        for _ in range(80):
            writer.add(rng.integers(0, 28, 40))
            writer.add(rng.integers(0, 28, 30))


def load_preset(preset: str):
    data = "pairs.bin" if preset == "transformer-pairs" else "tokens.bin"
    words = {"dataset.path": data, "encoder_path": "chars:text.txt", "device": "cuda", "seed": 1, "max_iters": STEPS,
             "lr_decay_iters": STEPS, "warmup_iters": 10, "log_interval": 20, "eval_interval": 1000, "eval_iters": 2,
             "sample_length": 0, "checkpoints.create_checkpoints": "false"}  # fmt: skip
    return load_run(["--config", f"{preset}.json", *(f"--{key}={value}" for key, value in words.items())], CONFIGS)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_compiled_and_in_a_cuda_graph_without_a_warning(preset, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_token_files()
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: replays.append(1) or replay(self))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, which Python shows to nobody
        trainer = Trainer(load_preset(preset), Signals())
        try:
            trainer.prepare()
            trainer.train()
        finally:
            trainer.close()
    assert trainer.forward is not trainer.model  # compiled
    assert len(replays) == STEPS
    losses = [line["loss"] for line in plot.read_metrics(trainer.metrics.path) if "loss" in line]
    assert losses and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert not [f"{found.filename}: {found.message}" for found in caught]
    assert "warning" not in capfd.readouterr().err.lower()
