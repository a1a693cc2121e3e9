"""Small functions that all operations share."""

from torch import Tensor

from strawberry.ops.triton.common import HALF_DTYPES


def to_accum_dtype(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF_DTYPES else x
