"""Objectives: the inputs and targets that a model gets from a sample.

    next      predict each token from those before it
    spans     predict the missing spans of a text (T5)
    pairs     predict the target of a source
    masked    predict the masked tokens of a text (BERT)

An objective's make_batch(split, seed, first, count) returns a Batch of numpy arrays for samples first … first + count −
1. It is a pure function of its arguments, so a resumed run, and any number of processes, get the same corruption.
Sentinels and the mask have ids from encoder.vocab_size on, so that no text encodes to them. A model's vocab_size must
include `extra_ids` of them.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, NamedTuple

import numpy as np

from strawberry.common import UserError
from strawberry.data.dataset import Corpus
from strawberry.data.order import GOLDEN_GAMMA, derive_keys, mix64


class Batch(NamedTuple):
    """One micro-batch: tensors or arrays, int64."""

    x: Any  # (B, T) input: an encoder's tokens, or a decoder's previous tokens
    y: Any  # (B, T) target at each position, −1 where there is none
    source: Any = None  # (B, S) for encoder-decoders
    n_targets: int = 0  # number of targets in y that are not −1


class NextToken:
    """Predict each token from those before it: x is the window without its last token, y the window without its first.
    """

    model, kind = "decoder", "tokens"  # kind of model that it trains, kind of corpus that it reads
    has_bits_per_byte = True  # whether the targets are text, so that bits per byte are meaningful
    has_padding = False  # whether rows have padding, in training or in inference

    def __init__(self, encoder=None, block_size: int = 0):
        self.extra_ids = 0

    def make_batch(self, split, seed: int, first: int, count: int) -> Batch:
        windows = split.read_windows(seed, first, count)
        y = windows[:, 1:].copy()
        return Batch(windows[:, :-1].copy(), y, None, y.size)


class SpanCorruption:
    """Span corruption (T5, arXiv 1910.10683): 15 % of the source's tokens are removed, in spans of mean length 3, and a
    sentinel replaces each span. The target is each sentinel followed by the tokens that it replaces.

    All windows of block_size tokens lose the same number of tokens in the same number of spans, so no row is padded.
    The division of the removed tokens into spans, and of the others into gaps, is drawn uniformly. As in T5, a window
    begins with a gap and ends with a span.

        text     a b c d e f g h      source  a b <0> e f g <1> eot      target  <0> c d <1> h eot
    """

    model, kind = "encoder-decoder", "tokens"
    has_bits_per_byte = False  # sentinels cost bits and are not text
    has_padding = True
    DENSITY, MEAN_SPAN = 0.15, 3

    def __init__(self, encoder, block_size: int):
        if block_size < 2:
            raise UserError(f"model_hyperparams.block_size = {block_size}: span corruption needs 2 or more tokens")
        self.eot, self.first_sentinel = encoder.eot, encoder.vocab_size
        self.n_noise = min(max(round(block_size * self.DENSITY), 1), block_size - 1)
        self.n_spans = min(max(round(self.n_noise / self.MEAN_SPAN), 1), block_size - self.n_noise)
        self.extra_ids = self.n_spans

    def make_batch(self, split, seed: int, first: int, count: int) -> Batch:
        text = split.read_windows(seed, first, count)[:, 1:]
        n = text.shape[1]
        draw = draw_uint64(seed, first, count, n - 2)
        spans = segment_randomly(self.n_noise, self.n_spans, draw[:, : self.n_noise - 1])
        gaps = segment_randomly(n - self.n_noise, self.n_spans, draw[:, self.n_noise - 1 :])
        lengths = np.stack((gaps, spans), axis=2).reshape(count, -1)  # gap, span, gap, span, …
        begins = np.zeros((count, n), bool)
        np.put_along_axis(begins, np.cumsum(lengths, axis=1)[:, :-1], True, axis=1)
        part = np.cumsum(begins, axis=1)  # (count, n): 0, 2, 4 … are gaps, 1, 3, 5 … the spans after them
        begins[:, 0] = True
        noise = part % 2 == 1
        sentinel = self.first_sentinel + part // 2
        source = np.where(begins & noise, sentinel, text)[begins | ~noise].reshape(count, -1)
        target = np.where(begins & ~noise, sentinel, text)[noise | begins].reshape(count, -1)
        y = append_eot(target, self.eot)
        return Batch(shift_right(y, self.eot), y, append_eot(source, self.eot), y.size)


class Pairs:
    """Predict a pair's target from its source. Both end with the eot, and are truncated or padded to block_size tokens.
    """

    model, kind = "encoder-decoder", "pairs"
    has_bits_per_byte = True
    has_padding = True

    def __init__(self, encoder, block_size: int):
        self.eot, self.pad, self.block_size, self.extra_ids = encoder.eot, encoder.pad, block_size, 0

    def make_batch(self, split, seed: int, first: int, count: int) -> Batch:
        source, x = np.full((2, count, self.block_size), self.pad, np.int64)
        y = np.full_like(x, -1)
        for row, (given, wanted) in enumerate(split.read_pairs(seed, first, count)):
            source[row, : len(given)] = given
            source[row, len(given) - 1] = self.eot  # a truncated source ends with the eot too
            y[row, : len(wanted)] = wanted
            x[row, : len(wanted)] = shift_right(wanted[None], self.eot)
        return Batch(x, y, source, int((y >= 0).sum()))


class MaskedTokens:
    """Masked tokens (BERT, arXiv 1810.04805): predict 15 % of the tokens, never an eot, from those around them.

    Of those, 80 % are replaced by the mask, 10 % by an ordinary token drawn uniformly, and 10 % are unchanged.
    """

    model, kind = "encoder", "tokens"
    has_bits_per_byte = False  # predictions of single tokens give no bits per byte of a text
    has_padding = True
    DENSITY, MASKED, RANDOM = 0.15, 0.8, 0.1

    def __init__(self, encoder, block_size: int):
        self.eot, self.mask, self.extra_ids = encoder.eot, encoder.vocab_size, 1
        self.ordinary = np.setdiff1d(np.arange(encoder.vocab_size), list(encoder.specials.values()))
        self.n_chosen = max(round(block_size * self.DENSITY), 1)

    def make_batch(self, split, seed: int, first: int, count: int) -> Batch:
        text = split.read_windows(seed, first, count)[:, 1:]
        n = text.shape[1]
        order, how, which = np.split(draw_uint64(seed, first, count, 3 * n), 3, axis=1)
        order = np.where(text == self.eot, np.iinfo(np.uint64).max, order)
        chosen = np.zeros(text.shape, bool)
        np.put_along_axis(chosen, choose_positions(order, self.n_chosen), True, axis=1)
        chosen &= text != self.eot  # in a window that is mostly eot
        share = (how >> np.uint64(11)) * 2.0**-53
        other = self.ordinary[which % np.uint64(len(self.ordinary))]
        shown = np.where(share < self.MASKED, self.mask, np.where(share < self.MASKED + self.RANDOM, other, text))
        y = np.where(chosen, text, -1)
        return Batch(np.where(chosen, shown, text), y, None, int(chosen.sum()))


OBJECTIVES = {"next": NextToken, "spans": SpanCorruption, "pairs": Pairs, "masked": MaskedTokens}
CORRUPTION_KEY = np.uint64(0x5AB1E5)  # the sample order's and dropout's keys are derived alike; this makes these differ


def draw_uint64(seed: int, first: int, count: int, n: int) -> np.ndarray:
    """n draws for each of samples first … first + count − 1: (count, n) uint64, SplitMix64 from the sample's key."""
    key = mix64(derive_keys(seed, np.arange(first, first + count)) ^ CORRUPTION_KEY)
    return mix64(key[:, None] + np.arange(1, n + 1, dtype=np.uint64) * GOLDEN_GAMMA)


