"""`bench.py speedrun`: nanoGPT's best validation loss, and our time to the same loss.

Both train on the same tokens, each by its own train.py in a child process, and the same held-out windows judge both:
see strawberry/bench/speedrun_child.py. A finished run is a small file in --out/runs, and is not repeated.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

from strawberry.argument_parser import ArgumentParser
from strawberry.bench import child_process
from strawberry.bench.common import (
    FIXED_VALUES,
    MANAGED_KEYS,
    check_results,
    format_command,
    list_spec_inputs,
    parse_assignment,
    parse_count,
    parse_learning_rates,
    parse_quantity,
    split_spec,
)
from strawberry.bench.speedrun_plan import (
    KINDS,
    Plan,
    Trial,
    describe_plan,
    make_nanogpt_trial,
    make_plan,
    make_trial,
)
from strawberry.bench.speedrun_report import (
    NANOGPT,
    STRAWBERRY,
    find_best_point,
    find_reached_point,
    make_row,
    write_speedrun,
)
from strawberry.bench.sweep import read_result_file
from strawberry.bench.train import find_nanogpt
from strawberry.common import UserError, atomic_write
from strawberry.outputs import Input, encoder_inputs
from strawberry.training import setup

ROLES = {NANOGPT: "_speedrun_nanogpt", STRAWBERRY: "_speedrun_strawberry"}
# Keys of nanoGPT that the command sets itself, and the option for each.
NANOGPT_KEYS = {"learning_rate": "--nanogpt_lrs", "min_lr": "--nanogpt_lrs", "dataset": "--data", "device": "--device",
                "eval_interval": "--evaluations", "eval_iters": "--evaluations", "max_iters": "--nanogpt_steps",
                "lr_decay_iters": "--nanogpt_steps"}  # fmt: skip
NANOGPT_FIXED = ("init_from", "out_dir", "eval_only", "always_save_checkpoint", "wandb_log")
STRAWBERRY_KEYS = {key: option for key, option in MANAGED_KEYS.items()
                   if key not in ("learning_rate", "min_lr", "warmup_iters", "cooldown_frac")}  # fmt: skip
STRAWBERRY_KEYS |= {"max_iters": "--steps", "lr_decay_iters": "--steps", "eval_interval": "--evaluations",
                    "log_interval": "--evaluations", "dataset.path": "--data", "encoder_path": "--encoder",
                    "dataset.data_division": "--data_division", "dataset.load_from_file": "--data",
                    "model_hyperparams.block_size": "--nanogpt_set block_size=…"}  # fmt: skip


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "bench.py speedrun",
        "Train with nanoGPT's own train.py, and a config until its validation loss is as low as nanoGPT's best. After "
        "an interruption, the same command continues.",
    )
    add = parser.add_argument
    add("--nanogpt_path", type=Path, required=True, help="a checkout of nanoGPT")
    add("--kind", choices=list(KINDS), default="char", help="nanoGPT's configuration: train_shakespeare_char, or GPT-2 "
        "124M at 32 × 1,024 tokens a step (default char)")  # fmt: skip
    add("--config", required=True, help="our config; file.json:key=value,key=value changes its keys")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of our config; may be repeated")
    add("--data", type=Path, required=True, help="with char a text file, with gpt2 a token file of prepare.py")
    add("--encoder", help="encoder of the token file, with gpt2")
    add("--data_division", type=float, help="share of the tokens for training (default 0.9 for char, 0.95 for gpt2)")
    add("--steps", type=parse_quantity, help="maximum number of our steps; our learning rate falls over them (default "
        "0.4 of nanoGPT's)")  # fmt: skip
    add("--lrs", help="our learning rates; the best with seed 1 is chosen (default: the config's)")
    add("--nanogpt_lrs", help="nanoGPT's learning rates; the best with seed 1 is chosen (default: its own with char, "
        "3e-4,6e-4,1e-3 with gpt2)")  # fmt: skip
    add("--nanogpt_steps", type=parse_quantity, help="nanoGPT's steps (default 5000 with char, 1500 with gpt2)")
    add("--nanogpt_set", action="append", default=[], metavar="KEY=VALUE", help="a key of nanoGPT; may be repeated")
    add("--seeds", type=parse_count, default=3, help="runs of each side with its best learning rate (default 3)")
    add("--evaluations", type=parse_count, default=50, help="number of evaluations in each run (default 50)")
    add("--eval_tokens", type=parse_quantity, default=500_000, help="maximum number of held-out tokens of an "
        "evaluation (default 500k)")  # fmt: skip
    add("--jobs", type=parse_count, default=1, help="runs at once, each on a GPU of its own (default 1)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: cuda, else cpu")
    add("--out", default="img/speedrun", type=Path, help="directory of the results (default img/speedrun)")
    arguments = parser.parse_args(argv)
    for name in ("lrs", "nanogpt_lrs"):
        text = getattr(arguments, name)
        setattr(arguments, name, None if text is None else parse_learning_rates(text, f"--{name}"))
    if arguments.kind == "gpt2" and arguments.encoder is None:
        raise UserError("--kind gpt2: needs --encoder, the encoder of the token file --data")
    if arguments.kind == "char" and arguments.encoder is not None:
        raise UserError(f"--encoder {arguments.encoder}: --kind char has a token for each character; leave it out")
    if arguments.data_division is None:
        arguments.data_division = KINDS[arguments.kind].division
    if not 0 < arguments.data_division < 1:
        raise UserError(f"--data_division {arguments.data_division}: is a share of the tokens, between 0 and 1")
    return arguments


def check_keys(arguments: argparse.Namespace) -> None:
    """Raises UserError for keys of either side that the command sets itself."""
    _, changes = split_spec(arguments.config)
    for text in [*arguments.set, *changes]:
        key, _ = parse_assignment(text)
        if key in STRAWBERRY_KEYS:
            raise UserError(f"{text!r}: speedrun sets {key} itself; use {STRAWBERRY_KEYS[key]}")
        if key in FIXED_VALUES or key.startswith("checkpoints."):
            raise UserError(f"{text!r}: speedrun sets {key} itself; leave it out")
    for text in arguments.nanogpt_set:
        key, equals, _ = text.partition("=")
        if not equals:
            raise UserError(f"--nanogpt_set {text}: write key=value")
        if key in NANOGPT_KEYS:
            raise UserError(f"--nanogpt_set {text}: speedrun sets {key} itself; use {NANOGPT_KEYS[key]}")
        if key in NANOGPT_FIXED:
            raise UserError(f"--nanogpt_set {text}: speedrun sets {key} itself; leave it out")


# ---- the runs -------------------------------------------------------------------------------------------------------


def rank_nanogpt(result: dict) -> float:
    """Its best loss: the lower, the better."""
    point = find_best_point(result)
    return math.inf if point is None else point[3]


def rank_strawberry(result: dict, target: float) -> tuple[float, float]:
    """Its seconds to the target, then its best loss: the lower, the better."""
    point = find_reached_point(result, target)
    return math.inf if point is None else point[2], rank_nanogpt(result)


class Pool(child_process.RunPool):
    """The running children of speedrun, each on a separate GPU."""

    def __init__(self, plan: Plan):
        super().__init__(plan.runs, plan.arguments.jobs, plan.device.type)
        self.plan = plan

    def start(self, trial: Trial) -> None:
        """Start a run. Its caches of compiled code are empty, so that each run's compilation takes as long."""
        folder = self.folder(trial)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        job = trial.job | {"windows": str(self.plan.work / "windows.npy"), "folder": str(self.plan.work / "nanogpt"),
                           "result": str((self.plan.runs / f"{trial.key}.json").absolute())}  # fmt: skip
        if trial.side == STRAWBERRY:
            job["config"] = self.write_config(folder, job.pop("run"))
        atomic_write(folder / "job.json", json.dumps(job).encode())
        extra = {"TORCHINDUCTOR_CACHE_DIR": str((folder / "inductor").absolute()),
                 "TRITON_CACHE_DIR": str((folder / "triton").absolute())}  # fmt: skip
        command = child_process.make_command(ROLES[trial.side], str((folder / "job.json").absolute()))
        self.start_child(trial, command, extra)

    def write_config(self, folder: Path, run: dict) -> str:
        none = {"path": str(folder / "ck"), "create_checkpoints": False}
        paths = {"checkpoints": none, "model_path": str(folder / "model"), "img_path": None}
        atomic_write(folder / "config.json", json.dumps(run | paths).encode())
        return str((folder / "config.json").absolute())

    def collect_finished(self) -> list[tuple[Trial, str]]:
        """(trial, reason of its failure or "") of the children that have ended since the last call."""
        finished = []
        for trial, code in self.pop_ended():
            why = ""
            if code == 0 and (self.runs / f"{trial.key}.json").exists():
                shutil.rmtree(self.folder(trial), ignore_errors=True)
            else:
                why = self.describe_failure(trial, code)
            finished.append((trial, why))
        return finished


