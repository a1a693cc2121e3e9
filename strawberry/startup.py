"""What SIGINT and SIGTERM do before a program's main function runs, and after it; standard streams that are closed.

Importing torch takes seconds, in which there is nothing to save. A KeyboardInterrupt there prints a traceback, or is
lost in a library's callback. So each script calls `exit_on` before its other imports, and `strawberry.common.run_cli`
calls `restore_handlers` when `main` begins.
"""

import contextlib
import os
import signal
import sys

replaced: dict[int, object] = {}  # signal number → the handler before `exit_on`


def exit_on(*numbers: int) -> None:
    """End the process at once on these signals: one line on stderr, exit code 128 + number.

    A signal that is ignored, as SIGINT is in a background job of a shell script, stays ignored.
    """
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            replaced[number] = signal.signal(number, exit_at_once)


def exit_at_once(number: int, frame: object) -> None:
    if os.environ.get("RANK", "0") == "0":  # torchrun signals all processes of a machine
        with contextlib.suppress(OSError):
            os.write(2, f"{start_line()}{'interrupted' if number == signal.SIGINT else 'terminated'}\n".encode())
    os._exit(128 + number)


def start_line() -> str:
    """A line end on a terminal, which shows ^C behind whatever was printed last; nothing elsewhere."""
    return "\n" if os.isatty(2) else ""


def restore_handlers() -> None:
    for number, handler in replaced.items():
        signal.signal(number, handler)


def replace_closed_streams() -> None:
    """Open the null device for each standard stream that is closed (`python train.py >&-`), for which Python has None,
    so that no other file gets its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open until the process ends)
