"""The machine itself: its name, a clock that waits for it, memory, and the speeds that bound all others."""

import contextlib
import os
import re
import statistics
import time
from pathlib import Path

import torch

from strawberry import machine


def peak_resident_bytes() -> int | None:
    """The peak resident memory of this process in bytes, torch included; None where the system does not report it."""
    with contextlib.suppress(OSError, TypeError):  # psutil has no peak; getrusage's counts the parent's before exec
        line = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(line[1]) * 1024
    return None


def describe_device(device: torch.device) -> str:
    """The device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    model = ""
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = found[1].strip() if found else ""
    return f"{device.type}{f' {model}' if model else ''}, {os.cpu_count()} cores"


COPY_BYTES = (2**28, 2**30)  # bytes, on a CPU and on a GPU: many times the size of their caches


def measure_copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a tensor larger than any cache: the median of ten."""
    source = torch.ones(COPY_BYTES[device.type == "cuda"] // 4, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        began = synchronized_time(device)
        target.copy_(source)
        times.append(synchronized_time(device) - began)
    return 2 * source.nbytes / statistics.median(times[2:])


def synchronized_time(device: torch.device) -> float:
    """Seconds, after the device has finished all that is queued."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def get_free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate; on CUDA with those that torch's allocator has reserved."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return machine.memory()[0]


MATMUL_SIZES = (1024, 8192)  # rows and columns of the matrices whose product sets the ceiling, on a CPU and on a GPU


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square product of random numbers: the median of ten."""
    n = MATMUL_SIZES[device.type == "cuda"]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(13):
        began = synchronized_time(device)
        torch.mm(a, b)
        times.append(synchronized_time(device) - began)
    return 2 * n**3 / statistics.median(times[3:])
