"""Triton kernels for operations where plain PyTorch moves more bytes than necessary. Each has a plain PyTorch version
in strawberry/ops, which is the reference and the fallback without Triton or a GPU.

Importing this package registers the kernels with torch.library as torch.ops.strawberry.*. torch.compile treats them as
opaque operators, and a CUDA graph may capture them, because no host code depends on the values in a tensor. With
TRITON_INTERPRET=1 in the environment they run on the CPU, slowly, for tests. `python bench.py kernels` on a GPU
compares each with float64.
"""

from strawberry.ops.triton import (  # noqa: F401
    aft,
    aft_positional,
    cross_entropy,
    decode_attention,
    float8,
    int8_linear,
    memory,
    memory_step,
    retention,
    rope,
)
