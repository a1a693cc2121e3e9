"""compare's training runs: the learning rate grid of each config, then its other seeds. Finished runs are not repeated.
"""

import ast
import dataclasses
import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from strawberry.bench import child_process, hardware
from strawberry.bench.common import FIXED_VALUES, ROOT, Entry
from strawberry.common import UserError, atomic_write
from strawberry.config import to_dict
from strawberry.training import plot
from strawberry.training.evaluation import QUARTERS
from strawberry.training.metrics import METRICS

EVALUATIONS = 20  # in each run: the number of points of its curve
MIN_LR = 0.1  # final learning rate, as a share of the highest
RESULT_FORMAT = 2  # format of the files in runs/; files of another format are not read
USE_MUON = {"adamw": False, "muon": True}  # name on the command line → the value of use_muon
OPTIMIZERS = {False: "AdamW", True: "Muon"}  # the value of use_muon → the name that tables show
OWN_RATES = ("muon_lr", "embedding_lr", "head_lr", "scalar_lr")  # of groups of parameters
BENCH = ROOT / "strawberry" / "bench"  # does not affect the results
CODE_GLOBS = ("model.py", "optimizer.py", "train.py", "strawberry/**/*.py")  # the code that affects a result


@dataclass
class Plan:
    """The settings that all runs share."""

    steps: int
    tokens_per_step: int
    warmup: float  # share of the steps
    cooldown: float
    lrs: list[float]
    seeds: int
    jobs: int
    device: torch.device
    out: Path
    data: dict[str, str]  # fingerprints of the data, the encoder and the code
    optimizers: tuple[str, ...] = ()  # keys of USE_MUON to choose from; none: each config has its own
    muon_lrs: list[float] | None = None  # learning rates to choose from with Muon, instead of `lrs`

    def list_rates(self, muon: bool) -> list[float]:
        return self.muon_lrs if muon and self.muon_lrs else self.lrs

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


@dataclass(frozen=True)
class Trial:
    """One training run."""

    label: str
    lr: float
    seed: int
    config: dict  # the config that train.py reads, without the paths
    key: str  # hash of all that the result depends on; the name of its file

    def __str__(self) -> str:
        return f"{self.label}, {OPTIMIZERS[uses_muon(self.config)]}, lr {self.lr:g}, seed {self.seed}"


def uses_muon(config: dict) -> bool:
    return config["optimizer_hyperparams"]["use_muon"]


