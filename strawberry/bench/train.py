"""`bench.py train`: training speed of configs in train.py's own loop, and next to nanoGPT's train.py.

BenchmarkTrainer is the only class in bench that depends on train.py's Trainer. All commands that train use it in their
child processes.
"""

import argparse
import collections
import contextlib
import itertools
import json
import math
import os
import pickle
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import train
from model import CONFIGS
from strawberry.argument_parser import ArgumentParser
from strawberry.bench import child_process, hardware
from strawberry.bench.common import (
    GPT2_KEYS,
    GPT2_SHAPE,
    list_json_output,
    list_spec_inputs,
    load_spec,
    parse_assignment,
    parse_count,
    parse_quantity,
    qualify_key,
    write_benchmark_config,
)
from strawberry.common import UserError, atomic_write
from strawberry.data.dataset import Corpus
from strawberry.device import choose_device
from strawberry.outputs import Input, check_outputs
from strawberry.run_config import Run, load_run
from strawberry.training import plot, setup
from strawberry.training.evaluation import QUARTERS, Evaluator
from strawberry.training.signals import Signals
from train import Trainer

MEASURED_SECONDS = 3.0
MAX_BESIDE = 64  # processes of bench.py train --beside
STEP_PARTS = ("data", "forward", "backward", "optimizer")
STEP_KINDS = {"compiled": "compiled", "cuda_graph": "CUDA graph"}  # key of a row → name of the way in which a step runs
TIMED_STEPS = 20  # steps whose parts are timed
ALL_REDUCE_BYTES = 256 << 20  # bytes of the tensor whose all-reduce is timed


class StageTimer:
    """Time stamps of the parts of steps, by the device's own clock, a row for each step. Calling it adds a stamp."""

    def __init__(self, device: torch.device):
        self.cuda, self.rows = device.type == "cuda", []

    def start_step(self) -> None:
        self.rows.append([])
        self()

    def __call__(self) -> None:
        if self.cuda:
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
        else:
            stamp = time.perf_counter()
        self.rows[-1].append(stamp)

    def median_intervals(self) -> list[float]:
        """Milliseconds between each stamp and the next, the median over the rows."""
        if self.cuda:
            torch.cuda.synchronize()
        spans = [[a.elapsed_time(b) if self.cuda else 1e3 * (b - a) for a, b in itertools.pairwise(row)]
                 for row in self.rows]  # fmt: skip
        return [statistics.median(column) for column in zip(*spans, strict=True)]


