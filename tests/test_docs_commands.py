"""Every fenced block of README.md and docs/*.md does what the page says.

Before each block stands a comment that readers do not see, with one line for each command in the block, or one for all:

    <!-- test: run max_iters=3; creates bin/air.strawberry
         test: check -->

MODE
    run              bash runs the command as it is printed, or Python a Python block
    run KEY=VALUE …  also with other values: of `--KEY` or `"KEY"` where it is printed, else train.py gets --KEY=VALUE
    serve            a server: it is started at a free port, must answer, and is stopped
    check            nothing is run: bash reads the command, make must know its targets, and the parsers of the scripts
                     here must accept their options, keys and configs (clone, install, torchrun, GPUs and long runs)
    by TEST          a Python block that this test in tests/test_docs.py covers
    file NAME        no command: the block is written to this file, where the commands after it find it
    text             no command: what a program has printed
EFFECT, any number after it, each after a semicolon
    given FILE …     the test puts these there before (GIVEN), but for models that are there already
    where OLD = NEW  in this command NEW stands for OLD
    served           `python serve.py` is running at a free port, which stands for 8000 in the command
    types TEXT       the command runs in a terminal; TEXT is typed at its prompt `> `, then Ctrl-D
    exits N          its exit code, otherwise 0
    creates FILE …   these are there afterwards, and were not or were other files
    prints TEXT      is in its standard output; without TEXT, there is some
    lacks TEXT       is not in its standard output
    keeps WORD       in later commands the "id" of the JSON that this one prints stands for WORD
TEXT is as it stands there, or a JSON string ("a\\n").

A page's commands run in order, in a folder with the repository's tracked files and nothing else.
"""

import atexit
import contextlib
import functools
import importlib
import itertools
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import forks
import freeze
import pytest
import test_docs
from machine import require, require_program
from ports import free_port
from torch.distributed.run import get_args_parser as torchrun_parser

import bench
import prepare
import sample
from model import CONFIGS
from strawberry.bench.common import load_spec, parse_assignment, read_specs
from strawberry.run_config import load_run
from strawberry.serving.settings import read_command

ROOT = Path(__file__).parent.parent
PAGES = {page: (ROOT / page).read_text(encoding="utf-8") for page in test_docs.PAGES if page.count("/") < 2}
SECONDS = 300  # after which a command hangs

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the commands are bash's")

# ---- files that commands are given ---------------------------------------------------------------------------------

VERSE = "".join(f"Once a {who} {did}.\n\n" for who in ("cat", "dog", "fox") for did in ("sat", "ran", "ate")) * 250
SMALL = ("--max_iters=8 --warmup_iters=2 --eval_interval=8 --eval_iters=1 --sample_length=0 "
         "--model_hyperparams.n_layer=1 --checkpoints.create_checkpoints=false")  # fmt: skip
