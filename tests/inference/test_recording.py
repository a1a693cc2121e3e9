"""recording.py: a replay computes what the recorded function computes, from the tensors' newest values."""

import pytest
import torch
import torch.nn.functional as F
from decoding import collect, every_model, small_model, wishful_requests

from strawberry.cache import iter_layer_caches
from strawberry.inference import step
from strawberry.inference.engine import Decoder
from strawberry.inference.loading import quantize_model
from strawberry.inference.recording import RecordedSteps, Recorder, make_replay
from strawberry.inference.sampling import Request

SHAPES = {"x": (2, 6), "y": (2, 6), "cache": (2, 4, 6), "weight": (6, 6), "n": (2,)}


def repeat_after_a_write(s: dict) -> None:
    before = s["x"] + 1
    s["x"].mul_(2)
    s["y"].copy_(before + (s["x"] + 1))  # equal calls, unlike values


def view_of_a_repeated_result(s: dict) -> None:
    first, second = (F.linear(s["x"], s["weight"]).unflatten(-1, (2, 3)).transpose(0, 1) for _ in range(2))
    s["y"].copy_((first * second[:, :1]).transpose(0, 1).flatten(1))


def writes_to_views(s: dict) -> None:
    fresh = torch.zeros(2, 6)
    fresh.view(2, 2, 3)[:, 1] = s["x"][:, 3:]
    s["cache"][:, 1] = fresh
    s["y"].copy_(s["cache"].narrow(1, 0, 2).sum(dim=1) + torch.zeros(2, 6) + torch.ones_like(fresh))


def numbers_and_no_ops(s: dict) -> None:
    mask = torch.arange(6) % 2 == 0
    x = F.dropout(s["x"].to(s["x"].dtype), 0.5, training=False).detach()
    s["y"].copy_(torch.where(mask, x, float("-inf")).clamp(min=-1.5))


def views_of_bits_and_parts(s: dict) -> None:
    bits = (s["x"] * 2).view(torch.int32)
    a, b = (bits & 0x7FFFFFFF).view(torch.float32).chunk(2, dim=-1)
    values, places = s["weight"].topk(2)
    s["y"].copy_(torch.cat((b, a), dim=-1) + values.sum() + places.sum())
    s["n"] += 1


def write_to_a_result(s: dict) -> None:
    twice = [s["x"] * 3 for _ in range(2)]  # equal calls, one of whose results changes
    twice[0].view(-1)[::2] += 1
    s["y"].copy_(twice[0] - twice[1])


FUNCTIONS = [repeat_after_a_write, view_of_a_repeated_result, writes_to_views, numbers_and_no_ops,
             views_of_bits_and_parts, write_to_a_result]  # fmt: skip


def make_state(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_replay_computes_what_the_function_computes(function):
    state, expected = make_state(0), make_state(0)
    steps = RecordedSteps(lambda: function(state))
    for seed in range(4):  # the first launch records
        for name, values in make_state(seed).items():
            state[name].copy_(values)
            expected[name].copy_(values)
        steps.launch()
        function(expected)
        assert all(torch.equal(state[name], expected[name]) for name in SHAPES)


def test_a_replay_leaves_out_constants_repeated_calls_and_unused_results():
    """Views of tensors that exist before, numbers, repeated calls and unused results cost nothing in a replay."""
    x, y = torch.randn(4, 6), torch.zeros(4)
    with torch.inference_mode(), Recorder() as recorder:
        for _ in range(3):
            part = x[:, :3].unflatten(1, (1, 3)).squeeze(1) * (torch.arange(3) + 1).unsqueeze(0)
            part.exp()
        y.copy_(part.sum(dim=1))
    replay = make_replay(recorder.calls)
    called = [name for name in replay.__code__.co_names if name.startswith("c")]
    functions = {getattr(replay.__globals__[name], "__name__", None) for name in called} - {None}
    assert functions == {"mul", "sum", "copy_"}


@pytest.mark.slow
@every_model
def test_recorded_steps_are_equal_bit_for_bit(name):
    """In float32, where rounding would show: against the same steps, run each time."""
    model = small_model(name).float()
    texts = []
    for recorded in (True, False):
        decoder = Decoder(model, 3, 64)
        if not recorded:
            decoder.device_step.launch = decoder.device_step.run
        requests = wishful_requests(model)
        texts.append((collect(decoder, requests), decoder.sampler.num_drawn.tolist(), decoder.logits))
    (got, drawn, logits), (expected, its_drawn, its_logits) = texts
    assert got == expected and drawn == its_drawn
    if model.causal:
        for mine, other in zip(*(iter_layer_caches(c.cache.layers) for c in (logits, its_logits)), strict=True):
            assert all(torch.equal(getattr(mine, part), getattr(other, part)) for part in mine.initial)


def test_a_small_model_s_step_runs_on_one_thread(monkeypatch):
    """A large one on as many as torch has; int8 weights count."""
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for quantized in (False, True):
        model = small_model("tinystar").float()
        size = sum(p.nbytes for p in model.parameters())
        model = quantize_model(model) if quantized else model
        without_int8 = sum(p.nbytes for p in model.parameters())
        for limit, threads in ((size + 1, 1), (without_int8 + 1 if quantized else size, 2)):
            monkeypatch.setattr(step, "ONE_THREAD_BYTES", limit)
            decoder = Decoder(model, 1, 16)
            decoder.admit(Request([1], 3))
            decoder.step()
            seen.clear()
            decoder.step()
            assert seen == [threads, 2]


def test_random_numbers_are_drawn_at_each_launch():
    """Neither kept as a constant nor drawn once for two equal calls."""
    y = torch.empty(5)
    steps = RecordedSteps(lambda: y.copy_(torch.rand(5) - torch.rand(5)))
    for seed in range(3):
        torch.manual_seed(seed)
        steps.launch()
        torch.manual_seed(seed)
        assert torch.equal(y, torch.rand(5) - torch.rand(5))
