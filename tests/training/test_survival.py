"""A run that is left alone overnight: whatever happens to the machine, it loses one interval at most, and nothing wrong
is saved as right. `make torture` runs these tests with more of everything.

Index:  resuming · kills · signals · damage · full disks · losses that are not finite · memory · malicious files ·
        one process at a time · several processes · properties · long runs · odd surroundings · checking
"""

import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import forks
import numpy as np
import pytest
import runs
import safetensors.torch
import torch
import torture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine import FULL, count, require, require_program
from ports import free_port
from torture import (
    assert_same,
    newest_state,
    read_log,
    set_up,
    start_child,
    untimed_metrics,
    wait_for_exit,
    wait_until,
    write_run,
)

import encoder as encoders
import train
from model import CONFIGS
from optimizer import lr_at
from strawberry.common import UserError
from strawberry.config import check, dotted_names, to_dict
from strawberry.data.token_file import Header, TokenFile, TokenFileWriter
from strawberry.model_file import load_model
from strawberry.run_config import load_run, run_class
from strawberry.training import checkpoint, checkpointing, distributed, evaluation, memory, plot, setup
from strawberry.training import lock as lock_module
from strawberry.training import signals as signals_module
from strawberry.training.checkpoint import _render_manifest, find_latest
from strawberry.training.checkpointing import Checkpointer
from strawberry.training.console import DiskFullSafeStream, format_bytes
from strawberry.training.lock import Lock
from strawberry.training.signals import Interrupted, Signals
from strawberry.training.step import TrainStep
from train import Trainer

RESUME = "--init_from=resume"
ENDLESS = ["--config", "run.json", "--max_iters=100000", "--eval_interval=100000"]
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has neither signals to send nor fork")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A directory with a corpus and a config, where nothing is drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "curves", lambda *arguments: None)
    set_up(tmp_path)
    return tmp_path


@pytest.fixture
def report(record_property):
    """Add a row to the table of `make torture`: what was done, and how much of it."""
    return lambda what, how: record_property("torture", (what, how))


def run(*argv):
    return train.main(["--config", "run.json", *argv])


def prepared(*argv):
    """A trainer before its first step, which keeps its directory from no other one."""
    trainer = Trainer(load_run(["--config", "run.json", *argv], CONFIGS), Signals())
    trainer.prepare()
    trainer.close()
    return trainer


def at_call(monkeypatch, owner, name, number, act):
    """Call `act()` at the start of the call of that number of a function, the first being 1."""
    function, calls = getattr(owner, name), []

    def then_function(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            act()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, then_function)


def terminate():
    signal.raise_signal(signal.SIGTERM)


def files(root) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(Path(root).rglob("*")) if path.is_file()}


def weights_hash(path="out/tiny.model") -> str:
    """SHA-256 of all tensors of a model file: the record beside them tells the time."""
    tensors = safetensors.torch.load_file(path)
    return hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))).hexdigest()


# ---- resuming ------------------------------------------------------------------------------------------------------


def random_corpus(block_size: int, windows: int) -> None:
    """One long line in which no two windows are alike."""
    rng = random.Random(block_size)
    text = "".join(rng.choice(torture.ALPHABET[:-1]) for _ in range(int((windows + 1.5) * block_size / 0.8)))
    runs.write_corpus("data.bin", text)


TINYSTAR = {"arch": "tinystar", "vocab_size": 44, "n_layer": 1}
WIDE = TINYSTAR | {"block_size": 64, "n_embd": 64, "n_head": 2, "dropout": 0.2}  # torch divides this among threads


@pytest.mark.slow
@pytest.mark.parametrize("threads,model", [(1, torture.MODEL | {"dropout": 0.2}), (2, WIDE)], ids=["1", "2"])
def test_a_run_resumed_at_any_step_is_bit_identical(workdir, monkeypatch, report, threads, model):
    torch.set_num_threads(threads)
    size = model["block_size"]
    random_corpus(size, windows=41)  # 5 1/8 steps of 2 · 4 rows
    write_run(model_hyperparams=model)
    rows = []
    compute = TrainStep.compute_gradients

    def note(self, micro_batches):
        rows.extend(row.tobytes() for batch in micro_batches for row in batch.x.numpy())
        return compute(self, micro_batches)

    monkeypatch.setattr(TrainStep, "compute_gradients", note)
    assert run("--checkpoints.path=whole") == 0
    whole = list(rows)
    stops = range(1, 10) if FULL else (3, 5, 8)  # the middle of an epoch, its end, the middle of the next one
    rows.clear()
    done = 0
    for stop in stops:
        with monkeypatch.context() as patch:
            at_call(patch, TrainStep, "update_weights", stop - done, terminate)
            assert run(*[RESUME] * bool(done)) == 143
        assert find_latest("ck").step == done + (stop - done) == stop
        done = stop
    assert run(RESUME) == 0
    assert rows == whole  # every batch, in order
    assert_same(newest_state("whole")[1], newest_state("ck")[1])
    assert untimed_metrics("whole/metrics.jsonl") == untimed_metrics()
    assert_an_epoch_is_every_window_once(rows, size)
    threads = f"{threads} thread{'s' * (threads > 1)}"
    report("stopped and resumed: identical bits", f"{threads}: after {len(stops)} of 10 steps")