GIVEN: dict[str, str | list[str]] = {  # a text, or the commands that make the file
    "book.txt": "".join(PAGES.values()),
    "notes/day.txt": VERSE,
    "logs/a.jsonl": "".join(f'{{"text": "{verse.strip()}"}}\n' for verse in VERSE.split("\n\n") if verse) * 2,
    "input.txt": VERSE,
    "chats.jsonl": 200 * (
        '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello to you"}]}\n'),
    "pairs.jsonl": '{"source": "Return the sum.", "target": "return a + b"}\n' * 50,
    "prompts.jsonl": '{"prompt": "Once"}\n{"prompt": "Once a", "max_tokens": 5, "id": "b"}\n',
    "bin/tiny.strawberry": [
        "python prepare.py --input notes/day.txt --output data/webtext.bin --encoder bin/cl8k.bin --vocab_size 270",
        "python train.py --config tiny.json --model_hyperparams.vocab_size=270 --max_iters=3 --warmup_iters=2 "
        "--eval_iters=1 --sample_length=0"],
    "bin/verse.strawberry": [  # writes verses, a blank line after each
        "python prepare.py --input notes/day.txt --output data/verse.bin --encoder bin/verse.bin --vocab_size 270",
        f"python train.py --config tiny.json {SMALL} --dataset.path=data/verse.bin --encoder_path=bin/verse.bin "
        "--model_hyperparams.vocab_size=270 --model_hyperparams.block_size=64 --model_path=bin/verse.strawberry"],
    "bin/chat.strawberry": [
        "python prepare.py --input chats.jsonl --chat_template chatml --output data/chats.bin --encoder bin/chat.bin "
        "--vocab_size 264",
        f"python train.py --config tiny.json {SMALL} --dataset.path=data/chats.bin --encoder_path=bin/chat.bin "
        "--model_hyperparams.vocab_size=264 --model_hyperparams.block_size=64 --model_path=bin/chat.strawberry"],
    "bin/tinystar-v0.2-modernbase.tinystar": [
        "python prepare.py --input notes/day.txt --output data/verse.bin --encoder bin/verse.bin --vocab_size 270",
        f"python train.py --config tinystar-v0.2-modernbase.json {SMALL} --max_iters=2 --dataset.path=data/verse.bin "
        "--encoder_path=bin/verse.bin --model_hyperparams.vocab_size=270 --model_hyperparams.block_size=64"],
    "bin/transformer-pairs.transformer": [
        "python prepare.py --pairs pairs.jsonl --output data/pairs.bin --encoder bin/pairs.bin --vocab_size 262",
        f"python train.py --config transformer-pairs.json {SMALL} --max_iters=2 --encoder_path=bin/pairs.bin "
        "--model_hyperparams.n_embd=32 --model_hyperparams.block_size=64"],
}  # fmt: skip

# ---- reading a page -----------------------------------------------------------------------------------------------

EFFECTS = {"given", "where", "served", "types", "exits", "creates", "prints", "lacks", "keeps"}
MODES = {"run", "serve", "check", "by", "file", "text"}


@dataclass
class Marker:
    mode: str
    words: list[str] = field(default_factory=list)
    effects: list[tuple[str, str]] = field(default_factory=list)

    def get(self, name: str) -> list[str]:
        return [value for effect, value in self.effects if effect == name]


@dataclass
class Command:
    page: str
    block: int  # line of the block's first command
    line: int
    text: str
    language: str
    marker: Marker


def read_text(value: str) -> str:
    return json.loads(value) if value.startswith('"') else value


def read_marker(line: str) -> Marker:
    (mode, *words), *effects = (part.split() if i == 0 else part for i, part in enumerate(re.split(r"\s*;\s*", line)))
    marker = Marker(mode, words, [tuple(f"{effect} ".split(" ", 1)) for effect in effects])
    marker.effects = [(name, value.strip()) for name, value in marker.effects]
    unknown = {mode} - MODES | {name for name, _ in marker.effects} - EFFECTS
    fits = {"run": all("=" in word for word in words), "by": len(words) > 0, "file": len(words) == 1}
    if unknown or not fits.get(mode, not words):
        raise ValueError(f"unknown marker {line!r}: {', '.join(unknown) or ' '.join(words)}")
    return marker


def split_commands(block: str, line: int) -> list[tuple[int, str]]:
    """The commands of a bash block, each with its line; a backslash at a line's end goes on with the next."""
    found, parts = [], []
    for number, row in enumerate(block.splitlines(), line):
        if parts or (row.strip() and not row.startswith("#")):
            parts.append(row)
            if not row.endswith("\\"):
                found.append((number - len(parts) + 1, "\n".join(parts)))
                parts = []
    return found


BLOCK = re.compile(r"""
    (?: ^<!--(?P<marker>(?:(?!-->).)*)-->\n )?  ^```(?P<language>\w*)\n(?P<block>.*?)^```$
""", re.M | re.S | re.X)  # fmt: skip


