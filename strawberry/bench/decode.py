"""`bench.py decode`: text generation speed, next to a floor: the time to read the model's weights and its cache."""

import argparse
import gc
import importlib.util
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from model import CONFIGS, CrossAttention, Embedding, LanguageModel, LearnedPositions, build
from strawberry.argument_parser import ArgumentParser
from strawberry.bench import hardware
from strawberry.bench.common import (
    GPT2_KEYS,
    GPT2_SHAPE,
    check_results,
    format_command,
    format_quantity,
    format_table,
    list_spec_inputs,
    make_line_style,
    parse_quantities,
    parse_quantity,
    read_specs,
    refuse_repeats,
    set_log_ticks,
    style_panel,
)
from strawberry.bench.step_profile import format_profile, profile_steps
from strawberry.cache import Cache, ChunkCache, iter_layer_caches
from strawberry.common import UserError, atomic_write
from strawberry.config import to_dict
from strawberry.device import choose_device
from strawberry.inference import engine
from strawberry.inference.loading import check_can_compile, quantize_model
from strawberry.inference.sampling import Request
from strawberry.model_file import load_model, read_about
from strawberry.ops.linear import Int8Weight
from strawberry.training import plot


@dataclass
class ModelSource:
    """A model to benchmark: built from a config with fresh weights, or loaded from a trained file."""

    label: str
    make: Callable[[], LanguageModel]


def read_model_sources(specs: list[str], take_source: bool = False) -> list[ModelSource]:
    """One ModelSource for each spec: `config.json:key=value` as in compare, or the path of a model file.

    Raises UserError if a model cannot continue text or two labels are equal, and for an encoder-decoder unless
    `take_source`.
    """
    configs = [spec for spec in specs if re.match(r".+\.json5?(:|$)", spec)]
    for path in (spec for spec in specs if spec not in configs):
        read_about(path)  # refuses what is no model file, before others are measured
    entries = dict(zip(configs, read_specs(configs, shared=()), strict=True))
    for entry in entries.values():
        entry.load([])
        with torch.device("meta"):
            check_generates(build(entry.run.model_hyperparams), entry.label, take_source)
    sources = [
        ModelSource(entries[spec].label, partial(build_fresh, entries[spec].run.model_hyperparams)) if spec in entries
        else ModelSource(Path(spec).stem, partial(load_trained, spec, take_source)) for spec in specs
    ]  # fmt: skip
    refuse_repeats(source.label for source in sources)
    return sources


def build_fresh(config) -> LanguageModel:
    """A freshly initialized model. Parameters that start at zero get small random values, so that every part computes.
    """
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.02)
    return model.eval()


def load_trained(path: str, take_source: bool) -> LanguageModel:
    model, _, _ = load_model(path)
    check_generates(model, path, take_source)
    return model


def check_generates(model: LanguageModel, label: str, take_source: bool) -> None:
    if not model.generates or (model.takes_source and not take_source):
        raise UserError(f"{label}: kind = {model.config.kind!r} does not continue text; try "
                        ":kind=decoder, or give a model that does")  # fmt: skip


def count_weight_bytes(model: LanguageModel, rows: int) -> int:
    """Bytes of weights that a step for `rows` texts reads. Every weight is read once, except for lookup tables (input
    embeddings, learned positions): one row for each text. A table that is also the head is read completely. The encoder
    of an encoder-decoder, and the projections of the source, are read before the first step only.
    """
    total, skipped = 0, set(model.encoder.modules() if model.takes_source else ())
    for module in model.modules():
        if isinstance(module, CrossAttention):
            skipped |= {module.wk, module.wv}
    for module in (module for module in model.modules() if module not in skipped):
        table = isinstance(module, Embedding) and module.roles["weight"] == "input"
        looked_up = table or isinstance(module, LearnedPositions)
        in_8_bits = [t for value in vars(module).values() if isinstance(value, Int8Weight) for t in value]  # and scales
        for t in (*module.parameters(recurse=False), *in_8_bits):
            total += rows * t.size(-1) * t.element_size() if looked_up else t.nbytes
    return total


