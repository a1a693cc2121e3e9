"""`python bench.py kernels`: compare each Triton kernel with float64 on a GPU, and time it against its floor: the bytes
that it must move, divided by the machine's copy bandwidth.
"""

import argparse
import sys

import torch
from torch import Tensor

from optimizer import JORDAN, newton_schulz
from strawberry.argument_parser import ArgumentParser
from strawberry.cache import LayerCache
from strawberry.common import UserError
from strawberry.context import ForwardContext
from strawberry.ops import muon
from strawberry.ops.activations import ACTIVATIONS
from strawberry.ops.attention import decode_attention, decode_attention_plain
from strawberry.ops.linear import int8_linear, quantize_int8
from strawberry.ops.memory import EPS, MEMORY_CHUNK, OFFSETS, delta_memory, read_chunks, unit
from strawberry.ops.retention import gated_update_backward_plain, gated_update_plain
from strawberry.ops.rope import qk_rope_norm_backward_plain, qk_rope_norm_plain
from strawberry.ops.triton.aft_positional import AFT_BLOCK, fused_aft_conv, fused_aft_local
from strawberry.ops.triton.common import triton
from strawberry.ops.triton.rope import qkv_grad_quantize


def time_graph(call, sets: list[tuple]) -> float:
    """Seconds of one call(*inputs): the median of seven replays of a CUDA graph with a call for each set of inputs. The
    sets together exceed the L2 cache, so that each call reads its inputs from memory.
    """
    call(*sets[0])  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            call(*inputs)
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(sets))
    return sorted(times[3:])[3]


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy on the device."""
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / time_graph(lambda a, b: b.copy_(a), [(x, y)] * 3)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got − exact| / |exact|, in Frobenius norms."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def random_tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def print_row(name: str, error: float, bound: float, seconds: float, floor: float) -> bool:
    """Print a row of the table. Returns whether the error is below its bound."""
    passed = error < bound
    print(
        f"{name:46} {error:8.1e} {seconds * 1e6:9.1f} {floor * 1e6:9.1f} {floor / seconds:6.0%}",
        "" if passed else "WRONG",
    )
    return passed


def num_input_sets(nbytes: float) -> int:
    """The number of input sets that together exceed the L2 cache."""
    return max(2, min(64, int(3e8 / nbytes) + 1))


def measure_decode(bandwidth: float) -> bool:
    passed = True
    for B, H, Hkv, d, context, size in [
        (1, 12, 12, 64, 128, 256), (1, 12, 12, 64, 1000, 1024), (1, 12, 12, 64, 1000, 32768),
        (1, 12, 12, 64, 8192, 32768), (1, 12, 12, 64, 32768, 32768), (64, 12, 12, 64, 1024, 1024),
        (64, 12, 4, 64, 1024, 1024), (8, 32, 8, 128, 8192, 8192), (1, 12, 6, 64, 8192, 8192), (4, 8, 1, 80, 4096, 4096),
    ]:  # fmt: skip
        nbytes = 4 * B * context * Hkv * d
        pos = torch.full((B,), context - 1, device="cuda")
        rest = pos, size, d**-0.5
        sets = [
            (random_tensor(B, H, d), *(random_tensor(B, size + 1, Hkv * d) for _ in "kv"), *rest)
            for _ in range(num_input_sets(nbytes))
        ]
        error = relative_error(
            decode_attention(*sets[0]), decode_attention_plain(*(x.double() for x in sets[0][:3]), *rest)
        )
        seconds = time_graph(decode_attention, sets)
        name = f"decode B {B} heads {H}/{Hkv} of {d}, {context} of {size}"
        passed &= print_row(name, error, 6e-3, seconds, nbytes / bandwidth)
    return passed


def measure_int8(bandwidth: float) -> bool:
    passed = True
    for M, N, K in [
        (1, 2304, 768), (1, 768, 3072), (1, 50304, 768), (1, 4096, 4096), (4, 2304, 768), (8, 2304, 768),
        (64, 2304, 768), (64, 50304, 768),
    ]:  # fmt: skip
        sets = [(random_tensor(M, K), *quantize_int8(random_tensor(N, K))) for _ in range(num_input_sets(N * K))]
        x, w, scale = sets[0]
        error = relative_error(int8_linear(x, w, scale), x.double() @ (w.double() * scale.double().unsqueeze(1)).T)
        passed &= print_row(
            f"int8_linear {M} x {K} to {N}", error, 6e-3, time_graph(int8_linear, sets), N * K / bandwidth
        )
    return passed


def measure_cross_entropy(bandwidth: float) -> bool:
    """Gradients of the logits, in bfloat16 and in FP8. Floor: logits read, gradients written."""
    passed = True
    for N, V in ((8192, 50304), (32768, 8192)):
        sets = [(2 * random_tensor(N, V), torch.randint(0, V, (N,), device="cuda"), V, None) for _ in range(2)]
        exact = sets[0][0][:64].double().softmax(dim=-1)
        exact[torch.arange(64), sets[0][1][:64]] -= 1
        for scale, dtype, bound in ((1.0, torch.bfloat16, 1e-2), (2.0**15, torch.float8_e5m2, 8e-2)):
            calls = [(*inputs, scale, dtype) for inputs in sets]
            got = torch.ops.strawberry.cross_entropy_fwd_bwd(*calls[0])[1][:64].double() / scale
            seconds = time_graph(torch.ops.strawberry.cross_entropy_fwd_bwd, calls)
            name = f"cross_entropy {N} x {V}, {str(dtype).removeprefix('torch.')}"
            passed &= print_row(
                name, relative_error(got, exact), bound, seconds, N * V * (2 + dtype.itemsize) / bandwidth
            )
    return passed


def measure_float8(bandwidth: float) -> bool:
    """The kernels between FP8 matrix products. Floor: each number read once and written once."""
    n, m, passed, ops = 32768, 3072, True, torch.ops.strawberry
    sets = [(random_tensor(n, m).to(torch.float8_e4m3fn).view(torch.uint8),) for _ in range(2)]
    error = relative_error(ops.transpose_fp8(*sets[0]), sets[0][0].t().double())
    passed &= print_row(
        f"transpose_fp8 {n} x {m}", error, 1e-9, time_graph(ops.transpose_fp8, sets), 2 * n * m / bandwidth
    )
    thirds = [(*(random_tensor(n, m // 3) for _ in range(3)), 4.0, torch.float8_e5m2) for _ in range(2)]
    got, transposed = ops.concat_quantize(*thirds[0])
    error = relative_error(got.view(torch.float8_e5m2).double() / 4, torch.cat(thirds[0][:3], dim=1).double())
    passed &= print_row(
        f"concat_quantize {n} x {m}", error, 8e-2, time_graph(ops.concat_quantize, thirds), 4 * n * m / bandwidth
    )
    passed &= torch.equal(got.t(), transposed)
    for kind in ("gelu", "swiglu"):
        parts, dtypes = 2 if kind == "swiglu" else 1, (torch.float8_e4m3fn, torch.float8_e5m2)
        sets = [(random_tensor(n, parts * m), random_tensor(n, m)) for _ in range(2)]
        h, grad = (x[:256].double() for x in sets[0])
        exact = ACTIVATIONS[kind][0](h), ACTIVATIONS[kind][1](h, grad)
        calls = [(h, kind, 4.0, dtypes[0]) for h, _ in sets], [(h, g, None, kind, 4.0, dtypes[1]) for h, g in sets]
        floors = (2 * parts + 2) * n * m / bandwidth, (4 * parts + 2) * n * m / bandwidth
        for i, (name, op) in enumerate(
            ((f"act_quantize {kind} {n} x {m}", ops.act_quantize), ("  backward", ops.act_quantize_backward))
        ):
            got, transposed = op(*calls[i][0])
            error = relative_error(got.view(dtypes[i])[:256].double() / 4, exact[i])
            passed &= print_row(name, error, 8e-2, time_graph(op, calls[i]), floors[i]) and torch.equal(
                got.t(), transposed
            )
    return passed


def measure_retention(bandwidth: float) -> bool:
    """gated_update, forward and backward: two products with a (C, C) matrix in each. Floor: the larger of bytes and
    FLOPs, the latter at the speed of a large product. Plain: the same in PyTorch, compiled.
    """
    a, passed = random_tensor(8192, 8192), True
    ceiling = 2 * 8192**3 / time_graph(torch.mm, [(a, a)] * 2)
    for n, M, N, C, viewed in [
        (32, 2304, 768, 768, False), (32, 768, 1536, 768, True), (24, 768, 256, 256, False), (24, 256, 512, 256, True),
    ]:  # fmt: skip
        sets = []
        for _ in range(num_input_sets(8 * n * M * N)):
            raw, grad, oa, out = (
                random_tensor(n, 1, M, N),
                random_tensor(n, 1, M, N),
                random_tensor(n, 1, C, C),
                random_tensor(C, C),
            )
            sets.append((raw, torch.ones(n, 1, 1, 1, device="cuda"), oa * C**-0.5, out * C**-0.5, viewed, grad))
        forward = [inputs[:5] for inputs in sets]
        zs = [torch.ops.strawberry.gated_update(*inputs)[1] for inputs in forward]
        backward = [(inputs[5], *inputs[1:4], z, viewed) for inputs, z in zip(sets, zs)]
        flops_floor, ops = 4 * n * M * N * C / ceiling, torch.ops.strawberry
        for name, op, plain, calls, num_bytes, checked in [  # num_bytes per element; checked: indices of the outputs
            (f"gated_update {n} x {M} x {N}, C {C}", ops.gated_update, gated_update_plain, forward, 12, (0, 1)),
            ("  backward", ops.gated_update_backward, gated_update_backward_plain, backward, 14, (0, 2, 3)),
        ]:
            double = [x[:1].double() if x.dim() == 4 else x.double() for x in calls[0][:-1]]
            exact, floor = plain(*double, viewed), max(flops_floor, num_bytes * n * M * N / bandwidth)
            for label, function in ((name, op), ("    plain, compiled", torch.compile(plain, dynamic=False))):
                got = function(*calls[0])
                error = max(relative_error(got[i][:1], exact[i]) for i in checked)
                passed &= print_row(label, error, 1e-2, time_graph(function, calls), floor)
    return passed


def measure_rope(bandwidth: float) -> bool:
    """RoPE of q and k in a training step, with and without the norm, with grouped-query heads, with 128 channels per
    head. Plain: the same in PyTorch, compiled.
    """
    passed = True
    for B, T, H, Hkv, d, normed in [
        (32, 1024, 12, 12, 64, True), (32, 1024, 12, 12, 64, False), (8, 4096, 32, 8, 128, True),
    ]:  # fmt: skip
        n_q, n_k = H * d, Hkv * d
        angle = torch.arange(T)[None, :, None, None] * 1e4 ** -torch.linspace(0, 1, d // 2)
        tables = (angle.cos().cuda(), angle.sin().cuda())
        sets = range(num_input_sets(4 * B * T * (n_q + n_k)))
        forward = [(random_tensor(B, T, n_q + 2 * n_k), *tables, n_q, n_k, normed) for _ in sets]
        grads = [[random_tensor(B, T, n) for n in (n_q, n_k, n_k)] for _ in sets]
        backward = [(*grad, inputs[0], *tables) for grad, inputs in zip(grads, forward)]
        double = [x[:1].double() for x in (*grads[0], forward[0][0])], [x.double() for x in tables]
        exact = (
            qk_rope_norm_plain(double[0][-1], *double[1], n_q, n_k, normed),
            (qk_rope_norm_backward_plain(*double[0], *double[1], normed),),
        )

        def op_back(dq, dk, dv, qkv, cos, sin, normed=normed):
            return torch.ops.strawberry.qk_rope_norm_backward(dq, dk, dv, qkv if normed else None, cos, sin)

        def plain_back(*args, normed=normed):
            return qk_rope_norm_backward_plain(*args, normed)

        forward_bytes = 4 * B * T * (n_q + n_k)
        backward_bytes = 4 * B * T * (n_q + 2 * n_k) + 2 * B * T * (n_q + n_k) * normed
        for name, op, plain, calls, expected, nbytes in [
            (f"qk_rope_norm {B} x {T} x {H}/{Hkv} of {d}{', normed' * normed}", torch.ops.strawberry.qk_rope_norm,
             qk_rope_norm_plain, forward, exact[0], forward_bytes),
            ("  backward", op_back, plain_back, backward, exact[1], backward_bytes),
        ]:  # fmt: skip
            for label, function in ((name, op), ("    plain, compiled", torch.compile(plain, dynamic=False))):
                got = function(*calls[0])
                got = (got,) if isinstance(got, Tensor) else got
                error = max(relative_error(x[:1], y) for x, y in zip(got, expected, strict=True))
                passed &= print_row(label, error, 6e-3, time_graph(function, calls), nbytes / bandwidth)
        fp8 = [(*grad, inputs[0] if normed else None, *tables, 4.0, torch.float8_e5m2)
               for grad, inputs in zip(grads, forward)]  # fmt: skip
        got, transposed = qkv_grad_quantize(*fp8[0])
        error = relative_error(got[:T].double() / 4, exact[1][0].flatten(0, 1))
        floor = backward_bytes / bandwidth
        passed &= print_row("  backward in FP8", error, 8e-2, time_graph(qkv_grad_quantize, fp8), floor)
        passed &= torch.equal(got.view(torch.uint8).t(), transposed.view(torch.uint8))
    return passed


def exact_aft(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """AFT-simple in float64, whose range includes e^±80."""
    q, k, v = q.double(), k.double(), v.double()
    return torch.sigmoid(q) * (k.exp() * v).cumsum(1) / k.exp().cumsum(1)


def measure_aft(bandwidth: float) -> bool:
    """AFT-simple: forward, which also returns the states for backward, then backward. The error of backward is the
    largest error of the gradients.
    """
    passed = True
    for B, T, D, spread in [(32, 1024, 768, 1), (8, 4096, 768, 1), (1, 65536, 768, 80), (4, 256, 256, 1)]:
        sets = [[random_tensor(B, T, D) for _ in range(4)] for _ in range(num_input_sets(8 * B * T * D))]
        for inputs in sets:
            inputs[1] = inputs[1].sign() * spread if spread > 1 else inputs[1]  # keys of ±80
        forward = [(*inputs[:3], True) for inputs in sets]
        states = [torch.ops.strawberry.aft_simple(*args)[1] for args in forward]
        backward = [(inputs[3], *inputs[:3], state) for inputs, state in zip(sets, states)]
        exact = [x[:1, :, :64].double().requires_grad_() for x in sets[0][:3]]
        y = exact_aft(*exact)
        y.backward(sets[0][3][:1, :, :64].double())
        error = relative_error(torch.ops.strawberry.aft_simple(*forward[0])[0][:1, :, :64], y.detach())
        floor = 8 * B * T * D / bandwidth
        seconds = time_graph(torch.ops.strawberry.aft_simple, forward)
        passed &= print_row(f"aft_simple {B} x {T} x {D}", error, 6e-3, seconds, floor)
        got = torch.ops.strawberry.aft_simple_backward(*backward[0])
        error = max(relative_error(g[:1, :, :64], x.grad) for g, x in zip(got, exact))
        seconds = time_graph(torch.ops.strawberry.aft_simple_backward, backward)
        passed &= print_row("  backward", error, 1e-2, seconds, floor * 14 / 8)
    return passed


def measure_aft_positional(bandwidth: float) -> bool:
    """Forward, then forward and backward, of AFT-conv and AFT-local. The error is the largest of result and gradients
    of one group of channels, against float64.
    """
    passed = True
    product = (random_tensor(8192, 8192), random_tensor(8192, 8192))
    ceiling = 2 * 8192**3 / time_graph(torch.matmul, [product] * 3)
    for kind, window in [("conv", 256), ("conv", 1024), ("local", 256)]:
        B, T, D, G = 32, 1024, 768, 12
        qkv = [random_tensor(B, T, D).requires_grad_() for _ in range(3)]
        p = [torch.randn(*shape, device="cuda").mul(0.1).requires_grad_()
             for shape in ([(G, window)] if kind == "conv" else [(T, 128)] * 2)]  # fmt: skip
        grad = random_tensor(B, T, D)

        def forward(*args, kind=kind, window=window):
            return fused_aft_conv(*args) if kind == "conv" else fused_aft_local(*args, window)

        def forward_backward(*args, forward=forward, grad=grad):
            return torch.autograd.grad(forward(*args), args, grad)

        small = [x.detach()[:2, :, :64].requires_grad_() for x in qkv] + [
            x.detach()[:1] if kind == "conv" else x for x in p
        ]
        small = [x.detach().requires_grad_() for x in small]
        exact = [x.detach().double().requires_grad_() for x in small]
        y = exact_aft_positional(*exact, window)
        expected = [y, *torch.autograd.grad(y, exact, grad[:2, :, :64].double())]
        got = forward(*small)
        got = [got, *torch.autograd.grad(got, small, grad[:2, :, :64])]
        error = max(relative_error(g, e) for g, e in zip(got, expected))
        operations = 4 * B * T * D * (min(window, T // 2) + AFT_BLOCK)
        floor = max(8 * B * T * D / bandwidth, operations / ceiling)
        seconds = time_graph(forward, [(*qkv, *p)] * 2)
        passed &= print_row(f"aft_{kind} {B} x {T} x {D}, window {window}", error, 2e-2, seconds, floor)
        floor = max(22 * B * T * D / bandwidth, 3 * operations / ceiling)
        seconds = time_graph(forward_backward, [(*qkv, *p)] * 2)
        passed &= print_row("  forward and backward", error, 2e-2, seconds, floor)
    return passed


def exact_aft_positional(q: Tensor, k: Tensor, v: Tensor, *p_window) -> Tensor:
    """AFT over all pairs of positions, for one group of channels, in the dtypes of the inputs."""
    *p, window = p_window
    i = torch.arange(v.size(1), device=v.device)
    away = i[:, None] - i
    p = p[0][0, away.clamp(0, window - 1)] if len(p) == 1 else p[0] @ p[1].T
    weight = torch.where(away < window, p, 0.0).exp() * (away >= 0)
    return torch.sigmoid(q) * (weight @ (k.exp() * v)) / (weight @ k.exp())


def measure_muon(bandwidth: float) -> bool:
    """The stacks of GPT-2's 124M parameters: both symmetric products of a Newton–Schulz iteration, Newton–Schulz as a
    whole, and the passes over momentum and weights. Plain: the products by torch.bmm. Floor: half a product's
    operations, at the speed of a large one; of Newton–Schulz all of them.
    """
    passed, big = True, (random_tensor(8192, 8192), random_tensor(8192, 8192))
    ceiling = 2 * 8192**3 / time_graph(torch.matmul, [big] * 3)
    for n, rows, cols in [(48, 768, 768), (12, 768, 3072), (36, 384, 384), (6, 384, 1536)]:
        sets = [(random_tensor(n, rows, cols) / cols**0.5,) for _ in range(num_input_sets(2 * n * rows * cols))]
        grams = [(muon.symmetric_product(x, x),) * 3 + (2.0, -5.0) for (x,) in sets]
        for name, function, plain, calls in [
            (f"muon x xT, {n} x {rows} x {cols}", muon.symmetric_product,
             lambda x, y: torch.bmm(x, y.mT), [(x, x) for (x,) in sets]),
            (f"muon b G + c G G, {n} x {rows}", muon.symmetric_product,
             lambda x, y, c, alpha, beta: torch.baddbmm(c, x, y.mT, alpha=alpha, beta=beta), grams),
        ]:  # fmt: skip
            exact = plain(*(x[:1].double() if isinstance(x, Tensor) else x for x in calls[0]))
            floor = n * rows**2 * calls[0][0].size(2) / ceiling
            for label, measured in ((name, function), ("    plain", plain)):
                error = relative_error(measured(*calls[0])[:1], exact)
                passed &= print_row(label, error, 1e-2, time_graph(measured, calls), floor)
        exact, small = newton_schulz(sets[0][0][:1].double()), min(rows, cols)
        floor = 5 * n * 2 * small * (2 * small * max(rows, cols) + small**2) / ceiling
        name = f"newton_schulz {n} x {rows} x {cols}"
        for label, function in ((name, newton_schulz), ("    plain", newton_schulz_plain)):
            error = relative_error(function(sets[0][0])[:1], exact)
            passed &= print_row(label, error, 0.1, time_graph(function, sets), floor)
    return passed & measure_muon_passes(bandwidth)


def newton_schulz_plain(x: Tensor) -> Tensor:
    """Newton–Schulz by general matrix products in x's dtype."""
    x = x / x.norm(dim=(1, 2), keepdim=True)
    for a, b, c in JORDAN:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def measure_muon_passes(bandwidth: float) -> bool:
    """Momentum and weights of 48 matrices."""
    passed = True
    grads, buffers = ([random_tensor(768, 768, dtype=torch.float32) for _ in range(48)] for _ in range(2))
    weight, found_inf = torch.tensor(0.1, device="cuda"), torch.zeros((), device="cuda")
    exact = [0.9 * m.double() + 0.1 * g.double() for m, g in zip(buffers[:1], grads)]
    exact = [0.9 * m + 0.1 * g.double() for m, g in zip(exact, grads)]
    ahead = muon.move_and_look_ahead(grads, buffers, weight, found_inf, torch.bfloat16)
    for name, function, calls, got, nbytes in [
        ("muon momentum, 48 x 768 x 768", muon.move_and_look_ahead,
         [(grads, buffers, weight, found_inf, torch.bfloat16)] * 2, ahead[:1], 14),
        ("muon weights, 48 x 768 x 768", muon.decay_and_add, [(buffers, ahead, -weight, weight)] * 2, None, 10),
    ]:  # fmt: skip
        if got is None:
            exact = [0.9 * buffers[0].double() - 0.1 * ahead[0].double()]
            function(*calls[0])
            got = buffers[0][None]
        floor = nbytes * 48 * 768**2 / bandwidth
        passed &= print_row(name, relative_error(got[0], exact[0]), 1e-2, time_graph(function, calls), floor)
    return passed


