"""Text in, a token file out.

    python prepare.py                                     # the standard library's sources -> data/webtext.bin
    python prepare.py --corpus packages                   # the pinned packages' sources   -> data/packages.bin
    python prepare.py --input texts/ 'more/*.jsonl.gz'    # your own text                  -> data/texts.bin
    python prepare.py --pairs                             # docstrings and their code      -> data/pairs.bin
    python prepare.py --input chats.jsonl --chat_template chatml --encoder bin/chat.bin     # {"messages": [...]} lines
    python prepare.py --pairs mine.jsonl                  # lines of {"source": …, "target": …}, for encoder-decoders
    python prepare.py --verify data/webtext.bin           # reads all of a token file and checks its hash

Input is .txt .md .py and the like, one document a file; .json, a list of strings or of {"text": …}; .jsonl, one such
entry a line; any of them gzipped (.gz); a directory, read whole; a glob; a pipe, or - for standard input
(strawberry/data/documents.py reads them). The documents are encoded in the order of the files' names, shuffled, and
written with an `<|eot|>` after each. The same input gives the same bytes, and a token file whose header has the hash of
its input and its encoder is up to date. Without --output, only a file that was made from inputs of the same names with
an encoder of the same name is replaced.

Memory is constant: a text file is read a megabyte at a time, a .json or .jsonl an entry at a time, and what grows with
the input is on disk, in unnamed temporary files beside the output as large as the output. Only the files' names
are held. Shuffling is exact over all documents, whichever file they come from: they are encoded into such a temporary
file, then copied from it in the order of a permutation that is a formula (strawberry/data/order.py).

Index:  corpora · pairs · the encoder · writing the token file · the output · the command line
"""

from __future__ import annotations

import signal

from strawberry import startup

if __name__ == "__main__":
    startup.exit_on(signal.SIGINT)

import argparse
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import re
import shlex
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
from tqdm import tqdm

from encoder import Encoder, cut_pieces, load, parse_vocab_size, train
from strawberry.argument_parser import ArgumentParser
from strawberry.common import UserError, check_path_arguments, format_count, run_cli, show
from strawberry.data import encoding
from strawberry.data.chat import ChatReader, ChatTemplate, read_template, template_of
from strawberry.data.docstrings import DocstringPairs
from strawberry.data.documents import Documents, add_reading_options, find_text
from strawberry.data.encoding import Spool, encode_documents, encode_pairs
from strawberry.data.inputs import STANDARD_INPUT, InputFile, expand_inputs, ignore_progress, walk_folder
from strawberry.data.json_entries import NoTextError
from strawberry.data.order import permutation
from strawberry.data.token_file import DEFAULTS, NO_ORIGIN, TokenFile, TokenFileWriter
from strawberry.outputs import Input, Output, check_outputs, encoder_inputs, find_previous

SEED = 0  # of the shuffle
MAX_PAIR_TOKENS = 1 << 16  # of --max_tokens: a pair's source and target fit into a piece

# ---- corpora -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Source:
    """What a token file is made from: documents of files, and some texts before them."""

    name: str
    documents: Documents
    texts: list[str] = dataclasses.field(default_factory=list)
    is_corpus: bool = False  # Python sources, whose pairs are docstrings and code
    max_tokens: int = 0  # tokens of a pair's target; 0: running text
    template: ChatTemplate | None = None  # that makes text of entries with messages

    @property
    def kind(self) -> str:
        """Of the token file that is made from it."""
        return "pairs" if self.max_tokens else "tokens"

    @property
    def digest(self) -> str:
        """SHA-256 of all that is read, after documents.scan(); it stands in the token file's header."""
        about = [self.documents.digest, self.texts, self.max_tokens, self.is_corpus]
        about += [self.template.to_dict()] if self.template else []
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def read(self, progress: Callable[[int], object] = ignore_progress) -> Iterator[tuple[str | list[str], bool]]:
        """(piece, whether it ends its document) of the running text; a chat is one piece, the list of its parts."""
        documents = itertools.chain(((text, True) for text in self.texts), self.documents.read(progress=progress))
        for is_text, group in itertools.groupby(documents, key=lambda part: isinstance(part[0], str)):
            if is_text:
                group = cut_pieces(group, encoding.PIECE)  # noqa: B031 (it is read once)
            yield from group


LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", ".."}  # folders
LEFT_OUT_FILE = re.compile(r"(test_.*|.*_test|conftest|sitecustomize|usercustomize|_sysconfigdata.*)\.py")
GENERATED_NAME = re.compile(r"(.*/)?(generated/.*|_?version\.py|__config__\.py|.*_pb2(_grpc)?\.py)")
GENERATED = re.compile(
    rb"@generated|auto-?generated|(do not|don't) (edit|modify)|(file|code|module)( was| is)? generated", re.IGNORECASE
)


def filter_python_sources(root: Path, names: Iterable[str]) -> list[tuple[str, Path]]:
    """Those of the files `names`, under root, that are Python sources and no tests, sorted."""
    kept = []
    for name in sorted(set(names)):
        *folders, file = name.split("/")
        if file.endswith(".py") and not LEFT_OUT & set(folders) and not LEFT_OUT_FILE.fullmatch(file):
            kept.append((name, root / name))
    return kept


def find_stdlib() -> Source:
    """The standard library of the Python that runs, and the topics of its pydoc, each a document of its own."""
    root = Path(sysconfig.get_path("stdlib"))
    names = (name for name, _ in walk_folder(root, LEFT_OUT)) if root.is_dir() else ()
    files = filter_python_sources(root, set(names) - {"pydoc_data/topics.py"})
    if len(files) < 100:
        raise UserError(f"this Python keeps no sources of its standard library in {root} (found {len(files)} files; it "
                        "may be in a zip, or stripped): use a full install of Python, or your own text with --input")
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    texts = [topics[name] for name in sorted(topics)]
    return Source("the standard library's sources", make_documents(files), texts, is_corpus=True)


def make_documents(files: Iterable[tuple[str, Path]]) -> Documents:
    return Documents([InputFile(path, name, is_named=False) for name, path in files], format="text")


def find_packages(requirements: Path) -> Source:
    """The Python sources of the packages that requirements.txt pins for every platform: no tests, nothing generated."""
    pins = read_pins(requirements)
    files = []
    for name, version in pins:
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise UserError(f"{requirements} pins {name}, which is missing: pip install -r {requirements}") from None
        if version not in (package.version, package.version.split("+")[0]):
            raise UserError(f"{requirements} pins {name} {version}, and {package.version} is installed: "
                            f"pip install -r {requirements}")
        listed = [file.as_posix() for file in package.files or ()]
        files += filter_python_sources(Path(package.locate_file("")), listed)
    kept = [(name, path) for name, path in files if path.is_file() and not is_generated(name, path)]
    if not kept:
        raise UserError(f"the packages that {requirements} pins have no Python sources here: use --input")
    return Source(f"the sources of {len(pins)} packages", make_documents(kept), is_corpus=True)


def read_pins(requirements: Path) -> list[tuple[str, str]]:
    """(name, version) of each `name==version` line, sorted; lines for some platforms only (`; …`) are left out."""
    try:
        lines = requirements.read_text("utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {requirements}: {error.strerror or error}") from error
    pins = (re.fullmatch(r"([\w.-]+)(?:\[.*\])?\s*==\s*([\w.+!-]+)", line.split("#")[0].strip()) for line in lines)
    return sorted({(pin[1], pin[2]) for pin in pins if pin})


def is_generated(name: str, path: Path) -> bool:
    with open(path, "rb") as file:
        return bool(GENERATED_NAME.fullmatch(name) or GENERATED.search(file.read(1000)))


# ---- pairs ---------------------------------------------------------------------------------------------------------


