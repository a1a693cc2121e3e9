"""Child processes of bench.py. Each measurement and each training run has its own, so that a failure stops no other."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from strawberry.bench.common import SCRIPT


def make_command(role: str, *arguments: str) -> list[str]:
    return [sys.executable, SCRIPT, role, *arguments]


def gpu_environment(index: int) -> dict[str, str]:
    """The environment variable with which a child sees one GPU: number `index` of those that this process sees."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}


def start(command: list[str], log: Path, jobs: int, extra: dict[str, str] | None = None, **pipes) -> subprocess.Popen:
    """Start a child in a process group or session of its own, so that the terminal's Ctrl-C does not reach it: this
    process receives it and signals the child once.

    stderr goes to `log`, and stdout too unless `pipes` says otherwise. With several jobs, each child gets a share of
    the CPU threads. `extra`: environment variables of the child.
    """
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    env = dict(os.environ)
    if jobs > 1:
        env = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads, **env}
    env |= extra or {}
    apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
    with open(log, "ab") as file:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": file} | pipes
        return subprocess.Popen(command, stderr=file, env=env, **pipes, **apart)


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


def read_failure(log: Path) -> str:
    """Why a child failed: the last line of its log that begins with `error: `, else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")


def run_in_turns(role: str, arguments: list[list[str]]) -> list[dict]:
    """The JSON object that each child process prints; {"why": …} for a child that fails. All children prepare at the
    same time, then they measure one at a time.
    """
    env = dict(os.environ)
    if len(arguments) > 1:
        threads = str(max(1, (os.cpu_count() or 1) // len(arguments)))
        env = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads, **env}
    rows = []
    with start_measuring(role, arguments, env) as (children, before_ready):
        for child, lines in zip(children, before_ready, strict=True):
            lines += child.communicate("go\n" if child.poll() is None else None)[0].splitlines()
            rows.append(parse_result(lines, child.returncode))
    return rows


def run_together(role: str, arguments: list[list[str]]) -> list[dict]:
    """As `run_in_turns`, but all children measure at the same time, each with the number of threads that it would use
    alone.
    """
    with start_measuring(role, arguments, dict(os.environ)) as (children, before_ready):
        for child in children:
            with contextlib.suppress(OSError):  # the child has ended
                child.stdin.write("go\n")
                child.stdin.flush()
        for child, lines in zip(children, before_ready, strict=True):
            lines += child.communicate()[0].splitlines()
        return [parse_result(lines, child.returncode) for child, lines in zip(children, before_ready, strict=True)]


@contextlib.contextmanager
def start_measuring(role: str, arguments: list[list[str]], env: dict) -> Iterator[tuple[list, list]]:
    """Start child processes and wait until each is ready or has failed. Yields (children, lines that each has printed);
    kills the children at the end.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    children = [subprocess.Popen(make_command(role, *words), env=env, **pipes) for words in arguments]
    try:
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
