"""Child processes of bench.py. Each measurement and each training run has its own, so that a failure stops no other.
On a host of several GPUs, each child uses one of them.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from strawberry.bench.common import SCRIPT
from strawberry.device import choose_device

POLL_SECONDS = 0.3  # between polls of children that run at once


class Caught:
    """The last signal that `interrupt_on_signals` has seen, or None."""

    number: int | None = None


@contextlib.contextmanager
def interrupt_on_signals() -> Iterator[Caught]:
    """Within this context, SIGTERM and SIGHUP (a closed terminal) raise KeyboardInterrupt as Ctrl-C does, so that the
    children are stopped too. A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """
    caught = Caught()

    def interrupt(number, frame):
        caught.number = number
        raise KeyboardInterrupt

    names = [name for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]
    numbers = [number for name in names if signal.getsignal(number := getattr(signal, name)) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_command(role: str, *arguments: str) -> list[str]:
    return [sys.executable, SCRIPT, role, *arguments]


class GpuPool:
    """The host's GPUs. Each child that it starts gets one of them, the one with the fewest running children. With one
    GPU or none, children see the devices of this process.
    """

    def __init__(self, device: str = "auto"):
        names = list_gpus() if choose_device(device).type == "cuda" else []
        self.children: dict[str, list[subprocess.Popen]] = {name: [] for name in names if len(names) > 1}

    @property
    def lanes(self) -> int:
        """The number of children that can measure at the same time."""
        return max(1, len(self.children))

    def start(self, command: list[str], env: dict, **how) -> subprocess.Popen:
        """subprocess.Popen, with the child's GPU in its environment."""
        if not self.children:
            return subprocess.Popen(command, env=env, **how)
        running = {name: sum(child.poll() is None for child in mine) for name, mine in self.children.items()}
        name = min(running, key=running.get)
        child = subprocess.Popen(command, env=env | {"CUDA_VISIBLE_DEVICES": name}, **how)
        self.children[name].append(child)
        return child

    def list_turns(self, children: list[subprocess.Popen]) -> list[list[subprocess.Popen]]:
        """The children in groups that measure one group after the other. A group has at most one child of each GPU."""
        lanes = [[child for child in children if child in mine] for mine in self.children.values()] or [children]
        return [[child for child in turn if child is not None] for turn in itertools.zip_longest(*lanes)]


def list_gpus() -> list[str]:
    """The GPUs that this process sees, each as CUDA_VISIBLE_DEVICES names it: an index of the host or a UUID."""
    count, chosen = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(i) for i in range(count)]
    return [name.strip() for name in chosen.split(",")][:count]  # CUDA stops at the first entry that is no GPU


def share_threads(jobs: int) -> dict[str, str]:
    """The environment of one of `jobs` children: a share of the CPU threads each, unless the user has set a number."""
    if jobs == 1:
        return dict(os.environ)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    return {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads, **os.environ}


def start(
    command: list[str], log: Path, jobs: int, gpus: GpuPool, extra: dict[str, str] | None = None, **pipes
) -> subprocess.Popen:
    """Start a child in a process group or session of its own, so that the terminal's Ctrl-C does not reach it: this
    process receives it and signals the child once.

    stderr goes to `log`, and stdout too unless `pipes` says otherwise. With several jobs, each child gets a share of
    the CPU threads. `extra`: environment variables of the child.
    """
    apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
    with open(log, "ab") as file:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": file} | pipes
        return gpus.start(command, share_threads(jobs) | (extra or {}), stderr=file, **pipes, **apart)


class RunPool:
    """Up to `jobs` simultaneous training runs, each in the folder runs/KEY until its result is in runs/KEY.json. A run
    is an object with a `key`."""

    def __init__(self, runs: Path, jobs: int, device: str):
        self.runs, self.jobs, self.gpus = runs, jobs, GpuPool(device)
        self.running: dict[str, tuple[Any, subprocess.Popen]] = {}

    @property
    def n_free(self) -> int:
        return self.jobs - len(self.running)

    def folder(self, run) -> Path:
        return self.runs / run.key

    def start_child(self, run, command: list[str], extra: dict[str, str] | None = None) -> None:
        child = start(command, self.folder(run) / "log.txt", self.jobs, self.gpus, extra)
        self.running[run.key] = (run, child)

    def pop_ended(self) -> Iterator[tuple[Any, int]]:
        """Yield (run, exit code) of the children that have ended since the last call."""
        for key, (run, child) in list(self.running.items()):
            if child.poll() is not None:
                del self.running[key]
                yield run, child.returncode

    def describe_failure(self, run, code: int) -> str:
        log = self.folder(run) / "log.txt"
        return f"exit code {code}, {read_failure(log)}; see {log}"

    def stop(self) -> None:
        stop_all([child for _, child in self.running.values()])


