"""The promises that every architecture keeps, over every option that changes what is computed.

The cases come from the registry: for each architecture a small base, and one case for each choice, switch and
expert count that its config declares. A new architecture or option is tested without a line here, unless it has no
effect without another (IDLE_ALONE), needs companions (COMPANIONS) or a slow reference (REFERENCES).
"""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from cases import CAUSAL_CASES, T, causal_cases, every_case, perturbed_model, source_for, tokens
from naive_others import naive_palm, naive_tinystar, naive_transformer
from naive_strawberry import naive_strawberry, naive_strawberry_silia, naive_strawberry_v0

from model import LanguageModel

torch.set_num_threads(1)

REFERENCES = {
    "strawberry": naive_strawberry,
    "strawberry-silia": naive_strawberry_silia,
    "strawberry-v0": naive_strawberry_v0,
    "palm": naive_palm,
    "tinystar": naive_tinystar,
    "transformer": naive_transformer,
}


# ---- the three promises --------------------------------------------------------------------------------------------


@every_case
def test_it_says_whether_it_is_causal(case):
    assert perturbed_model(case).causal == (case in CAUSAL_CASES)


@causal_cases
def test_causal(case):
    """No logit changes when a later token does: exactly, at equal shapes, in float32."""
    model = perturbed_model(case, torch.float32)
    idx, source = tokens(2, T), source_for(model, 2)
    full = model(idx, source=source)[0]
    for t in (0, 15, 16, 37, T - 2):
        other = idx.clone()
        other[:, t + 1 :] = tokens(2, T - t - 1, seed=t + 1)
        changed = model(other, source=source)[0]
        assert torch.equal(changed[:, : t + 1], full[:, : t + 1]), f"a position ≤ {t} depends on later ones"
        assert not torch.equal(changed[:, -1], full[:, -1])


@causal_cases
def test_batch_independent(case):
    """No logit changes when other rows change: exactly; nor when they leave the batch: within 1e-9 in float64."""
    model = perturbed_model(case, torch.float32)
    idx, source = tokens(3, T), source_for(model, 3)
    other = torch.cat((idx[:1], tokens(2, T, seed=5)))
    assert torch.equal(model(idx, source=source)[0][0], model(other, source=source)[0][0])
    model = perturbed_model(case)
    alone = model(idx[1:2], source=None if source is None else source[1:2])[0]
    torch.testing.assert_close(alone[0], model(idx, source=source)[0][1], rtol=0, atol=1e-9)


def run_with_cache(model, idx, splits, source):
    cache = model.new_cache(idx.size(0), idx.size(1), source)
    parts = [model(part, cache=cache)[0] for part in idx.split(splits, dim=1)]
    return torch.cat(parts, dim=1)


def random_chunk_sizes(n: int, seed: int) -> list[int]:
    """n chunk sizes whose sum is T."""
    cuts = torch.randperm(T - 1, generator=torch.Generator().manual_seed(seed))[: n - 1].sort().values + 1
    return torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([T])).tolist()


@pytest.mark.slow
@causal_cases
def test_chunking_is_invisible(case):
    """In one call, token by token and in random chunks: within 1e-9 in float64."""
    model = perturbed_model(case)
    idx, source = tokens(2, T), source_for(model, 2)
    full = model(idx, source=source)[0]
    for sizes in ([1] * T, *(random_chunk_sizes(2 * seed + 1, seed) for seed in (1, 2, 3))):
        error = (run_with_cache(model, idx, sizes, source) - full).abs().max().item()
        assert error < 1e-9, f"chunks {sizes}: {error}"
        model.max_prefill = 9  # from here on, longer chunks are divided


@pytest.mark.parametrize("chunk", [None, 48])
@pytest.mark.parametrize("device, cached, first", [("cpu", 0, 2048), ("cuda", 0, 8192), ("cuda", 96, 2048)])
def test_only_a_gpu_prefills_an_empty_cache_with_a_long_first_chunk(device, cached, first, chunk):
    """A long chunk needs no mask there. On a CPU it took three to six times the memory of short ones."""
    model = SimpleNamespace(chunk_size=chunk, device=torch.device(device), max_prefill=2048, max_first_prefill=8192)
    bounds = LanguageModel.prefill_bounds(model, SimpleNamespace(lengths=[cached]), 16_000)
    sizes = [b - a for a, b in itertools.pairwise([0, *bounds])]
    up = 0 if chunk is None else 47  # rounded up to whole chunks
    assert first <= sizes[0] <= first + up and sum(sizes) == 16_000
    assert all(2048 <= size <= 2048 + up for size in sizes[1:-1]) and sizes[-1] <= 2048 + up