def assert_an_epoch_is_every_window_once(rows: list[bytes], size: int) -> None:
    """Found in the text, the first 41 rows begin `size` apart, none twice and none left out."""
    tokens = TokenFile("data.bin").tokens.astype(np.int64)
    text = tokens.tobytes()
    for epoch in range(len(rows) // 41):
        starts = sorted(text.index(row) // 8 for row in rows[41 * epoch : 41 * epoch + 41])
        assert np.diff(starts).tolist() == [size] * 40


# ---- kills ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@posix
def test_a_run_killed_at_any_moment_ends_with_the_same_weights(workdir, report):
    write_run(max_iters=24, checkpoints={"path": "ck", "interval": 2, "keep": 2}, eval_interval=12)
    assert wait_for_exit(start_child("--config", "run.json", "--checkpoints.path=whole")) == 0
    expected = weights_hash()
    rng, kills, in_saves, runs = random.Random(6), 0, 0, 0
    wanted = count(4, 50)
    while kills < wanted or not in_saves or Path("ck").exists():
        child = start_child("--config", "run.json", *[RESUME] * bool(list(Path("ck").glob("step_*"))))
        saving = f"ck/.tmp_step_*_{child.pid}"
        if kills < wanted or not in_saves:
            if kills % 2:
                with contextlib.suppress(AssertionError):  # it may have been done before
                    wait_until(lambda saving=saving: list(Path().glob(saving)), child=child)
            else:
                child.join(rng.uniform(0.1, 1.5))
            child.kill()
        code = wait_for_exit(child)
        if code == -9:
            kills += 1
            in_saves += bool(list(Path().glob(saving)))
            assert_little_is_lost(2)
        else:
            assert code == 0, read_log()
            assert weights_hash() == expected
            assert [line["step"] for line in untimed_metrics() if "loss" in line] == list(range(1, 25))
            shutil.rmtree("ck")
            runs += 1
    assert runs
    report("SIGKILL at random moments", f"{kills} times, {in_saves} of them during a save")


def assert_little_is_lost(interval: int) -> int:
    """The newest checkpoint is good, and at most an interval older than what was logged."""
    logged = max((line["step"] for line in untimed_metrics()), default=0) if Path("ck/metrics.jsonl").exists() else 0
    step = find_latest("ck").step if list(Path("ck").glob("step_*")) else 0
    assert step >= logged - interval
    return step


# ---- signals -------------------------------------------------------------------------------------------------------

PHASES = {  # what is called there, and how often before the signal comes
    "reading the data": (setup, "load_data", 1),
    "building the model": (train, "build", 1),
    "the rehearsal": (TrainStep, "accumulate", 1),
    "claiming the directory": (checkpointing, "archive_run", 1),
    "a step's forward pass": (TrainStep, "accumulate", 4),
    "a step's update": (TrainStep, "update_weights", 3),
    "logging": (Trainer, "log", 3),
    "an evaluation": (evaluation, "mean_loss", 2),
    "a sample": (evaluation, "sample_tokens", 1),
    "the curves": (plot, "curves", 1),
    "a checkpoint's files": (checkpoint, "_write_file", 2),
    "a checkpoint's renaming": (checkpoint, "_publish", 1),
    "the model file": (checkpointing, "save_model", 1),
}


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    """The last step's tensors of a run of six that nothing disturbs."""
    before = os.getcwd()
    set_up(tmp_path_factory.mktemp("six"))
    run(*SIX_STEPS)
    tensors = newest_state()[1]
    os.chdir(before)
    return tensors


SIX_STEPS = ["--max_iters=6", "--eval_interval=3", "--checkpoints.interval=2"]


@pytest.mark.slow
@posix
@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_at_any_moment_saves_and_ends_with_143(workdir, monkeypatch, six_steps, report, phase):
    owner, name, number = PHASES[phase]
    with monkeypatch.context() as patch:
        moment = []
        at_call(patch, owner, name, number, lambda: (moment.append(time.monotonic()), terminate()))
        assert run(*SIX_STEPS) == 143
        seconds = time.monotonic() - moment[0]
        assert seconds < 10
    begun = Path("ck").exists()
    assert begun == (phase not in ("reading the data", "building the model", "the rehearsal"))
    if begun:
        logged = [line["step"] for line in untimed_metrics()]
        assert find_latest("ck").step == max(logged, default=0)  # nothing at all is lost
    assert run(*SIX_STEPS, *[RESUME] * begun) == 0
    assert_same(newest_state()[1], six_steps)
    report("SIGTERM in every phase from start to the model file; nothing lost", {"s": seconds})


@posix
def test_a_signal_swallowed_by_a_callback_is_raised_again(workdir, monkeypatch):
    monkeypatch.setattr(signals_module, "RERAISE_INTERVAL", 0.01)
    build, swallowed = train.build, []

    def swallow_signal(hyper):
        with contextlib.suppress(Interrupted):
            terminate()
        swallowed.append(True)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            hash(end)
        return build(hyper)

    monkeypatch.setattr(train, "build", swallow_signal)
    began = time.monotonic()
    assert run() == 143 and swallowed and time.monotonic() - began < 10
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


@pytest.mark.slow
@posix
def test_a_step_longer_than_the_grace_period_is_abandoned(workdir, monkeypatch, six_steps):
    """Of the third step's two micro-batches only one is computed; the step is done anew on resume."""
    monkeypatch.setattr(signals_module, "GRACE_PERIOD", -1.0)
    with monkeypatch.context() as patch:
        at_call(patch, Signals, "raise_if_late", 7, terminate)  # 1 in the rehearsal, 2 in each step
        calls = []
        at_call(patch, TrainStep, "update_weights", 3, lambda: calls.append(1))
        assert run(*SIX_STEPS) == 143
        assert not calls and find_latest("ck").step == 2
    assert run(*SIX_STEPS, RESUME) == 0
    assert_same(newest_state()[1], six_steps)


@pytest.mark.slow
@posix
def test_sigterm_while_compiling_ends_with_143(workdir, report):
    times = []
    for number in range(count(1, 5)):
        log = f"log{number}.txt"
        cold = {"TORCHINDUCTOR_CACHE_DIR": str(workdir / f"cache{number}")}
        child = start_child(*ENDLESS, "--compile=true", f"--checkpoints.path=ck{number}", log=log, **cold)
        wait_until(lambda log=log: "compiling" in read_log(log), child=child)
        child.join(0.5 + 2 * number)
        before = time.monotonic()
        os.kill(child.pid, signal.SIGTERM)
        assert wait_for_exit(child, 20) == 143, read_log(log)
        times.append(time.monotonic() - before)
        assert times[-1] < 10 and "SIGTERM: " in read_log(log)
    report("SIGTERM while compiling", f"{len(times)} times, the slowest took {max(times):.1f} s")


@pytest.mark.slow
@posix
def test_sigterm_during_imports_ends_with_143(workdir, report):
    script = [sys.executable, str(torture.ROOT / "train.py"), "--config", "run.json"]
    tries = count(1, 10)
    for number in range(tries):
        with subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.4 + 0.2 * number)
            child.terminate()
            assert child.wait(10) == 143
    report("SIGTERM while Python loads", f"{tries} times")


@pytest.mark.slow
@posix
def test_a_second_sigint_exits_immediately_and_the_last_checkpoint_is_intact(workdir, report):
    """Both come in the middle of the second save, which is never finished."""
    assert wait_for_exit(start_child("--config", "run.json", body=torture.interrupt_twice_in_a_save)) == 130
    assert list(Path("ck").glob(".tmp_step_00000008_*")) and find_latest("ck").step == 4
    assert "go on" not in read_log()
    assert run(RESUME) == 0
    report("SIGINT twice during a save", "once")


# ---- damage --------------------------------------------------------------------------------------------------------


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[random.Random(len(data)).randrange(len(data))] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": flip_bit,
    "a truncated file": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "an empty file": lambda path: path.write_bytes(b""),
    "a missing file": lambda path: path.unlink(),
}
PARTS = ("model.safetensors", "state.pt", "manifest.json")


@pytest.mark.slow
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(workdir, six_steps, capsys, report):
    run(*SIX_STEPS)
    shutil.copytree("ck", "sound")
    for part in PARTS:
        for name, damage in DAMAGE.items():
            shutil.rmtree("ck")
            shutil.copytree("sound", "ck")
            damage(Path("ck/step_00000006") / part)
            capsys.readouterr()
            assert run(*SIX_STEPS, RESUME) == 0
            out = capsys.readouterr()
            assert re.search(rf"warning: the checkpoint ck.step_00000006 is broken \({re.escape(part)}", out.err), name
            assert "resuming ck/step_00000004" in out.out.replace(os.sep, "/")
            assert_same(newest_state()[1], six_steps)
    report("damaged checkpoints", f"{len(DAMAGE)} kinds in each of {len(PARTS)} files")


@pytest.mark.slow
@posix
def test_only_damaged_checkpoints_are_an_error_and_no_new_run_starts(workdir):
    run(*SIX_STEPS)
    for path in Path("ck").glob("step_*"):
        flip_bit(path / "state.pt")
    before = files(workdir)
    assert wait_for_exit(start_child("--config", "run.json", *SIX_STEPS, RESUME)) == 2
    last = read_log().splitlines()[-1]
    assert last.startswith("error: every checkpoint in ck is broken (") and last.count("state.pt") == 3
    Path("log.txt").unlink()
    assert files(workdir) == before


