"""Small functions that all operations share."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor

from strawberry.ops.triton.common import HALF_DTYPES


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without a learned scale."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def to_accum_dtype(x: Tensor) -> Tensor:
    """x in float32 if it has a half type: sums, softmax and standard deviations are accumulated in float32. Other types
    are unchanged."""
    return x.float() if x.dtype in HALF_DTYPES else x


def no_autocast(x: Tensor):
    """A context in which autocast does not cast matrix products to a half type."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Under autocast, x in autocast's dtype, so that the residual stream takes half the bytes; otherwise x."""
    kind = "cpu" if x.is_meta else x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
