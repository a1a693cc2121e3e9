"""A decode step whose linear maps are fused with the operations around them, as graphs: on a GPU, a kernel computes
each fused operation; here, its plain version does (the kernel: tests/ops/kernels_in_interpreter.py).
"""

import pytest
import torch
from decoding import MODELS, SMALL, collect

from model import build
from strawberry.cache import LayerCache
from strawberry.context import ForwardContext
from strawberry.inference import fusing
from strawberry.inference.engine import Decoder
from strawberry.inference.loading import quantize_model
from strawberry.inference.sampling import Request
from strawberry.inference.step import SIMPLE_FILTERS
from strawberry.ops.fused_linear import Norm, fused_linear_plain
from strawberry.ops.memory import MEMORY_CHUNK, delta_memory
from strawberry.ops.triton import common as kernels
from strawberry.ops.triton import memory_step

GPT2 = {"arch": "tinystar", "norm_type": "LayerNorm", "attention_type": "MHA", "ffn_type": "GELU",
        "pos_encoding": "Learned"}  # fmt: skip


def fused_linear_reference(x, weights, scales, biases, kind, gain, shift, eps, activation, residual):
    return fused_linear_plain(x, weights, scales, biases, Norm(kind, gain, shift, eps), activation, residual)


def memory_step_reference(z, v, gates, gate_bias, taps, tail, state, lengths, active, eps, offsets):
    cache = LayerCache(0, "cpu")
    cache.tail, cache.state = tail, state
    ctx = ForwardContext(torch.zeros(1, 1), lengths=lengths, active=active)
    return delta_memory(z, v, gates, gate_bias, taps, MEMORY_CHUNK, ctx, cache)


REFERENCES = {torch.ops.strawberry.fused_linear.default: fused_linear_reference,
              torch.ops.strawberry.memory_step: memory_step_reference}  # fmt: skip


def build_small(hyper: dict):
    torch.manual_seed(3)
    model = build(SMALL | {"n_layer": 1} | hyper).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def compare_steps(model, monkeypatch, rows: int = 3, kernels_run: bool = False) -> tuple[list, set]:
    """The fused operations' arguments, and the graph's targets, after a check that the fused step computes the step.
    `kernels_run`: the step is recorded as on a GPU, where int8 weights have an operation."""
    fused, targets, logits = [], set(), []

    def fuse(module, inputs):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "can_run", lambda *tensors: True)
            count = fusing.fuse_linears(module.graph)
        for node in module.graph.nodes:
            if node.target is torch.ops.strawberry.fused_linear.default:
                fused.append(node.args)
            node.target = REFERENCES.get(node.target, node.target)
        assert len(fused) == count
        module.graph.lint()
        module.recompile()
        targets.update(node.target for node in module.graph.nodes)
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        for step in (model.decode_step, torch.compile(model.decode_step, backend=fuse, dynamic=False)):
            cache = model.new_cache(rows, 64, max_source=5 if model.takes_source else None)
            if model.takes_source:
                model.set_source(torch.arange(5 * rows).view(rows, 5) % 31, cache)
            model.logits_after(torch.arange(5 * rows).view(rows, 5) % 31, cache)
            if model.chunk_size:
                model.begin_chunks(cache, list(range(rows)))
            with monkeypatch.context() as patch:
                if kernels_run and logits:  # the second step is the fused one
                    patch.setattr(kernels, "can_run", lambda *tensors: True)
                logits.append(step(torch.arange(3, 3 + rows) % 31, cache, 32))
    bound = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}[model.probe.dtype]
    torch.testing.assert_close(logits[1], logits[0], rtol=bound, atol=bound)
    return fused, targets


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "batch scope"])
def test_a_fused_decode_step_equals_the_decode_step(name, monkeypatch):
    fused, targets = compare_steps(build_small(MODELS[name] | {"n_layer": 1}), monkeypatch)
    assert fused and not targets & set(fusing.LINEARS)


def describe(args) -> tuple:
    x, weights, scales, biases, norm, gain, shift, eps, activation, residual = args
    return norm, len(weights), len(biases), activation, residual is not None


@pytest.mark.parametrize("ffn_type, activation", [("GELU", "gelu"), ("GELU_tanh", "gelu_tanh")])
def test_gpt2_has_four_operations_a_layer(ffn_type, activation, monkeypatch):
    layer = [("layer", 3, 3, "identity", False), ("none", 1, 1, "identity", True), ("layer", 1, 1, activation, False),
             ("none", 1, 1, "identity", True)]  # fmt: skip
    fused, _ = compare_steps(build_small(GPT2 | {"n_layer": 2, "ffn_type": ffn_type}), monkeypatch)
    assert list(map(describe, fused)) == [*layer, *layer, ("layer", 1, 0, "identity", False)]


