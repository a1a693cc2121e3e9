"""Fuse a decode step's graph: each linear map, the norm before it (up to 16 rows), and the bias, the activation and the
residual sum after it become one operation (strawberry/ops/fused_linear.py). This rewrites the graph that torch.compile
records, so that no model has code for it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from strawberry.ops.fused_linear import MAX_GEMV_ROWS, MAX_ROWS, MAX_WEIGHTS
from strawberry.ops.triton import common as kernels
from strawberry.ops.triton.common import HALF_DTYPES

LINEARS = (F.linear, torch._C._nn.linear)
NORMS = {F.layer_norm: "layer", F.rms_norm: "rms", torch.rms_norm: "rms", torch.layer_norm: "layer"}
GELUS = (F.gelu, torch._C._nn.gelu)
ADDS = (operator.add, torch.add)
IN_PLACE = (operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv)
PRODUCTS = (operator.mul, torch.mul)


@dataclass
class FusedLinear:
    """A linear map of the graph and the operations that are fused with it. `end` is the node whose value they
    compute."""

    end: fx.Node
    x: fx.Node
    weight: fx.Node
    scale: fx.Node | None = None
    bias: fx.Node | None = None
    norm: tuple = ("none", None, None, 0.0)  # kind, gain, shift, eps
    activation: str = "identity"
    residual: fx.Node | None = None
    inside: list[fx.Node] = field(default_factory=list)  # nodes that are unused once `end` is replaced

    @property
    def group_key(self) -> tuple:
        """Linear maps with equal keys read the same input and can be computed by one kernel."""
        kinds = (self.scale is None, self.bias is None, self.weight.op, value(self.weight).dtype)
        return (self.x, *self.norm, *kinds)


def compile_fused(module: fx.GraphModule, inputs: list) -> object:
    """A backend of torch.compile: `fuse_linears`, then Inductor."""
    from torch._inductor.compile_fx import compile_fx

    fuse_linears(module.graph)
    module.recompile()
    return compile_fx(module, inputs)


def fuse_linears(graph: fx.Graph) -> int:
    """Replace the linear maps of up to MAX_ROWS rows (in float32 MAX_GEMV_ROWS) in a graph of torch functions, as
    torch.compile records it without gradients. Returns the number of fused operations.
    """
    for node in list(graph.nodes):
        if is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure)
    num_fused, found = 0, [node for node in graph.nodes if match_linear(node) is not None]
    while found:  # matched again, because an earlier match may have fused a node that follows both
        match = match_linear(found.pop(0))
        group = find_group(match, found)
        found = [node for node in found if all(node is not member.inside[0] for member in group)]
        replace(graph, group)
        num_fused += 1
    return num_fused


def is_impure(node: fx.Node) -> bool:
    """Whether a node has side effects, so that it must stay even if its value is unused."""
    changes = node.op == "call_method" and node.target.endswith("_")
    return changes or node.target in IN_PLACE or node.is_impure()


def find_group(match: FusedLinear, found: list[fx.Node]) -> list[FusedLinear]:
    """`match` and up to MAX_WEIGHTS − 1 linear maps of the same input; only `match` if it has an activation, a residual
    sum, or a matrix for each row.
    """

    def can_group(match: FusedLinear) -> bool:
        return match.activation == "identity" and match.residual is None and match.weight.op == "placeholder"

    others = [match_linear(node) for node in found] if can_group(match) else []
    alike = [other for other in others if can_group(other) and other.group_key == match.group_key]
    return [match, *alike][:MAX_WEIGHTS]


def value(node) -> Tensor | None:
    """A node's value as a fake tensor, which has a shape and a dtype; None if it is no tensor."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def is_call(node, functions) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in functions


