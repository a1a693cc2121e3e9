"""Activations of feed-forwards, with their gradients in plain PyTorch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(h: Tensor) -> Tensor:
    """u ⊙ silu(g) for h = (u, g), concatenated over the last axis (arXiv 2002.05202)."""
    u, g = h.chunk(2, dim=-1)
    return u * F.silu(g)


def swiglu_backward(h: Tensor, grad: Tensor) -> Tensor:
    (u, g), s = h.chunk(2, dim=-1), h.chunk(2, dim=-1)[1].sigmoid()
    return torch.cat((grad * g * s, grad * u * s * (1 + g * (1 - s))), dim=-1)


def gelu_backward(h: Tensor, grad: Tensor) -> Tensor:
    return grad * (torch.special.ndtr(h) + h * (-h * h / 2).exp() / math.sqrt(2 * math.pi))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by a tanh, within 5e-4 of the exact one (arXiv 1606.08415, section 2): what GPT-2's checkpoints compute."""
    return F.gelu(x, approximate="tanh")


def gelu_tanh_backward(h: Tensor, grad: Tensor) -> Tensor:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (h + 0.044715 * h**3))
    return grad * ((1 + t) / 2 + h / 2 * (1 - t * t) * c * (1 + 3 * 0.044715 * h * h))


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS = {  # name: (f, backward), where backward(h, gradient of f(h)) is the gradient of h
    "gelu": (F.gelu, gelu_backward),
    "gelu_tanh": (gelu_tanh, gelu_tanh_backward),
    "relu": (F.relu, lambda h, grad: grad * (h > 0)),
    "relu2": (relu2, lambda h, grad: grad * 2 * F.relu(h)),
    "swiglu": (swiglu, swiglu_backward),
    "identity": (lambda h: h, lambda h, grad: grad),
}
