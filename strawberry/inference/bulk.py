"""Generate texts for all prompts in a file and write them to another: `sample.py --prompts_file … --out …`.

Index:  prompts · results · the job
"""

import dataclasses
import hashlib
import json
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from strawberry.common import UserError, atomic_write, show
from strawberry.config import check, option
from strawberry.data import documents
from strawberry.data.inputs import InputFile
from strawberry.data.json_entries import Line, parse_json, read_json_list, read_lines
from strawberry.inference import engine
from strawberry.inference.loading import LoadSettings, choose_dtype_name, load_for_inference, resolve_model_path
from strawberry.inference.penalties import BIAS_RULE, LogitBias
from strawberry.inference.sampling import Request
from strawberry.inference.text import (
    DecoderSettings,
    SamplingSettings,
    TextPiece,
    TextStream,
    Workload,
    check_prompt_fits,
    choose_num_rows,
    draw_seed,
    encode_source_text,
    encode_text,
    explain_errors,
    format_rate,
    make_decoder,
    make_request,
    note_positions_end,
    stream_texts,
)
from strawberry.outputs import Input, Output, check_outputs

# ---- prompts -------------------------------------------------------------------------------------------------------


@dataclass
class PromptLine:
    """The keys of a line in --prompts_file. The value of a missing key is that of the command line."""

    prompt: Any = option(None, "text to continue")
    source: Any = option(None, "source text of an encoder-decoder")
    id: Any = option(None, "text or integer, copied to the result")
    max_tokens: int | None = option(None, "maximum number of new tokens", low=1, high=2**20)
    length: int | None = option(None, "the same", low=1, high=2**20)
    temperature: float | None = option(None, "as --temperature", low=0)
    top_k: int | None = option(None, "as --top_k", low=0)
    top_p: float | None = option(None, "as --top_p", above=0, high=1)
    min_p: float | None = option(None, "as --min_p", low=0, high=1)
    repetition_penalty: float | None = option(None, "as --repetition_penalty", low=0.01, high=100)
    presence_penalty: float | None = option(None, "as --presence_penalty", low=-2, high=2)
    frequency_penalty: float | None = option(None, "as --frequency_penalty", low=-2, high=2)
    logit_bias: LogitBias | None = option(None, "as --logit_bias", must=BIAS_RULE)
    min_tokens: int | None = option(None, "as --min_tokens", low=0)
    ignore_eos: bool | None = option(None, "as --ignore_eos")
    stop_token_ids: list[int] | None = option(None, "as --stop_token_ids", low=0)
    seed: int | None = option(None, "default: the command's, plus the line's index", low=0)
    stop: list[str] | None = option(None, "as --stop")

    def problems(self) -> Iterator[tuple[str, str]]:
        for name in ("prompt", "source"):
            if not isinstance(getattr(self, name), (str, type(None))):
                yield name, "must be text"
        if isinstance(self.id, bool) or not isinstance(self.id, (str, int, type(None))):
            yield "id", "must be text or an integer"
        if self.max_tokens is not None and self.length is not None:
            yield "length", f"is max_tokens too, which is {self.max_tokens}; keep one"


MAX_LISTED_PROBLEMS = 10  # wrong lines that an error message lists; the rest are only counted


class PromptEntry(NamedTuple):
    """An entry of --prompts_file: its index from 0, its place for messages, and a function that parses its value."""

    index: int
    place: str
    parse: Callable[[], Any]


class PromptsFile:
    """A --prompts_file: JSON lines, or a list in a .json file; gzip is allowed. A pipe is read only once."""

    def __init__(self, path: str):
        self.file = InputFile(path)
        with self.file.open() as stream:
            scan = documents.scan_bytes(stream)
        if kind := documents.find_other_kind(self.file, scan.head):
            raise UserError(f'{self.file.label} is {kind}; write a line {{"prompt": "…"}} for each text')
        self.sha256 = scan.sha256
        has_list = re.match(rb"(\xef\xbb\xbf)?\s*\[", scan.head)  # some people give JSON lines the suffix .json
        is_list = documents.find_format(self.file, scan.head) == "json" and has_list
        if is_list and scan.bad_byte:
            raise UserError(f"{self.file.label}, line {scan.bad_byte.line}: {scan.bad_byte} is not UTF-8; convert it")
        self.entries = self._list_entries if is_list else self._line_entries

    def _line_entries(self) -> Iterator[PromptEntry]:
        """Blank lines count in the index, but are not entries."""
        with self.file.open() as stream:
            for line in read_lines(stream, self.file.label):
                yield PromptEntry(line.number - 1, f"line {line.number}", partial(parse_prompt, line))

    def _list_entries(self) -> Iterator[PromptEntry]:
        with self.file.open() as stream:
            for index, value in enumerate(read_json_list(stream, self.file.label)):
                yield PromptEntry(index, f"entry {index + 1}", lambda value=value: value)


