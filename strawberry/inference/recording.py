"""Record the operations of a decode step on a CPU and replay them without the Python code around them.

For one token of a small model, the code of modules, contexts and shapes takes as long as the operations themselves. A
recording does for a CPU what a CUDA graph does for a GPU, under the same conditions: the operations do not depend on
values, and the tensors that the step reads and writes keep their addresses. A replay calls the same kernels with the
same arguments in the same order, so its results are equal bit for bit.

Index:  recording · simplification · code
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# ---- recording -----------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call of an operation: torch.ops.aten.mm.default, for example."""

    op: Any
    args: tuple
    kwargs: dict
    result: Any  # a tensor, several, or None

    @property
    def inputs(self) -> list[Tensor]:
        return [*iter_tensors(self.args), *iter_tensors(tuple(self.kwargs.values()))]

    @property
    def outputs(self) -> list[Tensor]:
        return list(iter_tensors(self.result))


class Recorder(TorchDispatchMode):
    """A context that lists the operations that run in it. It keeps all their results, so that no two tensors have the
    same id."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise the first call loads torch._dynamo, which takes a second

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.calls.append(Call(op, args, kwargs or {}, result))
        return result


def iter_tensors(tree) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from iter_tensors(branch)


class RecordedSteps:
    """A recording of a step for each key. A key's first launch runs and records the step, later ones replay it.
    threads: as many compute a step; None: torch's number.
    """

    def __init__(self, run: Callable, threads: int | None = None):
        self.run, self.replays, self.threads = run, {}, threads

    def launch(self, *key) -> None:
        with torch.inference_mode(), use_threads(self.threads or torch.get_num_threads()):
            if key in self.replays:
                self.replays[key]()
            else:
                with Recorder() as recorder:
                    self.run(*key)
                self.replays[key] = make_replay(recorder.calls)


@contextmanager
def use_threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_replay(calls: list[Call]) -> Callable[[], None]:
    """A function that repeats these calls with the tensors that existed before them."""
    return generate_code(remove_unused(simplify(calls)))


# ---- simplification ------------------------------------------------------------------------------------------------


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass
class Program:
    """Calls, and the tensors that they compute."""

    calls: list[Call] = field(default_factory=list)
    same: dict[int, Tensor] = field(default_factory=dict)  # id of a result → an equal tensor that is computed before it
    computed: set[int] = field(default_factory=set)  # ids of the results that a replay computes
    roots: dict[int, Tensor] = field(default_factory=dict)  # storage → the computed tensor that allocates it

    def resolve(self, tensor: Tensor) -> Tensor:
        return self.same.get(id(tensor), tensor)

    def keep(self, call: Call) -> None:
        self.calls.append(call)
        inputs = set(map(id, call.inputs))
        for tensor in call.outputs:
            if id(tensor) not in inputs:
                self.computed.add(id(tensor))
                self.roots.setdefault(storage(tensor), tensor)


def simplify(calls: list[Call]) -> Program:
    """Leave out calls whose result is known: views of tensors that exist before the step, tensors that do not depend on
    values, and repeated calls with the same arguments. A view of a view becomes one view.

    A storage has a time: the number of calls that have written to it. Equal calls have equal results if the storages of
    their arguments have equal times, and nothing writes to the results.
    """
    written = {storage(tensor) for call in calls for tensor in list_written(call)}
    program, times, first, constants = Program(), dict.fromkeys(written, 0), {}, set()
    for call in calls:
        changed, places = list_written(call), set(map(storage, call.inputs))
        for tensor in changed:
            times[storage(tensor)] += 1
        if changed or not call.outputs:
            program.keep(call)
        elif all(storage(tensor) in places for tensor in call.outputs):
            for tensor in call.outputs:
                keep_view(program, call, tensor)
        elif is_random(call.op) or any(storage(tensor) in written for tensor in call.outputs):
            program.keep(call)
        elif call.op in SHAPE_ONLY or all(place in constants for place in places):
            constants.update(map(storage, call.outputs))
        elif (key := describe_call(call, program, times)) in first:
            for tensor, earlier in zip(call.outputs, first[key], strict=True):
                program.same[id(tensor)] = program.roots[storage(tensor)] = earlier
        else:
            first[key] = call.outputs
            program.keep(call)
    return program


def is_random(op) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags


# results that depend on the arguments' shapes and dtypes, but not on their values
SHAPE_ONLY = {torch.ops.aten.ones_like.default, torch.ops.aten.zeros_like.default, torch.ops.aten.new_zeros.default}


def keep_view(program: Program, call: Call, view: Tensor) -> None:
    """Compute a view as one view of the tensor that allocates its storage, or not at all if it is equal to that, or if
    the storage exists before the step.
    """
    root = program.roots.get(storage(view))
    if root is None or id(view) in program.computed:
        return
    if view.dtype != root.dtype or view.is_complex():  # as_strided changes neither dtype nor conjugation
        program.keep(call)
        return
    geometry = (view.size(), view.stride(), view.storage_offset())
    if geometry == (root.size(), root.stride(), root.storage_offset()):
        program.same[id(view)] = root
    else:
        program.keep(Call(torch.ops.aten.as_strided.default, (root, *geometry), {}, view))


def list_written(call: Call) -> list[Tensor]:
    """The arguments that a call changes."""
    if not call.op._schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in call.op._schema.arguments), call.args, strict=False)) | call.kwargs
    writes = [argument.name for argument in call.op._schema.arguments if argument.is_write]
    return [tensor for name in writes for tensor in iter_tensors(given.get(name))]


def describe_call(call: Call, program: Program, times: dict[int, int]) -> tuple:
    """Equal for calls with equal results."""

    def describe(value):
        if isinstance(value, Tensor):
            value = program.resolve(value)
            return id(value), times.get(storage(value), 0)
        if isinstance(value, (list, tuple)):
            return tuple(map(describe, value))
        return type(value), value if value == value else "nan"

    return call.op, describe(call.args), tuple((name, describe(value)) for name, value in sorted(call.kwargs.items()))


def remove_unused(program: Program) -> Program:
    """Leave out the calls that change nothing and whose results no later call reads."""
    used, kept = set(), []
    for call in reversed(program.calls):
        if call.op._schema.is_mutable or not call.outputs or any(id(tensor) in used for tensor in call.outputs):
            used.update(id(program.resolve(tensor)) for tensor in call.inputs)
            kept.append(call)
    return Program(kept[::-1], program.same, program.computed, program.roots)


# ---- code ----------------------------------------------------------------------------------------------------------

# Operations that torch's Python functions of the same name compute with the same arguments. A call of these takes a
# microsecond less than a call of torch.ops.
DIRECT = frozenset((
    "abs", "add", "add_", "amax", "any", "argmax", "as_strided", "bitwise_not", "cat", "clamp", "copy_", "cos",
    "cumsum", "div", "embedding", "eq", "exp", "flatten", "gather", "ge", "gelu", "gt", "index_put_", "isnan",
    "layer_norm", "le", "linear", "lt", "masked_fill", "matmul", "max", "maximum", "minimum", "mul", "neg", "pad",
    "pow", "relu", "remainder", "rms_norm", "rsqrt", "scaled_dot_product_attention", "scatter_add_", "sigmoid", "silu",
    "sin", "softmax", "sort", "square", "stack", "sub", "sum", "tanh", "topk", "where",
))  # fmt: skip


def find_function(op) -> Callable:
    name = op._schema.name.partition("::")[2]
    if op.namespace == "aten" and name in DIRECT:
        for owner in (torch._C._VariableFunctions, torch._C._nn, torch._C.TensorBase):
            if hasattr(owner, name):
                return getattr(owner, name)
    return op


class CodeWriter:
    """Writes a Python function with a line for each call. A variable whose tensor is no longer read is used again."""

    def __init__(self, program: Program):
        self.program, self.names, self.constants = program, {}, {}
        self.free, self.counter = [], itertools.count()
        reads = ((i, tensor) for i, call in enumerate(program.calls) for tensor in call.inputs)
        self.last_use = {id(program.resolve(tensor)): i for i, tensor in reads}

    def write(self) -> tuple[str, dict]:
        """The source, and its global variables."""
        lines = ["def replay():", *(self.write_call(i, call) for i, call in enumerate(self.program.calls)), "    pass"]
        return "\n".join(lines), self.constants

    def write_call(self, i: int, call: Call) -> str:
        values = [self.write_value(value) for value in call.args]
        values += [f"{name}={self.write_value(value)}" for name, value in call.kwargs.items()]
        line = f"{self.name_constant(find_function(call.op))}({', '.join(values)})"
        for tensor in {id(tensor): tensor for tensor in map(self.program.resolve, call.inputs)}.values():
            if self.last_use[id(tensor)] == i and id(tensor) in self.names:
                self.free.append(self.names.pop(id(tensor)))
        targets = [self.name_result(tensor) for tensor in call.result] if isinstance(call.result, (list, tuple)) else (
            self.name_result(call.result))  # fmt: skip
        targets = f"({', '.join(targets)},)" if isinstance(targets, list) else targets
        return f"    {line}" if targets == "_" else f"    {targets} = {line}"

    def name_result(self, tensor) -> str:
        """The variable of a result; "_" for one that nothing reads."""
        key = id(tensor)
        if key not in self.program.computed or key not in self.last_use or key in self.names:
            return "_"
        self.names[key] = self.free.pop() if self.free else f"v{next(self.counter)}"
        return self.names[key]

    def write_value(self, value) -> str:
        if isinstance(value, Tensor):
            value = self.program.resolve(value)
            if id(value) in self.program.computed:
                return self.names[id(value)]
            return self.name_constant(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self.write_value, value))}]"
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        return self.name_constant(value)

    def name_constant(self, value) -> str:
        name = f"c{id(value)}"
        self.constants[name] = value
        return name


def generate_code(program: Program) -> Callable[[], None]:
    source, constants = CodeWriter(program).write()
    exec(compile(source, "<recorded step>", "exec"), constants)
    return constants["replay"]
