"""Processes of bench.py: each measures or trains apart, so that one that fails takes no other along."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from strawberry.bench.common import SCRIPT


def make_command(role: str, *arguments: str) -> list[str]:
    return [sys.executable, SCRIPT, role, *arguments]


def start(command: list[str], log: Path, jobs: int, **pipes) -> subprocess.Popen:
    """A child out of the terminal's reach: Ctrl-C is for this process, which passes it on once."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    env = dict(os.environ)
    if jobs > 1:
        env = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads, **env}
    apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {"start_new_session": True}
    with open(log, "ab") as file:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": file} | pipes
        return subprocess.Popen(command, stderr=file, env=env, **pipes, **apart)


def stop_all(children: list[subprocess.Popen], patience: float = 60) -> None:
    """Let each finish its step and save; a second Ctrl-C, or the end of patience, ends them."""
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
    """Why a child failed: the last `error:` of its log, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")


def run_in_turns(role: str, arguments: list[list[str]]) -> list[dict]:
    """What child processes print, a JSON object each. All get ready at once, then one after another is told to go on;
    of one that fails, {"why": …}."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = dict(os.environ)
    if len(arguments) > 1:
        threads = str(max(1, (os.cpu_count() or 1) // len(arguments)))
        env = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads, **env}
    children = [subprocess.Popen(make_command(role, *words), env=env, **pipes) for words in arguments]
    rows = []
    try:
        before_ready = [read_until_ready(child) for child in children]
        for child, lines in zip(children, before_ready, strict=True):
            lines += child.communicate("go\n" if child.poll() is None else None)[0].splitlines()
            rows.append(parse_result(lines, child.returncode))
    finally:
        for child in children:
            child.kill()
            child.wait()
    return rows


def read_until_ready(child: subprocess.Popen) -> list[str]:
    """What a child prints before it is ready, or all if it ends."""
    return list(itertools.takewhile(lambda line: line != "ready\n", child.stdout))


def parse_result(lines: list[str], code: int) -> dict:
    lines = [line.strip() for line in lines if line.strip()]
    if code == 0 and lines:
        return json.loads(lines[-1])
    why = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no output")
    return {"why": why.removeprefix("error: ")}