def choose_positions(draw: np.ndarray, k: int) -> np.ndarray:
    """The positions of the k smallest draws of each row, (count, n) to (count, k): a uniform choice of k of n."""
    return np.argsort(draw, axis=1, kind="stable")[:, :k]


def segment_randomly(n: int, parts: int, draw: np.ndarray) -> np.ndarray:
    """Divide n into `parts` parts of at least 1, uniformly: (count, n − 1) draws to (count, parts)."""
    cuts = np.sort(choose_positions(draw, parts - 1), axis=1) + 1
    return np.diff(cuts, axis=1, prepend=0, append=n)


def append_eot(rows: np.ndarray, eot: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, 1)), constant_values=eot)


def shift_right(y: np.ndarray, eot: int) -> np.ndarray:
    """A decoder's input for the targets y: the token before each target; the eot before the first."""
    return np.pad(y[:, :-1], ((0, 0), (1, 0)), constant_values=eot)


def make_objective(name: str, model: str, vocab_size: int, block_size: int, encoder, corpus: Corpus) -> tuple:
    """(name, objective). `model` is "decoder", "encoder" or "encoder-decoder". Raises UserError if the objective does
    not fit the model, the corpus or vocab_size.

    "auto" selects by the model and the corpus: "next", "masked", or for an encoder-decoder "spans" or "pairs".
    """
    fits = [fit for fit, objective in OBJECTIVES.items() if objective.model == model]
    if name == "auto":
        name = next((fit for fit in fits if OBJECTIVES[fit].kind == corpus.kind), fits[0])
    cls, path = OBJECTIVES[name], corpus.files[0].path
    if name not in fits:
        raise UserError(
            f'objective = "{name}": is for a model of kind {cls.model}, and this one is of kind {model}, '
            f'for which there is {" and ".join(fits)}; set it to "auto"'
        )
    if cls.kind != corpus.kind:
        option = "with" if cls.kind == "pairs" else "without"
        raise UserError(
            f'objective = "{name}": learns from {cls.kind}, and {path} holds {corpus.kind}; set '
            f"dataset.path to a file that prepare.py made {option} --pairs"
        )
    objective = cls(encoder, block_size)
    needed = encoder.vocab_size + objective.extra_ids
    if vocab_size < needed:
        raise UserError(
            f'model_hyperparams.vocab_size = {vocab_size}: objective "{name}" needs {objective.extra_ids} '
            f"more ids than the encoder's {encoder.vocab_size}; set it to {needed} or more"
        )
    return name, objective


def count_extra_ids(name: str, model: str, block_size: int, encoder) -> int:
    """The number of ids beyond the encoder's that such a model needs for an objective; with "auto", for any of its
    objectives.
    """
    fits = [cls for fit, cls in OBJECTIVES.items() if cls.model == model and name in ("auto", fit)]
    return max((cls(encoder, block_size).extra_ids for cls in fits), default=0)


def decode_with_sentinels(encoder, tokens) -> str:
    """Decode tokens to text, with <|0|>, <|1|>, … for the sentinels, whose ids are above the encoder's."""
    text = ""
    for is_text, run in itertools.groupby(tokens, lambda token: token < encoder.vocab_size):
        run = list(run)
        text += encoder.decode(run) if is_text else "".join(f"<|{token - encoder.vocab_size}|>" for token in run)
    return text


def encode_with_sentinels(encoder, text: str) -> list[int]:
    """Encode a text in which <|0|>, <|1|>, … are sentinels."""
    parts = re.split(r"<\|(\d{1,9})\|>", text)  # text, number, text, …
    ids = [[encoder.vocab_size + int(part)] if i % 2 else encoder.encode(part) for i, part in enumerate(parts)]
    return list(itertools.chain.from_iterable(ids))
