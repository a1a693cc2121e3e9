"""Ctrl-C ends every program with one line and exit code 130, whenever it comes.

`python -X importtime` writes a line on stderr for each import, and a signal is sent after a given line. The pipe holds
a few lines only, so that the program cannot get far ahead, however busy the machine is.
"""

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
@pytest.mark.parametrize("more", [1, 40, 90])  # imports after the handler is set
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
