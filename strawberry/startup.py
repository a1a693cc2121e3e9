"""What SIGINT and SIGTERM do before a program's main function runs, and after it.

Importing torch takes seconds, in which there is nothing to save. A KeyboardInterrupt there prints a traceback, or is
lost in a library's callback. So each script calls `exit_on` before its other imports, and `strawberry.common.run_cli`
calls `restore_handlers` when `main` begins.
"""

import contextlib
import os
import signal

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