@pytest.mark.slow
def test_a_latest_file_that_cannot_be_written_loses_no_checkpoint(workdir, capsys, monkeypatch):
    write = checkpoint.atomic_write

    def refuse(path, data):
        if Path(path).name == "latest":
            raise UserError(f"cannot write {path}: No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoint, "atomic_write", refuse)
    assert run(*SIX_STEPS, "--checkpoints.keep=2") == 0
    assert capsys.readouterr().err.count("is saved all the same") == 3
    assert find_latest("ck").step == 6 and not Path("ck/step_00000002").exists()


# ---- full disks ----------------------------------------------------------------------------------------------------


def assert_it_went_on_without_the_disk() -> None:
    """The child made steps 5 … 8 without room; every checkpoint then was as it had been."""
    found = json.loads(Path("found.json").read_text())
    assert found["newest"] == 4 and found["visible"] == ["step_00000002", "step_00000004"]
    assert find_latest("ck").step == 12 and load_model("out/tiny.model")[2]["step"] == 12
    assert [line["step"] for line in untimed_metrics() if "loss" in line] == list(range(1, 13))
    assert not list(Path("ck").glob(".tmp_*"))
    assert {path.name for path in Path("img").glob("*.png")} == set(plot.SHEETS)


FULL_DISK = ["--config", "run.json", "--max_iters=12", "--checkpoints.interval=2", "--eval_interval=6"]


@pytest.mark.slow
@posix
def test_a_checkpoint_beyond_the_file_size_limit_is_reported_and_retried(workdir, report):
    """RLIMIT_FSIZE: no checkpoint and no picture fits."""
    assert wait_for_exit(start_child(*FULL_DISK, body=torture.limit_file_size)) == 0, read_log()
    assert "File too large" in read_log() and "cannot draw the curves" in read_log()
    assert_it_went_on_without_the_disk()
    report("full disk (RLIMIT_FSIZE)", "4 steps, with 2 checkpoints and a plot due")


def can_mount() -> bool:
    return not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux's tmpfs")
def test_a_checkpoint_on_a_full_disk_is_reported_and_retried(workdir, report):
    """A tmpfs of 4 MB with nothing left on it, for the log too."""
    require_program("unshare")
    require(can_mount(), "a kernel that lets users mount a tmpfs (unshare -rm)")
    script = f"import sys; sys.path[:0] = {[str(torture.ROOT), str(torture.ROOT / 'tests')]}; import torture, os\n"
    script += f"torture.run_child(torture.fill_disk, {FULL_DISK}, os.getcwd(), 'log.txt', 1, {{}})"
    steps = ["mount -t tmpfs -o size=4m none small && cp *.* small && cd small", '"$0" -c "$1"; code=$?',
             "cp -r . ../after; exit $code"]  # fmt: skip
    Path("small").mkdir()
    command = ["unshare", "-rm", "sh", "-c", "\n".join(steps), sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    os.chdir("after")
    assert done.returncode == 0, done.stderr + read_log()
    assert_it_went_on_without_the_disk()
    report("full disk (tmpfs of 4 MB)", "4 steps, with 2 checkpoints, metrics, log and a plot due")


def test_a_log_on_a_full_disk_ends_no_run_and_a_closed_pipe_does():
    class Full(io.StringIO):
        def write(self, text):
            raise error

    stream, error = DiskFullSafeStream(Full()), OSError(28, "No space left on device")
    assert stream.write("text") == 4 and stream.isatty() is False
    error = BrokenPipeError()
    with pytest.raises(BrokenPipeError):
        stream.write("text")


# ---- losses that are not finite ------------------------------------------------------------------------------------

ROLLBACK = "--on_nan=rollback"


def poison(monkeypatch, *positions):
    """A weight becomes NaN right before the steps at these positions in the data, in whichever order they come."""
    compute = TrainStep.compute_gradients

    def poisoned(self, micro_batches):
        if self.state.progress.position in positions:
            with torch.no_grad():
                self.state.model.embed.weight[3, 1] = math.nan
        return compute(self, micro_batches)

    monkeypatch.setattr(TrainStep, "compute_gradients", poisoned)


@pytest.mark.slow
def test_a_nan_weight_is_rolled_back_past_its_data_at_half_the_learning_rate(workdir, monkeypatch, capsys, report):
    poison(monkeypatch, 6)
    used = []
    at_first = TrainStep.update_weights

    def note(self, loss, grad_norm):
        lr = at_first(self, loss, grad_norm)
        used.append((self.state.progress.step, self.state.progress.position, lr))
        return lr

    monkeypatch.setattr(TrainStep, "update_weights", note)
    assert run(ROLLBACK) == 0
    lrs = [lr_at(step, load_run(["--config", "run.json"], CONFIGS)) for step in range(10)]
    first = [(step, step, lrs[step]) for step in range(6)]  # step 7 meets the poison: back to step 4, on from batch 7
    assert used == first + [(step, step + 3, pytest.approx(lrs[step] / 2)) for step in range(4, 10)]
    lines = [line for line in untimed_metrics() if "rollback" in line]
    keys = ("step", "from_step", "rollback", "lr_factor")
    assert [tuple(line[key] for key in keys) for line in lines] == [(4, 7, 1, 0.5)]
    record = load_model("out/tiny.model")[2]["rollbacks"]
    assert [about["from_step"] for about in record] == [7] and "the loss is nan" in record[0]["why"]
    assert find_latest("ck").load_state()["progress"]["skipped"] == 3
    assert "going back to step 4" in capsys.readouterr().err
    assert [line["step"] for line in untimed_metrics() if "loss" in line] == list(range(1, 11))
    report("a weight set to NaN, `on_nan: \"rollback\"`", "once: continued; four times: exit code 3")


@pytest.mark.slow
def test_the_batches_after_a_rollback_are_those_after_the_bad_one(workdir, monkeypatch):
    poison(monkeypatch, 6)
    batches = []
    at_first = TrainStep.accumulate

    def note(self, micro_batches):
        batches.append(torch.cat([batch.x for batch in micro_batches]))
        return at_first(self, micro_batches)

    monkeypatch.setattr(TrainStep, "accumulate", note)
    assert run(ROLLBACK) == 0
    trainer = prepared()
    every = [torch.from_numpy(trainer.corpus.train.read_windows(5, 8 * step, 8)[:, :-1]) for step in range(13)]
    steps = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]  # each batch once, though the steps 5 and 6 were done twice
    for got, step in zip(batches[1:], steps, strict=False):
        assert torch.equal(got, every[step])


@pytest.mark.slow
def test_a_resumed_run_with_a_rollback_equals_the_uninterrupted_one(workdir, monkeypatch):
    poison(monkeypatch, 6)
    assert run(ROLLBACK, "--checkpoints.path=whole") == 0
    # the first is right after the rollback
    stops = [(Trainer, "take_steps", 2), (TrainStep, "update_weights", 1), (TrainStep, "update_weights", 2)]
    for i, (kind, name, number) in enumerate(stops):
        with monkeypatch.context() as patch:
            at_call(patch, kind, name, number, terminate)
            assert run(ROLLBACK, *[RESUME] * bool(i)) == 143
    assert run(ROLLBACK, RESUME) == 0
    assert_same(newest_state("whole")[1], newest_state()[1])
    assert untimed_metrics("whole/metrics.jsonl") == untimed_metrics()


@pytest.mark.slow
def test_a_fourth_rollback_ends_the_run(workdir, monkeypatch, capsys):
    poison(monkeypatch, 2, 5, 7, 9)
    assert run(ROLLBACK) == 3
    assert "3 rollbacks did not help" in capsys.readouterr().err
    factors = [line["lr_factor"] for line in untimed_metrics() if "rollback" in line]
    assert factors == [0.5, 0.25, 0.125] and find_latest("ck").load_state()["progress"]["rollbacks"][2]["rollback"] == 3


@pytest.mark.slow
def test_a_rollback_takes_the_checkpoint_before_a_broken_one(workdir, monkeypatch, capsys):
    poison(monkeypatch, 9)
    with monkeypatch.context() as patch:
        at_call(patch, Trainer, "roll_back", 1, lambda: flip_bit(Path("ck/step_00000008/state.pt")))
        assert run(ROLLBACK) == 0
    error = capsys.readouterr().err
    assert "step_00000008 is broken" in error and "going back to step 4" in error
    assert find_latest("ck").step == 10 and find_latest("ck").load_state()["progress"]["skipped"] == 6


@pytest.mark.slow
def test_weights_that_are_not_finite_before_a_save_are_rolled_back(workdir, monkeypatch):
    """The gradient was finite and the update was not."""

    def poisoned(self):
        if self.state.progress.step == 8 and not self.state.progress.rollbacks:
            with torch.no_grad():
                self.state.model.embed.weight[3, 1] = math.inf
        return check(self)

    check = Checkpointer.check_weights
    monkeypatch.setattr(Checkpointer, "check_weights", poisoned)
    assert run(ROLLBACK) == 0
    assert [line["step"] for line in untimed_metrics() if "rollback" in line] == [4]


@pytest.mark.slow
def test_a_learning_rate_of_1e20_ends_the_run_and_saves_no_bad_weights(workdir):
    exploding = ["--learning_rate=1e20", "--warmup_iters=0", "--min_lr=0"]
    assert run(*exploding, ROLLBACK) == 3
    assert [line["rollback"] for line in untimed_metrics() if "rollback" in line] == [1, 2, 3]
    assert run(*exploding, "--checkpoints.path=stop", "--checkpoints.interval=1") == 3
    for root in ("ck", "stop"):
        assert all(t.isfinite().all() for t in newest_state(root)[1].values())
    assert not Path("out/tiny.model").exists()


# ---- memory --------------------------------------------------------------------------------------------------------


def limit_rows(monkeypatch, rows):
    """A device that has room for so many rows and no more."""
    accumulate = TrainStep.accumulate

    def full(self, micro_batches):
        if len(micro_batches[0].x) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return accumulate(self, micro_batches)

    monkeypatch.setattr(TrainStep, "accumulate", full)


@pytest.mark.slow
def test_out_of_memory_reports_the_estimate_and_what_to_lower(workdir, monkeypatch):
    limit_rows(monkeypatch, 3)
    before = files(workdir)
    with pytest.raises(UserError) as caught:
        run()
    message = str(caught.value)
    trainer = Trainer(load_run(["--config", "run.json"], CONFIGS), Signals())
    trainer.set_up()
    need = trainer.memory_planner.estimate()
    assert f"weights {format_bytes(need.weights)}, gradients" in message
    assert f"activations of 4 rows of 16 tokens about {format_bytes(4 * need.row)}" in message
    assert "before the first step" in message and "nothing was changed" in message
    assert "Halve batch_size and double gradient_accumulation_steps (to 2 and 4), which computes the same" in message
    assert "model_hyperparams.block_size (16)" in message and "\n" not in message
    assert files(workdir) == before
    assert run("--batch_size=2", "--gradient_accumulation_steps=4", "--max_iters=1") == 0  # what it said


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 11, 16, 1000])
def test_batch_size_auto_finds_the_largest_batch_that_fits(workdir, monkeypatch, capsys, rows):
    limit_rows(monkeypatch, rows)
    trainer = prepared("--batch_size=auto")
    expected = min(rows, trainer.corpus.train.n_windows)
    assert trainer.run.batch_size == expected and f"batch_size   {expected}" in capsys.readouterr().out
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(not router.load.any() for router in trainer.model.routers().values())