class Speedrun:
    """The schedule of the runs: nanoGPT's learning rates with seed 1, then its other seeds, and our runs to its losses;
    without finished runs."""

    def __init__(self, plan: Plan):
        self.plan, self.pool = plan, Pool(plan)
        self.results: dict[str, dict] = {}
        self.failures: dict[str, str] = {}
        self.nanogpt_grid = [make_nanogpt_trial(plan, lr, 1) for lr in plan.nanogpt_lrs]

    def get_result(self, trial: Trial) -> dict | None:
        """The result of a trial, from this command or an earlier one."""
        path = self.plan.runs / f"{trial.key}.json"
        if trial.key not in self.results and path.exists():
            self.results[trial.key] = read_result_file(path)
        return self.results.get(trial.key)

    def find_best(self, grid: list[Trial], rank) -> Trial | None:
        """The trial of a grid with the lowest rank; None until all of it is done."""
        results = [self.get_result(trial) for trial in grid]
        if not grid or None in results:
            return None
        ranks = [rank(result) for result in results]
        return grid[ranks.index(min(ranks))]

    def list_nanogpt_seeds(self) -> list[Trial]:
        """nanoGPT's runs that the table averages; none until its learning rate is chosen."""
        best = self.find_best(self.nanogpt_grid, rank_nanogpt)
        return [make_nanogpt_trial(self.plan, best.lr, seed) for seed in self.seeds] if best else []

    @property
    def seeds(self) -> range:
        return range(1, self.plan.arguments.seeds + 1)

    def find_target(self, seed: int) -> float | None:
        """nanoGPT's best loss with that seed; None until its run is done. Raises UserError if all losses diverged."""
        trials = self.list_nanogpt_seeds()
        result = self.get_result(trials[seed - 1]) if trials else None
        if result is None:
            return None
        point = find_best_point(result)
        if point is None:
            raise UserError(f"{trials[seed - 1]}: no validation loss is finite; give lower --nanogpt_lrs")
        return point[3]

    def list_grid(self) -> list[Trial]:
        """Our runs with seed 1; none until the loss that they must reach is known."""
        target = self.find_target(1)
        return [] if target is None else [make_trial(self.plan, lr, 1, target) for lr in self.plan.lrs]

    def list_seeds(self) -> list[Trial]:
        """Our runs that the table averages, as far as the losses that they must reach are known."""
        target = self.find_target(1)
        best = self.find_best(self.list_grid(), lambda result: rank_strawberry(result, target))
        targets = {seed: self.find_target(seed) for seed in self.seeds} if best else {}
        return [make_trial(self.plan, best.lr, seed, loss) for seed, loss in targets.items() if loss is not None]

    def list_pending(self) -> list[Trial]:
        """The runs that can start now."""
        known = [*self.nanogpt_grid, *self.list_nanogpt_seeds(), *self.list_grid(), *self.list_seeds()]
        waiting = {t.key: t for t in known if self.get_result(t) is None and t.key not in self.failures}
        return [trial for key, trial in waiting.items() if key not in self.pool.running]

    @property
    def total(self) -> int:
        return len(self.nanogpt_grid) + len(self.plan.lrs) + 2 * (self.plan.arguments.seeds - 1)

    def run(self) -> None:
        """Train all runs without a result. A run that fails is reported; those that do not need it continue."""
        try:
            while (waiting := self.list_pending()) or self.pool.running:
                for trial in waiting[: self.pool.n_free]:
                    print(f"{trial}: started", flush=True)
                    self.pool.start(trial)
                while not (finished := self.pool.collect_finished()):
                    time.sleep(child_process.POLL_SECONDS)
                for trial, why in finished:
                    self.failures |= {trial.key: why} if why else {}
                    print(f"{trial}: {f'failed: {why}' if why else self.describe(trial)}", flush=True)
        except BaseException:
            self.pool.stop()
            self.pool.collect_finished()
            raise

    def list_rows(self) -> list[dict]:
        """The finished runs of all seeds, as plain data."""
        spec, rows = self.plan.arguments.config, []
        for trial in self.list_nanogpt_seeds():
            rows.append(self.make_row(trial, self.find_target(trial.seed), NANOGPT) | self.get_sizes(NANOGPT))
        for trial in self.list_seeds():
            rows.append(self.make_row(trial, trial.job["target"], spec) | self.get_sizes(STRAWBERRY))
        return rows

    def list_grid_rows(self) -> list[dict]:
        rows = []
        for trial in self.nanogpt_grid:
            rows.append(self.make_row(trial, rank_nanogpt(self.get_result(trial)), NANOGPT))
        return rows + [self.make_row(trial, trial.job["target"], self.plan.arguments.config)
                       for trial in self.list_grid()]  # fmt: skip

    def make_row(self, trial: Trial, target: float, config: str) -> dict:
        return make_row(trial.side, config, trial.lr, trial.seed, target, self.get_result(trial))

    def get_sizes(self, side: str) -> dict:
        sizes = self.plan.nanogpt if side == NANOGPT else self.plan.ours
        return {key: sizes[key] for key in ("params", "params_total")}

    def describe(self, trial: Trial) -> str:
        result = self.get_result(trial)
        best = find_best_point(result)
        if best is None:
            return "no validation loss was finite"
        if trial.side == NANOGPT or (reached := find_reached_point(result, trial.job["target"])) is None:
            text = f"best validation loss {best[3]:.4f} at step {best[0]:,}, after {best[2]:,.1f} s in steps"
            missed = "" if trial.side == NANOGPT else f"{best[3] - trial.job['target']:.4f} above nanoGPT's: "
            return missed + text
        return f"validation loss {reached[3]:.4f} at step {reached[0]:,}, after {reached[2]:,.1f} s in steps"