def measure_memory(bandwidth: float) -> bool:
    """The linear memory, forward and backward. Floor: inputs read, outputs written. Error: the largest of all outputs
    and gradients, against float64."""
    passed = True
    for B, T, H, d in ((8, 4096, 4, 64), (8, 4096, 2, 128), (1, 32768, 12, 64)):
        sets = []
        for _ in range(num_input_sets(8 * B * T * H * d)):
            z, v, grad = (random_tensor(B, n, H, d) for n in (T + 1, T, T))
            gates = -random_tensor(B, T, H).float().abs() / 16, random_tensor(B, T, H).float().sigmoid()
            sets.append((unit(z)[:, 1:], unit(z)[:, :-1], v, *gates, grad))
        ops, name = torch.ops.strawberry, f"memory {B} x {T}, {H} heads of {d}"
        *inputs, grad = (x[:1, :1000].clone() for x in sets[0])
        exact = [x.double().requires_grad_() for x in inputs]
        o = read_chunks(*exact, 64)[0]
        grads = torch.autograd.grad(o, exact, grad.double())
        error = relative_error(ops.memory(*inputs, None, 64)[0], o.detach())
        forward, backward = [(*s[:-1], None, 64) for s in sets], [(s[-1], *s[:-1], 64) for s in sets]
        floor = v.nbytes / bandwidth  # of one of the tensors
        passed &= print_row(name, error, 2e-2, time_graph(ops.memory, forward), 4 * floor)
        error = max(map(relative_error, ops.memory_backward(grad, *inputs, 64), grads))
        passed &= print_row("  backward", error, 3e-2, time_graph(ops.memory_backward, backward), 7 * floor)
    return passed