@pytest.mark.slow
def test_batch_size_auto_without_memory_for_one_row_is_an_error(workdir, monkeypatch):
    limit_rows(monkeypatch, 0)
    with pytest.raises(UserError, match=r"out of memory before the first step.* Lower model_hyperparams.block_size"):
        run("--batch_size=auto")


@pytest.mark.slow
def test_batch_size_auto_is_recorded_and_resumed(workdir, monkeypatch):
    limit_rows(monkeypatch, 5)
    run("--batch_size=auto", "--max_iters=2")
    limit_rows(monkeypatch, 3)  # another machine computes the same, or says that it can't
    assert find_latest("ck").meta["run"]["batch_size"] == 5
    with pytest.raises(UserError, match="out of memory"):
        run("--batch_size=auto", RESUME)


@pytest.mark.slow
def test_batch_size_auto_on_a_cpu_takes_half_of_the_free_memory_and_limits_tokens(workdir, monkeypatch):
    trainer = prepared()  # its planner does not keep it
    need = trainer.memory_planner.estimate()
    room = need.fixed + 7 * need.row + need.row // 2
    monkeypatch.setattr(memory, "device_memory", lambda device: (2 * room, 4 * room))
    assert prepared("--batch_size=auto").run.batch_size == 7
    monkeypatch.setattr(memory, "MAX_CPU_TOKENS", 5 * 16)
    assert prepared("--batch_size=auto").run.batch_size == 5


@pytest.mark.slow
def test_a_run_beyond_the_memory_of_a_cpu_is_refused_at_the_start(workdir, monkeypatch):
    trainer = prepared()  # its planner does not keep it
    need, before = trainer.memory_planner.estimate(), files(workdir)
    trainer.close()
    with monkeypatch.context() as patch:
        patch.setattr(memory.machine, "capacity", lambda: need.weights)
        with pytest.raises(UserError, match=r"the model has [\d,]+ parameters, .* Lower model_hyperparams\.n_embd \("):
            run()
    monkeypatch.setattr(memory, "SAFE_TOKENS", 0)
    monkeypatch.setattr(memory.machine, "capacity", lambda: need.fixed + 3 * need.row)
    with pytest.raises(UserError, match="a step needs about .* activations of 4 rows .* Halve batch_size"):
        run()
    assert files(workdir) == before
    assert run("--batch_size=2", "--gradient_accumulation_steps=4", "--max_iters=1") == 0  # what it said


def test_activations_saved_for_backward_are_counted():
    """silu(x W) + (x W)² keeps x (n·8 floats) and x W (n·4), once though used twice, and neither W nor the result."""
    layer = torch.nn.Linear(8, 4, bias=False)

    def forward(n):
        h = layer(torch.ones(n, 8))
        return (torch.nn.functional.silu(h) + h.square()).sum()

    saved = [sum(memory.saved_for_backward(layer, lambda n=n: forward(n))) for n in (1, 2, 5)]
    assert np.diff(saved).tolist() == [4 * (8 + 4), 3 * 4 * (8 + 4)]


def test_largest_fitting_finds_any_limit():
    for limit in (1, 2, 7, 8, 100):
        for n in range(limit + 3):
            asked = []
            found = memory.largest_fitting(lambda rows, n=n, asked=asked: asked.append(rows) or rows <= n, limit)
            assert found == min(n, limit)
            assert max(asked) <= limit and max(asked) <= max(2 * n, 1) and len(asked) == len(set(asked))


@pytest.mark.slow
@posix
def test_out_of_memory_on_a_cpu_is_reported(workdir):
    """A real allocation fails, in a process that may have 300 MB more than it has."""
    write_run(batch_size=1 << 17)
    before = files(workdir)
    assert wait_for_exit(start_child("--config", "run.json", body=torture.limit_memory)) == 2, read_log()
    last = read_log().splitlines()[-1]
    # the second on a small machine
    messages = ("error: cpu is out of memory before the first step", "error: a step needs about")
    assert last.startswith(messages) and "Halve batch_size" in last
    Path("log.txt").unlink()
    assert files(workdir) == before


@pytest.mark.cuda
@pytest.mark.whole_gpu
def test_batch_size_auto_fits_a_nearly_full_gpu(workdir, capsys):
    """With a tenth of the GPU left, the batch that auto finds trains; four times as much does not, and is reported."""
    wide = {"block_size": 256, "n_embd": 128, "n_qkv": 128, "n_layer": 4, "retention_chunk": 128}
    write_run(device="cuda", model_hyperparams=torture.MODEL | wide)
    runs.write_corpus("data.bin", runs.TEXT * 400)
    free, total = torch.cuda.mem_get_info()
    ballast = torch.empty(free - total // 10, dtype=torch.uint8, device="cuda")
    try:
        assert run("--batch_size=auto", "--max_iters=3") == 0
        rows = find_latest("ck").meta["run"]["batch_size"]
        with pytest.raises(UserError, match=r"cuda is out of memory before the first step, of .*weights"):
            run(f"--batch_size={4 * rows}")
    finally:
        del ballast
        torch.cuda.empty_cache()  # the next test's child processes need it


# ---- malicious files -----------------------------------------------------------------------------------------------


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("it_ran",))


def sign_header(head: bytes) -> bytes:
    return head[:224] + hashlib.sha256(head[:224]).digest()