def read_commands(text: str, page: str) -> list[Command]:
    """The commands of a page, with their markers. Raises ValueError for a block without."""
    commands = []
    for match in BLOCK.finditer(text):
        line = text[: match.start("block")].count("\n") + 1
        try:
            lines = [row.strip() for row in (match["marker"] or "").split("\n")]
            if not all(row.startswith("test: ") for row in lines):
                raise ValueError("a block needs a marker before it, <!-- test: … -->")
            markers = [read_marker(row.removeprefix("test: ").strip()) for row in lines]
            is_whole = match["language"] == "python" or markers[0].mode in ("text", "file")
            found = [(line, match["block"])] if is_whole else split_commands(match["block"], line)
            if len(markers) not in (1, len(found)):
                raise ValueError(f"{len(markers)} markers for {len(found)} commands")
        except ValueError as error:
            raise ValueError(f"{page}:{line}: {error}") from error
        markers = markers * len(found) if len(markers) == 1 else markers
        commands += [Command(page, line, *at, match["language"], marker)
                     for at, marker in zip(found, markers, strict=True)]  # fmt: skip
    return commands


# ---- checking without running --------------------------------------------------------------------------------------


def check_bench(argv: list[str]) -> None:
    """The arguments of a subcommand, and the configs that they name."""
    if argv[0] not in bench.COMMANDS:
        raise ValueError(f"bench.py has no {argv[0]}")
    module = importlib.import_module(f"strawberry.bench.{argv[0]}")
    arguments = vars(module.parse_arguments(argv[1:]))
    specs = [arguments.get(name) or [] for name in ("config", "configs", "models", "model")]
    common = [parse_assignment(text) for text in arguments.get("set", [])]
    for spec in (spec for found in specs for spec in ([found] if isinstance(found, str) else found)):
        if ".json" in spec:
            load_spec(spec, common)
    if argv[0] == "compare":
        read_specs(arguments["configs"])  # refuses a key that all must share


def check_module(argv: list[str]) -> None:
    """`python -m pytest`, of which the files must be there."""
    name, *argv = argv
    missing = [word for word in argv if word.endswith(".py") and not (ROOT / word).exists()]
    if name != "pytest" or missing:
        raise ValueError(f"python -m {name} {' '.join(argv)}: {' '.join(missing) or 'no parser is known for it'}")


PARSERS: dict[str, Callable] = {
    "-m": check_module,
    "train.py": lambda argv: load_run([word for word in argv if word not in ("--check", "--quiet")], CONFIGS),
    "sample.py": sample.read_settings,
    "serve.py": read_command,
    "prepare.py": prepare.parse_arguments,
    "bench.py": check_bench,
    "tests/freeze.py": freeze.parse_arguments,
}


