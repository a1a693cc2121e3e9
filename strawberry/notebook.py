"""Training from a notebook or any other Python: `strawberry.train`, which docs/notebook.md describes.

The work is train.py's. This module only reads the settings, and returns what a notebook goes on with.
"""

import contextlib
import copy
import functools
import io
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from model import CONFIGS
from strawberry.common import UserError, nearest, show
from strawberry.config import check, join_problems, merge_configs, path_names, read_json, to_dict
from strawberry.inference.options import SamplingOptions
from strawberry.inference.text import (
    TextStream,
    Workload,
    check_prompt_fits,
    draw_seed,
    encode_source_text,
    encode_text,
    explain_errors,
    make_decoder,
    make_request,
    stream_texts,
)
from strawberry.run_config import Run, find_config, make_run
from strawberry.training import cuda_graph, plot
from strawberry.training.console import warn
from strawberry.training.loggers import flatten
from strawberry.training.signals import Interrupted, Signals
from train import Trainer, explain_non_finite, save_after_errors

DPI = 100  # of a figure in a notebook: 640 pixels wide


class TrainedRun:
    """What a training run leaves: the model, its tokenizer, its metrics.

    model      the model, in evaluation mode, on the device where it was trained
    encoder    its tokenizer
    config     every key of the run, with its value
    metrics    the lines of metrics.jsonl: a dict for each logged step and each evaluation
    finished   whether all steps were done; False after an interrupt
    """

    def __init__(self, trainer: Trainer, given: set[str]):
        self.model, self.encoder, self.config = trainer.model.eval(), trainer.encoder, trainer.run
        path = trainer.metrics.path
        self.metrics = plot.read_metrics(path) if path.exists() else []
        self.finished = trainer.progress.step >= trainer.run.max_iters
        self.given = given  # the keys that were not left to their defaults
        self.name = Path(trainer.run.model_path).stem
        self.summary = f"{trainer.progress.step:,} of {trainer.run.max_iters:,} steps"

    def __repr__(self) -> str:
        losses = [line["val_loss"] for line in self.metrics if line.get("val_loss") is not None]
        loss = f", validation loss {losses[-1]:.4f}" if losses else ""
        return f"<run {self.name}: {self.model.config.arch}, {self.summary}{loss}>"

    def plot(self, *others: "TrainedRun", x: str = "step"):
        """A matplotlib Figure with loss, learning rate and throughput of this run, and of others in the same axes.

        x: "step", "tokens" or "seconds". The figure shows itself as the last value of a cell, with every backend.
        """
        if x not in plot.AXES:
            raise UserError(f"x = {show(x)}: must be {', '.join(plot.AXES)}{nearest(str(x), plot.AXES)}")
        if wrong := [other for other in others if not isinstance(other, TrainedRun)]:
            raise UserError(f"{show(wrong[0])}: must be a run, as strawberry.train returns it; for files, "
                            "python -m strawberry.training.plot")  # fmt: skip
        runs = [self, *others]
        lines = dict(zip(name_runs(runs), (run.metrics for run in runs), strict=True))
        figure = plot.draw_figure(list(plot.SHEETS.values()), lines, x)
        figure.set_dpi(DPI)
        figure._repr_png_ = functools.partial(plot.png, figure)  # IPython's, which otherwise needs pyplot to be loaded
        return figure

    def sample(
        self, prompt="", *, length=256, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, seed=None, source=None, **more
    ) -> str:
        """The prompt and its continuation of at most `length` tokens. The options are sample.py's (`more`: its
        penalties, and what ends a text), and the same seed gives the same text. `source` is the input of an
        encoder-decoder. Raises UserError for what cannot be sampled.
        """
        if not isinstance(prompt, str):
            raise UserError(f"prompt = {show(prompt)}: must be text")
        if not self.model.generates:
            raise UserError(f"this {self.model.config.arch} is an encoder: it predicts masked tokens, not text")
        given = {"length": length, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        options, problems = check(SampleOptions, {**given, "seed": seed, **more})
        if problems:
            raise UserError(join_problems(problems))
        record = {"run": {"objective": self.config.objective}}
        source = encode_source_text(source, self.model, self.encoder, record, "source")
        tokens = encode_text(self.encoder, prompt)
        request = make_request(options, self.encoder, tokens, source, draw_seed() if seed is None else options.seed)
        check_prompt_fits(self.model, request, options.on_full)
        work = Workload()
        work.add(request)
        with explain_errors(work.longest):
            decoder = make_decoder(self.model, options, work)
            pieces = stream_texts(decoder, [TextStream(self.encoder, request, [])])
            return prompt + "".join(piece for _, piece, _ in pieces)


@dataclass
class SampleOptions(SamplingOptions):
    compile: ClassVar[str] = "false"
    on_full: ClassVar[str] = "stop"
    batch: ClassVar[int | None] = None


def train(config: str | os.PathLike | dict | None = None, *, quiet: bool = False, **overrides) -> TrainedRun:
    """See strawberry.train."""
    raw = merge_overrides(config, overrides)
    given = {name for name, _ in flatten(raw)}
    run = make_run(raw, CONFIGS)
    for message in run.warnings():
        warn(message)
    file = str(config) if config and not isinstance(config, dict) else None
    trainer = Trainer(run, Signals(exits=False), file, quiet)
    stopped, out = None, io.StringIO() if quiet else sys.stdout
    try:
        with contextlib.redirect_stdout(out), save_after_errors(trainer):
            trainer.complete()
    except Interrupted as stop:
        stopped = stop.number
        saved = trainer.checkpoints.save_on_exit()
        mend = '; strawberry.train(…, init_from="resume") goes on' if saved else ""
        print(f"interrupted: {trainer.checkpoints.status()}{mend}", file=sys.stderr)
    except cuda_graph.NonFinite as error:
        raise UserError(explain_non_finite(trainer, error)) from error
    finally:
        trainer.close()
    if stopped == signal.SIGTERM:
        signal.raise_signal(stopped)  # the kernel was asked to end
    if stopped and not trainer.claimed:
        raise KeyboardInterrupt  # before the first step: there is no model yet
    return TrainedRun(trainer, given)


def merge_overrides(config: str | os.PathLike | dict | None, overrides: dict) -> dict:
    """The content of a config (a file's name as for --config, or a dict) with the keys that override it.

    A section may be a dict, merged with the config's, or a dotted name: `**{"checkpoints.interval": 10}`. Raises
    UserError if the file cannot be read.
    """
    if not isinstance(config, str | os.PathLike | dict | None):
        raise UserError(f"config = {show(config)}: must be the name of a JSON file, a dict or None")
    if config is None or isinstance(config, dict):
        raw = make_plain(config or {})
    else:
        raw = read_json(find_config(str(config)))
    raw.pop("$schema", None)
    for name, value in overrides.items():
        value = make_plain(value)
        *outer, last = name.split(".")
        nested = functools.reduce(lambda inner, key: {key: inner}, reversed(outer), {last: value})
        raw = merge_configs(raw, nested)
    return raw


def make_plain(value: Any) -> Any:
    """A copy of a value in which paths are text and numbers of NumPy and PyTorch are Python's."""
    if isinstance(value, dict):
        return {key: make_plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [make_plain(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "shape", None) == () else copy.deepcopy(value)


def name_runs(runs: list[TrainedRun]) -> list[str]:
    """A name for each run in a legend: its own, or the given keys that differ between the runs, or its number."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    ignored = {name.replace(".", "/") for name in path_names(Run)} | {"seed"}
    keys = [dict(flatten(to_dict(run.config))) for run in runs]
    given = {name: None for run in runs for name in sorted(run.given - ignored)}
    differing = [name for name in given if len({show(found.get(name)) for found in keys}) > 1]
    names = [", ".join(f"{name.rpartition('/')[2]} {show(found.get(name))}" for name in differing) for found in keys]
    if differing and len(set(names)) == len(names):
        return names
    return [f"{run.name} {number}" for number, run in enumerate(runs, 1)]
