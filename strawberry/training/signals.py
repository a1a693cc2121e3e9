"""Handle SIGINT and SIGTERM, and defer them while state is inconsistent."""

import contextlib
import os
import signal
import threading
import time

RERAISE_INTERVAL = 1.0  # seconds after which an exception that was lost is raised again
GRACE_PERIOD = 3.0  # seconds after a signal within which a step may still finish


class Interrupted(BaseException):
    """SIGINT or SIGTERM was received. A BaseException, so that `except Exception` in other code does not catch it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Raises Interrupted on SIGINT and SIGTERM, but never while state is inconsistent.

    The first signal raises Interrupted immediately, except inside `with signals.deferred():`, where it is raised at the
    end of the block. A second signal ends the process, or raises KeyboardInterrupt if not `exits`. An exception raised
    inside a callback may be lost (torch.compile has many callbacks), so it is raised again every RERAISE_INTERVAL
    seconds until it is caught.
    """

    def __init__(self, exits: bool = True):
        self.exits = exits
        self.received: int | None = None
        self.at = 0.0  # time of the signal, by time.monotonic()
        self.caught = False  # Interrupted was caught and is not raised again
        self.depth = 0  # nesting depth of deferred() blocks
        self.is_remote = False  # another process of this run received the signal, and this one acts on it too

    def __enter__(self) -> "Signals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
            if hasattr(signal, "SIGALRM"):  # not on Windows
                self.before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.re_raise)
        return self

    def __exit__(self, *_) -> None:
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        if self.is_remote:  # this process's own copy of the signal arrives later and is not a second signal
            self.is_remote = False
            return
        if self.received is not None:
            if not self.exits:
                raise KeyboardInterrupt
            os._exit(128 + number)
        self.received, self.at = number, time.monotonic()
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, RERAISE_INTERVAL, RERAISE_INTERVAL)
        if not self.depth:
            raise Interrupted(number)

    def re_raise(self, number: int, frame) -> None:
        if not self.depth and not self.caught:
            raise Interrupted(self.received)

    def raise_if_late(self) -> None:
        """Raise Interrupted if GRACE_PERIOD has passed since the signal. Call it in a deferred() block where the work
        can be abandoned."""
        if self.received is not None and not self.caught and time.monotonic() - self.at > GRACE_PERIOD:
            raise Interrupted(self.received)

    def raise_remote(self, number: int) -> None:
        """Raise Interrupted, even in a deferred() block, because another process received the signal `number`."""
        self.is_remote = self.received is None
        self.received = self.received or number
        raise Interrupted(self.received)

    @contextlib.contextmanager
    def deferred(self):
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        if self.received is not None and not self.depth and not self.caught:
            raise Interrupted(self.received)
