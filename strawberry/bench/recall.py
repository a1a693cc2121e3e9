"""`bench.py recall`: associative recall by distance and by number of pairs (MQAR, arXiv 2312.04927).

A row has n pairs of a key and a value, d tokens of filler, and then n queries: each key once more, in another order.
The target of a query is the key's value; other tokens have no target. Keys and values are drawn for each row, so
weights cannot store them. The values are not in the text after the queries: if each followed its query, as in the
paper, a model could infer the later ones by elimination. A model that knows only which values are in the row is right
once in n; a model that does not see the pairs is right once in the number of all values. All queries of a row are at
one distance, since the state after a query holds its value for later ones.

    n = 2, d = 3:   text     k7 v3 k1 v9 .. .. .. k1 k7        target   -  -  -  -  -  -  -  v9 v3

Half of the training rows, and no evaluation row, have several queries of each key at random places: more targets for
the same number of tokens. The optimizer is Muon by default. With AdamW a small transformer learns which values are in
the row, and then stays at chance for thousands of steps, many more than Muon needs to bind each value to its key.
"""

import argparse
import contextlib
import itertools
import json
import math
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import encoder as encoders
from model import CONFIGS, build
from strawberry.argument_parser import ArgumentParser
from strawberry.bench import child_process, hardware
from strawberry.bench.common import (
    check_results,
    format_command,
    format_table,
    list_spec_inputs,
    load_spec,
    make_line_style,
    parse_assignment,
    parse_count,
    parse_learning_rates,
    parse_quantities,
    parse_quantity,
    qualify_key,
    refuse_repeats,
    split_spec,
    style_panel,
    write_benchmark_config,
)
from strawberry.bench.decode import check_generates
from strawberry.bench.sweep import OWN_RATES, hash_code, hash_json, read_result_file
from strawberry.bench.train import BenchmarkTrainer
from strawberry.common import UserError, atomic_write, format_count
from strawberry.config import to_dict
from strawberry.data.objectives import Batch
from strawberry.data.token_file import TokenFileWriter
from strawberry.device import choose_device
from strawberry.run_config import Run, load_run
from strawberry.training import plot, setup
from strawberry.training.evaluation import evaluation_mode, make_batch
from strawberry.training.signals import Signals

N_FILLERS = 16  # token ids of filler
EVAL_SEED = 2**31  # larger than any run's seed, so that evaluation rows are not training rows
ROWS_AT_ONCE = 32  # rows in a pass of an evaluation
FIRST_LENGTH, LENGTH_RATIO = 24, 6  # tokens of a row in the first stage of training; each next stage's over its own
MAX_ROWS = 256  # in a step of a stage with short rows
QUERIES_PER_KEY = 4  # on average, in a row with scattered queries
# The keys of the optimizer for all configs, also for presets with rates of their own; --set and a config's own changes
# replace them
RECIPE = {f"optimizer_hyperparams.{name}": "null" for name in OWN_RATES}
RECIPE |= {"optimizer_hyperparams.use_muon": "true", "optimizer_hyperparams.muon_beta2": "0",
           "optimizer_hyperparams.weight_decay": "0", "gradient_accumulation_steps": "1"}  # fmt: skip
MAX_PAIRS, MAX_DISTANCE = 1024, 1 << 20