def change_header(data: bytes, at: int, number: int) -> bytes:
    """A token file with another number in its header, and a checksum that fits it."""
    return sign_header(data[:at] + struct.pack("<Q", number) + data[at + 8 : 256]) + data[256:]


def tensors_claiming(header: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header


def bomb() -> bytes:
    """A state.pt of 300 kB that unpacks to 300 MB."""
    with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("state/data.pkl", bytes(300 << 20))
        archive.writestr("state/version", b"3\n")
    return Path("bomb.zip").read_bytes()


def sign_manifest(manifest: bytes, **changes) -> bytes:
    body = json.loads(manifest) | changes
    body.pop("sha256")
    return _render_manifest(body)


def in_checkpoint(part: str, change) -> None:
    """A checkpoint whose manifest vouches for a malicious file."""
    run("--max_iters=1")
    path = Path("ck/step_00000001")
    content = change((path / part).read_bytes())
    (path / part).write_bytes(content)
    if part != "manifest.json":
        manifest = (path / "manifest.json").read_bytes()
        about = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files = json.loads(manifest)["files"] | {part: about}
        (path / "manifest.json").write_bytes(sign_manifest(manifest, files=files))


DEEP = b"[" * 100_000
MODEL_FILE = "--init_from=evil.model,pretrained"
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
# name → (the file, its content from the sound one's, the command line)
MALICIOUS_FILES = {
    "a pickle for a model": ("evil.model", lambda _: pickle.dumps(Payload()), [MODEL_FILE]),
    "a torch file for a model": ("evil.model", lambda _: save_to_bytes(Payload()), [MODEL_FILE]),
    "a pickle for an encoder": ("evil.bin", lambda _: pickle.dumps(Payload()), ["--encoder_path=evil.bin"]),
    "a pickle for a dataset": ("data.bin", lambda _: pickle.dumps(Payload()), []),
    "a pickle for a config": ("run.json", lambda _: pickle.dumps(Payload()), []),
    "a header of 2^63 bytes": ("evil.model", lambda _: tensors_claiming(b"{}", 1 << 63), [MODEL_FILE]),
    "a header of the whole file": ("evil.model", lambda _: tensors_claiming(b"{" * 10_000_000), [MODEL_FILE]),
    "a tensor of 2^60 bytes": (
        "evil.model",
        lambda _: tensors_claiming(json.dumps({"a": EMPTY | {"shape": [1 << 60], "data_offsets": [0, 4]}}).encode()),
        [MODEL_FILE],
    ),
    "200,000 empty tensors": (
        "evil.model",
        lambda _: tensors_claiming(json.dumps({f"t{i}": EMPTY for i in range(200_000)}).encode()),
        [MODEL_FILE],
    ),
    "JSON of depth 100,000 for a config": ("run.json", lambda _: DEEP, []),
    "a deep config that is short enough": ("run.json", lambda _: b"[" * 60_000, []),
    "brackets for a config": ("run.json", lambda _: b'{"a":' * 10_000, []),
    "JSON of depth 100,000 for an encoder": ("evil.bin", lambda _: DEEP, ["--encoder_path=evil.bin"]),
    "60 MB of brackets for an encoder": ("evil.bin", lambda _: b"[" + b"[]," * 20_000_000, ["--encoder_path=evil.bin"]),
    "60 MB of numbers for an encoder": ("evil.bin", lambda _: b"[" + b"999," * 15_000_000, ["--encoder_path=evil.bin"]),
    "6 MB of names for an encoder": (
        "evil.bin",
        lambda _: b"{" + b",".join(b'"%d":0' % i for i in range(550_000)) + b"}",
        ["--encoder_path=evil.bin"],
    ),
    "2^63 tokens": ("data.bin", lambda data: change_header(data, 56, 1 << 63), []),
    "2^64 − 1 tokens": ("data.bin", lambda data: change_header(data, 56, 2**64 - 1), []),
    "2^63 ids": ("data.bin", lambda data: change_header(data, 40, 1 << 63), []),
    "ids beyond the vocabulary": ("data.bin", lambda data: data[:256] + b"\xff" * (len(data) - 256), []),
    "fewer tokens than a window": ("data.bin", lambda data: change_header(data, 56, 12)[: 256 + 24], []),
    "an odd length": ("data.bin", lambda data: data[:-1], []),
    "a byte too many": ("data.bin", lambda data: data + b"\0", []),
    "an empty dataset": ("data.bin", lambda data: b"", []),
    "a sparse file of 8 GB for a dataset": ("data.bin", "sparse", []),
    "a sparse file of 8 GB for an encoder": ("evil.bin", "sparse", ["--encoder_path=evil.bin"]),
    "a sparse file of 8 GB for a model": ("evil.model", "sparse", [MODEL_FILE]),
    "a sparse file of 8 GB for a config": ("run.json", "sparse", []),
    "a pickle for a state": ("state.pt", lambda _: pickle.dumps(Payload()), [RESUME]),
    "a torch file with a payload for a state": ("state.pt", lambda _: save_to_bytes(Payload()), [RESUME]),
    "300 MB in 300 kB for a state": ("state.pt", lambda _: bomb(), [RESUME]),
    "numbers for a state": ("state.pt", lambda _: save_to_bytes({"optimizer": 1, "progress": [2]}), [RESUME]),
    "a list for a state": ("state.pt", lambda _: save_to_bytes([1]), [RESUME]),
    "a pickle for a checkpoint's model": ("model.safetensors", lambda _: pickle.dumps(Payload()), [RESUME]),
    "a deep manifest": ("manifest.json", lambda _: DEEP, [RESUME]),
    "a manifest of another program": (
        "manifest.json", lambda data: sign_manifest(data, meta={}), [RESUME, "--seed=auto"],
    ),
    "a manifest without numbers": (
        "manifest.json",
        lambda data: sign_manifest(data, meta=json.loads(data)["meta"] | {"run": {"seed": "x", "batch_size": {}}}),
        [RESUME, "--seed=auto", "--batch_size=auto"],
    ),
    "complex numbers for a state": ("state.pt", lambda data: complex_state(data), [RESUME]),
}


def complex_state(data: bytes) -> bytes:
    """A sound state but for one tensor."""
    Path("state.pt").write_bytes(data)
    state = torch.load("state.pt")
    for values in state["optimizer"]["state"].values():
        for name, tensor in values.items():
            values[name] = torch.zeros_like(tensor, dtype=torch.complex64).to_sparse() if tensor.ndim else "x"
    return save_to_bytes(state)


def save_to_bytes(value) -> bytes:
    torch.save(value, "saved.pt")
    return Path("saved.pt").read_bytes()


@pytest.mark.slow
@posix
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("harm", MALICIOUS_FILES)
def test_a_malicious_file_is_refused_quickly_and_runs_nothing(workdir, report, harm):
    name, content, argv = MALICIOUS_FILES[harm]
    if content == "sparse":
        with open(name, "wb") as file:
            file.truncate(8 << 30)
    elif name in PARTS:
        in_checkpoint(name, content)
    else:
        Path(name).write_bytes(content(Path(name).read_bytes() if Path(name).exists() else b""))
    assert wait_for_exit(start_child("--config", "run.json", *argv, body=torture.record_resources)) == 2, read_log()
    lines = read_log().splitlines()
    used = json.loads(Path("used.json").read_text())
    assert used["seconds"] < 5 and used["megabytes"] < 200, used
    assert lines[-1].startswith("error: ") and "Traceback" not in read_log()
    assert not Path("it_ran").exists()
    report("malicious files, refused", {"s": used["seconds"], "MB": used["megabytes"]})


def test_the_pickled_payload_runs_where_it_is_loaded(workdir):
    pickle.loads(pickle.dumps(Payload()))
    assert Path("it_ran").exists()


def test_malicious_lines_of_metrics_are_skipped(workdir):
    Path("ck").mkdir()
    Path("ck/metrics.jsonl").write_bytes(DEEP + b'\n{"step": 1, "loss": 2}\n{"step": true}\n[]\n\xff\n')
    assert plot.read_metrics("ck/metrics.jsonl")[0] == {"step": 1, "loss": 2}


# ---- one process at a time -----------------------------------------------------------------------------------------


@pytest.mark.slow
@posix
def test_a_second_trainer_is_refused_and_names_the_first(workdir, report):
    child = start_child(*ENDLESS)
    try:
        wait_until(lambda: list(Path("ck").glob("step_*")), child=child)
        for argv in ([], [RESUME], ["--check"]):
            with pytest.raises(UserError) as refused:
                run(*argv)
            message = str(refused.value)
            assert f"process {child.pid} on {socket.gethostname()} since 20" in message
            assert "(train.py --config run.json --max_iters=100000" in message and "checkpoints.path = ck" in message
        assert run("--checkpoints.path=other", "--max_iters=1") == 0
    finally:
        child.kill()
    assert wait_for_exit(child) == -9
    assert Path("ck/lock").exists()
    assert run(RESUME, "--max_iters=1") == 0 and not Path("ck/lock").exists()
    report("a second trainer on one directory", "refused; accepted once the first was killed")


def without_flock(monkeypatch):
    monkeypatch.setattr(lock_module, "fcntl", None)


@pytest.mark.parametrize("flock", [True, False])
def test_a_lock_is_released(tmp_path, monkeypatch, flock):
    if not flock:
        without_flock(monkeypatch)
    lock = Lock(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        Lock(tmp_path)
    lock.release()
    assert not list(tmp_path.iterdir())
    again = Lock(tmp_path)
    del again  # forgotten, it is given back too
    assert not list(tmp_path.iterdir())


@posix
def test_a_lock_whose_file_was_removed_still_locks_the_directory(tmp_path):
    lock = Lock(tmp_path)
    lock.path.unlink()
    with pytest.raises(UserError, match="another process, which has not written its name"):
        Lock(tmp_path)
    lock.release()


@posix
@pytest.mark.parametrize("left,dead", [
    ({}, False), ({"born": "1"}, True), ({"pid": 2**30}, True), ({"host": "elsewhere"}, False),
    ({"pid": -1}, False), ({"pid": "x"}, False),
])  # fmt: skip
def test_without_flock_the_lock_of_a_dead_process_is_acquired(tmp_path, monkeypatch, left, dead):
    """By number, by the moment of birth of who has that number now, and never another machine's."""
    without_flock(monkeypatch)
    Lock(tmp_path)
    lock = Lock(tmp_path)
    holder = json.loads((tmp_path / "lock").read_text())
    lock.release()
    (tmp_path / "lock").write_text(json.dumps(holder | left))
    if dead:
        assert Lock(tmp_path).path.exists()
    else:
        with pytest.raises(UserError, match="is written to by process"):
            Lock(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b'{"pid": 1}', b"[]"])
def test_without_flock_an_unreadable_lock_is_respected(tmp_path, monkeypatch, content):
    without_flock(monkeypatch)
    (tmp_path / "lock").write_bytes(content)
    with pytest.raises(UserError, match="which has not written its name; .* if it has ended, remove .*lock"):
        Lock(tmp_path)


def test_a_file_system_without_flock_is_locked_by_name(tmp_path, monkeypatch):
    if lock_module.fcntl is None:
        pytest.skip("there is no flock at all")

    def unsupported(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock_module.fcntl, "flock", unsupported)
    lock = Lock(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        Lock(tmp_path)
    lock.release()


# ---- several processes ---------------------------------------------------------------------------------------------


def start_ranks(*argv, world=2, directory=".", **options):
    """A child for each rank, as torchrun would start them; rank r's log is log<r>.txt."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [
        start_child("--config", "run.json", *argv, directory=directory, log=f"log{rank}.txt", RANK=str(rank),
              LOCAL_RANK=str(rank), **env, **options)
        for rank in range(world)
    ]  # fmt: skip


def run_ranks(*argv, world=2, directory="."):
    """Run to the end on that many processes; one is a run without torchrun."""
    children = start_ranks(*argv, world=world, directory=directory)
    codes = [wait_for_exit(child) for child in children]
    assert codes == [0] * world, read_log(Path(directory) / "log0.txt") + read_log(Path(directory) / "log1.txt")


def losses(path):
    lines = untimed_metrics(path)
    return [(line["step"], value) for line in lines for key, value in line.items() if key.endswith("loss")]


def assert_close(a, b):
    assert [step for step, _ in a] == [step for step, _ in b]
    np.testing.assert_allclose([loss for _, loss in a], [loss for _, loss in b], rtol=1e-4)


@pytest.mark.slow
@posix
def test_ranks_compute_what_one_process_does_and_resume_from_each_others_checkpoints(workdir, report):
    halves = ["--max_iters=5", "--lr_decay_iters=10"]
    run_ranks("--checkpoints.path=two")
    run("--checkpoints.path=one")
    assert_close(losses("one/metrics.jsonl"), losses("two/metrics.jsonl"))
    for (name, a), b in zip(newest_state("one")[1].items(), newest_state("two")[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
        if name.endswith("router.bias"):
            assert torch.equal(a, b) and a.any()  # loads are sums over all ranks
    assert "step 10: loss" in read_log("log0.txt") and read_log("log1.txt") == ""  # only the first talks
    report("two processes over gloo beside one", "10 steps")
    if not FULL:  # test_parallel.py resumes from such checkpoints too, in one process group
        return
    run_ranks("--checkpoints.path=half", *halves)
    for world in (2, 1):
        shutil.copytree("half", f"half{world}")
        run_ranks(f"--checkpoints.path=half{world}", RESUME, world=world)
        assert_close(losses("two/metrics.jsonl"), losses(f"half{world}/metrics.jsonl"))
    assert_same(newest_state("half2")[1], newest_state("two")[1])  # exactly, on equal counts
    run("--checkpoints.path=other", *halves)
    run_ranks("--checkpoints.path=other", RESUME)
    assert_close(losses("one/metrics.jsonl"), losses("other/metrics.jsonl"))
    report("checkpoints resumed by other numbers of processes: 2 → 2, 2 → 1, 1 → 2", "after 5 of 10 steps")


@pytest.mark.slow
@posix
def test_ranks_weight_rows_by_their_targets(workdir):
    """Pairs: each row has a number of targets of its own."""
    model = {"arch": "transformer", "kind": "encoder-decoder", "vocab_size": 41, "block_size": 16, "n_layer": 1,
             "n_head": 2, "n_embd": 16}  # fmt: skip
    write_run(model_hyperparams=model, max_iters=3, eval_interval=3, batch_size=2, gradient_accumulation_steps=1)
    encoder = encoders.load("chars:text.txt")
    with TokenFileWriter("data.bin", encoder, kind="pairs") as writer:
        for n in range(40):
            writer.add(np.array(encoder.encode("ab")))
            writer.add(np.array(encoder.encode("abcdefghijklmno"[: 1 + n * 7 % 14])))
    run_ranks("--checkpoints.path=two")
    run("--checkpoints.path=one")
    batch = evaluation.make_batch(prepared().objective, prepared().corpus.train, 5, 0, 2, "cpu")
    assert (batch.y[0] >= 0).sum() != (batch.y[1] >= 0).sum()
    assert_close(losses("one/metrics.jsonl"), losses("two/metrics.jsonl"))


MANY_STEPS = ["--max_iters=30", "--eval_interval=30"]


@pytest.fixture(scope="module")
def many_steps_of_two(tmp_path_factory):
    """The last step's tensors of a run of two processes that nothing disturbs."""
    before = os.getcwd()
    set_up(tmp_path_factory.mktemp("many"))
    run_ranks(*MANY_STEPS)
    tensors = newest_state()[1]
    os.chdir(before)
    return tensors


@pytest.mark.slow
@posix
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_rank_is_killed_the_other_ends_and_both_resume(workdir, many_steps_of_two, report, victim):
    children = start_ranks(*MANY_STEPS)
    wait_until(lambda: Path("ck/metrics.jsonl").exists() and len(untimed_metrics()) > 9, child=children[0])
    children[victim].kill()
    began = time.monotonic()
    assert wait_for_exit(children[1 - victim], 30) == 4, read_log(f"log{1 - victim}.txt")
    seconds = time.monotonic() - began
    last = read_log(f"log{1 - victim}.txt").splitlines()[-2:]
    assert last[0].startswith("error: another process of this run has ended")
    assert "torchrun --nproc_per_node=2" in last[1] and last[1].endswith(RESUME)
    logged = untimed_metrics()[-1]["step"]
    assert find_latest("ck").step >= (logged - 4 if victim == 0 else logged)  # rank 0 loses nothing
    run_ranks(*MANY_STEPS, RESUME)
    assert_same(newest_state()[1], many_steps_of_two)
    report("one of two processes killed; both resumed to identical bits",
         f"rank {victim}: the other ended after {seconds:.1f} s")  # fmt: skip


@pytest.mark.slow
@posix
def test_torchrun_ends_when_a_rank_is_killed(workdir, report):
    launcher = forks.fork_command([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                                   f"--master_port={free_port()}"])  # fmt: skip
    script = [sys.executable, str(torture.ROOT / "train.py"), *ENDLESS]
    Path("worker.sh").write_text('echo $$ > pid$RANK; exec "$@"')
    command = [*launcher, "--no-python", "sh", "worker.sh", *script]
    with open("log.txt", "w") as output, subprocess.Popen(command, stdout=output, stderr=output) as parent:
        try:
            log = Path("ck/metrics.jsonl")
            wait_until(lambda: log.exists() and len(untimed_metrics()) > 3 or parent.poll() is not None)
            assert parent.poll() is None, read_log()
            assert json.loads(Path("ck/lock").read_text())["pid"] == int(Path("pid0").read_text())
            began = time.monotonic()
            os.kill(int(Path("pid1").read_text()), signal.SIGKILL)
            assert parent.wait(30) != 0
        finally:
            parent.kill()
            for pid in map(Path.read_text, Path().glob("pid*")):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
    assert "is saved in ck; to go on:" in read_log()
    report("rank 1 killed under torchrun", f"all ended after {time.monotonic() - began:.1f} s")
    assert run("--max_iters=1", RESUME) == 0


@pytest.mark.slow
@posix
def test_a_batch_that_ranks_cannot_divide_is_an_error(workdir):
    codes = [wait_for_exit(child) for child in start_ranks("--batch_size=3", "--gradient_accumulation_steps=1")]
    assert set(codes) <= {2, 4} and 2 in codes
    message = "error: batch_size = 3: with gradient_accumulation_steps 1 it cannot be divided among 2"
    assert message in read_log("log0.txt")
    assert not Path("ck").exists()


@pytest.mark.slow
@posix
def test_ranks_roll_back_together(workdir):
    children = start_ranks(ROLLBACK, body=torture.poison_one_rank)
    assert [wait_for_exit(child) for child in children] == [0, 0], read_log("log0.txt") + read_log("log1.txt")
    assert [line["step"] for line in untimed_metrics() if "rollback" in line] == [4] and find_latest("ck").step == 10


def test_tensors_are_reduced_in_buckets_of_one_dtype(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET_SIZE", 10)
    sizes = [4, 6, 1, 12, 3, 3]
    tensors = [torch.zeros(n) for n in sizes] + [torch.zeros(2, dtype=torch.float64)]
    found = [[t.numel() for t in bucket] for bucket in distributed.bucket_tensors(tensors)]
    assert found == [[4, 6], [1], [12], [3, 3], [2]]


def test_devices_that_cannot_be_shared_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match='device = "mps": several processes need'):
        distributed.join_processes(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="lower --nproc_per_node to 1"):
        distributed.join_processes(torch.device("cuda"))


# ---- properties ----------------------------------------------------------------------------------------------------
# Any string through the encoder: tests/data/test_encoder.py. Random values in a stand-in config:
# tests/common/test_config.py.

NUMBERS = st.integers(-3, 100) | st.integers() | st.floats() | st.sampled_from([10**400, 2**63, 0, -0.0, 1e-320])
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=6) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
PRESETS = sorted(path.name for path in (torture.ROOT / "config").glob("*.json") if path.name != "schema.json")
thorough = settings(max_examples=count(60, 2_000), deadline=None, suppress_health_check=list(HealthCheck))


def to_json_data(run) -> dict:
    return json.loads(json.dumps(to_dict(run)))


def places(data: dict, prefix=()) -> list[tuple]:
    """The path of every key, sections and their keys."""
    found = [(*prefix, key) for key in data]
    return found + [place for key, value in data.items() if isinstance(value, dict)
                    for place in places(value, (*prefix, key))]  # fmt: skip


@functools.cache
def load_preset(name: str) -> dict:
    return to_json_data(load_run(["--config", name], CONFIGS))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name):
    raw = load_preset(name)
    again, problems = check(run_class(CONFIGS, raw["model_hyperparams"]["arch"]), raw)
    assert not problems and to_json_data(again) == raw


