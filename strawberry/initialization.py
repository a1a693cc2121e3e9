"""Build a model without drawing its weights."""

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class SkipInit(TorchFunctionMode):
    """Leaves parameters as they were allocated, for saved values to come.

    It saves the time of drawing them and the caller's dice; and memory that is not yet written to takes no room, so
    that a file may claim any shape until it has been compared with what the file holds.
    """

    FILLS = (Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        fills = func in self.FILLS or getattr(func, "__module__", "") == "torch.nn.init"
        if fills and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)