def parse_prompt(line: Line) -> Any:
    try:
        return parse_json(line.data.decode(), mend='write {"prompt": "…"}')
    except UnicodeDecodeError as error:
        bad_byte = documents.BadByte(line.number, line.offset + error.start, line.data[error.start])
        raise UserError(f"{bad_byte} is not UTF-8; convert the file to UTF-8") from error
    except ValueError as error:
        raise UserError(str(error)) from error


class BulkSettings(LoadSettings, SamplingSettings, DecoderSettings, Protocol):
    """The settings of sample.py's command line that a bulk run reads."""

    model: str | None
    prompts_file: str
    out: str
    source: str | None
    seed: int | None
    stop: list[str]
    fast: bool


class Prompts:
    """The entries of --prompts_file. They are read twice: all are checked before any text is generated."""

    def __init__(self, settings: BulkSettings, prompts: PromptsFile, seed: int, model, encoder, record: dict):
        self.settings, self.prompts, self.seed = settings, prompts, seed
        self.model, self.encoder, self.record = model, encoder, record

    def make_text(self, entry: PromptEntry) -> TextStream:
        """The TextStream of an entry. Raises UserError that names the file and the entry's place."""
        try:
            return self.make_text_of(entry.index, entry.parse())
        except UserError as error:
            raise UserError(f"{self.prompts.file.label}, {entry.place}: {error}") from error

    def make_text_of(self, index: int, data: Any) -> TextStream:
        if not isinstance(data, dict):
            raise UserError(f'holds {show(data)}; write an object, {{"prompt": "…"}}')
        line, problems = check(PromptLine, data)
        if problems:
            raise UserError("; ".join(problems))
        s = self.settings
        source = encode_source_text(
            s.source if line.source is None else line.source, self.model, self.encoder, self.record, "source"
        )
        if line.prompt is None and source is None:
            raise UserError('has no prompt; give it one, "" for the beginning of a text')
        own = {"length": line.max_tokens, **{name: getattr(line, name) for name in LINE_OPTIONS if name in data}}
        s = dataclasses.replace(s, **{name: value for name, value in own.items() if value is not None})
        if s.min_tokens > s.length:
            raise UserError(f"min_tokens = {s.min_tokens}: is more than max_tokens, which is {s.length}; give fewer")
        seed = self.seed + index if line.seed is None else line.seed
        request = make_request(s, self.encoder, encode_text(self.encoder, line.prompt or ""), source, seed)
        check_prompt_fits(self.model, request, s.on_full)
        request.check_tokens(self.model.config.vocab_size)
        known = {"id": line.id, "source": line.source, "prompt": line.prompt}
        label = {"index": index, **{name: value for name, value in known.items() if value is not None}}
        return TextStream(self.encoder, request, s.stop, label)

    def plan(self, done: set[int]) -> tuple[int, dict[Any, Workload]]:
        """(number of texts, remaining Workload of each size class). Raises UserError that lists the wrong lines."""
        bad, count, groups = [], 0, defaultdict(Workload)
        for entry in self.prompts.entries():
            count += 1
            try:
                request = self.make_text(entry).request
            except UserError as error:
                bad.append(str(error))
                continue
            if entry.index not in done:
                groups[choose_size_class(self.model, self.settings, request)].add(request, entry.index)
        if bad:
            more = [f"… and {len(bad) - MAX_LISTED_PROBLEMS:,} more"] if len(bad) > MAX_LISTED_PROBLEMS else []
            problems = "\n  ".join([*bad[:MAX_LISTED_PROBLEMS], *more])
            raise UserError(bad[0] if len(bad) == 1 else f"{len(bad):,} of {count:,} lines are wrong:\n  {problems}")
        if not count:
            raise UserError(f'{self.prompts.file.label} has no prompts; write a line {{"prompt": "…"}} for each')
        return count, dict(sorted(groups.items()))

    def iter_texts(self, indexes: set[int]) -> Iterator[TextStream]:
        """The texts of the entries with these indexes."""
        return (self.make_text(entry) for entry in self.prompts.entries() if entry.index in indexes)