@pytest.mark.slow
@thorough
@given(st.data())
def test_any_mutation_of_a_config_is_valid_or_refused_by_name(data):
    """One or two keys get another value, an extra key appears, or one goes; what is valid survives JSON."""
    raw = copy.deepcopy(load_preset(data.draw(st.sampled_from(PRESETS))))
    changed = []
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places(raw)))
        *parents, key = place
        target = raw
        for parent in parents:
            target = target[parent]
        how = data.draw(st.sampled_from(["change", "change", "change", "add", "remove"]))
        if how == "remove":
            del target[key]
        else:
            key = key if how == "change" else key + "x"
            target[key] = data.draw(JUNK)
        changed.append(key)
    cls = run_class(CONFIGS, load_preset(PRESETS[0])["model_hyperparams"]["arch"])
    model = raw.get("model_hyperparams")
    arch = model.get("arch", "strawberry") if isinstance(model, dict) else None
    if isinstance(arch, str) and arch in CONFIGS:
        cls = run_class(CONFIGS, arch)
    run, problems = check(cls, raw)
    assert (run is None) == bool(problems)
    for line in problems:
        assert any(key in line for key in changed) or "arch" in changed or "kind" in changed, (line, changed)
        line.encode()
    if run is not None:
        assert to_json_data(check(cls, to_json_data(run))[0]) == to_json_data(run)