def measure_memory_step(bandwidth: float) -> bool:
    """A token of the linear memory. Floor: the state read and written."""
    passed = True
    for B, H, d in ((1, 4, 64), (1, 12, 64), (16, 12, 64), (64, 12, 64), (64, 6, 128)):
        sets = []
        for _ in range(num_input_sets(8 * B * H * d * d)):
            parts = random_tensor(B, 1, (2 * d + 3) * H).split((H * d, H * d, 3 * H), dim=-1)
            weights = random_tensor(3 * H), random_tensor(4, H * d)
            cache = random_tensor(B, 4, H * d), random_tensor(B, H, d, d, dtype=torch.float32)
            sets.append((*parts, *weights, *cache, None, None, EPS, OFFSETS))
        step, exact = torch.ops.strawberry.memory_step, LayerCache(B, "cuda")
        exact.tail, exact.state = (x.double() for x in sets[0][5:7])
        context = ForwardContext(torch.zeros(1, 1, device="cuda"))
        with torch.no_grad():
            o = delta_memory(*(x.double() for x in sets[0][:5]), MEMORY_CHUNK, context, exact)
        error = max(relative_error(step(*sets[0]), o), relative_error(sets[0][6], exact.state))
        floor = 8 * B * H * d * d / bandwidth
        passed &= print_row(f"memory step {B} rows, {H} heads of {d}", error, 6e-3, time_graph(step, sets), floor)
    return passed