def make_meta_cache(config, dtype: torch.dtype, length: int) -> Cache | None:
    """The cache of one text on the meta device (shapes only), and of a source of as many tokens; None for a model
    without a cache, which recomputes all tokens.
    """
    with torch.device("meta"):
        model = build(config).to(dtype)
        source = length if model.takes_source else None
        return model.new_cache(1, length, max_source=source) if model.causal else None


def count_cache_bytes(config, dtype: torch.dtype, length: int) -> int:
    """Bytes of the cache of a text of `length` tokens."""
    cache = make_meta_cache(config, dtype, length)
    return cache.nbytes() if cache else 0


def count_cache_bytes_read(config, dtype: torch.dtype, length: int) -> int:
    """Cache bytes that a step reads: all except the sums over finished chunks, which are read only at a chunk boundary.
    """
    cache = make_meta_cache(config, dtype, length)
    states = iter_layer_caches(cache.layers if cache else None)
    return sum(state.nbytes() - (state.finished.nbytes if isinstance(state, ChunkCache) else 0) for state in states)


def fit_cache_bytes(config, dtype: torch.dtype, length: int) -> tuple[float, float]:
    """(constant, per token): a linear fit of the bytes of a text's cache between n and 2 n tokens. n is `length`, or
    half the number of positions if that is less.
    """
    with torch.device("meta"):
        end = build(config).max_positions
    n = length if end is None else min(length, end // 2)
    one, two = (count_cache_bytes(config, dtype, size) for size in (n, 2 * n))
    return 2 * one - two, (two - one) / n


WARMUP_STEPS = 8
MAX_STEPS = 256  # largest number of timed steps
MIN_STEPS = 16  # smallest number; a context that leaves fewer does not fit
MAX_SECONDS = 8.0  # approximate limit of the timed steps' duration


class DoesNotFit(Exception):
    """A batch size at a context cannot be measured. The message is the reason, which the table shows."""


@dataclass
class DecodeBenchmark:
    """The settings that all measurements of a command share."""

    device: torch.device
    dtype: torch.dtype
    quantize: str | None
    compile: bool
    bandwidth: float  # bytes per second
    profile: bool = False

    def prepare(self, model: LanguageModel) -> LanguageModel:
        model = model.to(self.device, self.dtype).eval()
        return quantize_model(model, self.quantize) if self.quantize else model

    def measure_cell(self, model: LanguageModel, batch: int, context: int) -> dict:
        """The measurements of one batch size and context, as plain data. `why` is the reason if it does not fit, else
        None.
        """
        row = {"batch": batch, "context": context, "why": None}
        try:
            row |= self.time_decoding(model, batch, context)
            weights, cache = count_weight_bytes(model, batch), count_cache_bytes_read(model.config, self.dtype, context)
            bytes_moved = weights / batch + cache
        except (DoesNotFit, UserError) as error:
            return row | {"why": str(error)}
        except (RuntimeError, MemoryError) as error:
            if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
                raise
            return row | {"why": "not enough memory"}
        finally:
            self.clean_up()
        seconds, floor = 1 / row["tokens_per_s"], bytes_moved / self.bandwidth
        return row | {"bytes_per_token": bytes_moved, "floor_s": floor, "times_floor": seconds / floor}

    def clean_up(self) -> None:
        gc.collect()
        if self.compile:
            torch.compiler.reset()  # it compiles one function for a few shapes only
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def time_decoding(self, model: LanguageModel, batch: int, context: int) -> dict:
        """Seconds from a prompt of `context` tokens to its first token, and tokens/s of `batch` such texts after that.
        """
        steps = count_steps_that_fit(model, context)
        self.check_memory(model, batch, context + steps)
        decoder = engine.Decoder(model, batch, context + steps, compile=self.compile, max_source=context)
        prompts = (make_random_request(model, context, steps, seed) for seed in itertools.count())
        decoder.release(decode_first_token(decoder, next(prompts)))  # the first prompt selects and compiles kernels
        began = hardware.synchronized_time(self.device)
        decoder.release(decode_first_token(decoder, next(prompts)))
        seconds = hardware.synchronized_time(self.device) - began
        n = steps - WARMUP_STEPS - 2  # the device may run a step ahead
        if self.device.type == "cuda":  # capture the CUDA graphs of all lengths before the timed steps
            n, _ = self.time_steps(decoder, itertools.islice(prompts, batch), n)
        done, took = self.time_steps(decoder, itertools.islice(prompts, batch), n)
        measured = {"first_token_s": seconds, "tokens_per_s": batch * done / took, "steps": done}
        return measured | ({"profile": self.profile_steps(decoder, prompts)} if self.profile else {})

    def profile_steps(self, decoder: engine.Decoder, prompts: Iterable[Request]) -> dict:
        handles = decoder.admit_all(list(itertools.islice(prompts, decoder.rows)))
        for _ in range(WARMUP_STEPS):
            decoder.step()
        profile = profile_steps(decoder.step, self.device)
        for handle in handles:
            decoder.release(handle)
        return profile

    def time_steps(self, decoder: engine.Decoder, prompts: Iterable[Request], n: int) -> tuple[int, float]:
        """(steps, seconds) of n steps after these prompts; of fewer steps if they exceed MAX_SECONDS."""
        handles = decoder.admit_all(list(prompts))
        for _ in range(WARMUP_STEPS):
            decoder.step()
        began, done = hardware.synchronized_time(self.device), 0
        while done < n and (done < MIN_STEPS or time.perf_counter() - began < MAX_SECONDS):
            decoder.step()
            done += 1
        took = hardware.synchronized_time(self.device) - began
        for handle in handles:
            decoder.release(handle)
        return done, took

    def check_memory(self, model: LanguageModel, batch: int, length: int) -> None:
        need, free = batch * count_cache_bytes(model.config, self.dtype, length), hardware.get_free_memory(self.device)
        if need > 0.9 * free:
            raise DoesNotFit(f"needs {need / 1e9:,.1f} GB of cache, and {free / 1e9:,.1f} GB are free")


def count_steps_that_fit(model: LanguageModel, context: int) -> int:
    """The number of tokens to generate after a context; fewer if the model's positions end soon after it. Raises
    DoesNotFit.
    """
    steps, end = WARMUP_STEPS + MAX_STEPS + 2, model.max_positions
    if end is None or context + steps <= end:
        return steps
    if end - context < WARMUP_STEPS + MIN_STEPS + 2:
        raise DoesNotFit(f"its positions end at {end:,}")
    return end - context


def make_random_request(model: LanguageModel, context: int, steps: int, seed: int) -> Request:
    generator = torch.Generator().manual_seed(int(seed > 0))  # the same for seed > 0: prefilled once
    prompt = torch.randint(model.config.vocab_size, (context,), generator=generator).tolist()
    return Request(prompt, steps, seed=seed, source=prompt if model.takes_source else None)


def decode_first_token(decoder: engine.Decoder, request: Request) -> int:
    """Prefill the prompt and wait for the first token after it. Returns the text's handle."""
    handle = decoder.admit(request)
    while all(handle != given for given, _, _ in decoder.step()):
        pass
    return handle


def measure_model(source: ModelSource, benchmark: DecodeBenchmark, batches: list[int], contexts: list[int]) -> dict:
    """All measurements of one model, as plain data."""
    model = source.make()
    config, params = model.config, model.num_params(non_embedding=False)
    model = benchmark.prepare(model)
    constant, each = fit_cache_bytes(config, benchmark.dtype, max(contexts)) if model.causal else (0, 0)
    cells = []
    for context, batch in itertools.product(contexts, batches):
        cells.append(benchmark.measure_cell(model, batch, context))
        tqdm.write(f"{source.label}: batch {batch}, context {format_quantity(context)}: {format_cell(cells[-1])}")
        if "profile" in cells[-1]:
            tqdm.write(format_profile(cells[-1]["profile"]))
    return {"label": source.label, "arch": config.arch, "params": params, "weight_bytes": count_weight_bytes(model, 1),
            "cache_constant": constant, "cache_per_token": each, "causal": model.causal, "cells": cells,
            "model_hyperparams": to_dict(config)}  # fmt: skip


def format_cell(cell: dict) -> str:
    if cell["why"]:
        return f"— ({cell['why']})"
    return f"{cell['tokens_per_s']:,.0f} tokens/s, {cell['times_floor']:.1f} times the floor"


def format_models_table(rows: list[dict], contexts: list[int]) -> str:
    """The table of what does not depend on the batch: sizes, and the time from a prompt to its first token."""
    header = ["model", "parameters", "weights read, MB", "cache, constant, bytes", "and per token",
              *(f"first token after {format_quantity(context)}, ms" for context in contexts)]  # fmt: skip
    lines = []
    for row in rows:
        first = {cell["context"]: cell["first_token_s"] for cell in reversed(row["cells"]) if not cell["why"]}
        times = [f"{1e3 * first[context]:,.1f}" if context in first else "—" for context in contexts]
        cache = [f"{row[name]:,.0f}" if row["causal"] else "none" for name in ("cache_constant", "cache_per_token")]
        lines.append([row["label"], f"{row['params']:,}", f"{row['weight_bytes'] / 1e6:,.2f}", *cache, *times])
    return format_table(header, lines)


def list_cells(rows: list[dict]) -> list[tuple[str, dict]]:
    return [(row["label"], cell) for row in rows for cell in row["cells"]]


def format_speeds_table(rows: list[dict]) -> str:
    """The table of tokens/s of each model, and the ratio of a token's time to the floor."""
    columns = sorted({(cell["batch"], cell["context"]) for _, cell in list_cells(rows)})
    lines = []
    for row in rows:
        cells = {(cell["batch"], cell["context"]): cell for cell in row["cells"]}
        lines.append([row["label"], *(
            "—" if cell["why"] else f"{cell['tokens_per_s']:,.0f} ({cell['times_floor']:,.1f}×)"
            for cell in map(cells.__getitem__, columns))])  # fmt: skip
    return format_table(["tokens/s (times the floor)", *(f"{b:,} × {format_quantity(c)}" for b, c in columns)], lines)


def format_details_table(rows: list[dict]) -> str:
    """The table of every batch and context, with the bytes that the floor counts."""
    header = ["model", "batch", "context", "tokens/s", "µs per token", "floor, µs", "times the floor", "MB per token"]
    lines = []
    for label, cell in list_cells(rows):
        numbers = ["—"] * 5
        if not cell["why"]:
            numbers = [f"{cell['tokens_per_s']:,.0f}", f"{1e6 / cell['tokens_per_s']:,.1f}",
                       f"{1e6 * cell['floor_s']:,.2f}", f"{cell['times_floor']:,.1f}",
                       f"{cell['bytes_per_token'] / 1e6:,.3f}"]  # fmt: skip
        lines.append([label, f"{cell['batch']:,}", format_quantity(cell["context"]), *numbers])
    return format_table(header, lines)


def list_missing_cells(rows: list[dict]) -> list[str]:
    """A line for each reason why the table has a —."""
    batches: dict[tuple, list[str]] = {}
    for label, cell in list_cells(rows):
        if cell["why"]:
            batches.setdefault((label, cell["why"], cell["context"]), []).append(f"{cell['batch']:,}")
    contexts: dict[tuple, list[str]] = {}
    for (label, why, context), found in batches.items():
        contexts.setdefault((label, why, ", ".join(found)), []).append(format_quantity(context))
    return [f"— {label}, context {', '.join(found)}, batch {those}: {why}."
            for (label, why, those), found in contexts.items()]  # fmt: skip


def describe_setup(benchmark: DecodeBenchmark) -> str:
    parts = [hardware.describe_device(benchmark.device)]
    if benchmark.device.type == "cpu":
        n = torch.get_num_threads()
        parts.append(f"{n} thread{'s' * (n > 1)}")
    parts += [f"torch {torch.__version__}", str(benchmark.dtype).removeprefix("torch.")]
    if benchmark.quantize:
        parts.append(f"{benchmark.quantize} weights")
    return ", ".join([*parts, "compiled" if benchmark.compile else "not compiled"])


def list_notes(benchmark: DecodeBenchmark, rows: list[dict]) -> list[str]:
    """Sentences that state how the results were measured, and why some are missing."""
    recomputing = [row["label"] for row in rows if not row["causal"]]
    return [
        f"{describe_setup(benchmark)}.",
        f"Floor: bytes per token over {benchmark.bandwidth / 1e9:,.1f} GB/s, at which this machine copies a large "
        "tensor, bytes read and written. "
        "The bytes are those of the weights, read once for the whole batch, and of the cache "
        "of a text of that context, read once; of an input embedding only one row per text. Experts that a token does "
        "not choose are counted.",
        f"Columns are batch × context. Speed: all rows' tokens together, up to {MAX_STEPS} each, after prompts of that "
        "context, sampled at temperature 1. First token: the time to prefill one prompt alone and to sample the first "
        "token after it.",
        "An encoder-decoder also has a source of as many tokens as the context.",
        *([f"Not causal, so without a cache; each token recomputes the last block_size tokens: "
           f"{', '.join(recomputing)}."] if recomputing else []),
        *list_missing_cells(rows),
    ]  # fmt: skip


def draw_speeds(rows: list[dict], batches: list[int], title: str):
    """A figure with a panel for each batch size: tokens/s against context, both on log scales."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 2 if max(len(row["label"]) for row in rows) > 34 else 3
    fig = Figure(figsize=(11, 4.3 + 0.2 * math.ceil(len(rows) / columns)), dpi=200, layout="constrained")
    FigureCanvasAgg(fig)
    panels = fig.subplots(1, len(batches), squeeze=False)[0]
    contexts = sorted({cell["context"] for row in rows for cell in row["cells"]})
    for ax, batch in zip(panels, batches, strict=True):
        for number, row in enumerate(rows):
            cells = [cell for cell in row["cells"] if cell["batch"] == batch and not cell["why"]]
            ax.plot([cell["context"] for cell in cells], [cell["tokens_per_s"] for cell in cells],
                    **make_line_style(number), label=row["label"])  # fmt: skip
        style_panel(ax, "context (tokens)")
        ax.set_xticks(contexts, map(format_quantity, contexts))
        if speeds := [y for line in ax.lines for y in line.get_ydata()]:
            ax.set_yscale("log")
            set_log_ticks(ax.yaxis, speeds)
        else:
            ax.set_yticks([])
            ax.text(0.5, 0.5, "nothing fits", transform=ax.transAxes, ha="center", color="0.5")
        ax.set_title(f"batch {batch:,}", fontsize=11, loc="left")
    panels[0].set_ylabel("tokens/s, all rows together", fontsize=11)
    fig.suptitle(title, fontsize=12, x=0.01, ha="left")
    fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=9,
               frameon=False)  # fmt: skip
    return fig


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        "bench.py decode",
        "Measure the speed of text generation, beside its upper bound: reading weights and cache once for each step.",
    )
    add = parser.add_argument
    add("models", nargs="*", help="config files (file.json:key=value,key=value changes keys) and trained model files")
    add("--batches", default="1,8,64", help="batch sizes (default 1,8,64)")
    add("--contexts", default="128,1k,8k", help="tokens of the prompts (default 128,1k,8k)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="default: cuda, else mps, else cpu")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 on cuda, else float32")
    add("--quantize", choices=["int8"], help="quantize weight matrices")
    add("--compile", action="store_true", help="torch.compile the step, on cuda only")
    add("--profile", action="store_true", help="list the kernels of a step with their times")
    add("--out", default="img/decode", type=Path, help="directory of decode.md, .json and .png (default img/decode)")
    add("--json", type=Path, help="path of the JSON file, instead of decode.json in --out")
    add("--against", choices=["nanogpt"], help="measure tinystar in GPT-2's shape beside nanoGPT's generate instead")
    add("--nanogpt_path", type=Path, help="directory with nanoGPT's model.py")
    for name, size in GPT2_SHAPE.items():
        add(f"--{name}", type=parse_quantity, default=size, help=f"of both, with --against (default {size})")
    arguments = parser.parse_args(argv)
    arguments.batches, arguments.contexts = (
        list(parse_quantities(f"--{name}", getattr(arguments, name))) for name in ("batches", "contexts")
    )
    if bool(arguments.models) == bool(arguments.against):
        raise UserError("name configs or model files, or --against nanogpt, one of the two")
    if arguments.against and arguments.nanogpt_path is None:
        raise UserError("--against nanogpt: needs --nanogpt_path, a directory with nanoGPT's model.py")
    if not arguments.against:
        parser.refuse_unused(arguments, ["nanogpt_path", *GPT2_SHAPE], "is about --against nanogpt; add that")
    return arguments


def make_benchmark(arguments: argparse.Namespace) -> DecodeBenchmark:
    device = choose_device(arguments.device)
    auto = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, auto if arguments.dtype == "auto" else arguments.dtype)
    if arguments.compile:
        check_can_compile(device.type, "--compile")
    return DecodeBenchmark(
        device, dtype, arguments.quantize, arguments.compile, hardware.measure_copy_bandwidth(device),
        arguments.profile,
    )  # fmt: skip


def run(argv: list[str]) -> None:
    """Measure how fast models generate text; write a table and a picture."""
    arguments = parse_arguments(argv)
    if arguments.against:
        run_against_nanogpt(arguments)
        return
    check_results("decode", arguments.out, argv, list_spec_inputs("models", arguments.models), arguments.json)
    sources = read_model_sources(arguments.models, take_source=True)
    benchmark = make_benchmark(arguments)
    print(f"{hardware.describe_device(benchmark.device)} copies {benchmark.bandwidth / 1e9:,.1f} GB/s", flush=True)
    rows, command = [], format_command("python", "decode", argv)
    for source in sources:
        rows.append(measure_model(source, benchmark, arguments.batches, arguments.contexts))
        text = write_results(rows, benchmark, arguments, command)  # the results so far
    print(f"\n{text}\n\nthe tables and the picture are in {arguments.out}")


def write_results(rows: list[dict], benchmark: DecodeBenchmark, arguments: argparse.Namespace, command: str) -> str:
    """Write decode.md, decode.json and decode.png. Returns the tables and the notes."""
    notes = list_notes(benchmark, rows)
    tables = f"{format_speeds_table(rows)}\n\n{format_models_table(rows, arguments.contexts)}"
    text = "\n".join(f"- {note}" for note in notes)
    parts = [
        tables,
        "![tokens/s against context](decode.png)",
        text,
        format_details_table(rows),
        f"```\n{command}\n```",
    ]
    atomic_write(arguments.out / "decode.md", ("\n\n".join(parts) + "\n").encode())
    about = {"device": hardware.describe_device(benchmark.device), "torch": torch.__version__,
             "dtype": str(benchmark.dtype), "quantize": benchmark.quantize, "compile": benchmark.compile,
             "bandwidth": benchmark.bandwidth, "notes": notes, "command": command, "rows": rows}  # fmt: skip
    atomic_write(arguments.json or arguments.out / "decode.json", json.dumps(about, indent=1).encode())
    plot.save(draw_speeds(rows, arguments.batches, describe_setup(benchmark)), arguments.out / "decode.png")
    return f"{tables}\n\n{text}"


ROUNDS = 3


def run_against_nanogpt(arguments: argparse.Namespace) -> None:
    """Print tokens/s of tinystar with GPT-2's keys and of nanoGPT's generate, measured in turns."""
    shape = {name: getattr(arguments, name) for name in GPT2_SHAPE}
    theirs = load_nanogpt(arguments.nanogpt_path / "model.py", shape)
    benchmark = make_benchmark(arguments)
    theirs = theirs.to(benchmark.device, benchmark.dtype).eval()
    ours = benchmark.prepare(build_fresh(CONFIGS["tinystar"](arch="tinystar", **shape, **GPT2_KEYS)))
    print(
        f"{hardware.describe_device(benchmark.device)}, {benchmark.dtype}, "
        f"{sum(p.numel() for p in theirs.parameters()):,} parameters, copies {benchmark.bandwidth / 1e9:,.1f} GB/s",
        flush=True,
    )
    for context, batch in itertools.product(arguments.contexts, arguments.batches):
        line = compare_with_nanogpt(benchmark, ours, theirs, batch, context)
        print(f"batch {batch}, context {format_quantity(context)}: {line}")


def load_nanogpt(path: Path, shape: dict) -> torch.nn.Module:
    """The GPT model of the user's nanoGPT checkout. This executes its model.py, as the checkout's own train.py does."""
    if not path.is_file():
        raise UserError(f"--nanogpt_path: there is no {path}; name a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GPT(module.GPTConfig(**shape, dropout=0.0, bias=True))


def compare_with_nanogpt(benchmark: DecodeBenchmark, ours: LanguageModel, theirs, batch: int, context: int) -> str:
    """A line with tokens/s of both, medians of ROUNDS turns, and the speedup over nanoGPT without and with the prefill.
    """
    found = []
    for _ in range(ROUNDS):
        cell = benchmark.measure_cell(ours, batch, context)
        if cell["why"]:
            return format_cell(cell)
        found.append((measure_nanogpt(benchmark, theirs, batch, context), cell["tokens_per_s"], cell["first_token_s"]))
    their, our, first = (statistics.median(column) for column in zip(*found, strict=True))
    ratios = [b / a for a, b, _ in found]
    with_prompt = 64 * batch / (64 * batch / our + first * batch) / their
    share = our * cell["floor_s"]
    return (
        f"nanoGPT {their:,.1f} tokens/s, tinystar {our:,.1f} ({share:.0%} of the upper bound), "
        f"{statistics.median(ratios):.1f} times as many ({min(ratios):.1f} to {max(ratios):.1f}); the first token "
        f"after {1e3 * first:,.1f} ms, so with the prefill, 64 tokens are {with_prompt:.1f} times as fast"
    )


@torch.no_grad()
def measure_nanogpt(benchmark: DecodeBenchmark, model, batch: int, context: int) -> float:
    """Tokens/s of nanoGPT's own generate, after a prompt of `context` tokens."""
    idx = torch.randint(model.config.vocab_size, (batch, context), device=benchmark.device)
    began = hardware.synchronized_time(benchmark.device)
    model.generate(idx, 2)  # selects kernels; its time determines the number of tokens to measure
    n = min(64, max(4, round(2 * 2 / (hardware.synchronized_time(benchmark.device) - began))))
    began = hardware.synchronized_time(benchmark.device)
    model.generate(idx, n)
    return batch * n / (hardware.synchronized_time(benchmark.device) - began)