def test_more_than_16_rows_are_fused_without_their_norm(monkeypatch):
    """And only in half types, which tensor cores multiply."""
    layer = [("none", 3, 3, "identity", False), ("none", 1, 1, "identity", True), ("none", 1, 1, "gelu", False),
             ("none", 1, 1, "identity", True)]  # fmt: skip
    fused, targets = compare_steps(build_small(GPT2).bfloat16(), monkeypatch, rows=17)
    assert list(map(describe, fused)) == [*layer, ("none", 1, 0, "identity", False)]
    assert targets & set(fusing.NORMS)
    fused, _ = compare_steps(build_small(GPT2), monkeypatch, rows=17)
    assert not fused


def test_strawberry_has_three_operations_a_step(monkeypatch):
    step = [("rms", 1, 0, "identity", False), ("none", 1, 0, "swiglu", False), ("none", 1, 0, "identity", True)]
    fused, _ = compare_steps(build_small({"n_qkv": 32, "retention": "none", "r_layer": 1}), monkeypatch)
    assert list(map(describe, fused)) == [*step, *step, ("rms", 1, 0, "identity", False)]


def test_retention_fuses_the_matrices_of_each_row(monkeypatch):
    """Two steps, the second with matrices of its own for each of three rows."""
    fused, targets = compare_steps(build_small({"n_qkv": 32, "retention_chunk": 16, "r_layer": 1}), monkeypatch)
    per_row = [args[1][0].meta["example_value"].dim() == 3 for args in fused]
    assert per_row == [False] * 3 + [True] * 3 + [False]
    assert describe(fused[4]) == ("none", 1, 0, "swiglu", False) and describe(fused[5])[-1]


@pytest.mark.parametrize("more", [{}, {"recursions": 2, "adaptive": True}], ids=["one pass", "frozen tokens"])
def test_a_memory_has_two_operations_around_its_step(more, monkeypatch):
    """The norm and all three products of its input, and the product of its output with the residual sum. Between them,
    its step is one operation in the graph of a GPU."""
    monkeypatch.setattr(memory_step, "can_fuse_step", lambda *inputs: torch.compiler.is_compiling())
    hyper = {"n_qkv": 32, "retention_rule": "delta", "memory_head": 8, "r_layer": 1}
    fused, targets = compare_steps(build_small(hyper | more), monkeypatch)
    step = [("rms", 1, 0, "identity", False), ("none", 1, 0, "swiglu", False), ("none", 1, 0, "identity", True)]
    memory, head = [("rms", 3, 0, "identity", False), ("none", 1, 0, "identity", True)], step[0]
    block = [*step, *memory, *step]
    if more:  # the first product also has the matrix of the router, which selects the number of passes
        block = [("rms", 2, 0, "identity", False), *block[1:], *block]
    assert list(map(describe, fused)) == [*block, head]
    assert memory_step_reference in targets and not targets & set(fusing.LINEARS)


def test_int8_weights_are_fused_with_their_scales(monkeypatch):
    model = quantize_model(build_small(MODELS["palm, lam"]).float())
    fused, targets = compare_steps(model, monkeypatch, kernels_run=True)
    assert [args[1][0].meta["example_value"].dtype for args in fused].count(torch.int8) == len(fused)
    assert all(len(args[2]) == len(args[1]) for args in fused)
    assert not targets & {torch.ops.strawberry.int8_linear, torch.ops.strawberry.int8_linear.default}


def test_more_rows_than_a_kernel_takes_stay_products(monkeypatch):
    fused, targets = compare_steps(build_small(GPT2).bfloat16(), monkeypatch, rows=65)
    assert not fused and targets & set(fusing.LINEARS)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_sampling_gives_the_same_texts(rows):
    model = build_small(GPT2)
    requests = [Request([1 + i], 9, temperature=i % 2, seed=i, **wish)
                for i, wish in enumerate([{}, {}, {"top_k": 4}, {"repetition_penalty": 1.5}])]  # fmt: skip
    expected = collect(Decoder(model, rows, 64), requests)
    decoder, calls = Decoder(model, rows, 64), []
    step = decoder.device_step
    finish = torch.compile(step.draw_and_finish, backend="aot_eager", dynamic=False, fullgraph=True)
    step.compiled_finish = lambda *args: calls.append(args[2]) or finish(*args)
    for filters in (SIMPLE_FILTERS[1], SIMPLE_FILTERS[2]):
        step.warm_up_sampling(rows, 0, filters)
    calls.clear()
    step.shrinks, step.launch = False, step.run  # not recorded: a recording has no compiled code
    assert collect(decoder, requests) == expected
    assert calls and (rows == 1 or set(calls) <= set(SIMPLE_FILTERS))
