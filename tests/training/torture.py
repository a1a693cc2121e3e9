"""What the tests of survival share: a tiny run, children that can be killed, and the counts of `make torture`.

Children are forked from a server that has imported all that a run does, so that a hundred cost no hundred imports.
`python tests/training/torture.py` runs tests/training/test_survival.py with full counts and prints the table of
docs/measurements.md.
"""

import contextlib
import ctypes
import faulthandler
import functools
import gc
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import forks
from runs import ALPHABET, write_corpus

from strawberry import startup
from strawberry.common import run_cli
from strawberry.training import checkpoint, plot
from strawberry.training.checkpoint import find_latest
from strawberry.training.step import TrainStep

with contextlib.suppress(ImportError):  # on Windows there is none, and the tests that need it are skipped
    import resource

ROOT = Path(__file__).resolve().parents[2]
SURVIVAL = "tests/training/test_survival.py"
MODEL = {
    "vocab_size": 44, "block_size": 16, "n_layer": 1, "r_layer": 1, "n_head": 2, "n_embd": 16, "n_qkv": 16,
    "retention_chunk": 4, "n_experts": 2, "a_experts": 1,
}  # fmt: skip


# ---- a tiny run ----------------------------------------------------------------------------------------------------


def write_run(path="run.json", **changes):
    """A config whose steps take milliseconds, with accumulation, experts and Muon."""
    config = {
        "dataset": {"path": "data.bin", "data_division": 0.8},
        "checkpoints": {"path": "ck", "interval": 4, "keep": 9},
        "model_hyperparams": MODEL, "optimizer_hyperparams": {"use_muon": True},
        "model_path": "out/tiny.model", "encoder_path": "chars:text.txt", "seed": 5, "device": "cpu", "compile": False,
        "batch_size": 4, "gradient_accumulation_steps": 2, "max_iters": 10, "eval_interval": 5, "log_interval": 1,
        "eval_iters": 2, "learning_rate": 3e-3, "warmup_iters": 2, "min_lr": 1e-3, "sample_length": 4,
    }  # fmt: skip
    Path(path).write_text(json.dumps(config | changes))


def set_up(directory: Path) -> None:
    """A corpus and a config in the working directory, which is then this one."""
    os.chdir(directory)
    Path("text.txt").write_text(ALPHABET)
    write_corpus("data.bin")
    write_run()


def untimed_metrics(path="ck/metrics.jsonl") -> list[dict]:
    """metrics.jsonl without what no two runs have in common."""
    lines = map(json.loads, Path(path).read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_s")} for line in lines]


# ---- children ------------------------------------------------------------------------------------------------------


@functools.cache
def server():
    """multiprocessing, with a server that has imported train.py and what a run imports later, torch._dynamo above all:
    it takes a child more than a second, as building a model does that."""
    folders = [ROOT, ROOT / "tests" / "helpers", Path(__file__).parent]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONPATH"] = path
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torture", "safetensors.torch", *forks.MODULES])
    return context


def run_child(body, argv, directory, log, threads, env):
    """A child's own main: `body(argv)` with its output in `log`, and its exit code."""
    import torch

    gc.freeze()  # what is imported: no collection of garbage looks through it
    os.environ.update(env)
    os.chdir(directory)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb"), line_buffering=True) for n in (1, 2))
    torch.set_num_threads(threads)
    faulthandler.register(signal.SIGUSR1)
    startup.exit_on(signal.SIGINT, signal.SIGTERM)  # as train.py does where it is the program
    sys.argv = ["train.py", *argv]
    try:
        body(argv)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def train_without_curves(argv):
    """train.py, without curves."""

    plot.curves = lambda *arguments: None
    train_with_curves(argv)


def train_with_curves(argv):
    import train

    run_cli(train.main)


def interrupt_twice_in_a_save(argv):
    """Two SIGINT while the second checkpoint's second file is written."""

    write, calls = checkpoint._write_file, []

    def interrupted(path, writer):
        calls.append(path)
        if len(calls) == 3 + 2:  # each has a model, a state and a manifest
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return write(path, writer)

    checkpoint._write_file = interrupted
    train_without_curves(argv)


def act_before_steps(act) -> None:
    """Call `act(number)` before each optimizer step of that number, the first being 1."""

    update = TrainStep.update_weights

    def then_update(self, loss, grad_norm):
        act(self.state.progress.step + 1)
        return update(self, loss, grad_norm)

    TrainStep.update_weights = then_update


def record_checkpoints() -> None:
    """found.json: what there is when the disk has room again."""

    visible = sorted(path.name for path in Path("ck").glob("step_*"))
    Path("found.json").write_text(json.dumps({"newest": find_latest("ck").step, "visible": visible}))


def limit_file_size(argv):
    """From step 5 to the end of step 8 no file can grow beyond 12 kB."""

    def act(step):
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))
        elif step == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            record_checkpoints()

    act_before_steps(act)
    train_with_curves(argv)


