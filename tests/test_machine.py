"""In CI every tool that a test needs is there, or the test fails and names it; elsewhere the test is skipped. A free
port stays free."""

import re
import socket
import sys
from pathlib import Path

import pytest
from _pytest.outcomes import Failed, Skipped
from machine import is_ci, require, require_module, require_program
from ports import RANGE, free_port

TESTS = Path(__file__).parent


@pytest.mark.parametrize("value,expected", [("true", True), ("1", True), ("false", False), ("0", False), ("", False)])
def test_ci_is_what_the_environment_says(monkeypatch, value, expected):
    monkeypatch.setenv("CI", value)
    assert is_ci() == expected
    monkeypatch.delenv("CI")
    assert not is_ci()


@pytest.mark.parametrize("ci,outcome", [("true", Failed), ("", Skipped)])
def test_a_tool_that_is_missing_is_named(monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="no_such_browser or no_such_other"):
        require_program("no_such_browser", "no_such_other")
    with pytest.raises(outcome, match="package no_such_package"):
        require_module("no_such_package")
    with pytest.raises(outcome, match="a tmpfs"):
        require(False, "a tmpfs")


def test_a_tool_that_is_there_is_used(monkeypatch, tmp_path):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / ("second.exe" if sys.platform == "win32" else "second")
    program.touch(0o755)
    assert require_program("first", "second") == str(program)
    require_module("pytest", whole_file=True)


def test_tests_skip_through_these_functions():
    """A skip that CI does not see hides that a test never runs; platforms and GPUs are no tools."""
    own = re.compile(r"importorskip|skipif\([^)]*(?:which|find_spec|exists\()|pytest\.skip\(")
    allowed = ("there is no flock at all", "root may write anywhere", "this machine has it")
    for path in sorted(set(TESTS.rglob("*.py")) - {TESTS / "helpers" / "machine.py", Path(__file__)}):
        found = [line for line in path.read_text(encoding="utf-8").splitlines() if own.search(line)]
        assert not [line for line in found if not any(reason in line for reason in allowed)], path.name


def test_a_free_port_is_none_that_the_kernel_gives_away():
    """So that no connection of another test takes it before the process for which it was found."""
    require(RANGE.exists(), str(RANGE))
    first, last = map(int, RANGE.read_text().split())
    for _ in range(20):
        port = free_port()
        assert 1024 <= port < first <= last
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


def test_no_test_lets_the_kernel_choose_a_port_for_a_process_of_its_own():
    """A server of the test's own process may: it keeps the port. One that is closed again loses it."""
    chosen = re.compile(r"\.bind\(\([^)]*, 0\)\)")
    assert chosen.search('s.bind(("127.0.0.1", 0))')
    assert [path.name for path in TESTS.rglob("*.py") if chosen.search(path.read_text(encoding="utf-8"))
            and path != Path(__file__)] == []  # fmt: skip