def find_pair(entry, where: str) -> tuple[str, str]:
    """(source, target) of an entry {"source": string, "target": string} with any other keys beside them."""
    pair = tuple(entry.get(key) for key in ("source", "target")) if isinstance(entry, dict) else ()
    if not pair or not all(isinstance(text, str) for text in pair):
        wanted = '{"source": a string, "target": a string}'
        raise NoTextError(f"{where} is {show(entry)}, and must be {wanted}")
    return pair


def find_both_texts(entry, where: str) -> str:
    """Both texts of an entry that is a pair, for an encoder to be trained on."""
    return "\n".join(find_pair(entry, where))


# ---- the encoder ---------------------------------------------------------------------------------------------------


def is_missing(spec: str) -> bool:
    """Whether `spec` names an encoder file that is not there."""
    return not spec.startswith(("tiktoken:", "chars:")) and not os.path.exists(spec)


def load_encoder(spec: str, vocab_size: int | None) -> Encoder:
    """The encoder that `spec` names, which is there."""
    encoder = load(spec)
    if vocab_size not in (None, encoder.vocab_size):
        raise UserError(f"--vocab_size {vocab_size}: the encoder {spec} is there and has {encoder.vocab_size} tokens; "
                        "leave --vocab_size out, or name a new file with --encoder")
    return encoder


def find_template(spec: str | None, encoder: Encoder | None, path: str) -> ChatTemplate | None:
    """The template of --chat_template, or else the encoder's. Raises UserError if the encoder has another one."""
    own = None if encoder is None else template_of(encoder)
    if spec is None:
        return own
    template = read_template(spec)
    if encoder is not None and own != template:
        has = "another chat template" if own else "no chat template"
        raise UserError(f"--chat_template {spec}: the encoder {path} is there and has {has}; name a new file with "
                        "--encoder, to be trained with this one, or leave --chat_template out")
    return template


def train_encoder(spec: str, vocab_size: int, source: Source) -> Encoder:
    """An encoder trained on the source and saved as `spec`."""
    print(f"training an encoder of {vocab_size} tokens on {source.name}", flush=True)
    template = source.template
    specials, data = ([], None) if template is None else (template.specials, template.to_dict())
    encoder = train(read_training_text(source), vocab_size, specials, chat_template=data)
    encoder.save(spec)
    return encoder


def read_training_text(source: Source) -> Iterator[str]:
    """Text to train on: the files in shuffled order, the first MAX_TRAINING_CHARS characters of them."""
    files = source.documents.files
    find_entry = find_both_texts if source.max_tokens else find_text
    find_entry = ChatReader(source.template).find_contents if source.template else find_entry
    parts = source.documents.read((files[i] for i in permutation(len(files), SEED)), find_entry)
    left = encoding.MAX_TRAINING_CHARS
    for text, _ in itertools.chain(((text, True) for text in source.texts), cut_pieces(parts, encoding.PIECE)):
        if text:
            yield text[:left]
            left -= len(text)
        if left <= 0:
            return
    if left == encoding.MAX_TRAINING_CHARS:
        raise UserError(explain_no_text(source, "file"))


def explain_no_text(source: Source, what: str, notes: Iterable[str] = ()) -> str:
    left_out = "; ".join([*source.documents.notes(), *notes])
    reason = f"every {what} is empty or left out" + (f" ({left_out})" if left_out else "")
    return f"there is no text in {source.name}: {reason}"


# ---- writing the token file ----------------------------------------------------------------------------------------


def write_document(writer: TokenFileWriter, tokens: np.ndarray, last: bool) -> None:
    """A document, or a part of one, or a pair, from the spool into the file."""
    if writer.kind == "pairs":
        middle = int(np.argmax(tokens == writer.encoder.eot))
        writer.add(tokens[:middle])
        tokens = tokens[middle + 1 :]
    writer.add(tokens, last)


