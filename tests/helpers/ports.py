"""A port for a server or a group of processes that a test starts."""

import random
import socket
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def own_ports() -> range:
    """The ports below those that the kernel gives to connections and to servers that ask for any."""
    first = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32768
    return range(max(first - 16384, 1024), first)


def free_port() -> int:
    """A port that is free on 127.0.0.1, and stays so until a process that the test starts has it.

    The kernel's own choice (port 0) would not stay free: once the socket is closed, the kernel gives the port to
    somebody's next connection, in other tests too. The random choice keeps apart the workers of one run.
    """
    ports = own_ports()
    while True:
        with socket.socket() as found:
            try:
                port = random.SystemRandom().choice(ports)  # no seed: workers may share one
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