KEYS = sorted(dotted_names(run_class(CONFIGS, "transformer")))


@pytest.mark.slow
@thorough
@given(st.sampled_from(PRESETS), st.sampled_from(KEYS), st.text(max_size=12))
def test_any_override_is_a_run_or_a_user_error(name, key, text):
    try:
        load_run(["--config", name, f"--{key}={text}"], CONFIGS)
    except UserError as error:
        assert str(error)


@pytest.mark.slow
def test_ten_thousand_mutated_headers_are_refused_or_read(workdir, report):
    """Half of them with a checksum that fits."""
    rng = np.random.default_rng(7)
    sound = Path("data.bin").read_bytes()
    outcomes = {"read": 0, "refused": 0}
    number = count(10_000, 100_000)
    for i in range(number):
        data = bytearray(sound[:256])
        for place in rng.integers(0, 256, rng.integers(1, 5)):
            data[place] = rng.integers(0, 256)
        if i % 4 == 0:
            at = int(rng.choice([32, 40, 48, 56, 64]))
            data[at : at + 8] = int(rng.integers(0, 2**63)).to_bytes(8, "little")
        head = sign_header(bytes(data)) if i % 2 else bytes(data)
        with open("data.bin", "r+b") as file:
            file.write(head)
        try:
            tokens = TokenFile("data.bin").read_rows(np.array([0, 7]), 17)
            assert tokens.shape == (2, 17) and tokens.max() < Header.from_bytes(head, "").vocab_size
            outcomes["read"] += 1
        except UserError as error:
            assert "data.bin" in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > number // 100, outcomes
    report("mutated token-file headers", f"{number:,}: {outcomes['refused']:,} refused, {outcomes['read']:,} read")