def is_method_call(node, name: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_method" and node.target == name


def is_no_op(node: fx.Node) -> bool:
    """Whether a node is dropout outside of training, or a cast to the same dtype."""
    if is_call(node, (F.dropout,)):
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return not training
    if is_method_call(node, "to") and len(node.args) == 2 and isinstance(node.args[1], torch.dtype):
        return value(node.args[0]) is not None and value(node.args[0]).dtype == node.args[1]
    return False


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def match_linear(node: fx.Node) -> FusedLinear | None:
    """The linear map at `node` and what can be fused with it; None if the node is something else."""
    match = match_product(node) or match_product_per_row(node) or match_int8_product(node)
    if match is None or value(match.x) is None or value(match.weight) is None:
        return None
    x, weight = value(match.x), value(match.weight)
    most = MAX_ROWS if weight.dim() == 2 and x.dtype in HALF_DTYPES else MAX_GEMV_ROWS  # tensor cores multiply halves
    if x.numel() // x.size(-1) > most or not kernels.can_run(x, weight):
        return None
    if match.scale is None and x.dtype != weight.dtype:
        return None
    if x.numel() // x.size(-1) <= MAX_GEMV_ROWS:
        fuse_norm(match)
    fuse_bias(match)
    fuse_activation(match)
    fuse_residual(match)
    return match


def match_product(node: fx.Node) -> FusedLinear | None:
    """x Wᵀ with a parameter W."""
    if not is_call(node, LINEARS) or (node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")) is not None:
        return None
    x, weight = node.args[:2]
    return FusedLinear(node, x, weight, inside=[node]) if weight.op == "placeholder" else None


def match_product_per_row(node: fx.Node) -> FusedLinear | None:
    """x Wᵀ with x (B, 1, in) and a matrix for each row, W (B, out, in)."""
    if not is_call(node, (operator.matmul, torch.matmul)) or not is_call(node.args[1], (getattr,)):
        return None
    x, transposed = node.args
    weight, name = transposed.args
    shapes = [value(operand).shape if value(operand) is not None else () for operand in (x, weight)]
    if name != "mT" or list(map(len, shapes)) != [3, 3] or shapes[0][:2] != (len(value(weight)), 1):
        return None
    if value(weight).stride()[1:] != (shapes[1][2], 1):
        return None
    return FusedLinear(node, x, weight, inside=[node, transposed])


def match_int8_product(node: fx.Node) -> FusedLinear | None:
    """x Wᵀ · scale as `ops.linear` records it, with the rows of x flattened."""
    if not is_call(node, (torch.ops.strawberry.int8_linear, torch.ops.strawberry.int8_linear.default)):
        return None
    flat, weight, scale, bias = node.args
    if not is_method_call(flat, "reshape") or bias is not None or not is_method_call(only_user(node), "view"):
        return None
    end = only_user(node)
    return FusedLinear(end, flat.args[0], weight, scale, inside=[node, flat, end])


def fuse_norm(match: FusedLinear) -> None:
    x = match.x
    if not is_call(x, NORMS) or tuple(x.args[1]) != value(x).shape[-1:]:
        return
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    if NORMS[x.target] == "rms":
        names = ("input", "normalized_shape", "weight", "eps")
    given = dict(zip(names, x.args, strict=False)) | dict(x.kwargs)
    if given.get("eps") is None or value(given["input"]).dtype != value(x).dtype:
        return
    match.norm = (NORMS[x.target], given.get("weight"), given.get("bias"), float(given["eps"]))
    match.x = given["input"]
    match.inside.append(x)


def extend(match: FusedLinear, *nodes: fx.Node) -> None:
    """Fuse these nodes too. The last of them is the new end."""
    match.inside += nodes
    match.end = nodes[-1]


def fuse_bias(match: FusedLinear) -> None:
    add = only_user(match.end)
    if is_call(add, ADDS) and add.args[0] is match.end and value(add.args[1]) is not None:
        bias = add.args[1]
        if bias.op == "placeholder" and value(bias).shape == value(match.end).shape[-1:] and not add.kwargs:
            match.bias = bias
            extend(match, add)


def fuse_activation(match: FusedLinear) -> None:
    users, first = list(match.end.users), only_user(match.end)
    if is_call(first, GELUS):
        tanh = first.kwargs.get("approximate", "none") == "tanh"
        match.activation = "gelu_tanh" if tanh else "gelu"
        extend(match, first)
    elif is_call(first, (F.relu, torch.relu)):
        squared = is_method_call(only_user(first), "square")
        match.activation = "relu2" if squared else "relu"
        extend(match, first, *([only_user(first)] if squared else []))
    elif chunks := [user for user in users if is_method_call(user, "chunk")]:
        fuse_swiglu(match, users, chunks)


def fuse_swiglu(match: FusedLinear, users: list[fx.Node], chunks: list[fx.Node]) -> None:
    """u · silu(g), where (u, g) are the halves of the linear map."""
    if len(users) != 1 or chunks[0].args[1:] != (2,) or chunks[0].kwargs != {"dim": -1}:
        return
    halves = {half.args[1]: half for half in chunks[0].users}
    if set(halves) != {0, 1} or len(chunks[0].users) != 2:
        return
    silu = only_user(halves[1])
    product = only_user(halves[0])
    gated = is_call(silu, (F.silu,)) and is_call(product, PRODUCTS) and set(product.args) == {halves[0], silu}
    if gated and only_user(silu) is product:
        match.activation = "swiglu"
        extend(match, chunks[0], *halves.values(), silu, product)


def fuse_residual(match: FusedLinear) -> None:
    add = only_user(match.end)
    if not is_call(add, ADDS) or add.kwargs or len(add.args) != 2:
        return
    other = add.args[1] if add.args[0] is match.end else add.args[0]
    if other is match.end or value(other) is None:
        return
    left, right = value(match.end), value(other)
    if right.shape == left.shape and right.dtype == left.dtype == value(add).dtype:
        match.residual = other
        extend(match, add)


def replace(graph: fx.Graph, group: list[FusedLinear]) -> None:
    """Compute the ends of these linear maps by one operation, and erase the nodes that are then unused."""
    first = group[0]
    rows = value(first.x)
    M, widths = rows.numel() // rows.size(-1), [value(match.end).size(-1) for match in group]
    with graph.inserting_before(first.end if len(group) == 1 else first.inside[0]):
        x = graph.call_method("reshape", (first.x, (M, rows.size(-1))))
        residual = first.residual and graph.call_method("reshape", (first.residual, (M, widths[0])))
        lists = [[getattr(match, name) for match in group] for name in ("weight", "scale", "bias")]
        weights, scales, biases = ([] if None in nodes else nodes for nodes in lists)
        args = (x, weights, scales, biases, *first.norm, first.activation, residual)
        y = graph.call_function(torch.ops.strawberry.fused_linear.default, args)
        parts = [y] if len(group) == 1 else []
        if not parts:
            split = graph.call_method("split", (y, widths), {"dim": -1})
            parts = [graph.call_function(operator.getitem, (split, i)) for i in range(len(group))]
        parts = [graph.call_method("reshape", (part, tuple(value(match.end).shape)))
                 for part, match in zip(parts, group, strict=True)]  # fmt: skip
    for part, match in zip(parts, group, strict=True):
        part.meta["example_value"] = value(match.end)
        match.end.replace_all_uses_with(part)
        erase_unused(graph, match.inside)


def erase_unused(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase those of these nodes that have no users left."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in sorted((node for node in nodes if node in order), key=order.get, reverse=True):
        if not node.users:
            graph.erase_node(node)
