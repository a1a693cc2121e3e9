"""Evaluation: mean loss and bits per byte of a split, the strict loss, and samples of text."""

import contextlib
import functools
import itertools
import math

import torch
from torch import Tensor, nn

from strawberry.common import first_line
from strawberry.data.dataset import Split
from strawberry.data.loader import map_tensors
from strawberry.data.objectives import Batch, NextToken, decode_with_sentinels, encode_with_sentinels
from strawberry.sharding import batch_parts, divide_batch
from strawberry.training import distributed, plot
from strawberry.training.console import warn

EVAL_SEED = 0  # seed of the evaluation windows, independent of the run's seed
STRICT_POSITIONS = 512
QUARTERS = "val_loss_by_quarter"  # key of metrics.jsonl


@contextlib.contextmanager
def evaluation_mode(model: nn.Module):
    """A context without dropout and gradients. Restores training mode even after an exception."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def byte_lengths(encoder, vocab_size: int) -> Tensor:
    """(vocab_size,) the number of bytes of text of each token id; 0 for special tokens and unused ids."""
    lengths = torch.zeros(vocab_size, dtype=torch.int64)
    for i in range(encoder.vocab_size):
        lengths[i] = len(encoder.token_bytes(i))
    lengths[list(encoder.specials.values())] = 0
    return lengths


def make_batch(objective, split, seed: int, first: int, count: int, device) -> Batch:
    """The batch of samples first … first + count − 1, on the device."""
    return map_tensors(objective.make_batch(split, seed, first, count), lambda part: torch.from_numpy(part).to(device))


def mean_loss(
    forward, split, batches: int, rows: int, lengths: Tensor, objective=None, ranks=None
) -> tuple[float, float]:
    """(nats per token, bits per byte) over the targets of a split's first `batches` · `rows` samples, at most one pass
    over the split. All evaluations of all runs use the same samples. Each rank evaluates its part of each batch.

    bits per byte = nats / ln 2 · tokens / bytes, where bytes is the length of the target tokens' text. Unlike the loss,
    it can be compared between vocabularies. It is NaN if the objective's targets are not text.
    """
    objective, ranks = objective or NextToken(), ranks or distributed.SingleProcess()
    nats, n_bytes, count = [], [], 0
    row_parts, groups = batch_parts(rows, ranks.world)
    n = min(batches, max(1, split.n_windows // rows))
    share, (first, *_) = divide_batch(rows, groups, ranks.rank, ranks.world)
    for i in range(0, n, groups):  # the same number of passes on each rank, since sharded ranks run them together
        batch = make_batch(objective, split, EVAL_SEED, i * rows + first, share, lengths.device)
        loss = forward(batch.x, batch.y, source=batch.source)[1].detach().float()
        if i * rows + first < n * rows:
            nats.append(loss * batch.n_targets)
            n_bytes.append((lengths[batch.y.clamp(min=0)] * (batch.y >= 0)).sum())
            count += batch.n_targets
    total, n_bytes = (sum(torch.stack(values).tolist()) if values else 0 for values in (nats, n_bytes))
    total, n_bytes, count = ranks.sum_numbers(total, n_bytes, count)
    return total / max(count, 1), total / math.log(2) / n_bytes if n_bytes and objective.has_bits_per_byte else math.nan


def mean_loss_by_quarter(forward, split: Split, batches: int, rows: int, device) -> list[float]:
    """The mean loss in nats of the targets in each quarter of the window, over the samples of `mean_loss`. A separate
    pass for each quarter masks the other targets, so that no logits are stored."""
    n = min(batches, max(1, split.n_windows // rows))
    edges = [split.block_size * i // 4 for i in range(5)]
    sums = torch.zeros(4, dtype=torch.float64)
    for i in range(n):
        x, y, *_ = make_batch(NextToken(), split, EVAL_SEED, i * rows, rows, device)
        for quarter, (start, stop) in enumerate(itertools.pairwise(edges)):
            masked = torch.full_like(y, -1)
            masked[:, start:stop] = y[:, start:stop]
            sums[quarter] += forward(x, masked, source=None)[1].item()
    return (sums / n).tolist()


def strict_loss(model: nn.Module, split: Split, positions: int = STRICT_POSITIONS, rows: int = 16, device="cpu"):
    """(strict, plain) mean loss in nats over the same target tokens, one each from the first windows of a split.

    strict: each token is predicted from its own prefix only, in a batch of one: the model's true loss.
    plain: the loss that evaluations report, of whole windows in batches of `rows`. For a causal model the two are
    equal; for a model that is not causal (`model.causal` is False), the plain loss is too low.
    """
    step = (math.sqrt(5) - 1) / 2  # multiples of the golden ratio are evenly distributed over a window's positions
    strict, plain_loss = [], []
    for first in range(0, positions, rows):
        count = min(rows, positions - first)
        x, y, *_ = make_batch(NextToken(), split, EVAL_SEED, first, rows, device)
        log_p = model(x)[0].float().log_softmax(dim=-1)
        for row in range(count):
            t = int((first + row) * step % 1 * split.block_size)
            alone = model(x[row : row + 1, : t + 1])[0][0, -1].float().log_softmax(dim=-1)
            strict.append(-alone[y[row, t]])
            plain_loss.append(-log_p[row, t, y[row, t]])
    return torch.stack(strict).mean().item(), torch.stack(plain_loss).mean().item()


def sample_text(model: nn.Module, encoder, prompt: str, length: int, seed: int, device) -> str:
    """The prompt followed by `length` generated tokens; without a prompt, the start of a document."""
    start = encoder.encode(prompt) or [encoder.eot]
    tokens = sample_tokens(model, start, length, seed, device)
    tokens = tokens if prompt else tokens[1:]
    return encoder.decode([token for token in tokens if token < encoder.vocab_size])  # the model may have unused ids


def sample_answer(model: nn.Module, encoder, source: list[int], length: int, seed: int, device) -> str:
    """A source and the text that an encoder-decoder generates from it: up to the end token, or `length` tokens."""
    tokens = sample_tokens(model, [encoder.eot], length, seed, device, source)[1:]
    answer = list(itertools.takewhile(lambda token: token != encoder.eot, tokens))
    return f"{decode_with_sentinels(encoder, source)}\n→ {decode_with_sentinels(encoder, answer)}"


def sample_tokens(model: nn.Module, start: list[int], length: int, seed: int, device, source=None) -> list[int]:
    generator = torch.Generator(device).manual_seed(seed)
    idx, given = torch.tensor([start], device=device), None if source is None else torch.tensor([source], device=device)
    return model.generate(idx, length, temperature=0.8, top_k=50, generator=generator, source=given)[0].tolist()


def format_evaluation(step: int, results: dict, text: str) -> str:
    """The console output of an evaluation."""
    line = f"step {step:,}: loss {results['train_loss']:.4f} in training, {results['val_loss']:.4f} in validation"
    line += " (nats per token)"
    if not math.isnan(results["val_bpb"]):
        line += f"; {results['train_bpb']:.4f} and {results['val_bpb']:.4f} bits per byte"
    if "strict_loss" in results:
        strict, plain_loss = results["strict_loss"], results["plain_at_strict"]
        line += f"\n    strict loss in validation: {strict:.4f} (plain loss of the same tokens: {plain_loss:.4f})"
    return line + "".join(f"\n    | {row}" for row in text.splitlines())


class Evaluator:
    """Evaluates a run: losses, a sample of text, the curves."""

    def __init__(self, state):
        self.state, self.is_compiled = state, False
        self.stance = contextlib.nullcontext  # returns the context in which forward passes run

    def evaluate(self) -> None:
        """Compute the losses of both splits, the strict loss if the model is not causal, and a sample of text; draw the
        curves."""
        with evaluation_mode(self.state.model):
            results = self.compute_losses()
            text = self.evaluate_full_model(results) if self.state.model.generates else ""
        with self.state.signals.deferred():
            self.state.evaluated, self.state.val_loss = self.state.progress.step, results["val_loss"]
            if self.state.ranks.main:
                sample = {"sample": text} if text else {}
                self.state.metrics.add(
                    step=self.state.progress.step, tokens=self.state.progress.tokens, **results, **sample
                )
                self.state.console.print(format_evaluation(self.state.progress.step, results, text))
        if self.state.ranks.main:
            self.draw()

    def compute_losses(self) -> dict:
        """The losses of both splits. The first call compiles the forward pass if training is compiled; where that
        fails, this call and later ones run it uncompiled."""
        if self.state.compiled and not self.is_compiled:
            self.state.console.print("compiling the evaluation …")
            self.is_compiled = True
        try:
            return self.sum_losses()
        except Exception as error:
            if not self.state.compiled or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            reason = first_line(error)
            warn(f"torch.compile failed, so that evaluations take longer ({type(error).__name__}: {reason})")
            self.stance = functools.partial(torch.compiler.set_stance, "force_eager")
        return self.sum_losses()

    def sum_losses(self) -> dict:
        run, about, results = self.state.run, (self.state.lengths, self.state.objective, self.state.ranks), {}
        with self.state.autocast(), self.stance(), self.state.ranks.device_step():
            for name, split in (("train", self.state.corpus.train), ("val", self.state.corpus.val)):
                arguments = (split, run.eval_iters, run.batch_size, *about)
                results[f"{name}_loss"], results[f"{name}_bpb"] = mean_loss(self.state.forward, *arguments)
        return results

    def sum_losses_by_quarter(self) -> list[float]:
        run = self.state.run
        arguments = (self.state.corpus.val, run.eval_iters, run.batch_size, self.state.device)
        with self.state.autocast(), self.stance(), self.state.ranks.device_step():
            return mean_loss_by_quarter(self.state.forward, *arguments)

    def evaluate_full_model(self, results: dict) -> str:
        """The part that rank 0 does alone: adds the strict loss to `results`, and returns a sample of text."""
        if self.state.model.causal and not self.state.run.sample_length:
            return ""
        with self.state.ranks.full_model(self.state.model) as model:
            if model is None:
                return ""
            if not model.causal:
                with self.state.autocast():
                    found = strict_loss(
                        model, self.state.corpus.val, rows=self.state.run.batch_size, device=self.state.device
                    )
                results["strict_loss"], results["plain_at_strict"] = found
            return self.sample(model) if self.state.run.sample_length else ""

    def sample(self, model: nn.Module) -> str:
        run = self.state.run
        arguments = (run.sample_length, run.seed, self.state.device)
        if not model.takes_source:
            return sample_text(model, self.state.encoder, run.sample_prompt, *arguments)
        source = [*encode_with_sentinels(self.state.encoder, run.sample_prompt), self.state.encoder.eot]
        if not run.sample_prompt:
            first = self.state.objective.make_batch(self.state.corpus.val, EVAL_SEED, 0, 1).source[0].tolist()
            source = [token for token in first if token != self.state.encoder.pad]
        return sample_answer(model, self.state.encoder, source, *arguments)

    def draw(self) -> None:
        if self.state.run.img_path is None:
            return
        try:
            plot.curves(self.state.metrics.path, self.state.run.img_path)
        except Exception as error:
            warn(f"cannot draw the curves in {self.state.run.img_path} ({type(error).__name__}: {error})")