def fill_disk(argv):
    """From step 5 to the end of step 8 the disk is full to the last byte."""

    def act(step):
        if step == 5:
            with open("ballast", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        elif step == 9:
            os.unlink("ballast")
            record_checkpoints()

    act_before_steps(act)
    train_with_curves(argv)


def limit_memory(argv):
    """This process may have 300 MB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else 10**6
    room = pages * resource.getpagesize() + 300_000_000
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    train_without_curves(argv)


def record_resources(argv):
    """used.json: the CPU seconds and the megabytes that it took to refuse something."""
    scale = 1e6 if sys.platform == "darwin" else 1e3
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    start = time.process_time()  # others may use the CPU meanwhile
    try:
        train_without_curves(argv)
    finally:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale - before
        Path("used.json").write_text(json.dumps({"seconds": time.process_time() - start, "megabytes": used}))


def record_growth(argv):
    """growth.json: memory in MB, open files and seconds of the CPU, at each evaluation."""
    import gc

    from strawberry.data.loader import resident_memory
    from train import Trainer

    evaluate, growth = Trainer.evaluate, []

    def then_look(self):
        evaluate(self)
        gc.collect()
        memory = resident_memory()
        growth.append((memory["anonymous"], len(os.listdir("/proc/self/fd")), time.process_time()))
        Path("growth.json").write_text(json.dumps(growth))

    Trainer.evaluate = then_look
    train_with_curves(argv)


def poison_one_rank(argv):
    """The loss of rank 1 is NaN in the seventh step, once."""

    accumulate = TrainStep.accumulate

    def poisoned(self, micro_batches):
        loss = accumulate(self, micro_batches)
        return loss * float("nan") if self.state.ranks.rank == 1 and self.state.progress.position == 6 else loss

    TrainStep.accumulate = poisoned
    train_without_curves(argv)


def drop_capabilities(argv):
    """As a user whom rights hold back, which root on Linux is without its capabilities."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None)
        none = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
        if libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), none):  # _LINUX_CAPABILITY_VERSION_3, this process
            raise OSError("capset failed")
    train_without_curves(argv)


def start_child(*argv, body=train_without_curves, directory=".", log="log.txt", threads=1, **env):
    """Start a child with this command line; its output is appended to `log`."""
    context = server()
    directory = Path(directory).resolve()
    child = context.Process(target=run_child, args=(body, argv, str(directory), str(directory / log), threads, env))
    child.start()
    return child


def wait_for_exit(child, seconds=60) -> int:
    """Its exit code, as a shell tells it: −9 after SIGKILL."""
    child.join(seconds)
    if child.exitcode is None:
        os.kill(child.pid, signal.SIGUSR1)  # its log then has a stack trace
        child.join(1)
        child.kill()
        child.join()
        raise AssertionError(f"it did not end within {seconds} s")
    return child.exitcode


def wait_until(condition, seconds=60.0, child=None) -> None:
    """Look again every few milliseconds, as long as the child lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        assert child is None or child.exitcode is None, f"it ended with {child.exitcode}"
        time.sleep(0.002)


def read_log(log="log.txt") -> str:
    return Path(log).read_text(errors="replace") if Path(log).exists() else ""


# ---- what is left --------------------------------------------------------------------------------------------------


def newest_state(root="ck") -> tuple[int, dict]:
    """(step, every tensor of the newest checkpoint's weights, buffers and optimizer state)."""
    from model import build

    found = find_latest(root)
    model = build(found.meta["run"]["model_hyperparams"])
    found.load_weights(model)
    tensors = dict(model.state_dict())
    for name, values in found.load_state()["optimizer"]["state"].items():
        tensors |= {f"{name}.{key}": value for key, value in values.items()}
    return found.step, tensors


def assert_same(a: dict, b: dict) -> None:
    import torch

    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---- the table -----------------------------------------------------------------------------------------------------


PROPERTIES = {  # test → its row; hypothesis' tests cannot record what they did
    "tests/data/test_encoder.py::test_round_trip_of_any_string": ("random strings through the tokenizer", "20,000"),
    "tests/common/test_config.py::test_round_trip": ("random valid configs: JSON → dataclass → JSON", "2,000"),
    f"{SURVIVAL}::test_any_mutation_of_a_config_is_valid_or_refused_by_name": ("mutated configs", "2,000"),
    f"{SURVIVAL}::test_any_override_is_a_run_or_a_user_error": ("random --key=value", "2,000"),
}


class Notes:
    """pytest's plugin that collects what the tests say they have done: record_property("torture", (what, how much)).

    `how much` is text, or a dict of numbers by unit: tests that do the same thing make one row, with the largest.
    """

    def __init__(self):
        self.done: dict[str, list] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report):
        if report.outcome == "failed":
            self.failed.append(report.nodeid)
        rows = [value for name, value in report.user_properties if name == "torture"]
        rows += [PROPERTIES[report.nodeid]] if report.nodeid in PROPERTIES else []
        for what, how in rows if report.when == "call" and report.outcome == "passed" else ():
            self.done.setdefault(what, []).append(how)

    def rows(self):
        for what, hows in self.done.items():
            if isinstance(hows[0], dict):
                most = (f"{max(how[unit] for how in hows):.3g} {unit}" for unit in hows[0])
                yield what, f"{len(hows)}, each in at most {' and '.join(most)}"
            else:
                yield what, "; ".join(hows)


def main() -> int:
    """Run the tests of survival with full counts; print the table of docs/measurements.md."""
    import pytest

    notes = Notes()
    start = time.perf_counter()
    os.chdir(ROOT)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    others = [name for name in PROPERTIES if "test_survival" not in name]
    code = pytest.main(["-q", SURVIVAL, *others], plugins=[notes])
    version = re.search(r"[\d.]+", sys.version)[0]
    print("\n| fault | times |\n| --- | --- |")
    print("\n".join(f"| {what} | {how} |" for what, how in notes.rows()))
    print("\n".join(["", f"{len(notes.failed)} failed", *notes.failed]))
    minutes = (time.perf_counter() - start) / 60
    print(f"\nPython {version}, {os.cpu_count()} cores, {minutes:.0f} minutes, commit {commit}.")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
