"""Choose the torch device."""

import os
import shutil

import torch

from strawberry.common import UserError


def choose_device(name: str, spelling: str = 'device = "{}"') -> torch.device:
    """The device of that name; "auto" is the first available of cuda, mps and cpu. Raises UserError if the device is
    not available; `spelling` is how the user writes the option."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, is_available in available.items() if is_available)
    if not available[name]:
        raise UserError(f'{spelling.format(name)}: torch finds none on this machine; use "auto" or "cpu"')
    return torch.device(name)


def has_cxx_compiler() -> bool:
    """Whether the C++ compiler that torch.compile needs on a CPU is installed."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++", "cl"))