def run(argv: list[str]) -> int | None:
    """Train to nanoGPT's best validation loss: seconds and tokens of nanoGPT's train.py, and of a config."""
    arguments = parse_arguments(argv)
    check_keys(arguments)
    find_nanogpt(arguments.nanogpt_path)
    names = ("train.py", "model.py", "configurator.py")
    checked = [Input("--nanogpt_path", arguments.nanogpt_path / name) for name in names]
    checked += [Input("--data", arguments.data), *(encoder_inputs("--encoder", arguments.encoder or "chars:"))]
    checked += list_spec_inputs("--config", [arguments.config])
    check_results("speedrun", arguments.out, argv, checked)
    runs = arguments.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs, prefix="work-") as folder:
        speedrun = Speedrun(make_plan(arguments, Path(folder).absolute()))
        print("\n".join(describe_plan(speedrun.plan)))
        done = [trial for trial in speedrun.nanogpt_grid if speedrun.get_result(trial)]
        known = f"{len(done)} of nanoGPT's are done already"
        print(f"{speedrun.total} runs, {arguments.jobs} at once; {known}\n", flush=True)
        try:
            speedrun.run()
        except KeyboardInterrupt:
            again = format_command(setup.relative_path(sys.executable), "speedrun", argv)
            print(f"\ninterrupted: finished runs are kept in {runs}; to go on:\n    {again}", flush=True)
            return 130
    if speedrun.failures:
        raise UserError(f"{len(speedrun.failures)} runs failed: {'; '.join(speedrun.failures.values())}")
    rows, grid = speedrun.list_rows(), speedrun.list_grid_rows()
    command = format_command("python", "speedrun", argv)
    print("\n" + write_speedrun(arguments.out, rows, grid, describe_plan(speedrun.plan), command))
    print(f"\nthe table and the picture are in {arguments.out}")
    return None