# ---- long runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_long_run_leaks_no_memory_files_or_time(workdir, report):
    require(Path("/proc/self/fd").exists(), "/proc, from which memory and open files are read")
    steps = count(400, 20_000)
    model = TINYSTAR | {"block_size": 8, "n_head": 1, "n_embd": 8}
    rarely = {"eval_interval": steps // 8, "checkpoints": {"path": "ck", "interval": steps // 24}}
    write_run(model_hyperparams=model, batch_size=1, optimizer_hyperparams={}, max_iters=steps, **rarely)
    assert wait_for_exit(start_child("--config", "run.json", body=torture.record_growth), 1200) == 0, read_log()
    growth = json.loads(Path("growth.json").read_text())  # eight times: anonymous memory in MB, open files, CPU seconds
    memory, descriptors, seconds = (np.array(column) for column in zip(*growth, strict=True))
    assert np.ptp(descriptors[1:]) == 0, descriptors
    # the least of three at the end, since an allocator's peaks pass, and the middle of three, since it may start low
    assert memory[-3:].min() - np.median(memory[1:4]) < 6, memory
    each = np.diff(seconds) / (steps / 8)
    assert np.median(each[-3:]) < 2 * np.median(each[1:4]), each
    assert [line["step"] for line in untimed_metrics() if "loss" in line] == list(range(1, steps + 1))
    report(
        f"{steps:,} steps", f"memory {memory[3]:.0f} MB after half, {memory[-1]:.0f} MB at the end; "
        f"{descriptors[-1]:.0f} open files throughout; {1e3 * each[3]:.2f} and {1e3 * each[-1]:.2f} ms of CPU per step",
    )  # fmt: skip


# ---- odd surroundings ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_nothing(workdir, monkeypatch, six_steps):
    """Every moment is before the last one, and the newest files are the oldest."""
    clock = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    with monkeypatch.context() as patch:
        at_call(patch, TrainStep, "update_weights", 5, terminate)
        assert run(*SIX_STEPS) == 143
    for age, path in enumerate(sorted(Path("ck").rglob("*"), reverse=True)):
        os.utime(path, (10**9 + age, 10**9 + age))
    assert run(*SIX_STEPS, RESUME) == 0
    assert_same(newest_state()[1], six_steps)
    lines = [json.loads(line) for line in Path("ck/metrics.jsonl").read_text().splitlines()]
    assert all(line["seconds"] > 0 and line["tokens_per_s"] > 0 for line in lines if "seconds" in line)


@pytest.mark.slow
@posix
@pytest.mark.parametrize("key,path", [("model_path", "bin/tiny.model"), ("checkpoints.path", "bin/ck")])
def test_a_read_only_directory_is_reported_before_anything_is_trained(workdir, key, path):
    if os.geteuid() == 0 and sys.platform != "linux":
        pytest.skip("root may write anywhere")
    Path("bin").mkdir()
    Path("bin").chmod(0o555)
    child = start_child("--config", "run.json", f"--{key}={path}", body=torture.drop_capabilities)
    assert wait_for_exit(child) == 2, read_log()
    last = read_log().splitlines()[-1]
    assert last == f"error: {key} = {path}: bin cannot be written to; name another path, or change the rights"
    assert not Path("ck").exists()
    child = start_child("--config", "run.json", "--max_iters=1", body=torture.drop_capabilities)
    assert wait_for_exit(child) == 0, read_log()


@pytest.mark.slow
@posix
def test_paths_with_spaces_and_letters_of_any_alphabet(workdir, capsys):
    odd = workdir / "une étude — 研究 (1) 'x'"
    odd.mkdir()
    for name in ("text.txt", "data.bin", "run.json"):
        shutil.copy(name, odd / f"µ {name}")
    os.chdir(odd)
    argv = ["--config", "µ run.json", "--dataset.path=µ data.bin", "--encoder_path=chars:µ text.txt",
            "--checkpoints.path=чек поинты", "--model_path=modèle 模/tiny", "--img_path=bilder ß"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, TrainStep, "update_weights", 3, terminate)
        assert train.main(argv) == 143
    line = capsys.readouterr().out.rstrip().splitlines()[-1]
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True).stdout.splitlines()
    assert words[-1] == RESUME and words[2:-1] == argv  # what it says can be pasted
    assert train.main(words[2:]) == 0
    assert load_model("modèle 模/tiny")[2]["step"] == 10


@pytest.mark.slow
@posix
def test_presets_are_found_and_data_is_missed_in_any_working_directory(tmp_path):
    """The presets are found from everywhere; the data are looked for in the working directory, and the error
    names the command that makes them."""
    command = forks.fork_command([sys.executable, str(torture.ROOT / "train.py"), "--config", "tiny.json"])
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.count("\n") == 1 and "prepare.py" in done.stderr


# ---- checking ------------------------------------------------------------------------------------------------------


def test_check_reports_the_run_and_writes_nothing(workdir, capsys, monkeypatch):
    before = files(workdir)
    monkeypatch.setattr(torch, "compile", lambda *arguments, **options: pytest.fail("that takes minutes"))
    assert run("--check", "--compile=true") == 0
    out = capsys.readouterr().out
    trainer = prepared()
    need = trainer.memory_planner.estimate()
    assert f"about {format_bytes(need.fixed + 4 * need.row)} (weights {format_bytes(need.weights)}" in out
    assert trainer.corpus.fingerprint[:12] in out and trainer.encoder.fingerprint[:12] in out and "read whole" in out
    assert re.search(r"\nfirst batch  loss 3\.\d+, after \d+\.\d\d s", out)
    assert out.endswith("nothing was written\n")
    shutil.rmtree("ck")
    shutil.rmtree("out")
    assert files(workdir) == before


@pytest.mark.slow
def test_check_of_a_resumed_run_changes_nothing(workdir, capsys):
    run("--max_iters=4")
    before = files(workdir)
    assert run("--check", RESUME) == 0
    assert files(workdir) == before and "resuming ck/step_00000004" in capsys.readouterr().out.replace(os.sep, "/")


def change_data():
    run("--max_iters=1")
    runs.write_corpus("data.bin", runs.TEXT[:-9])


def corrupt_data():
    data = bytearray(Path("data.bin").read_bytes())
    data[300] ^= 1
    Path("data.bin").write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("argv,prepare,message", [
    (["--dataset.path=none.bin"], None, "there is no token file none.bin"),
    (["--encoder_path=none.bin"], None, "no encoder at 'none.bin'"),
    (["--model_path=run.json/model"], None, "model_path = run.json/model: run.json is a file, not a directory"),
    (["--checkpoints.path=run.json"], None, "checkpoints.path = run.json: run.json is a file, not a directory"),
    (["--model_path=" + "x" * 300 + "/m"], None, "File name too long"),
    (["--learning_rat=1"], None, "learning_rate"),
    ([RESUME], None, "no checkpoint to resume from"),
    ([RESUME], change_data, "the dataset has changed"),
    ([], corrupt_data, "is damaged: the tokens' SHA-256"),
])  # fmt: skip
def test_check_finds_errors_of_a_run(workdir, argv, prepare, message):
    if prepare:
        prepare()
    before = files(workdir)
    with pytest.raises(UserError, match=re.escape(message)):
        run("--check", *argv)
    assert files(workdir) == before


def test_check_warns_of_too_little_memory_and_disk(workdir, monkeypatch, capsys):
    monkeypatch.setattr(memory, "device_memory", lambda device: (1000, 2000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    assert run("--check") == 0
    warnings = capsys.readouterr().err
    assert "more memory than there is. Halve batch_size" in warnings and "may fill the disk" in warnings