# the options that change the logits, with the values that change nothing
NEUTRAL_OPTIONS = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {},
                   "min_tokens": 0, "ignore_eos": False, "stop_token_ids": []}  # fmt: skip
# the options that a line may set, besides its seed
LINE_OPTIONS = ("length", "temperature", "top_k", "top_p", "min_p", "stop", *NEUTRAL_OPTIONS)


# ---- results -------------------------------------------------------------------------------------------------------


class Results:
    """The --out file: one line for each finished text, in order of completion. Beside it, OUT.from.json stores the
    origin: all that the texts depend on. Lines of another origin are never appended.
    """

    def __init__(self, path: str):
        self.path, self.origin_path = Path(path), Path(f"{path}.from.json")

    def read_origin(self) -> dict | None:
        """The origin of the existing results; None if there are none. Raises UserError if it cannot be read."""
        try:
            if not self.path.exists() or not self.path.stat().st_size:
                return None
            return dict(json.loads(self.origin_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{self.path} exists, but {self.origin_path}, which states its prompts and options, cannot be read; "
                "name another --out"
            ) from error

    def check_origin(self, origin: dict, before: dict) -> None:
        """Raises UserError that names each difference if the results `before` have another origin."""
        files = {"prompts_file": "the prompts file", "model": "the model"}
        before = {"fast": True, **NEUTRAL_OPTIONS, **before}  # those of older results may lack these
        differ = [f"{files[name]} is another, or was changed" if name in files else
                  f"--{name} was {show(before.get(name))} and is {show(value)}"
                  for name, value in origin.items() if before.get(name) != value]  # fmt: skip
        if differ:
            raise UserError(
                f"{self.path} has other inputs: {'; '.join(differ)}. Give the same again, or name another --out"
            )

    def read_indexes(self) -> set[int]:
        """Indexes of the texts in the file. An incomplete last line, from a killed process, is removed."""
        found, end = set(), 0
        with self.open("r+b") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    file.truncate(end)
                    break
                end += len(raw)
                try:
                    found.add(int(json.loads(raw)["index"]))
                except (ValueError, TypeError, KeyError) as error:
                    raise UserError(
                        f"{self.path}, line {number}: is no text that sample.py wrote; remove the line, or "
                        "name another --out"
                    ) from error
        return found

    def create(self, origin: dict) -> None:
        atomic_write(self.origin_path, json.dumps(origin, indent=1).encode())
        with self.open("wb"):
            pass

    def append(self, line: dict) -> None:
        """Write a line with a single write call, so that a kill can leave only the last line incomplete."""
        with self.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

    @contextmanager
    def open(self, mode: str):
        try:
            with open(self.path, mode) as file:
                yield file
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; its texts are kept, and the same command "
                "continues"
            ) from error


# ---- the job -------------------------------------------------------------------------------------------------------