MEASURES = (
    measure_decode,
    measure_int8,
    measure_aft,
    measure_aft_positional,
    measure_cross_entropy,
    measure_float8,
    measure_retention,
    measure_memory,
    measure_memory_step,
    measure_rope,
    measure_muon,
)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser("bench.py kernels", "Compare each Triton kernel with float64 on a GPU, and time it.")
    return parser.parse_args(argv)


def run(argv: list[str]) -> int:
    """Compare each Triton kernel with float64 on a GPU, and time it against its floor."""
    parse_arguments(argv)
    return print_table()


def print_table() -> int:
    """Print the table. Returns 1 if a kernel's error exceeds its bound, else 0. Raises UserError without a GPU and
    Triton.
    """
    if triton is None or not torch.cuda.is_available():
        raise UserError("bench.py kernels times the kernels on a GPU; this machine has no GPU with Triton")
    bandwidth = copy_bandwidth()
    name, versions = torch.cuda.get_device_name(), f"torch {torch.__version__}, triton {triton.__version__}"
    print(f"{name}, {versions}: copies at {bandwidth / 1e12:.2f} TB/s")
    print(f"{'bfloat16':46} {'error':>8} {'µs':>9} {'floor µs':>9} {'floor':>6}")
    passed = [measure(bandwidth) for measure in MEASURES]
    if not all(passed):
        print("a kernel is wrong: its error is above its bound", file=sys.stderr)
    return 0 if all(passed) else 1
