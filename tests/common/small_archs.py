"""Configs of two architectures that stand in for those of model.py, which needs torch."""

import dataclasses

from strawberry.config import option


@dataclasses.dataclass
class Berry:
    arch: str = option("strawberry", "family", choices=["strawberry"])
    vocab_size: int = option(8192, "tokens", low=2)
    block_size: int = option(256, "context", low=1)
    r_layer: int = option(2, "retention steps", low=0)
    n_layer: int = option(2, "blocks", low=1)
    n_head: int = option(4, "heads", low=1)
    n_embd: int = option(64, "width", low=1)
    n_qkv: int = option(256, "width of q, k, v", low=1)
    window: list[int] | None = option(None, "windows", low=1)
    dropout: float = option(0.0, "share dropped", low=0, below=1)

    def problems(self):
        if self.n_qkv % self.n_head:
            yield "n_qkv", f"must be a multiple of n_head ({self.n_head})"


@dataclasses.dataclass
class Star:
    arch: str = option("tinystar", "family", choices=["tinystar"])
    n_layer: int = option(6, "blocks", low=1)
    ffn_type: str = option("SwiGLU", "feed-forward", choices=["SwiGLU", "GELU"])


ARCHS = {"strawberry": Berry, "tinystar": Star}
