"""SIGINT and SIGTERM, deferred to where nothing is half done."""

import contextlib
import os
import signal
import threading
import time

RERAISE_INTERVAL = 1.0  # seconds after which a signal that nobody heard is raised again
GRACE_PERIOD = 3.0  # seconds after a signal in which a step may still be finished


class Interrupted(BaseException):
    """SIGINT or SIGTERM came. A BaseException, so that nobody on the way takes it for an error of their own."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """Lets SIGINT and SIGTERM arrive where nothing is half done, by raising Interrupted there.

    The first one is raised at once, wherever the program is, unless it is inside `with signals.deferred():`; then it is
    raised at the end of that block. A second one ends the process. An exception that comes in the middle of a callback
    gets lost (torch.compile has many), so that it is raised again each RERAISE_INTERVAL seconds until somebody
    catches it.
    """

    def __init__(self):
        self.received: int | None = None
        self.at = 0.0  # when, by time.monotonic()
        self.caught = False  # Interrupted was caught: from here on, nothing is raised again
        self.depth = 0  # of deferred() blocks
        self.is_remote = False  # another process of this run was signalled, and what it told counts for this one

    def __enter__(self) -> "Signals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
            if hasattr(signal, "SIGALRM"):  # on Windows there is none
                self.before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.re_raise)
        return self

    def __exit__(self, *_) -> None:
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame) -> None:
        if self.is_remote:  # its own comes later, and is no second one
            self.is_remote = False
            return
        if self.received is not None:
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
        """To be called in a deferred() block where its work can be given up: raises once GRACE_PERIOD is over."""
        if self.received is not None and not self.caught and time.monotonic() - self.at > GRACE_PERIOD:
            raise Interrupted(self.received)

    def raise_remote(self, number: int) -> None:
        """What a signal that another process got leads to in this one: raises Interrupted, held or not."""
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