def write_token_file(source: Source, encoder: Encoder, output: str, origin: str) -> None:
    """Encode, shuffle and write the source; a line on stdout says what came of it."""
    began, what = time.perf_counter(), "pair" if source.max_tokens else "document"
    folder = Path(os.path.realpath(output)).parent
    size = sum(scanned.file.size for scanned in source.documents.files)
    reader = DocstringPairs(source.documents) if source.is_corpus and source.max_tokens else source.documents
    with (
        TokenFileWriter(output, encoder, source.digest, source.kind, origin) as writer,
        Spool(folder, writer.dtype) as spool,
        tqdm(total=size, desc="encoding", unit="B", unit_scale=True, disable=None) as bar,
    ):
        try:
            if source.max_tokens:
                n_bytes = encode_pairs(reader.read(progress=bar.update), encoder, spool, source.max_tokens)
            else:
                n_bytes = encode_documents(source.read(bar.update), encoder, spool)
            if not spool.n_documents:
                raise UserError(explain_no_text(source, what, spool.notes))
            bar.reset(spool.n_tokens * spool.dtype.itemsize)
            bar.set_description("shuffling")
            for tokens, last in spool.read_shuffled(SEED):
                write_document(writer, tokens, last)
                bar.update(tokens.nbytes)
        except OSError as error:  # a full disk, above all
            raise UserError(f"cannot write beside {output}: {error.strerror or error}") from error
    print(f"{output}: {format_count(spool.n_documents, what)}, {writer.n_tokens:,} tokens ({writer.dtype.name}), "
          f"{n_bytes / 1e6:.1f} MB of text, {n_bytes / writer.n_tokens:.2f} bytes per token, "
          f"in {time.perf_counter() - began:.1f} s")
    if spool.n_empty:
        print(f"left out {format_count(spool.n_empty, f'empty {what}')}")
    for note in [*spool.notes, *reader.notes()]:
        print(note)


def find_difference(output: str, source: Source, encoder: Encoder | None) -> str | None:
    """Why `output` is out of date: what it was made from is not this source and this encoder, by the hashes in its
    header; None where it is up to date. Names, sizes and times of files decide nothing."""
    if not os.path.exists(output):
        return "it is not there"
    try:
        header = TokenFile(output).header
    except UserError as error:
        return str(error)
    if header.source != source.digest:
        return "it was made from other text or with other options, by the SHA-256 in its header"
    if encoder is None or header.encoder != encoder.fingerprint:
        return "it was made with another encoder"
    return None


# ---- the output ----------------------------------------------------------------------------------------------------


def choose_output(given: argparse.Namespace) -> str:
    """The token file: --output, or data/NAME.bin, where NAME is that of the corpus or of the first input."""
    names = given.pairs or given.input
    if given.output:
        return given.output
    if not names:
        options = ["--corpus packages"] * (given.corpus == "packages") + ["--pairs"] * (given.pairs is not None)
        return next(path for path, made_with in DEFAULTS.items() if made_with == " ".join(options))
    if any(is_pipe(name) for name in names):
        raise UserError("--output: standard input and pipes have no name after which the token file could be named; "
                        "name it, such as --output data/mine.bin")  # fmt: skip
    return (Path("data") / f"{name_input(names[0])}.bin").as_posix()


def is_pipe(name: str) -> bool:
    return name in STANDARD_INPUT or (os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name))


def name_input(name: str) -> str:
    """A file's name without its suffixes, a folder's name; for a glob, that of the folder in which it begins.

    >>> name_input("book.txt.gz"), name_input("notes/v1.2/"), name_input("logs/2025-*/*.jsonl")
    ('book', 'v1.2', 'logs')
    """
    path = Path(os.path.abspath(os.path.expanduser(name)))
    is_folder = path.is_dir() or name.endswith(("/", os.sep))
    while not path.exists() and glob.has_magic(str(path)):
        path, is_folder = path.parent, True
    return (path.name if is_folder else Path(path.name.removesuffix(".gz")).stem) or "text"