def stop_all(children: list[subprocess.Popen], patience: float = 60) -> None:
    """Interrupt the children, so that each finishes its step and saves. Kill them after `patience` seconds or a second
    Ctrl-C.
    """
    try:
        for child in children:
            if child.poll() is None:
                child.terminate() if os.name == "nt" else child.send_signal(signal.SIGINT)
        end = time.monotonic() + patience
        for child in children:
            child.wait(max(0.0, end - time.monotonic()))
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        for child in children:
            child.kill()


def run_group(command: list[str], patience: float = 30) -> subprocess.CompletedProcess:
    """As subprocess.run, with its text output. If this process is interrupted, the child, which may have started
    others, is told to end them, and after `patience` seconds all are killed.
    """
    apart = {} if os.name == "nt" else {"start_new_session": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **apart) as child:
        try:
            out, err = child.communicate()
        except BaseException:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=patience)
            if apart:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
            child.kill()
            raise
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def read_failure(log: Path) -> str:
    """Why a child failed: the last line of its log that begins with `error: `, else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")


def run_in_turns(role: str, arguments: list[list[str]], device: str = "auto") -> list[dict]:
    """The JSON object that each child process prints; {"why": …} for a child that fails. All children prepare at the
    same time, then they measure one at a time; on a host of several GPUs, one at a time on each of them.
    """
    gpus = GpuPool(device)
    with start_measuring(role, arguments, share_threads(len(arguments)), gpus) as (children, before_ready):
        printed = {child.pid: lines for child, lines in zip(children, before_ready, strict=True)}
        for turn in gpus.list_turns(children):
            send_go(turn)
            for child in turn:
                printed[child.pid] += child.communicate()[0].splitlines()
        return [parse_result(printed[child.pid], child.returncode) for child in children]


def run_at_once(role: str, arguments: list[list[str]], jobs: int, device: str = "auto") -> Iterator[tuple[int, dict]]:
    """Run children that measure no speed, up to `jobs` at a time. Yields (index, the JSON object that the child prints,
    or {"why": …} for a child that fails), as they end. Kills the running ones if the caller stops.
    """
    gpus, waiting, running = GpuPool(device), list(enumerate(arguments)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, words = waiting.pop(0)
                printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would fill up)
                how = {"stdin": subprocess.DEVNULL, "stdout": printed, "stderr": subprocess.STDOUT}
                running[index] = (gpus.start(make_command(role, *words), share_threads(jobs), **how), printed)
            for index in [index for index, (child, _) in running.items() if child.poll() is not None]:
                child, printed = running.pop(index)
                with printed:
                    printed.seek(0)
                    yield index, parse_result(printed.read().splitlines(), child.returncode)
            time.sleep(POLL_SECONDS if running else 0)
    finally:
        for child, printed in running.values():
            child.kill()
            child.wait()
            printed.close()


def send_go(children: list[subprocess.Popen]) -> None:
    """Send ready children the line for which they wait before they measure."""
    for child in children:
        with contextlib.suppress(OSError):  # the child has ended
            child.stdin.write("go\n")
            child.stdin.flush()


def run_together(role: str, arguments: list[list[str]]) -> list[dict]:
    """As `run_in_turns`, but all children measure at the same time on one device, each with the number of threads that
    it would use alone.
    """
    with start_measuring(role, arguments, dict(os.environ)) as (children, before_ready):
        send_go(children)
        for child, lines in zip(children, before_ready, strict=True):
            lines += child.communicate()[0].splitlines()
        return [parse_result(lines, child.returncode) for child, lines in zip(children, before_ready, strict=True)]


@contextlib.contextmanager
def start_measuring(
    role: str, arguments: list[list[str]], env: dict, gpus: GpuPool | None = None
) -> Iterator[tuple[list, list]]:
    """Start child processes and wait until each is ready or has failed. Yields (children, lines that each has printed);
    kills the children at the end.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    start_child = gpus.start if gpus else subprocess.Popen
    children = []
    try:
        children += (start_child(make_command(role, *words), env=env, **pipes) for words in arguments)
        yield children, [read_until_ready(child) for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()


def read_until_ready(child: subprocess.Popen) -> list[str]:
    """The lines that a child prints before its `ready` line; all lines if it ends without one."""
    return list(itertools.takewhile(lambda line: line != "ready\n", child.stdout))


def parse_result(lines: list[str], code: int) -> dict:
    lines = [line.strip() for line in lines if line.strip()]
    if code == 0 and lines:
        return json.loads(lines[-1])
    why = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")
    return {"why": why.removeprefix("error: ")}