def dump_without_comments(source: str) -> str:
    """The syntax tree of a Python file, without comments, docstrings and layout, which do not affect a result."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:]
    return ast.dump(tree)


def hash_code() -> str:
    """SHA-256 of the code that affects training."""
    paths = sorted(path for name in CODE_GLOBS for path in ROOT.glob(name) if BENCH not in path.parents)
    texts = [dump_without_comments(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def hash_json(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def scale_own_rates(run: dict, scale: float) -> None:
    """Multiply the rates that groups of parameters have of their own, so that they keep their proportion to the
    learning rate."""
    own = run["optimizer_hyperparams"]
    own |= {name: own[name] * scale for name in OWN_RATES if own[name] is not None}


def make_trial(entry: Entry, plan: Plan, lr: float, seed: int, muon: bool | None = None) -> Trial:
    """The training run of a config with one learning rate and one seed. `muon` replaces its use_muon."""
    run, steps = to_dict(entry.run), plan.steps
    if muon is not None:
        run["optimizer_hyperparams"]["use_muon"] = muon
    every = max(1, steps // EVALUATIONS)
    if every >= 5:
        every -= every % 5  # so that each evaluation coincides with a logged line, which has the seconds
    scale_own_rates(run, lr / run["learning_rate"])
    run |= FIXED_VALUES | {
        "max_iters": steps, "lr_decay_iters": steps, "warmup_iters": round(plan.warmup * steps),
        "cooldown_frac": plan.cooldown, "learning_rate": lr, "min_lr": MIN_LR * lr, "seed": seed,
        "device": plan.device.type, "eval_interval": every, "log_interval": max(1, every // 5),
    }  # fmt: skip
    paths = ("checkpoints", "model_path", "img_path", "encoder_path")
    hashed = {key: value for key, value in run.items() if key not in paths}
    hashed["dataset"] = {key: value for key, value in run["dataset"].items() if key != "path"}
    data = {name: plan.data[name] for name in ("dataset", "encoder")}
    return Trial(entry.label, lr, seed, run, f"{hash_json([RESULT_FORMAT, hashed, data])}-{plan.data['code'][:8]}")


def read_result(plan: Plan, trial: Trial) -> dict | None:
    """The result that an earlier command wrote, or None."""
    path = plan.runs / f"{trial.key}.json"
    return read_result_file(path) if path.exists() else None


def read_result_file(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, and its run is repeated") from error


def strict_bpb(line: dict) -> float | None:
    """Validation bits per byte of an evaluation, corrected for a model that sees the future.

    The evaluation of such a model also has the strict loss of some positions and the plain loss of the same positions.
    Their relative difference, the gain from seeing the future, is subtracted.
    """
    bpb = line.get("val_bpb")
    if bpb is None or line.get("strict_loss") is None:
        return bpb
    return bpb * (1 + (line["strict_loss"] - line["plain_at_strict"]) / line["val_loss"])


def make_result(trial: Trial, lines: list[dict], diverged: bool) -> dict:
    """The result of a finished run, from the lines of its metrics.jsonl. bpb is None if it diverged."""
    points = {line["step"]: line for line in lines if "val_bpb" in line}
    curve = [[line["tokens"], strict_bpb(line)] for _, line in sorted(points.items())]
    bpb = curve[-1][1] if curve and not diverged else None
    seconds = max((line["seconds"] for line in lines if "seconds" in line), default=None)
    quarters = points[max(points)].get(QUARTERS) if points and not diverged else None
    return {"label": trial.label, "lr": trial.lr, "seed": trial.seed, "bpb": bpb, "seconds_in_steps": seconds,
            "quarters": quarters, "curve": curve, "torch": torch.__version__, "run": trial.config}  # fmt: skip


def write_trial_config(folder: Path, trial: Trial, **changes) -> Path:
    """Write the JSON config that a child reads. All output paths in it are in the folder."""
    checkpoints = {"path": str(folder / "ck"), "interval": trial.config["max_iters"], "create_checkpoints": True,
                   "keep": 1}  # fmt: skip
    paths = {"checkpoints": checkpoints, "model_path": str(folder / "model"), "img_path": str(folder)}
    atomic_write(folder / "config.json", json.dumps(trial.config | paths | changes, indent=1).encode())
    return folder / "config.json"


class TrialPool(child_process.RunPool):
    """The running children of compare."""

    def __init__(self, plan: Plan):
        super().__init__(plan.runs, plan.jobs, plan.device.type)
        self.plan = plan

    def start(self, trial: Trial) -> None:
        folder = self.folder(trial)
        config = write_trial_config(folder, trial)
        resume = ["--init_from=resume"] if any((folder / "ck").glob("step_*")) else []
        self.start_child(trial, child_process.make_command("_train", "--config", str(config), *resume))

    def collect_finished(self) -> Iterator[tuple[Trial, dict | None, str]]:
        """Write the results of the children that have ended since the last call. Yields (trial, result or None, reason
        for failure).
        """
        for trial, code in self.pop_ended():
            lines = self.read_metrics(trial)
            evaluated = any(line["step"] == self.plan.steps and "val_bpb" in line for line in lines)
            done = code == 0 and evaluated
            if done or code == 3:  # train.py's exit code for a loss that is not finite
                result = make_result(trial, lines, diverged=not done)
                atomic_write(self.runs / f"{trial.key}.json", json.dumps(result).encode())
                shutil.rmtree(self.folder(trial), ignore_errors=True)
                yield trial, result, ""
            else:
                yield trial, None, self.describe_failure(trial, code)

    def read_metrics(self, trial: Trial) -> list[dict]:
        path = self.folder(trial) / "ck" / METRICS
        return plot.read_metrics(path) if path.exists() else []

    def count_steps(self) -> int:
        """The steps that the running children have logged."""
        lines = [self.read_metrics(trial) for trial, _ in self.running.values()]
        return sum(metrics[-1]["step"] for metrics in lines if metrics)


def make_speed_trial(entry: Entry, plan: Plan) -> Trial:
    """A trial whose key hashes all that its speed depends on: the run without its learning rate and seed, the machine
    and torch's version.
    """
    trial = make_trial(entry, plan, entry.run.learning_rate, 1)
    return dataclasses.replace(
        trial, key=f"speed-{hash_json([trial.key, hardware.describe_device(plan.device), torch.__version__])}"
    )


def measure_speeds(entries: list[Entry], plan: Plan) -> dict[str, dict]:
    """label → tokens/s and memory of each config, alone on its device. --jobs children prepare at the same time, with
    compilation, then measure one at a time; on a host of several GPUs, one at a time on each of them. A config that
    fails gets its `failure` set.
    """
    trials = {entry.label: make_speed_trial(entry, plan) for entry in entries}
    found = {label: result for label, trial in trials.items() if (result := read_result(plan, trial))}
    missing = [entry for entry in entries if entry.label not in found]
    for first in range(0, len(missing), plan.jobs):
        group = missing[first : first + plan.jobs]
        found |= measure_speed_group({entry.label: trials[entry.label] for entry in group}, plan)
        for entry in group:
            folder = plan.runs / trials[entry.label].key
            if entry.label in found:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                entry.failure = f"{child_process.read_failure(folder / 'log.txt')}; see {folder}/log.txt"
                tqdm.write(f"{entry.label}: failed: {entry.failure}")
    return found


def measure_speed_group(trials: dict[str, Trial], plan: Plan) -> dict[str, dict]:
    children, found, gpus = {}, {}, child_process.GpuPool(plan.device.type)
    try:
        for label, trial in trials.items():
            folder = plan.runs / trial.key
            none = {"path": str(folder / "ck"), "create_checkpoints": False}
            command = child_process.make_command("_speed", str(write_trial_config(folder, trial, checkpoints=none)))
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            children[label] = child_process.start(command, folder / "log.txt", plan.jobs, gpus, **pipes)
        ready = {label: child for label, child in children.items() if child.stdout.readline() == "ready\n"}
        labels = {child.pid: label for label, child in ready.items()}
        for turn in gpus.list_turns(list(ready.values())):
            child_process.send_go(turn)
            for child in turn:
                answer, label = child.communicate()[0], labels[child.pid]
                if child.returncode == 0:
                    found[label] = write_speed(json.loads(answer), trials[label], plan)
    finally:
        for child in children.values():
            child.kill()
            child.communicate()
    return found


def write_speed(measured: dict, trial: Trial, plan: Plan) -> dict:
    """Write and print what a child has measured. Returns it with its label and the machine."""
    found = measured | {"label": trial.label, "machine": hardware.describe_device(plan.device)}
    atomic_write(plan.runs / f"{trial.key}.json", json.dumps(found).encode())
    tqdm.write(f"{trial.label}: {found['tokens_per_s']:,.0f} tokens/s alone on the device")
    return found


class Sweep:
    """The schedule of the runs: the learning rate grid of each config, then its other seeds, without finished runs."""

    def __init__(self, entries: list[Entry], plan: Plan):
        self.entries, self.plan = entries, plan
        chosen_from = [USE_MUON[name] for name in plan.optimizers]
        self.grid = {
            entry.label: [make_trial(entry, plan, lr, 1, muon)
                          for muon in chosen_from or [entry.run.optimizer_hyperparams.use_muon]
                          for lr in plan.list_rates(muon)]
            for entry in entries
        }  # fmt: skip
        self.results: dict[str, dict] = {}
        self.speeds: dict[str, dict] = {}  # label → what measure_speeds has found
        self.pool = TrialPool(plan)

    def find_best(self, entry: Entry) -> tuple[float, bool] | None:
        """(learning rate, use_muon) of the grid's run with the lowest bits per byte; the lowest learning rate if all
        diverged; None until the grid is done.
        """
        found = [self.results.get(trial.key) for trial in self.grid[entry.label]]
        if None in found:
            return None
        best = min(found, key=lambda result: (math.inf if result["bpb"] is None else result["bpb"], result["lr"]))
        return best["lr"], uses_muon(best["run"])

    def list_seed_trials(self, entry: Entry) -> list[Trial]:
        """The runs that the table averages: the best of the grid, with seed 1, and the other seeds."""
        best = self.find_best(entry)
        seeds = range(1, self.plan.seeds + 1) if best is not None else ()
        return [make_trial(entry, self.plan, best[0], seed, best[1]) for seed in seeds]

    def choose_optimizers(self) -> list[Entry]:
        """Give each config the optimizer of its best run. Returns the configs that had another."""
        changed = []
        for entry in self.entries:
            best, own = self.find_best(entry), entry.run.optimizer_hyperparams
            if best is not None and best[1] != own.use_muon:
                entry.run = dataclasses.replace(
                    entry.run, optimizer_hyperparams=dataclasses.replace(own, use_muon=best[1])
                )
                changed.append(entry)
        return changed

    def has_result(self, trial: Trial) -> bool:
        """Whether the trial has a result, from this command or an earlier one."""
        if trial.key not in self.results and (result := read_result(self.plan, trial)):
            self.results[trial.key] = result
        return trial.key in self.results

    def list_pending(self) -> list[Trial]:
        """The trials that can start now, those of the slowest models first, so that no long one is left at the end."""
        speeds = {label: speed["tokens_per_s"] for label, speed in self.speeds.items()}
        entries = sorted(self.entries, key=lambda entry: speeds.get(entry.label, math.inf))
        found = []
        for entry in (entry for entry in entries if not entry.failure):
            grid = [trial for trial in self.grid[entry.label] if not self.has_result(trial)]
            found += grid or [trial for trial in self.list_seed_trials(entry) if not self.has_result(trial)]
        return [trial for trial in found if trial.key not in self.pool.running]

    def count_done(self) -> int:
        """The number of results, from this command and earlier ones."""
        for entry in self.entries:
            grid = [self.has_result(trial) for trial in self.grid[entry.label]]
            for trial in self.list_seed_trials(entry) if all(grid) else ():
                self.has_result(trial)
        return len(self.results)

    @property
    def total(self) -> int:
        return sum(len(trials) + self.plan.seeds - 1 for trials in self.grid.values())

    def run(self) -> None:
        """Train all runs without a result. A run that fails is reported and skipped; the others continue."""
        style = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        total, done = self.total * self.plan.steps, len(self.results) * self.plan.steps
        every = 1 if sys.stderr.isatty() else 30  # seconds
        with tqdm(total=total, initial=done, bar_format=style, dynamic_ncols=True, mininterval=every) as bar:
            try:
                while (waiting := self.list_pending()) or self.pool.running:
                    for trial in waiting[: self.pool.n_free]:
                        self.pool.start(trial)
                    while not self.collect():
                        self.update_bar(bar)
                        time.sleep(child_process.POLL_SECONDS)
                self.update_bar(bar)
            except KeyboardInterrupt:
                self.pool.stop()
                self.collect(stopped=True)
                raise

    def collect(self, stopped: bool = False) -> int:
        """Store the results of finished runs. Returns the number of runs that ended. If `stopped`, a run without a
        result is not a failure.
        """
        finished = list(self.pool.collect_finished())
        for trial, result, why in finished:
            if result is None and stopped:
                continue
            if result is None:
                entry = next(entry for entry in self.entries if entry.label == trial.label)
                entry.failure = why
                tqdm.write(f"{trial}: failed: {why}")
            else:
                self.results[trial.key] = result
                bpb = "diverged" if result["bpb"] is None else f"{result['bpb']:.4f} bits per byte"
                tqdm.write(f"{trial}: {bpb}")
        return len(finished)

    def update_bar(self, bar: tqdm) -> None:
        done = len(self.results)
        bar.set_postfix_str(f"{done}/{self.total} runs done, {len(self.pool.running)} running", refresh=False)
        bar.update(done * self.plan.steps + self.pool.count_steps() - bar.n)