@dataclass(frozen=True)
class RecallTask:
    """The numbers of pairs and the distances that rows are drawn from."""

    pairs: tuple[int, ...]
    distances: tuple[int, ...]

    @property
    def n_symbols(self) -> int:
        """Number of keys, and of values: four times as many as a row can have, so that most are absent."""
        return 4 * max(self.pairs)

    @property
    def vocab_size(self) -> int:
        return N_FILLERS + 2 * self.n_symbols

    @property
    def block_size(self) -> int:
        """An eighth more than the longest row needs, so that its pairs, too, begin at a random place. If they always
        began at the start, a model could learn their positions instead of binding values to keys."""
        longest = max(3 * n + d for n, d in self.cells)
        return longest + math.ceil(longest / 8)

    @property
    def cells(self) -> list[tuple[int, int]]:
        return list(itertools.product(self.pairs, self.distances))

    @property
    def lengths(self) -> list[int]:
        """The length of a row in each stage of training. In the last stage it is block_size."""
        shorter = itertools.takewhile(lambda length: 2 * length < self.block_size,
                                      (FIRST_LENGTH * LENGTH_RATIO**k for k in itertools.count()))  # fmt: skip
        return [*shorter, self.block_size]

    def draw_cells(self, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
        """(count, 2) numbers of pairs and distances: the task's for rows of block_size, random ones that fit for
        shorter rows."""
        if length == self.block_size:
            return np.array(self.cells)[rng.integers(len(self.cells), size=count)]
        most = max(2, min(max(self.pairs), length // 6))
        n = np.minimum(2 ** rng.integers(1, most.bit_length() + 1, count), min(most, max(self.pairs)))
        return np.stack((n, rng.integers(0, np.minimum(length - 3 * n, max(self.distances)) + 1)), axis=1)

    def draw_rows(
        self, rng: np.random.Generator, cells: np.ndarray, length: int, scattered: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(text, targets), (rows, length) each, of rows with these numbers of pairs and distances; a target of −1 means
        none. The pairs begin at a random place. In rows where `scattered` (rows,) is True, the queries are at random
        places after the pairs, QUERIES_PER_KEY for each key on average if there is room."""
        count, (n, d) = len(cells), cells[:, :, None].transpose(1, 0, 2)  # (rows, 1) each
        start = rng.integers(0, length - (3 * n + d) + 1)
        place = np.arange(length) - start  # counted from the first pair
        keys, values = (first + rng.random((count, self.n_symbols)).argsort(axis=1)[:, : max(self.pairs)]
                        for first in (N_FILLERS, N_FILLERS + self.n_symbols))  # fmt: skip
        is_query = (place >= 2 * n + d) & (place < 3 * n + d)
        number = np.where(is_query, place - 2 * n - d, place // 2)  # of the pair; clipped where there is none
        number = number.clip(0, n - 1)
        shuffled = np.where(np.arange(max(self.pairs)) < n, rng.random(keys.shape), 2).argsort(axis=1)
        number = np.where(is_query, np.take_along_axis(shuffled, number, axis=1), number)
        if scattered is not None and scattered.any():
            share = np.minimum(QUERIES_PER_KEY * n / (length - start - 2 * n), 1)
            anywhere = (place >= 2 * n) & (rng.random((count, length)) < share)
            where = scattered[:, None]
            is_query = np.where(where, anywhere, is_query)
            number = np.where(where & anywhere, (rng.random((count, length)) * n).astype(int), number)
        key, value = (np.take_along_axis(part, number, axis=1) for part in (keys, values))
        is_pair, fillers = (place >= 0) & (place < 2 * n), rng.integers(0, N_FILLERS, (count, length))
        x = np.where(is_query | is_pair & (place % 2 == 0), key, np.where(is_pair, value, fillers))
        return x, np.where(is_query, value, -1)


class RecallObjective:
    """Rows of a RecallTask: the training rows of a stage, or the evaluation rows of `cell`, (pairs, distance)."""

    model, kind = "decoder", "tokens"
    has_bits_per_byte = has_padding = False
    extra_ids = 0

    def __init__(self, task: RecallTask, cell: tuple[int, int] | None = None, stage: int = -1):
        self.task, self.cell, self.length = task, cell, task.lengths[stage]

    def make_batch(self, split, seed: int, first: int, count: int) -> Batch:
        """`count` rows, a function of (seed, first, count, stage). `split` is not read."""
        rng = np.random.default_rng([seed, first, self.length])
        if self.cell is None:
            cells, scattered = self.task.draw_cells(rng, count, self.length), rng.random(count) < 0.5
        else:
            cells, scattered = np.array([self.cell] * count), None
        x, y = self.task.draw_rows(rng, cells, self.length, scattered)
        return Batch(x, y, None, int((y >= 0).sum()))


class RecallTrainer(BenchmarkTrainer):
    """train.py's loop on rows of a task."""

    def __init__(self, run: Run, task: RecallTask):
        super().__init__(run, Signals())
        self.task = task

    def set_up(self) -> None:
        super().set_up()
        if not self.model.causal:
            raise UserError(f"{self.model.config.arch}: its predictions depend on later tokens; recall needs a causal "
                            "model")  # fmt: skip
        self.task_rows, self.total_steps = self.run.batch_size, self.run.max_iters
        self.set_stage(0)

    def set_stage(self, stage: int) -> None:
        """Set the length and the number of the next steps' rows to those of a stage."""
        self.objective = RecallObjective(self.task, stage=stage)
        longer = self.task.block_size // self.objective.length
        self.run.batch_size = max(self.task_rows, min(self.task_rows * longer, MAX_ROWS))

    def train_stages(self) -> None:
        """Train on short rows first. On long rows, which are nearly all filler, a model does not learn to find a
        query's value for thousands of steps."""
        stages = len(self.task.lengths)
        for stage in range(stages):
            if stage:
                self.steps.synchronize()
                self.steps.release_graph()
                self.set_stage(stage)
                torch.compiler.reset()  # otherwise the number of shapes exceeds dynamo's recompile limit
                self.steps.warm_up(self.compiled)
            self.run.max_iters = self.total_steps * (stage + 1) // stages
            self.train()

    def measure_recall(self, rows: int) -> list[dict]:
        """The accuracy of each cell, over `rows` evaluation rows."""
        return [{"pairs": n, "distance": d, "accuracy": self.measure_cell((n, d), rows)} for n, d in self.task.cells]

    def measure_cell(self, cell: tuple[int, int], rows: int) -> float:
        correct = total = 0
        with evaluation_mode(self.model), self.autocast():
            for first in range(0, rows, ROWS_AT_ONCE):
                count = min(ROWS_AT_ONCE, rows - first)
                batch = make_batch(RecallObjective(self.task, cell), None, EVAL_SEED, first, count, self.device)
                found = self.model(batch.x)[0].argmax(dim=-1)
                correct += int((found == batch.y).sum())
                total += batch.n_targets
        return correct / total


def recall_child(argv: list[str]) -> None:
    """The main function of a child: train a config on a task, measure its recall and print it."""
    file, task, rows = argv
    results, task = sys.stdout, RecallTask(**{key: tuple(value) for key, value in json.loads(task).items()})
    with contextlib.redirect_stdout(sys.stderr):
        trainer = RecallTrainer(load_run(["--config", file], CONFIGS), task)
        trainer.prepare()
        trainer.train_stages()
        found = {
            "cells": trainer.measure_recall(int(rows)), "params": trainer.model.num_params(), "loss": trainer.loss,
            "seconds": trainer.progress.seconds, "machine": hardware.describe_device(trainer.device),
        }  # fmt: skip
        trainer.close()
        print(json.dumps(found), file=results, flush=True)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "bench.py recall",
        "Train configs on associative recall, and measure their accuracy by distance and number of pairs.",
    )
    add = parser.add_argument
    add("configs", nargs="+", help="config files; file.json:key=value,key=value changes keys of one")
    add("--pairs", default="8", help="numbers of pairs of a key and a value, between commas (default 8)")
    add("--distances", default="16,64,256", help="tokens between the pairs and the queries (default 16,64,256)")
    add("--steps", type=parse_quantity, default=2000, help="training steps of each config (default 2000)")
    add("--batch_size", type=parse_quantity, default=32, help="rows of a step (default 32)")
    add("--lrs", default="3e-3", help="learning rates; a config's result is that of its best (default 3e-3)")
    add("--rows", type=parse_quantity, default=256, help="evaluation rows for each number of pairs and distance "
        "(default 256)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a key for all configs; may be repeated")
    add("--jobs", type=parse_count, help="configs at once, divided among the GPUs (default: one on each)")
    add("--out", default="img/recall", type=Path, help="directory of the results (default img/recall)")
    arguments = parser.parse_args(argv)
    for name, limit in (("pairs", MAX_PAIRS), ("distances", MAX_DISTANCE)):
        setattr(arguments, name, parse_quantities(f"--{name}", getattr(arguments, name), limit))
    arguments.lrs = parse_learning_rates(arguments.lrs)
    return arguments


def load_runs(arguments: argparse.Namespace, task: RecallTask, folder: Path) -> list[tuple[str, Run]]:
    """(config, run) for each config and learning rate, with the task's sizes and a schedule of --steps. The runs have a
    token file, which train.py requires, but RecallObjective does not read it."""
    (folder / "text.txt").write_text("ab")
    with TokenFileWriter(folder / "tokens.bin", encoders.load(f"chars:{folder / 'text.txt'}")) as writer:
        for _ in range(2):
            writer.add(np.zeros(2 * task.block_size + 2, np.int64))
    steps = arguments.steps
    refuse_repeats(arguments.configs)
    fixed = {"vocab_size": task.vocab_size, "block_size": task.block_size, "dropout": 0, "max_iters": steps,
             "lr_decay_iters": steps, "warmup_iters": max(steps // 20, 1), "batch_size": arguments.batch_size,
             "dataset.path": folder / "tokens.bin",
             "dataset.data_division": 0.5, "encoder_path": f"chars:{folder / 'text.txt'}", "sample_length": 0,
             "objective": "next", "eval_interval": 10**9, "log_interval": max(steps // 10, 1)}  # fmt: skip
    common = [parse_assignment(text) for text in arguments.set]
    common += [(qualify_key(name), str(value)) for name, value in fixed.items()]
    refuse_fixed(arguments, fixed)
    rates = [[("learning_rate", f"{lr}"), ("min_lr", f"{lr / 10}")] for lr in arguments.lrs]
    return [(spec, load_spec(spec, [*common, *rate], last=True, defaults=[*RECIPE.items()]))
            for spec in arguments.configs for rate in rates]  # fmt: skip


OPTIONS = {"block_size": "--distances and --pairs", "vocab_size": "--pairs", "max_iters": "--steps",
           "lr_decay_iters": "--steps", "batch_size": "--batch_size", "learning_rate": "--lrs",
           "min_lr": "--lrs"}  # that set a key, which --set and a config's own changes cannot


def refuse_fixed(arguments: argparse.Namespace, fixed: dict) -> None:
    """Raises UserError for a changed key that would be ignored, because recall sets it itself."""
    own = [text for spec in arguments.configs for text in split_spec(spec)[1]]
    names = {qualify_key(name): name for name in (*fixed, "learning_rate", "min_lr")}
    for text in (*arguments.set, *own):
        key, _ = parse_assignment(text)
        if name := names.get(key):
            mend = f"use {OPTIONS[name]}" if name in OPTIONS else "leave it out"
            raise UserError(f"{text!r}: recall sets {key} itself; {mend}")


def check_predicts_next(runs: list[tuple[str, Run]]) -> None:
    """Raises UserError for a model that predicts something else than the next token."""
    for spec, run in runs:
        with torch.device("meta"):
            check_generates(build(run.model_hyperparams), spec, take_source=False)


def list_result_files(runs: list[tuple[str, Run]], task: RecallTask, arguments: argparse.Namespace) -> list[Path]:
    """Where the result of each run is kept. The name is a hash of all that the result depends on."""
    code = [hash_code(), Path(__file__).read_text(encoding="utf-8")]
    plain = [to_dict(run) | {"dataset": None, "encoder_path": None} for _, run in runs]  # both in a temporary folder
    keys = [hash_json([each, asdict(task), arguments.rows, code]) for each in plain]
    return [arguments.out / "runs" / f"{key}.json" for key in keys]


def run(argv: list[str]) -> int | None:
    """Train configs on associative recall; measure it by distance and number of pairs."""
    arguments = parse_arguments(argv)
    check_results("recall", arguments.out, argv, list_spec_inputs("configs", arguments.configs))
    task = RecallTask(arguments.pairs, arguments.distances)
    with tempfile.TemporaryDirectory() as folder:
        runs = load_runs(arguments, task, Path(folder))
        check_predicts_next(runs)
        try:
            found = train_runs(runs, task, arguments, Path(folder))
        except KeyboardInterrupt:
            again = format_command(setup.relative_path(sys.executable), "recall", argv)
            kept = arguments.out / "runs"
            print(f"\ninterrupted: finished runs are kept in {kept}; to go on:\n    {again}", flush=True)
            return 130
    rows = choose_best(found)
    write_recall(rows, task, arguments.out, format_command("python", "recall", argv))
    return 2 if any("why" in row for row in rows) else None


def train_runs(
    runs: list[tuple[str, Run]], task: RecallTask, arguments: argparse.Namespace, folder: Path
) -> list[dict]:
    """The measurements of each run's child process, in the order of `runs`. Prints each when it ends, and keeps it in
    --out, so that the same command continues after an interruption."""
    files = list_result_files(runs, task, arguments)
    found = {i: read_result_file(file) for i, file in enumerate(files) if file.exists()}
    print(f"{format_count(len(runs), 'run')} of {arguments.steps:,} steps of {arguments.batch_size} rows of "
          f"{task.block_size:,} tokens; {len(found)} of them are done already", flush=True)  # fmt: skip
    waiting = [i for i in range(len(runs)) if i not in found]
    words = [[write_benchmark_config(folder / str(i), runs[i][1]), json.dumps(asdict(task)), str(arguments.rows)]
             for i in waiting]  # fmt: skip
    device = runs[0][1].device
    jobs = arguments.jobs or child_process.GpuPool(device).lanes
    for number, measured in child_process.run_at_once("_recall", words, jobs, device):
        i = waiting[number]
        spec, run = runs[i]
        found[i] = {"config": spec, "lr": run.learning_rate, **measured, "run": to_dict(run)}
        if "why" not in measured:
            atomic_write(files[i], json.dumps(found[i]).encode())
        table = f"{spec}: {measured['why']}" if "why" in measured else format_table(*list_accuracies([found[i]], task))
        print(table, flush=True)
    return [found[i] for i in range(len(runs))]


def choose_best(rows: list[dict]) -> list[dict]:
    """For each config the row with the highest mean accuracy, a failed one only if all of them failed. Its `by_lr` has
    the mean accuracy of every learning rate."""
    best = {}
    for row in rows:
        row["mean"] = statistics.fmean(cell["accuracy"] for cell in row["cells"]) if "cells" in row else None
        mine = best.setdefault(row["config"], row)
        if (row["mean"] or 0) > (mine["mean"] or 0) or mine["mean"] is None:
            best[row["config"]] = row
    for spec, row in best.items():
        row["by_lr"] = {f"{each['lr']:g}": each["mean"] for each in rows if each["config"] == spec}
    return list(best.values())


def list_accuracies(rows: list[dict], task: RecallTask) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the table: a row for each config and number of pairs."""
    header = ["config", "learning rate", "pairs", "chance", *(f"at {d:,}" for d in task.distances)]
    table = []
    for row, n in itertools.product(rows, task.pairs):
        found = {cell["distance"]: cell["accuracy"] for cell in row.get("cells", ()) if cell["pairs"] == n}
        shown = [f"{100 * found[d]:.1f} %" if d in found else "failed" for d in task.distances]
        table.append([row["config"], f"{row['lr']:g}", f"{n}", f"{100 / n:.1f} %", *shown])
    return header, table


def write_recall(rows: list[dict], task: RecallTask, out: Path, command: str) -> None:
    """Write recall.json, recall.md and recall.png."""
    where = hardware.describe_device(choose_device("auto"))
    text = format_table(*list_accuracies(rows, task))
    note = ("The benchmark is valid if a model with full attention reaches 99 %, and a model whose layers' windows "
            "together are shorter than the distance stays at chance or below.")  # fmt: skip
    report = f"{text}\n\n![recall](recall.png)\n\n{note}\n\n{where}\n\n```\n{command}\n```\n"
    atomic_write(out / "recall.md", report.encode())
    atomic_write(out / "recall.json", json.dumps({"command": command, "rows": rows}, indent=1).encode())
    plot.save(draw_recall(rows, task, f"Associative recall, {where}"), out / "recall.png")
    print(f"\n{text}\n\nthe table and the picture are in {out}")


def draw_recall(rows: list[dict], task: RecallTask, title: str):
    """A figure: accuracy against distance, a panel for each number of pairs; the dotted line is chance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(1.5 + 3.4 * len(task.pairs), 4.2), dpi=200, layout="constrained")
    FigureCanvasAgg(fig)
    panels = fig.subplots(1, len(task.pairs), sharey=True, squeeze=False)[0]
    for panel, n in zip(panels, task.pairs, strict=True):
        for number, row in enumerate(rows):
            found = [(c["distance"], c["accuracy"]) for c in row.get("cells", ()) if c["pairs"] == n]
            if found:
                panel.plot(*zip(*found, strict=True), **make_line_style(number), label=row["config"])
        panel.axhline(1 / n, color="0.5", linestyle=":", label="chance")
        style_panel(panel, f"distance (tokens), {n} pairs")
        panel.set_xticks(task.distances, [f"{d:,}" for d in task.distances])
        panel.minorticks_off()
        panel.set_ylim(0, 1.03)
    panels[0].set_ylabel("accuracy", fontsize=11)
    fig.suptitle(title, fontsize=12, x=0.01, ha="left")
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=9, frameon=False)
    return fig