class BenchmarkTrainer(Trainer):
    """train.py's own loop, timed and without evaluations. The only class that depends on the internals of Trainer: the
    child processes of all commands that train use it.
    """

    def prepare(self) -> None:
        began = time.perf_counter()
        super().prepare()
        self.ready_s = time.perf_counter() - began

    def evaluate(self) -> None:
        pass

    def advance(self, steps: int, every: int) -> list[float]:
        """Train for `steps`. Returns the tokens/s of each `every` of them."""
        first = self.progress.step
        self.run.max_iters, self.run.log_interval = first + steps, every
        self.train()
        lines = plot.read_metrics(self.metrics.path)
        return [line["tokens_per_s"] for line in lines if line["step"] > first + (first == 0)]

    def measure_speed(self) -> dict:
        """Tokens/s, the median of ten intervals of MEASURED_SECONDS together, and peak memory in bytes."""
        self.advance(6, 3)  # the first steps allocate memory and select kernels
        pace = statistics.median(self.advance(4, 2)) / self.tokens_per_step  # steps per second
        steps = min(max(round(MEASURED_SECONDS * pace), 10), 1000) // 10 * 10
        speed = statistics.median(self.advance(steps, steps // 10))
        memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None
        return {
            "tokens_per_s": speed,
            "steps": steps,
            "memory": memory,
            "resident": hardware.peak_resident_bytes(),
            "compiled": bool(self.compiled),
        }

    def measure_parts(self, steps: int = TIMED_STEPS) -> dict[str, float]:
        """Milliseconds of each part of a step, run sequentially and without a CUDA graph, so that the sum may exceed a
        step's time. `data` is the time that the loop waits for the loader.
        """
        self.steps.release_graph()
        timer, waits = StageTimer(self.device), []
        with self.batches() as loader:
            for _ in range(3 + steps):
                began = time.perf_counter()
                micro_batches = next(loader)
                waits.append(1e3 * (time.perf_counter() - began))
                self.run_timed_step(micro_batches[0], timer)
        timer.rows, waits = timer.rows[3:], waits[3:]
        forward, backward, update = timer.median_intervals()
        n = self.run.gradient_accumulation_steps
        return dict(zip(STEP_PARTS, (statistics.median(waits), n * forward, n * backward, update), strict=True))

    def run_timed_step(self, batch, timer: StageTimer) -> None:
        timer.start_step()
        with self.autocast():
            loss = self.forward(batch.x, batch.y, source=batch.source)[1]
        timer()
        loss.backward()
        timer()
        self.steps.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.after_step()
        timer()

    def profile_kernels(self, steps: int = 3) -> list[dict]:
        """The GPU kernels of a step, longest first: name, launches and milliseconds."""
        if self.device.type != "cuda":
            return []
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.advance(steps, steps)
            torch.cuda.synchronize()
        rows = [{"name": event.key, "launches": event.count / steps, "ms": event.self_device_time_total / 1e3 / steps}
                for event in profile.key_averages() if event.self_device_time_total]  # fmt: skip
        return sorted(rows, key=lambda row: -row["ms"])

    def measure_all(self, profile: bool) -> dict:
        """All numbers that `bench.py train` prints for a config."""
        found = self.measure_speed()
        found |= {
            "step_ms": 1e3 * self.tokens_per_step / found["tokens_per_s"],
            "cuda_graph": bool(self.graph_step),
            "ready_s": self.ready_s,
            "tokens_per_step": self.tokens_per_step,
            "kernels": self.profile_kernels() if profile else [],
        }
        found["parts_ms"] = self.measure_parts()
        flops = self.model.flops_per_token(self.run.model_hyperparams.block_size, self.rows)
        found |= {"params": self.model.num_params(non_embedding=False), "flops_per_token": flops}
        ceiling = hardware.measure_matmul_flops(self.device, self.dtype)
        found |= {"flops_per_s": flops * found["tokens_per_s"], "ceiling": ceiling}
        return found | {"share": found["flops_per_s"] / ceiling, "machine": hardware.describe_device(self.device)}

    def log(self, bar, step: int, loss: float, *about) -> None:
        super().log(bar, step, loss, *about)
        self.loss = loss

    def measure_scaling(self, steps: int) -> dict:
        """The numbers that `bench.py scale` prints, from `steps` steps after 10 others, or as many if they are
        fewer."""
        self.advance(min(10, steps), 10**6)
        before = self.progress.seconds
        self.advance(steps, 10**6)
        seconds = self.progress.seconds - before
        return {
            "processes": self.ranks.world, "machine": hardware.describe_device(self.device), "torch": torch.__version__,
            "params": self.model.num_params(non_embedding=False), "tokens_per_step": self.tokens_per_step,
            "tokens_per_s": steps * self.tokens_per_step / seconds, "step_ms": 1e3 * seconds / steps,
            "loss": self.loss, "memory": self.peak_memory(), "compile": self.compiled,
            "cuda_graph": bool(self.graph_step and self.graph_step.graph), "ready_s": self.ready_s,
            "link_bytes_per_s": self.measure_all_reduce(),
        }  # fmt: skip

    def peak_memory(self) -> int | None:
        """Peak bytes, with the warm-up: a CUDA graph's memory is counted only when it is captured. On a CPU, the peak
        resident memory of the process, including torch.
        """
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else hardware.peak_resident_bytes()

    def measure_all_reduce(self) -> float | None:
        """Bytes per second that each process sends in a ring all-reduce, in which each of n processes sends 2 (n − 1) /
        n of the tensor's bytes. None for one process.
        """
        if self.ranks.world == 1:
            return None
        numbers = (ALL_REDUCE_BYTES if self.device.type == "cuda" else ALL_REDUCE_BYTES >> 5) // 4
        tensor, times = torch.zeros(numbers, device=self.device), []
        for _ in range(8):
            began = hardware.synchronized_time(self.device)
            torch.distributed.all_reduce(tensor)
            times.append(hardware.synchronized_time(self.device) - began)
        n = self.ranks.world
        return 2 * (n - 1) / n * 4 * numbers / statistics.median(times[3:])


def sum_losses_and_quarters(evaluator: Evaluator, sum_losses=Evaluator.sum_losses) -> dict:
    results, state = sum_losses(evaluator), evaluator.state
    if state.progress.step == state.run.max_iters and state.model.causal:
        results[QUARTERS] = evaluator.sum_losses_by_quarter()
    return results


def train_child(argv: list[str]) -> int | None:
    """The main function of a child: train.py without drawing curves at evaluations. The last evaluation also has the
    losses by quarter of the window.
    """
    Evaluator.draw, Evaluator.sum_losses = lambda self: None, sum_losses_and_quarters
    return train.main(argv)


def measure_in_turn(file: str, measure: Callable[[BenchmarkTrainer], dict]) -> None:
    """Prepare the config of a JSON file, print `ready`, wait for a line on stdin, which comes when no other child
    measures, and print measure(trainer) as JSON. All other output goes to stderr. Ends without a result if stdin ends.
    """
    results = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        trainer = BenchmarkTrainer(load_run(["--config", file], CONFIGS), Signals())
        trainer.prepare()
        print("ready", file=results, flush=True)
        if sys.stdin.readline():
            print(json.dumps(measure(trainer)), file=results, flush=True)


def speed_child(argv: list[str]) -> None:
    """The main function of a child: measure the training speed of a config."""
    measure_in_turn(argv[0], BenchmarkTrainer.measure_speed)


def step_child(argv: list[str]) -> None:
    """The main function of a child: measure a config's steps and their parts."""
    file, profile = argv
    measure_in_turn(file, lambda trainer: trainer.measure_all(profile == "1"))


def race_child(argv: list[str]) -> None:
    """The main function of a child: train a config without evaluations; measure speed, losses and memory."""
    measure_in_turn(argv[0], measure_whole_run)


def measure_whole_run(trainer: BenchmarkTrainer) -> dict:
    trainer.train()
    lines = [line for line in plot.read_metrics(trainer.metrics.path) if line["step"] > 1]
    return {
        "params": trainer.model.num_params(non_embedding=False),
        "memory": torch.cuda.max_memory_allocated() if trainer.device.type == "cuda" else None,
        "losses": [[line["step"], line["loss"]] for line in lines],
        "step_s": median_step_seconds([[line["step"], line["seconds"]] for line in lines]),
    }


def scale_child(argv: list[str]) -> None:
    """The main function of each process: measure. The first process prints the result."""
    file, steps = argv
    results = sys.stdout
    with contextlib.redirect_stdout(sys.stderr if os.environ.get("RANK", "0") == "0" else open(os.devnull, "w")):
        trainer = BenchmarkTrainer(load_run(["--config", file], CONFIGS), Signals())
        trainer.prepare()
        found = trainer.measure_scaling(int(steps))
        if trainer.ranks.main:
            print(json.dumps(found), file=results, flush=True)
        trainer.close()


def enter_nanogpt_folder(folder: str, words: list[str]) -> None:
    """Change to nanoGPT's folder, and set sys.path and sys.argv as for `python train.py` with these words there."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    for name in ("model", "train"):  # nanoGPT's modules, not this repository's
        sys.modules.pop(name, None)
    sys.argv = ["train.py", *words]


def nanogpt_child(argv: list[str]) -> None:
    """The main function of a child: run the train.py of a folder as its own command line does, then print the peak
    memory.
    """
    folder, *words = argv
    enter_nanogpt_folder(folder, words)
    scope = runpy.run_path("train.py", run_name="__main__")
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    params = sum(p.numel() for p in scope["raw_model"].parameters())
    print("\n" + json.dumps({"memory": memory, "params": params}), flush=True)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "bench.py train",
        "Measure how fast configs train, in train.py's own loop: whole steps and their parts, arithmetic, memory.",
    )
    add = parser.add_argument
    add("--config", nargs="+", default=[], help="config files; file.json:key=value,key=value changes keys of one")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of all")
    add("--profile", action="store_true", help="also list the GPU's kernels, the longest first")
    add(
        "--jobs",
        type=parse_quantity,
        default=1,
        help="configs that are prepared at once; they are measured one after the other (default 1)",
    )
    add("--beside", type=parse_count, default=0, metavar="N", help="measure again beside N more of the same config")
    add("--json", type=Path, help="also write the measurements to this file")
    add("--against", choices=["nanogpt"], help="train tinystar in GPT-2's shape beside nanoGPT's own train.py instead")
    add("--nanogpt_path", type=Path, help="a checkout of nanoGPT")
    add("--steps", type=parse_quantity, default=500, help="steps of each, with --against (default 500)")
    add("--batch_size", type=parse_quantity, default=32, help="batch size of both, with --against (default 32)")
    for name, size in GPT2_SHAPE.items():
        add(f"--{name}", type=parse_quantity, default=size, help=f"of both, with --against (default {size})")
    arguments = parser.parse_args(argv)
    if arguments.beside > MAX_BESIDE:
        raise UserError(f"--beside {arguments.beside:,}: at most {MAX_BESIDE} more processes; give fewer")
    if bool(arguments.config) == bool(arguments.against):
        raise UserError("name configs after --config, or --against nanogpt, one of the two")
    if arguments.against and arguments.nanogpt_path is None:
        raise UserError("--against nanogpt: needs --nanogpt_path, a checkout of nanoGPT")
    if arguments.against and arguments.steps < 2 * LOG_INTERVAL:
        raise UserError(f"--steps {arguments.steps}: speed is measured between two logged steps after the first; give "
                        f"at least {2 * LOG_INTERVAL}")  # fmt: skip
    if not arguments.against:
        names = ["nanogpt_path", "steps", "batch_size", *GPT2_SHAPE]
        parser.refuse_unused(arguments, names, "is about --against nanogpt; change a key of a config with --set")
    return arguments


def run(argv: list[str]) -> int | None:
    """Measure how fast configs train: whole steps and their parts, arithmetic, memory."""
    arguments = parse_arguments(argv)
    if arguments.against:
        names = ("train.py", "model.py", "configurator.py")
        checked = [Input("--nanogpt_path", arguments.nanogpt_path / name) for name in names]
        check_outputs(list_json_output(arguments.json), checked)
        found = train_against_nanogpt(arguments)
    else:
        found = measure_configs(arguments)
    if arguments.json:
        atomic_write(arguments.json, json.dumps(found, indent=1).encode())
        print(f"\nwritten to {arguments.json}")
    return 2 if any("why" in row for row in found if isinstance(row, dict)) else None


def measure_configs(arguments: argparse.Namespace) -> list[dict]:
    """Measure each config in its own child process, and print its row. Returns the rows."""
    common = [parse_assignment(text) for text in arguments.set]
    runs, rows = [load_spec(spec, common) for spec in arguments.config], []
    check_outputs(list_json_output(arguments.json), list_spec_inputs("--config", arguments.config, runs))
    for first in range(0, len(runs), arguments.jobs):
        specs = arguments.config[first : first + arguments.jobs]
        with tempfile.TemporaryDirectory() as folder:
            files = [write_benchmark_config(Path(folder) / str(i), run)
                     for i, run in enumerate(runs[first : first + arguments.jobs])]  # fmt: skip
            words = [[file, str(int(arguments.profile))] for file in files]
            found = child_process.run_in_turns("_step", words, runs[first].device)
            for i, row in enumerate(found if arguments.beside else ()):
                row |= {} if "why" in row else measure_beside(runs[first + i], arguments.beside)
        for spec, row in zip(specs, found, strict=True):
            rows.append({"config": spec, **row})
            print(format_step(rows[-1]), flush=True)
    return rows


def measure_beside(run: Run, others: int) -> dict:
    """{"beside": tokens/s of each of others + 1 processes that train the same config at the same time}; {"why": …} if
    one fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [write_benchmark_config(Path(folder) / str(i), run) for i in range(others + 1)]
        found = child_process.run_together("_speed", [[file] for file in files])
    failed = [row["why"] for row in found if "why" in row]
    return {"why": failed[0]} if failed else {"beside": [row["tokens_per_s"] for row in found]}


def format_step(row: dict) -> str:
    if "why" in row:
        return f"{row['config']}: {row['why']}"
    parts = ", ".join(f"{name} {ms:,.2f}" for name, ms in row["parts_ms"].items())
    how = ", ".join(name for key, name in STEP_KINDS.items() if row[key]) or "neither compiled nor a CUDA graph"
    memory = f"{row['memory'] / 2**30:,.2f} GiB at most" if row["memory"] else "memory not measured"
    lines = [
        f"{row['config']} on {row['machine']}, {row['params']:,} parameters, {row['tokens_per_step']:,} tokens a step",
        f"    {row['tokens_per_s']:,.0f} tokens/s: {row['step_ms']:,.3f} ms a step, {how}; {row['ready_s']:,.0f} s to "
        "get ready",
        f"    one after another, without a CUDA graph: {parts} ms",
        f"    {row['flops_per_s'] / 1e12:,.2f} TFLOP/s, {row['share']:.1%} of the {row['ceiling'] / 1e12:,.1f} of a "
        f"large product; {memory}",
    ]
    if speeds := row.get("beside"):
        mean = statistics.mean(speeds)
        lines.append(f"    {len(speeds)} at once: {mean:,.0f} tokens/s each, {mean / row['tokens_per_s']:.1%} of one")
    shown = row["kernels"][:25]
    lines += [f"    {k['ms']:8.3f} ms {k['launches']:7.1f} × {k['name'][:100]}" for k in shown]
    return "\n".join(lines)


# GPT-2's keys without biases, which nanoGPT omits by default too: both have equally many parameters
GPT2_KEYS_WITHOUT_BIAS = GPT2_KEYS | {"norm_type": "RMSNorm"}
SAME_SCHEDULE = {"learning_rate": 6e-4, "min_lr": 6e-5, "warmup_iters": 100}  # the same for both
NANOGPT_OPTIMIZER = {"use_muon": "false", "weight_decay": 0.1, "weight_decay_schedule": "constant"}
LOG_INTERVAL = 10  # steps between the lines whose times are read


def train_against_nanogpt(arguments: argparse.Namespace) -> dict:
    """Train with both train.py on the same text, one after the other. Returns speed, memory and losses of both."""
    directory = find_nanogpt(arguments.nanogpt_path)
    shape = {name: getattr(arguments, name) for name in GPT2_SHAPE}
    keys = {**SAME_SCHEDULE, "lr_decay_iters": arguments.steps, "batch_size": arguments.batch_size}
    keys |= {**shape, **GPT2_KEYS_WITHOUT_BIAS, **NANOGPT_OPTIMIZER, "arch": "tinystar"}
    words = [f"--{qualify_key(key)}={value}" for key, value in (*keys.items(), *map(parse_assignment, arguments.set))]
    words += ["--cooldown_frac=1", "--optimizer_hyperparams.eps=1e-8"]
    run = load_run(["--config", "tinystar-v0.1-baseline.json", *words], CONFIGS)
    with tempfile.TemporaryDirectory() as folder:
        theirs = run_nanogpt(directory, Path(folder), run, arguments.steps)
        config = write_benchmark_config(Path(folder), run, max_iters=arguments.steps, log_interval=LOG_INTERVAL)
        (ours,) = child_process.run_in_turns("_race", [[config]])
    if "why" in ours:
        raise UserError(f"train.py failed: {ours['why']}")
    found = {"nanogpt": theirs, "strawberry": ours, "tokens_per_step": run.batch_size * shape["block_size"]}
    print(format_race(found))
    return found


def median_step_seconds(times: list[list[float]]) -> float:
    """Seconds per step: the median over the later half of the intervals between (step, seconds) pairs."""
    spans = [(b - a) / (n - m) for (m, a), (n, b) in itertools.pairwise(times)]
    return statistics.median(spans[len(spans) // 2 :])


def find_nanogpt(path: Path) -> Path:
    """The absolute path of a checkout. Raises UserError if a file of its that training needs is not there, or if its
    model.py has no GPT."""
    directory, mend = path.resolve(), "name a checkout of nanoGPT: git clone https://github.com/karpathy/nanoGPT"
    for name in ("train.py", "model.py", "configurator.py"):
        if not (directory / name).is_file():
            raise UserError(f"--nanogpt_path {path}: there is no {directory / name}; {mend}")
    if b"class GPT(" not in (directory / "model.py").read_bytes():
        raise UserError(f"--nanogpt_path {path}: its model.py has no class GPT; {mend}")
    return directory


def make_nanogpt_folder(directory: Path, folder: Path, splits: dict[str, np.ndarray], vocab_size: int) -> None:
    """Fill a folder in which nanoGPT's train.py can run: links to its files, and data/same with the tokens of the
    splits "train" and "val" in its format.
    """
    for name in ("train.py", "model.py", "configurator.py", "config"):
        if (directory / name).exists():
            os.symlink(directory / name, folder / name)
    data = folder / "data" / "same"
    data.mkdir(parents=True)
    for name, tokens in splits.items():
        tokens.astype(np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))


def read_splits(corpus: Corpus) -> dict[str, np.ndarray]:
    """The tokens of the splits that nanoGPT names "train" and "val"."""
    return {name: np.concatenate([file.tokens[start:stop] for file, start, stop in split.pieces])
            for name, split in (("train", corpus.train), ("val", corpus.val))}  # fmt: skip


def run_nanogpt(directory: Path, folder: Path, run: Run, steps: int) -> dict:
    """Run nanoGPT's own train.py in a folder of links to its files, on the same tokens in its format. Raises UserError
    if it fails.
    """
    hyper, device = run.model_hyperparams, choose_device(run.device).type
    splits = read_splits(Corpus(run.dataset, None, hyper.block_size))
    make_nanogpt_folder(directory, folder, splits, hyper.vocab_size)
    keys = {name: getattr(hyper, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    keys |= {name: getattr(run, name) for name in (*SAME_SCHEDULE, "lr_decay_iters", "batch_size")}
    keys |= {"dataset": "same", "gradient_accumulation_steps": 1, "max_iters": steps, "log_interval": LOG_INTERVAL,
             "eval_interval": 10**9, "eval_iters": 1, "always_save_checkpoint": False, "device": device,
             "compile": setup.should_compile(run, torch.device(device))}  # fmt: skip
    if device == "cpu":
        keys["dtype"] = "float32"
    words = [f"--{key}={value}" for key, value in keys.items()]
    command = child_process.make_command("_nanogpt", str(folder), *words)
    times, losses, memory, params = [], [], None, None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1) as child:
        tail = collections.deque(maxlen=20)
        for line in child.stdout:
            tail.append(line)
            if found := re.match(r"iter (\d+): loss ([\d.]+)", line):
                times.append([int(found[1]), time.perf_counter()])
                losses.append([int(found[1]), float(found[2])])
            elif line.startswith("{"):
                memory, params = json.loads(line).values()
    if child.returncode:
        why = child_process.parse_result(list(tail), child.returncode)["why"]
        raise UserError(f"nanoGPT's train.py failed: {why}; run it by itself in {directory} to see more")
    return {"params": params, "memory": memory, "losses": losses, "step_s": median_step_seconds(times[1:])}


def format_race(found: dict) -> str:
    tokens, lines = found["tokens_per_step"], []
    for name in ("nanogpt", "strawberry"):
        row = found[name]
        memory = f", {row['memory'] / 2**30:,.2f} GiB" if row["memory"] else ""
        lines.append(f"{name:<11} {tokens / row['step_s']:>10,.0f} tokens/s, {1e3 * row['step_s']:,.2f} ms a step"
                     f"{memory}, {row['params']:,} parameters")  # fmt: skip
    ratio = found["nanogpt"]["step_s"] / found["strawberry"]["step_s"]
    lines.append(f"{ratio:.3f} times as fast; mean training losses of 50 steps up to each step:")
    last = found["strawberry"]["losses"][-1][0]
    for step in range(last // 5, last + 1, max(last // 5, 1)):
        means = [statistics.fmean([loss for n, loss in found[name]["losses"] if step - 50 < n <= step] or [math.nan])
                 for name in ("nanogpt", "strawberry")]  # fmt: skip
        lines.append(f"    step {step:>5}: {means[0]:.3f} and {means[1]:.3f}")
    return "\n".join(lines)
