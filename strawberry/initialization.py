"""Build a model without initializing its weights."""

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class SkipInit(TorchFunctionMode):
    """Leaves parameters uninitialized, because saved values will overwrite them.

    This saves time and leaves the caller's random number generator unchanged. Memory that is never written also takes
    no physical memory, so the shapes that a file claims can be compared with its tensors before any memory is used.
    """

    FILLS = (Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        fills = func in self.FILLS or getattr(func, "__module__", "") == "torch.nn.init"
        if fills and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)