def hash_origin(given: argparse.Namespace) -> str:
    """Of the names of the inputs and of the encoder, where no --output names the file; else NO_ORIGIN."""
    if given.output:
        return NO_ORIGIN
    names = [os.path.normpath(name) for name in given.pairs or given.input or ()]
    about = [given.pairs is not None, names or given.corpus, given.encoder]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def check_origin(output: str, origin: str) -> None:
    """Raises UserError if no --output names the file, and it was not made from these inputs with this encoder."""
    try:
        found = TokenFile(output).header.origin
    except UserError:  # damaged, or missing
        return
    if origin not in (NO_ORIGIN, found):
        raise UserError(f"--output: {output} is there, and was made from other inputs, with another encoder, or by a "
                        f"command that named it; name a new file, or replace it with --output {output}")  # fmt: skip


# ---- the command line ----------------------------------------------------------------------------------------------


def verify_token_file(path: str) -> None:
    file = TokenFile(path)
    header = file.header
    with tqdm(total=header.n_tokens, desc="verifying", unit="tokens", unit_scale=True, disable=None) as bar:
        file.verify(bar.update)
    what = (format_count(header.n_documents, "document") if header.kind == "tokens"
            else f"{header.n_documents:,} sources and targets")  # fmt: skip
    print(f"{path} is sound: {what}, {header.n_tokens:,} tokens ({header.dtype}, under "
          f"{header.vocab_size:,}), encoder {header.encoder[:12]}…, SHA-256 {header.sha256[:12]}…")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    renamed = {"--longest": "--max_tokens"}
    parser = ArgumentParser("prepare.py", "Turn text into a token file.", renamed)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--input", nargs="+", action="extend", metavar="PATH", help="files, directories or globs of "
                      "text; .json is a list and .jsonl has lines of strings or of {\"text\": …}, .gz is unpacked; a "
                      "pipe, or - for standard input")
    what.add_argument("--corpus", choices=("stdlib", "packages"), default="stdlib", help="instead of --input: the "
                      "sources of this Python's standard library (default), or of the packages in requirements.txt")
    what.add_argument("--verify", metavar="FILE", help="read all of a token file and check its hash; writes nothing")
    parser.add_argument("--pairs", nargs="*", metavar="PATH", help="make pairs for encoder-decoders: of .jsonl files "
                        "with lines of {\"source\": …, \"target\": …}; without a PATH, of the corpus, in which the "
                        "docstring of each function is a source, and its code the target")
    parser.add_argument("--max_tokens", type=int, default=256, metavar="N",
                        help="maximum tokens of a pair, the <|eot|> included: "
                        "longer sources are cut, pairs with a longer target left out (default %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="the token file (default data/webtext.bin; data/packages.bin "
                        "for --corpus packages; data/pairs.bin for --pairs; for files of your own data/NAME.bin, with "
                        "the name of the first). Without --output, a file that was made from inputs of other names, or "
                        "with an encoder of another name, is not replaced")
    parser.add_argument("--encoder", default="bin/cl8k.bin", metavar="SPEC", help="an encoder file, trained on the "
                        "input where it is missing; tiktoken:NAME; chars:FILE (default %(default)s)")
    parser.add_argument("--vocab_size", type=parse_vocab_size, help="size of the encoder to train (default 8192)")
    parser.add_argument("--chat_template", metavar="NAME", help="chatml, or a file with a Jinja template: also read "
                        "{\"messages\": [{\"role\": …, \"content\": …}, …]} in .jsonl and .json; the new encoder keeps "
                        "the template, and its models can chat")
    add_reading_options(parser)
    parser.add_argument("--force", action="store_true", help="write the output anew though it is up to date: made from "
                        "the same text by the same encoder, by the hashes in its header (an encoder that is there is "
                        "kept)")
    given = parser.parse_args(argv)
    if given.pairs is None:
        parser.refuse_unused(given, ["max_tokens"], "limits pairs; add --pairs")
    if not given.input and not given.pairs:
        why = "is about files of your own; name them with --input or --pairs"
        parser.refuse_unused(given, ["format", "errors"], why)
    return given


def get_source(given: argparse.Namespace) -> tuple[Source, str]:
    """What a command line says to read, and where the token file goes. Nothing is read yet."""
    names, option = (given.pairs, "--pairs") if given.pairs else (given.input, "--input")
    if given.pairs is not None and given.chat_template is not None:
        raise UserError("--pairs and --chat_template exclude each other: a pair has no messages")
    if given.pairs is not None and given.input:
        raise UserError("--pairs and --input exclude each other: name the files after --pairs")
    if not 2 <= given.max_tokens <= MAX_PAIR_TOKENS:
        raise UserError(f"--max_tokens {given.max_tokens}: allowed is 2 to {MAX_PAIR_TOKENS:,}")
    max_tokens, output = 0 if given.pairs is None else given.max_tokens, choose_output(given)
    if not names:
        requirements = Path(__file__).with_name("requirements.txt")
        source = find_packages(requirements) if given.corpus == "packages" else find_stdlib()
        return dataclasses.replace(source, max_tokens=max_tokens, texts=[] if max_tokens else source.texts), output
    written = [Output("--output", output, "tokens"), Output("--encoder", given.encoder, "encoder")]
    inputs = expand_inputs(names, option, leave_out=find_previous(written))
    find_entry = find_pair if max_tokens else find_text
    documents = Documents(inputs, find_entry, given.format, given.errors, "--errors replace", only_json=max_tokens > 0)
    spelled = " ".join("standard input" if name == "-" else name for name in names)
    return Source(spelled[:80], documents, max_tokens=max_tokens), output


def check_files(given: argparse.Namespace, source: Source, output: str) -> None:
    """Raises UserError where writing the token file, or the encoder if it is to be trained, would cost another file."""
    outputs = [Output("--output", output, "tokens")]
    if not given.encoder.startswith(("tiktoken:", "chars:")) and not os.path.exists(given.encoder):
        outputs.append(Output("--encoder", given.encoder, "encoder"))
    option = "--pairs" if given.pairs else "--input" if given.input else "--corpus"
    inputs = [Input(option, file.path) for file in source.documents.inputs]
    check_outputs(outputs, inputs + encoder_inputs("--encoder", given.encoder))


def main(argv: list[str]) -> None:
    given = parse_arguments(argv)
    check_path_arguments(given, "input", "verify", "pairs", "output", "encoder")
    if given.verify:
        verify_token_file(given.verify)
        return
    source, output = get_source(given)
    check_files(given, source, output)
    encoder = None if is_missing(given.encoder) else load_encoder(given.encoder, given.vocab_size)
    if source.max_tokens == 0 and (template := find_template(given.chat_template, encoder, given.encoder)):
        source.template, source.documents.find_entry = template, ChatReader(template).split
    scan_documents(source)
    difference = find_difference(output, source, encoder)
    if difference is None and not given.force:
        print_up_to_date(output, source)
        return
    origin = hash_origin(given)
    if os.path.exists(output) and difference:
        check_origin(output, origin)
        print(f"{output} is written anew: {difference}", flush=True)
    encoder = encoder or train_encoder(given.encoder, given.vocab_size or 8192, source)
    write_token_file(source, encoder, output, origin)
    if given.output is None and (given.input or given.pairs):
        options = [f"--dataset.path={output}", f"--encoder_path={given.encoder}"]
        print(f"train.py reads it with {shlex.join(options)}")


def print_up_to_date(output: str, source: Source) -> None:
    n, size = len(source.documents.files), source.documents.size
    files = f"{n:,} file{'s' * (n != 1)} ({size / 1e6:.1f} MB)"
    print(f"{output} is up to date: the SHA-256 of {files}, of the options and of the encoder are those in its header "
          "(--force writes it anew)")
    for note in source.documents.notes():
        print(note)


def scan_documents(source: Source) -> None:
    """Look at all of the input once."""
    files = source.documents.inputs
    with tqdm(total=sum(file.size for file in files), desc="checking", unit="B", unit_scale=True, disable=None) as bar:
        source.documents.scan(bar.update)


if __name__ == "__main__":
    run_cli(main)
