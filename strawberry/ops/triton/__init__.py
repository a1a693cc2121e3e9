"""Triton kernels, for where plain PyTorch moves more bytes than the work needs. Each has a plain PyTorch version in
strawberry/ops, which is the reference, and what runs where Triton or a GPU is missing.

Importing this package registers the kernels with torch.library as torch.ops.strawberry.*, so that torch.compile keeps
them whole and a CUDA graph may capture them: nothing on the host depends on what is in a tensor. With
TRITON_INTERPRET=1 in the environment they run on the CPU, slowly, for tests. `python bench.py kernels` on a GPU holds
each against float64.
"""

from strawberry.ops.triton import (  # noqa: F401
    aft,
    aft_positional,
    cross_entropy,
    decode_attention,
    float8,
    int8_linear,
    retention,
    rope,
)