def check_call(program: str, *argv: str) -> None:
    """One call of a program: what belongs to this repository in it."""
    if program == "python":
        script, *argv = argv
        if script not in PARSERS:
            raise ValueError(f"python {script}: no parser is known for it")
        with contextlib.redirect_stderr(sys.stdout):
            PARSERS[script](argv)
    elif program == "torchrun":
        given = torchrun_parser().parse_args(argv)
        check_call("python", given.training_script, *given.training_script_args)
    elif program == "make":
        environment = os.environ | {"LC_ALL": "C"}
        done = subprocess.run(["make", "-n", *argv], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode or "Nothing to be done" in done.stdout:  # a file of that name, but no target
            raise ValueError((done.stderr or done.stdout).strip())
    elif program == "pip" and "-r" in argv and not (ROOT / argv[argv.index("-r") + 1]).exists():
        raise ValueError(f"pip {' '.join(argv)}: no such file")


# functions in the place of programs write down how they are called; without a PATH there is nothing else to be called
RECORD = """PATH=; exec 3>&1 1>/dev/null
for program in cd curl git lm_eval make pip python source torchrun; do
    eval "$program() { printf '%s\\0' $program \\$# \\"\\$@\\" >&3; }"
done
"""


def check_block(commands: list[Command]) -> None:
    """Checks all commands of a block, which may use each other's variables."""
    text = "\n".join(replace_words(command) for command in commands)
    done = subprocess.run([require_program("bash"), "-c", RECORD + text], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f"{commands[0].page}:{commands[0].line}: bash says {done.stderr}"
    words, problems = done.stdout.split("\0")[:-1], []
    while words:
        program, count = words[:2]
        argv, words = words[2 : 2 + int(count)], words[2 + int(count) :]
        try:
            check_call(program, *argv)
        except (Exception, SystemExit) as error:  # whatever a parser reports with
            problems.append(f"{program} {' '.join(argv)}\n    {error}")
    assert not problems, f"{commands[0].page}:{commands[0].line}: " + "\n".join(problems)


def replace_words(command: Command, more: dict[str, str] | None = None) -> str:
    """The command with what its marker puts in the place of words in it."""
    text = command.text
    pairs = [tuple(value.split(" = ", 1)) for value in command.marker.get("where")]
    for old, new in [*pairs, *(more or {}).items()]:
        text = text.replace(old, new)
    return text


# ---- running -------------------------------------------------------------------------------------------------------

PYTHON = """#!/bin/sh
case "$1" in
    train.py) set -- "$@" $DOCS_TRAIN ;;
    serve.py) set -- "$@" $DOCS_SERVE ;;
esac
[ -t 0 ] || case "$1" in
    *.py | -m) exec FORK "$@" ;;
esac
exec PYTHON "$@"
"""


def copy_repository(folder: Path) -> None:
    """The tracked files, and an installed .venv whose python adds what DOCS_TRAIN and DOCS_SERVE say."""
    command = [require_program("git"), "-c", "safe.directory=*", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    require(listed.returncode == 0, "a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    text = PYTHON.replace("PYTHON", shlex.quote(sys.executable)).replace("FORK", shlex.join(forks.start()))
    (programs / "python").write_text(text)
    (programs / "python").chmod(0o755)
    (folder / ".venv" / "installed").touch()


@functools.cache
def given_shell() -> "Shell":
    """A copy of the repository in which the files of GIVEN are written, once for all pages."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy_repository(folder)
    return Shell(folder)


@functools.cache
def make_given(name: str) -> dict[str, bytes]:
    """Run the commands of GIVEN that make the file. Returns all files in data/ and bin/ that they have written."""
    shell, began = given_shell(), time.time_ns()
    for command in GIVEN[name]:
        for needed in GIVEN:
            if re.search(rf" {re.escape(needed)}( |$)", command):
                shell.give(needed)
        done = shell.bash(command)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    files = [file for part in ("data", "bin") for file in (shell.folder / part).rglob("*") if file.is_file()]
    return {str(file.relative_to(shell.folder)): file.read_bytes()
            for file in files if file.stat().st_mtime_ns > began}  # fmt: skip


class Shell:
    """Runs the commands of a page one after another in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.words, self.server = folder, {}, None
        programs = [str(folder / ".venv" / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        self.environment = os.environ | {"PATH": os.pathsep.join(programs)}

    def __enter__(self) -> "Shell":
        return self

    def __exit__(self, *error) -> None:
        if self.server is not None:
            self.stop(self.server)

    def bash(self, text: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", "-c", text], cwd=self.folder, env=self.environment | environment,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)  # fmt: skip

    def give(self, name: str) -> None:
        """A file of GIVEN, and the files from which commands make it."""
        path, content = self.folder / name, GIVEN[name]
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
            return
        if path.exists():
            return
        for file, data in make_given(name).items():
            copy = self.folder / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                copy.write_bytes(data)

    def start(self, text: str) -> tuple[subprocess.Popen, int]:
        """A server and its port, once it answers."""
        port = free_port()
        with open(self.folder / "server.log", "wb") as log:
            server = subprocess.Popen(["bash", "-c", text], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log,
                                      stderr=log, env=self.environment | {"DOCS_SERVE": f"--port={port}"},
                                      start_new_session=True)  # fmt: skip
        end = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return server, port
            log = (self.folder / "server.log").read_text()
            assert server.poll() is None and time.monotonic() < end, f"{text} does not serve\n{log}"
            time.sleep(0.1)

    def stop(self, server: subprocess.Popen) -> None:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)

    def type_in(self, text: str, typed: str) -> subprocess.CompletedProcess:
        """Runs a command in a terminal and types a line at its prompt, then Ctrl-D at the next."""
        import pty

        ours, theirs = pty.openpty()
        process = subprocess.Popen(["bash", "-c", text], cwd=self.folder, env=self.environment, stdin=theirs,
                                   stdout=theirs, stderr=theirs, start_new_session=True)  # fmt: skip
        os.close(theirs)
        seen, keys = b"", [f"{typed}\n".encode(), b"\x04"]
        with contextlib.suppress(OSError):  # the end of the terminal
            while select.select([ours], [], [], SECONDS)[0] and (data := os.read(ours, 1 << 16)):
                seen += data
                if keys and seen.count(b"\n> ") > 2 - len(keys):
                    os.write(ours, keys.pop(0))
        os.close(ours)
        return subprocess.CompletedProcess(text, process.wait(SECONDS), seen.decode(errors="replace"), "")

    def run(self, command: Command) -> subprocess.CompletedProcess:
        """Runs one command, with the values that its marker gives to keys."""
        more = dict(self.words)
        if command.marker.get("served"):
            if self.server is None:
                self.server, self.port = self.start("python serve.py")
            more["8000"] = str(self.port)
        text, added = replace_words(command, more), []
        for word in command.marker.words:
            key, _, value = word.partition("=")
            text, count = re.subn(rf'(--{key}[= ]|"{key}": )[\w.+-]+', rf"\g<1>{value}", text)
            added += [f"--{word}"] if not count else []
        if typed := command.marker.get("types"):
            return self.type_in(text, typed[0])
        if command.language == "python":
            (self.folder / "block.py").write_text(text, encoding="utf-8")
            text = "python block.py"
        return self.bash(text, DOCS_TRAIN=" ".join(added))

    def run_and_check(self, command: Command) -> None:
        """Runs one command and looks at its effects."""
        marker = command.marker
        for name in [name for names in marker.get("given") for name in names.split()]:
            self.give(name)
        if marker.mode == "file":
            (self.folder / marker.words[0]).write_text(command.text, encoding="utf-8")
            return
        if marker.mode == "serve":
            self.stop(self.start(replace_words(command, self.words))[0])
            return
        created = {name: changed_at(self.folder / name) for names in marker.get("creates") for name in names.split()}
        done = self.run(command)
        where = f"{command.page}:{command.line}: {command.text}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == int((marker.get("exits") or ["0"])[0]), f"exit code {done.returncode}: {where}"
        for name, before in created.items():
            assert changed_at(self.folder / name) not in (None, before), f"has not created {name}: {where}"
        for text in map(read_text, marker.get("prints")):
            assert text in done.stdout and done.stdout, f"has not printed {text!r}: {where}"
        for text in map(read_text, marker.get("lacks")):
            assert text not in done.stdout, f"has printed {text!r}: {where}"
        for word in marker.get("keeps"):
            self.words[word] = json.loads(done.stdout)["id"]


def changed_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def run_page(commands: list[Command], folder: Path) -> None:
    with Shell(folder) as shell:
        for command in commands:
            if command.marker.mode in ("run", "serve", "file"):
                shell.run_and_check(command)


# ---- the tests -----------------------------------------------------------------------------------------------------

COMMANDS = {page: read_commands(text, page) for page, text in PAGES.items()}
BLOCKS: dict[str, list[Command]] = {}
for command in itertools.chain.from_iterable(COMMANDS.values()):
    if command.marker.mode == "check":
        BLOCKS.setdefault(f"{command.page}:{command.block}", []).append(command)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_options_of_commands_that_are_not_run(block):
    check_block(BLOCKS[block])


def runs(page: str) -> bool:
    return any(command.marker.mode in ("run", "serve") for command in COMMANDS[page])


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in COMMANDS if runs(page)])
def test_commands_of_a_page(tmp_path, page):
    for program in ("bash", "curl", "make"):
        require_program(program)
    copy_repository(tmp_path)
    run_page(COMMANDS[page], tmp_path)


@pytest.mark.slow
def test_the_architecture_that_the_readme_adds_trains_and_is_tested(tmp_path):
    """In model.py, where the README says that it belongs."""
    copy_repository(tmp_path)
    whole, registry = (tmp_path / "model.py").read_text(encoding="utf-8"), "MODELS: dict[str"
    added, _, entry = test_docs.example().rpartition("MODELS[")
    assert entry == '"mean"] = Mean\n' and whole.count(registry) == 1
    start, end = whole.split(registry)
    end = end.replace("{", '{\n    "mean": Mean,', 1)
    (tmp_path / "model.py").write_text(f"{start}{added}\n{registry}{end}", encoding="utf-8")
    config = {"model_hyperparams": {"arch": "mean", "block_size": 16}, "max_iters": 3, "warmup_iters": 1,
              "eval_iters": 1, "encoder_path": "chars:input.txt", "model_path": "bin/a.mean"}  # fmt: skip
    (tmp_path / "mean.json").write_text(json.dumps(config))
    with Shell(tmp_path) as shell:
        shell.give("input.txt")
        for command in ("python prepare.py --input input.txt --output data/webtext.bin --encoder chars:input.txt",
                        "python train.py --config mean.json",
                        "python sample.py --model bin/a.mean --prompt Once --length 5",
                        "python -m pytest -q tests/model/test_model.py -k 'mean and not reference'"):  # fmt: skip
            done = shell.bash(command)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_blocks_that_other_tests_cover_name_them():
    named = [word for commands in COMMANDS.values() for command in commands if command.marker.mode == "by"
             for word in command.marker.words]  # fmt: skip
    assert named and all(callable(getattr(test_docs, name, None)) for name in named)


# ---- the tests of the markers --------------------------------------------------------------------------------------


def read_one(marker: str, *lines: str, language: str = "") -> list[Command]:
    comment = f"<!-- {marker} -->\n" if marker else ""
    return read_commands("\n".join([f"{comment}```{language}", *lines, "```", ""]), "page.md")


@pytest.mark.parametrize("marker,says", [
    ("", "needs a marker"),
    ("a comment", "needs a marker"),
    ("test: try", "unknown marker 'try'"),
    ("test: run; makes x", "makes"),
    ("test: run now", "now"),
    ("test: check max_iters=3", "max_iters=3"),
    ("test: text of.txt", "of.txt"),
    ("test: file", "file"),
    ("test: run\n     test: run\n     test: run", "3 markers for 2 commands"),
])  # fmt: skip
def test_a_block_with_an_invalid_marker_is_refused(marker, says):
    with pytest.raises(ValueError, match=f"page.md:.*{says}"):
        read_one(marker, "true", "# a comment", "echo \\", "  two")


def test_commands_are_split_as_bash_does():
    first, second = read_one("test: run\n     test: check", "true", "# a comment", "echo \\", "  two")
    assert (first.text, first.marker.mode) == ("true", "run")
    assert (second.text, second.marker.mode) == ("echo \\\n  two", "check") and second.line == first.line + 2


@pytest.mark.parametrize("line,says", [
    ("make tests", "tests"),
    ("python train.py --config air.json --learning_rat=1", "learning_rat"),
    ("python train.py --config mist.json", "mist.json"),
    ("torchrun --nproc_per_node=2 train.py --parallel=ddq", "ddq"),
    ("torchrun --nproc=2 --standalon=x train.py", "standalon"),
    ("python sample.py --temprature 1", "temprature"),
    ("A=b python serve.py --prt 1", "prt"),
    ("python prepare.py --inputs x", "inputs"),
    ("python bench.py compares air.json", "compares"),
    ("python bench.py train --config air.json:n_layr=3", "n_layr"),
    ('P=air.json:n_layer=0; python bench.py scale --config "$P"', "n_layer"),
    ("python bench.py compare air.json:block_size=64 tiny.json", "block_size must be the same"),
    ("python bench.py kernels --fast", "fast"),
    ("python nothing.py", "nothing.py"),
    ("python -m pytest tests/nothing.py", "tests/nothing.py"),
    ("python -m nothing", "-m nothing"),
    ("python tests/freeze.py --bsae HEAD", "bsae"),
    ("pip install -r requirement.txt", "requirement.txt"),
    ("wget x", "wget"),
    ('echo "a', "unexpected EOF"),
    ("python bench.py kernels (1)", "syntax error"),
])  # fmt: skip
def test_a_mistake_in_a_command_that_is_not_run_is_named(line, says):
    with pytest.raises(AssertionError, match=says):
        check_block(read_one("test: check", line))


def test_checking_runs_nothing(tmp_path):
    check_block(read_one("test: check", f"pip install x > {tmp_path}/log && cd nowhere && python bench.py kernels"))
    assert (tmp_path / "log").read_bytes() == b""


@pytest.mark.parametrize("marker,line,says", [
    ("run", "exit 3", "exit code 3"),
    ("run; exits 3", "true", "exit code 0"),
    ("run; creates a", "touch b", "has not created a"),
    ("run; creates old", "true", "has not created old"),
    ("run; prints one", "echo two", "has not printed 'one'"),
    ("run; prints", "true", "has not printed"),
    (r'run; lacks "\n\n"', r"printf 'a\n\nb'", "has printed"),
    ("serve", "true", "does not serve"),
    ("run; types x; prints read=y", 'printf "\\n> "; read x; echo read=$x', "has not printed"),
])  # fmt: skip
def test_a_missing_effect_is_named(tmp_path, marker, line, says):
    (tmp_path / "old").touch()
    with pytest.raises(AssertionError, match=says):
        run_page(read_one(f"test: {marker}", line), tmp_path)


def test_every_effect_is_recognized(tmp_path):
    (tmp_path / "old").touch()
    lines = {
        "run; exits 3; prints": "echo; exit 3",
        "run; given notes/day.txt; creates old new; lacks b": "cp notes/day.txt old; echo a > new",
        "run; where … = one; prints a one": "echo a …",
        'run; keeps x-…; prints "id"': """echo '{"id": "x-1"}'""",
        "run; prints x-1": "echo x-…",
        "run; types word; prints read=word": 'printf "\\n> "; read x; echo read=$x; read -p "> " x || true',
        "run n=3 m=4; prints --n=3": 'echo --n=100 "train.py $DOCS_TRAIN"',
        "run m=4; prints train.py --m=4": 'echo "train.py $DOCS_TRAIN"',
    }
    run_page(read_one("\n     ".join(f"test: {marker}" for marker in lines), *lines.values()), tmp_path)


def test_a_file_is_written_as_it_is_printed(tmp_path):
    text = '{\n  "n": 1, // a comment \\\n}'
    run_page(read_one("test: file a.json", text, language="json") + read_one("test: run; prints comment", "cat a.json"),
             tmp_path)  # fmt: skip
    assert (tmp_path / "a.json").read_text() == text + "\n"


def test_an_existing_model_is_not_trained_again(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tiny.strawberry").write_text("mine")
    run_page(read_one("test: run; given bin/tiny.strawberry; prints mine", "cat bin/tiny.strawberry"), tmp_path)
