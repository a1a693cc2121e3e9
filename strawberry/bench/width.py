"""Widths at which models have equal parameter counts."""

import dataclasses
import json
import math
from collections.abc import Iterator

import torch

from model import build
from strawberry.bench.common import SHARED_KEYS, Entry, get_value
from strawberry.common import UserError

TOLERANCE = 0.02  # of --match params, as a share


# Multiples for (n_embd, channels of a head, other widths), from the most efficient on a GPU to the finest. n_embd is a
# multiple of the number of heads too, as n_qkv must be, except with the finest.
WIDTH_MULTIPLES = ((64, 16, 64), (32, 8, 32), (16, 8, 16), (8, 8, 8), (8, 2, 8), (2, 2, 2))
CLOSE_ENOUGH = 0.005  # the search stops at this relative error
ACCEPTABLE = 0.015  # the finest multiples are skipped at this relative error
MAX_STRETCH = 0.15  # limit of one width's deviation from its proportion to n_embd


param_counts: dict[str, int] = {}  # cache by repr of a config, because a search repeats configs


def count_params(config) -> int:
    """The number of non-embedding parameters."""
    if repr(config) not in param_counts:
        with torch.device("meta"):
            param_counts[repr(config)] = build(config).num_params()
    return param_counts[repr(config)]


def round_to_multiple(value: float, of: int) -> int:
    return max(1, round(value / of)) * of


def find_dependent_widths(config, multiples: tuple[int, int, int]) -> dict[str, tuple[float, int]]:
    """The widths that scale with n_embd: name → (current value, multiple)."""
    _, head, step = multiples
    found = {"n_qkv": (config.n_qkv, head * config.n_head)}
    if hasattr(config, "n_ffn"):
        gated = getattr(config, "ffn_type", "SwiGLU").lower() == "swiglu"
        found["n_ffn"] = (config.n_ffn or (8 / 3 if gated else 4) * config.n_embd, step)
    if getattr(config, "d_rank", None):
        found["d_rank"] = (config.d_rank, min(step, 8))
    if getattr(config, "attention_type", "").startswith("MHLA"):
        found |= {"kv_rank": (config.kv_rank, min(step, 8)), "rope_dim": (config.rope_dim, 2)}
    if getattr(config, "retention_rule", "silu") != "silu":
        found["memory_width"] = (config.memory_width, config.memory_head)
    return found


def resize(config, n_embd: int, multiples: tuple[int, int, int]):
    """The config with this n_embd and the other widths in proportion."""
    ratio = n_embd / config.n_embd
    others = {
        name: round_to_multiple(now * ratio, of) for name, (now, of) in find_dependent_widths(config, multiples).items()
    }
    return dataclasses.replace(config, n_embd=n_embd, **others)


def fit_width(config, target: int, multiples: tuple[int, int, int]):
    """The config with one width adjusted to come closest to the target: the feed-forward's, or else the attention's."""
    widths, now = find_dependent_widths(config, multiples), count_params(config)
    for name in ("n_ffn", "n_qkv"):
        width, of = widths.get(name, (0, 1))
        slope = (count_params(dataclasses.replace(config, **{name: int(width) + of})) - now) / of if width else 0
        if slope:
            wanted = min(max(width + (target - now) / slope, width * (1 - MAX_STRETCH)), width * (1 + MAX_STRETCH))
            return dataclasses.replace(config, **{name: round_to_multiple(wanted, of)})
    return config


def iter_candidates(config, target: int, multiples: tuple[int, int, int]) -> Iterator:
    """Yield configs of nearly `target` parameters: with the last n_embd below it and the first one above."""
    heads = multiples[1] * config.n_head if multiples != WIDTH_MULTIPLES[-1] else 1
    step = math.lcm(multiples[0], heads, config.n_ffn_experts)

    def small(n: int) -> bool:
        return n < 1 or count_params(resize(config, n * step, multiples)) < target

    # matrices grow with the square of the width
    guess = max(1, round(config.n_embd * math.sqrt(target / count_params(config)) / step))
    low, high = guess - 1, guess  # in steps; search until small(low) and not small(high)
    while small(high):
        low, high = high, 2 * high
    while not small(low):
        low, high = low // 2, low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if small(middle) else (low, middle)
    for n in {max(low, 1), high}:
        same = resize(config, n * step, multiples)
        yield from (same, fit_width(same, target, multiples))


def fit_params(config, target: int):
    """Resize the config to `target` non-embedding parameters. Returns (config, relative deviation)."""

    def off(c) -> float:
        return abs(count_params(c) / target - 1)

    best = config
    for multiples in WIDTH_MULTIPLES:
        if off(best) <= (ACCEPTABLE if multiples == WIDTH_MULTIPLES[-1] else CLOSE_ENOUGH):
            break
        valid = [c for c in iter_candidates(config, target, multiples) if not list(c.problems())]
        best = min([best, *valid], key=off)
    return best, count_params(best) / target - 1


def match_params(entries: list[Entry], target: int, common: list[tuple[str, str]]) -> None:
    """Resize every entry to `target` non-embedding parameters, within TOLERANCE. Raises UserError if no widths fit."""
    for entry in entries:
        old = entry.run.model_hyperparams
        new, off = fit_params(old, target)
        names = ["n_embd", *find_dependent_widths(old, WIDTH_MULTIPLES[0])]
        widths = {name: getattr(new, name) for name in names if getattr(new, name) != getattr(old, name)}
        if abs(off) > TOLERANCE:
            nearest_widths = ", ".join(f"{name} {width}" for name, width in widths.items()) or "as it is"
            raise UserError(
                f"{entry.label}: no widths give {target:,} non-embedding parameters within "
                f"{TOLERANCE:.0%}; the nearest ({nearest_widths}) gives {count_params(new):,}; change its n_layer "
                "or n_head, or give another --params"
            )
        entry.overrides += [(f"model_hyperparams.{name}", str(width)) for name, width in widths.items()]
        entry.changes += [f"{name} {getattr(old, name) or 'default'} → {width}" for name, width in widths.items()]
        shared = [(key, json.dumps(get_value(entries[0].run, key))) for key in SHARED_KEYS]
        entry.load([*common, *shared])
        entry.measure()
