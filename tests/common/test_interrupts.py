"""Ctrl-C ends every program with one line and exit code 130, whenever it comes.

`python -X importtime` writes a line on stderr for each import, and a signal is sent after a given line. The pipe holds
a few lines only, so that the program cannot get far ahead, however busy the machine is.
"""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from machine import FULL

ROOT = Path(__file__).parents[2]
PAGE = 4096  # bytes: the smallest pipe
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a pipe whose size can be set")


def find_programs() -> list[str]:
    files = [*ROOT.glob("*.py"), *ROOT.glob("strawberry/**/*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in files if "\n    run_cli(" in path.read_text("utf-8"))


PROGRAMS = find_programs()


def command(program: str) -> list[str]:
    parts = Path(program).with_suffix("").parts
    return [program] if len(parts) == 1 else ["-m", ".".join(parts)]


def interrupt(process: subprocess.Popen, line: bytes, more: int) -> str:
    """Send SIGINT `more` lines after the line that ends so. Returns what follows on stderr, without imports."""
    read = iter(process.stderr.readline, b"")
    assert any(text.rstrip().endswith(line) for text in read), "the line never came"
    for _ in range(more):
        assert next(read).startswith(b"import time:")
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read().decode().splitlines()
    return "\n".join(text.rpartition("import time:")[2].rpartition(" | ")[2].strip()
                     for text in rest if not text.startswith("import time:") or "interrupted" in text)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("more", [1, 40, 90] if FULL else [40])  # imports after the handler is set
def test_an_interrupt_during_imports_is_one_line(program, more):
    import fcntl

    words = [sys.executable, "-X", "importtime", *command(program), "--help"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0) as process:
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, PAGE)
        assert interrupt(process, b" strawberry.startup", more) == "interrupted"
    assert process.returncode == 130


def test_every_program_sets_its_handler_before_its_other_imports():
    assert {"train.py", "sample.py", "strawberry/data/assemble.py"} <= set(PROGRAMS)
    for program in PROGRAMS:
        body = ast.parse((ROOT / program).read_text("utf-8")).body
        before = []
        for statement in body[1:]:  # after the docstring
            if isinstance(statement, ast.If):
                break
            before.append(ast.unparse(statement))
        before = [text for text in before if text != "from __future__ import annotations"]
        assert before == ["import signal", "from strawberry import startup"], program
        assert "startup.exit_on(signal.SIGINT" in ast.unparse(statement), program


# ---- at work ---------------------------------------------------------------------------------------------------------

# Runs a script on texts that never end, and tells when it has asked for the first of them.
ENDLESS = """
import itertools, sys
import encoder
script, *sys.argv[1:] = sys.argv[1:]
def read_forever(texts):
    yield next(iter(texts))
    print("\\nasked", flush=True)
    for i in itertools.count():
        yield f"word{i % 999}"
encoder._clean_parts = read_forever
encoder.run_cli(__import__(script).main)
"""


def run_until(words: list[str], expected: bytes, folder: Path) -> tuple[int, str]:
    """Send SIGINT after a line that ends so is on stdout: exit code, and the last line of stderr."""
    options = {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    with open(folder / "errors", "wb") as errors, subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=errors, **options
    ) as process:
        while not (line := process.stdout.readline()).rstrip().endswith(expected):
            assert line, (folder / "errors").read_text("utf-8")
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    written = (folder / "errors").read_text("utf-8")
    assert "Traceback" not in written
    (folder / "errors").unlink()
    return process.returncode, written.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ["encoder", "--input", "text.txt", "--vocab_size", "300", "--output", "out/encoder.bin"],
    ["prepare", "--input", "text.txt", "--vocab_size", "300", "--encoder", "out/encoder.bin", "--output", "out/a.bin"],
], ids=lambda words: words[0])  # fmt: skip
def test_an_interrupt_while_an_encoder_is_trained_leaves_no_file(words, tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 1000)
    assert run_until(["-c", ENDLESS, *words], b"asked", tmp_path) == (130, "interrupted")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["text.txt"]


@pytest.mark.slow
def test_an_interrupt_while_a_text_is_streamed_is_one_line(tmp_path):
    import torch

    import encoder
    from model import build
    from strawberry.model_file import save_model

    (tmp_path / "letters.txt").write_text("abc\n")
    torch.manual_seed(1)
    shape = {"arch": "tinystar", "vocab_size": 8, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
    save_model(tmp_path / "m.tinystar", build(shape), encoder.load(f"chars:{tmp_path / 'letters.txt'}"), {})
    words = [str(ROOT / "sample.py"), "--model", "m.tinystar", "--prompt", "\n", "--length", "1000000", "--ignore_eos"]
    assert run_until(words, b"", tmp_path) == (130, "interrupted")