def hash_file(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def describe_origin(settings: BulkSettings, prompts: PromptsFile, path: Path, model, seed: int) -> dict:
    """All that the texts depend on: hashes of the prompts and the model, the seed, the dtype and the options."""
    files = {"prompts_file": prompts.sha256, "model": hash_file(path)}
    options = {name: getattr(settings, name) for name in (*LINE_OPTIONS, "source", "on_full", "quantize", "fast")}
    dtype = choose_dtype_name(settings, model.device.type)
    return {**files, "seed": seed, "dtype": dtype, **options}


def run_bulk(settings: BulkSettings) -> None:
    """Generate the texts of --prompts_file that are not in --out yet."""
    results, path = Results(settings.out), resolve_model_path(settings.model)
    outputs = [Output("--out", results.path, "texts"), Output("--out", results.origin_path, "texts origin")]
    check_outputs(outputs, [Input("--prompts_file", settings.prompts_file), Input("--model", path)])
    prompts = PromptsFile(settings.prompts_file)
    before = results.read_origin()
    model, encoder, record = load_for_inference(path, settings)
    seed = settings.seed if settings.seed is not None else before["seed"] if before else draw_seed()
    origin = describe_origin(settings, prompts, path, model, seed)
    if before:
        results.check_origin(origin, before)
    done = results.read_indexes() if before else set()
    entries = Prompts(settings, prompts, seed, model, encoder, record)
    count, groups = entries.plan(done)
    texts = sum(work.texts for work in groups.values())
    if not texts:
        print(f"all {count:,} texts are in {results.path} already", file=sys.stderr)
        return
    print(f"seed {seed}; {texts:,} of {count:,} texts are to be generated", file=sys.stderr)
    note_batch_size(model, settings)
    if not before:
        results.create(origin)
    reasons = write_results(stream_groups(model, settings, entries, groups), results, count - texts, count)
    if reasons["full"]:
        note_positions_end("full", model, reasons["full"])


def stream_groups(model, settings: BulkSettings, prompts: Prompts, groups: dict[Any, Workload]) -> Iterator[TextPiece]:
    """The pieces of all texts, one size class after the other. Each class has its own decoder."""
    for size, work in groups.items():
        rows = INVARIANT_ROWS if size else choose_num_rows(model, settings, work.texts)
        with explain_errors(work.longest, rows):
            if size:
                tokens, source = size
                decoder = engine.Decoder(model, rows, tokens, on_full=settings.on_full, batch_invariant=True,
                                         min_bucket=tokens, max_source=source)  # fmt: skip
            else:
                decoder = make_decoder(model, settings, work)
            yield from stream_texts(decoder, prompts.iter_texts(work.indexes))
        del decoder  # free its memory before the next decoder allocates


# On a CPU, a text of --prompts_file is bit for bit the same for any --batch, any other prompts and any interruption:
# its own line determines the shape of every computation for it. Every step computes INVARIANT_ROWS rows. A decoder
# generates texts of only one size class and reads its whole cache in each step; engine.py explains the rest.
INVARIANT_ROWS = 8


def is_batch_invariant(model, settings: BulkSettings) -> bool:
    return model.device.type == "cpu" and not settings.fast


def choose_size_class(model, settings: BulkSettings, request: Request) -> tuple[int, int] | None:
    """(tokens, source tokens) that the text's decoder allocates. They depend on the request alone and are powers of
    two, so that texts of different lengths share decoders. None if texts of all sizes share one decoder.
    """
    if not is_batch_invariant(model, settings):
        return None
    tokens, source = len(request.prompt) + request.max_new_tokens, len(request.source or ())
    tokens, source = (max(low, 1 << (n - 1).bit_length()) for low, n in ((256, tokens), (32, source or 1)))
    return min(tokens, model.max_positions or tokens), source


def note_batch_size(model, settings: BulkSettings) -> None:
    """Print a note if texts depend on --batch, or if --batch is ignored."""
    if settings.fast:
        print(
            "note: --fast: a text may differ with --batch, with the other prompts and after an interruption, by "
            "rounding",
            file=sys.stderr,
        )
    elif is_batch_invariant(model, settings) and settings.batch not in (None, INVARIANT_ROWS):
        print(
            f"note: on a CPU {INVARIANT_ROWS} texts are generated at once, so that no text depends on --batch; "
            f"--fast uses {settings.batch}",
            file=sys.stderr,
        )


def write_results(pieces: Iterable[TextPiece], results: Results, done: int, count: int) -> dict[str, int]:
    """Append each text to the results when it ends, with a progress bar. Returns the number of texts for each finish
    reason.
    """
    unfinished: dict[int, str] = defaultdict(str)
    began, tokens, reasons = time.perf_counter(), 0, Counter()
    with tqdm(total=count, initial=done, unit=" texts", dynamic_ncols=True, disable=None) as bar:
        try:
            for text, piece, reason in pieces:
                tokens += 1
                unfinished[text.label["index"]] += piece
                if reason is not None:
                    words = unfinished.pop(text.label["index"])
                    results.append(text.label | {"text": words, "finish_reason": reason, "tokens": text.num_tokens})
                    reasons[reason] += 1
                    speed = tokens / max(time.perf_counter() - began, 1e-9)
                    bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
                    bar.update()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted: {done + reasons.total():,} of {count:,} texts are in {results.path}; "
                "the same command continues"
            ) from None
    print(format_rate(tokens, time.perf_counter() - began), file=sys.stderr)
    return reasons
