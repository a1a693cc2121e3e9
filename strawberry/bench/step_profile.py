"""The kernels of a decode step: how many are launched, and how long each takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from strawberry.bench.common import format_table
from strawberry.bench.hardware import synchronized_time

STEPS = 20
ROWS = 20  # kernels in the table


def profile_steps(step: Callable, device: torch.device) -> dict:
    """Launches and µs of each kernel per step, from STEPS calls of `step`; on a CPU, of each operator. `busy_us` is the
    sum over all kernels, `wall_us` the time from step to step without the profiler.
    """
    on_gpu = device.type == "cuda"
    began = synchronized_time(device)
    for _ in range(STEPS):
        step()
    wall = (synchronized_time(device) - began) / STEPS
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        for _ in range(STEPS):
            step()
        synchronized_time(device)
    kernels = []
    for event in found.key_averages():
        if on_gpu != (event.device_type == DeviceType.CUDA):
            continue
        us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kernels.append({"name": event.key, "launches": event.count / STEPS, "us": us / STEPS})
    kernels.sort(key=lambda kernel: -kernel["us"])
    return {"wall_us": 1e6 * wall, "busy_us": sum(kernel["us"] for kernel in kernels),
            "launches": sum(kernel["launches"] for kernel in kernels), "kernels": kernels}  # fmt: skip


def format_profile(profile: dict) -> str:
    """A table of the ROWS kernels that take the most time, and a line with the sums."""
    lines = []
    for kernel in profile["kernels"][:ROWS]:
        numbers = (kernel["launches"], kernel["us"], kernel["us"] / kernel["launches"])
        lines.append([kernel["name"][:80].replace("|", "¦"), *(f"{number:,.2f}" for number in numbers)])
    total = (f"{profile['launches']:,.1f} launches and {profile['busy_us']:,.1f} µs of kernels in a step of "
             f"{profile['wall_us']:,.1f} µs")  # fmt: skip
    return f"{format_table(['kernel', 'launches', 'µs', 'µs each'], lines)}\n\n{total}"