@pytest.mark.slow
@causal_cases
def test_decode_steps_of_rows_with_different_lengths(case):
    """As engine.py: prefill each row alone, then decode all rows together, whatever their lengths. An idle row has
    position −1."""
    model = perturbed_model(case)
    idx, source = tokens(3, T), source_for(model, 3)
    full, cache = model(idx, source=source)[0], model.new_cache(3, T, source)
    cache.positions[:], cache.lengths = -1, [1] * 3
    for row, n in ((0, 20), (2, 9)):
        cache.positions[row] = cache.lengths[row] = 0
        model(idx[row : row + 1, :n], cache=cache.slice(slice(row, row + 1)))
        cache.lengths[row] = n
    for _ in range(T - 20):
        if model.chunk_size and (rows := [row for row in (0, 2) if cache.lengths[row] % model.chunk_size == 0]):
            model.begin_chunks(cache, rows)
        positions = cache.positions.clone()
        logits = model.decode_step(idx[range(3), positions.clamp(min=0)], cache)
        for row in (0, 2):
            cache.positions[row] += 1
            cache.lengths[row] += 1
            torch.testing.assert_close(logits[row], full[row, positions[row]], rtol=0, atol=1e-9)


@pytest.mark.slow
@causal_cases
def test_ragged_rows_and_reset(case):
    """Rows of different lengths in one call, an idle row, a row that is reset: each equals the row alone."""
    model = perturbed_model(case)
    idx, source = tokens(3, T), source_for(model, 3)
    full = model(idx, source=source)[0]
    cache = model.new_cache(3, T, source)
    position = [0, 0, 0]
    largest = 0.0
    calls = [([20, 33, 16], None), ([4, 0, 1], None), ([1, 1, 1], 1), ([1, 1, 1], None), ([9, 20, 30], None)]
    for counts, reset in calls:
        width = max(counts)
        rows = [torch.cat((idx[b, p : p + n], tokens(1, width - n, seed=7)[0])) for b, (p, n) in
                enumerate(zip(position, counts, strict=True))]
        logits = model(torch.stack(rows), cache=cache, lengths=torch.tensor(counts))[0]
        for b, (p, n) in enumerate(zip(position, counts, strict=True)):
            if n:
                largest = max(largest, (logits[b, :n] - full[b, p : p + n]).abs().max().item())
        position = [p + n for p, n in zip(position, counts, strict=True)]
        if reset is not None:
            cache.reset([reset])
            position[reset] = 0
    assert largest < 1e-9


# ---- the same function as the slow reference -------------------------------------------------------------------------


def to_reference_name(name: str, arch: str) -> str:
    """The references have shorter names for a few nested parameters."""
    if arch == "strawberry-silia":
        return name
    if arch == "palm":
        name = name.replace("embed_up.", "embed.up.")
    names = [("unembed.", "head."), (".compaction.", "."), ("mixer.router.", "router."), ("mixer.", "aft.")]
    for ours, theirs in names:
        name = name.replace(ours, theirs)
    return name


def reference_params(model: LanguageModel) -> dict[str, torch.Tensor]:
    params = {to_reference_name(n, model.config.arch): p for n, p in model.state_dict().items()}
    stacked = {name.split(".experts.")[0] for name in params if ".experts." in name}
    for ffn in stacked:  # the references have one tensor for all experts
        for part in {name.split(".experts.0.")[1] for name in params if name.startswith(f"{ffn}.experts.0.")}:
            experts = [params.pop(f"{ffn}.experts.{e}.{part}") for e in range(model.config.n_ffn_experts)]
            params[f"{ffn}.{part}"] = torch.stack(experts)
    return params


@every_case
def test_equals_the_slow_reference(case):
    """Naive loops in float64, written from the specification alone, give the same logits within 1e-9."""
    model = perturbed_model(case)
    rows = 2 if model.takes_source or not model.causal else 1
    idx, source = tokens(rows, T, seed=3), source_for(model, rows)
    cfg = {k: v for k, v in dataclasses.asdict(model.config).items() if v is not None}
    reference = REFERENCES[model.config.arch]
    expected = reference(cfg, reference_params(model), idx, *([source] if model.takes_source else []))
    torch.testing.assert_close(model(idx, source=source)[0], torch.as_tensor(expected), rtol=0, atol=1e-9)
