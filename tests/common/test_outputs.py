"""No command costs its user a file: not an input, not another output, not a file of another kind."""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bench
import encoder as encoders
import export
import prepare
import sample
import serve
import train
from model import CONFIGS, build
from strawberry.bench import growth
from strawberry.common import UserError, run_cli
from strawberry.data import assemble
from strawberry.data.token_file import TokenFileWriter
from strawberry.huggingface.export import FILES, write_export
from strawberry.inference.bulk import Results
from strawberry.model_file import save_model
from strawberry.outputs import CHECKPOINTS, KINDS, Input, Output, check_outputs, find_previous, has_kind
from strawberry.run_config import make_run
from strawberry.serving.id_directory import IdDirectory
from strawberry.training import plot, setup
from strawberry.training.checkpoint import save_checkpoint
from strawberry.training.lock import Lock
from strawberry.training.metrics import Metrics
from strawberry.training.record import write_record

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "ten", "dogs", "run", "over", "two", "hills", "in", "sun"]
TEXT = "".join(" ".join(WORDS[(7 * i + j * j) % len(WORDS)] for j in range(12)) + ".\n" for i in range(200))
MODEL = {"arch": "tinystar", "vocab_size": 300, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}
RUN = {
    "dataset": {"path": "base.bin"}, "encoder_path": "base.enc", "model_path": "new/model", "img_path": "new/img",
    "checkpoints": {"path": "new/ck", "interval": 2}, "model_hyperparams": MODEL, "batch_size": 2, "max_iters": 2,
    "eval_interval": 2, "eval_iters": 1, "log_interval": 1, "sample_length": 0, "seed": 1, "device": "cpu",
    "compile": False,
}  # fmt: skip
METRICS = '{"step": 1, "tokens": 8, "loss": 3.0}\n{"step": 2, "tokens": 16, "val_loss": 2.5}\n'


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with one file of each kind that the commands read, written by the commands' own code."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "base.txt").write_text(TEXT)
    encoder = encoders.train([TEXT], 300)
    encoder.save(folder / "base.enc")
    with TokenFileWriter(folder / "base.bin", encoder) as writer:
        for line in TEXT.splitlines():
            writer.add(encoder.encode_batch([line])[0])
    torch.manual_seed(0)
    save_model(folder / "base.model", build(MODEL), encoder, {})
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "metrics.jsonl").write_text(METRICS)
    (folder / "prompts.jsonl").write_text('{"prompt": "the cat"}\n')
    (folder / "recipe.json").write_text('{"files": ["base.txt"], "encoder": "base.enc"}')
    (folder / "pairs.jsonl").write_text('{"source": "the cat", "target": "sat"}\n')
    return folder


@contextlib.contextmanager
def enter_copy(template):
    """A copy of the template, which is the working directory."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(template, folder, dirs_exist_ok=True)
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


@pytest.fixture
def workdir(template):
    with enter_copy(template) as folder:
        yield folder


def call(main, *words):
    """(exit code, standard error) of a command, run in this process as its file would be."""
    errors, argv = io.StringIO(), sys.argv
    sys.argv = ["command", *map(str, words)]
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            run_cli(main)
    except SystemExit as end:
        return end.code, errors.getvalue()
    finally:
        sys.argv = argv


# ---- inputs --------------------------------------------------------------------------------------------------------


class Role(NamedTuple):
    """A place in a command line where a path stands: the name that a message gives it, and the template's file."""

    place: str  # in the command line
    name: str
    file: str = ""
    shape: str = "{path}"  # what is written there of the file's path and its folder


class Command(NamedTuple):
    main: object
    line: str  # with {places}
    defaults: dict[str, str]
    inputs: list[Role]
    outputs: list[Role]  # `file`: the name that the command itself gives to the file, in the folder that it is given


def assemble_of(argv):
    """strawberry.data.assemble, with a recipe of the files and the encoder given."""
    recipe, folder, files, encoder = argv
    if recipe == "recipe.json":
        Path(recipe).write_text(json.dumps({"files": [files], "encoder": encoder}))
    return assemble.main([recipe, folder])


def documents(name, place="input", file="base.txt"):
    shapes = ("{path}", "{folder}", "{folder}/*")
    return [Role(place, name, file, shape) for shape in shapes]


ENCODERS = [("base.enc", "{path}"), ("base.txt", "chars:{path}")]
TRAIN_LINE = (
    "--config {config} --dataset.path={data} --dataset.load_from_file={single} --encoder_path={encoder} "
    "--model_path={model} --checkpoints.path={checkpoints} --img_path={images} --init_from={init}"
)
TRAIN = {"config": "run.json", "data": "base.bin", "single": "true", "encoder": "base.enc", "model": "new/model",
         "checkpoints": "new/ck", "images": "new/img", "init": "scratch"}  # fmt: skip
BENCH = {"config": "run.json", "data": "base.bin", "encoder": "base.enc", "out": "new"}
BENCH_WORDS = "--set dataset.path={data} --set encoder_path={encoder}"


def bench_inputs(option):
    return [Role("config", option, "run.json"), Role("data", "dataset.path", "base.bin"),
            *(Role("encoder", "encoder_path", file, shape) for file, shape in ENCODERS)]  # fmt: skip


def bench_outputs(name):
    return [Role("out", "--out", f"{name}.{suffix}", "{folder}") for suffix in ("json", "md", "png")]


COMMANDS = {
    "encoder": Command(
        encoders.main, "--input {input} --output {output} --vocab_size 300", {"input": "base.txt", "output": "new.enc"},
        documents("--input"), [Role("output", "--output")],
    ),
    "prepare": Command(
        prepare.main, "--input {input} --output {output} --encoder {encoder} --force",
        {"input": "base.txt", "output": "new.bin", "encoder": "base.enc"},
        [*documents("--input"), *(Role("encoder", "--encoder", file, shape) for file, shape in ENCODERS)],
        [Role("output", "--output")],
    ),
    "prepare pairs": Command(
        prepare.main, "--pairs {input} --output {output} --encoder {encoder}",
        {"input": "pairs.jsonl", "output": "new.bin", "encoder": "base.enc"}, documents("--pairs", file="pairs.jsonl"),
        [Role("output", "--output")],
    ),
    "train": Command(
        train.main, TRAIN_LINE, TRAIN,
        [Role("config", "--config", "run.json"), Role("data", "dataset.path", "base.bin"),
         Role("data", "dataset.path", "base.bin", "{folder}"),
         *(Role("encoder", "encoder_path", file, shape) for file, shape in ENCODERS),
         Role("init", "init_from", "base.model", "{path},pretrained")],
        [Role("model", "model_path"),
         *(Role("checkpoints", "checkpoints.path", name, "{folder}") for name in ("metrics.jsonl", "lock", "latest")),
         *(Role("images", "img_path", name, "{folder}") for name in plot.SHEETS)],
    ),
    "sample": Command(
        sample.main, "--model {model} --prompts_file {prompts} --out {out}",
        {"model": "base.model", "prompts": "prompts.jsonl", "out": "new.jsonl"},
        [Role("model", "--model", "base.model"), Role("prompts", "--prompts_file", "prompts.jsonl")],
        [Role("out", "--out"), Role("out", "--out", "x.from.json", "{folder}/x")],
    ),
    "export": Command(
        export.main, "{model} {folder}", {"model": "base.model", "folder": "new"},
        [Role("model", "MODEL", "base.model")],
        [Role("folder", "FOLDER", name, "{folder}") for name in FILES],
    ),
    "plot": Command(
        plot.main, "{metrics} --out {out}", {"metrics": "metrics.jsonl", "out": "new"},
        [Role("metrics", "metrics", "metrics.jsonl")], [Role("out", "--out", name, "{folder}") for name in plot.SHEETS],
    ),
    "assemble": Command(
        assemble_of, "{recipe} {folder} {files} {encoder}",
        {"recipe": "recipe.json", "folder": "new", "files": "base.txt", "encoder": "base.enc"},
        [Role("recipe", "RECIPE.json", "recipe.json"), *documents("files", "files"),
         *(Role("encoder", "encoder", file, shape) for file, shape in ENCODERS)],
        [Role("folder", "FOLDER", name, "{folder}") for name in assemble.KINDS],
    ),
    "bench compare": Command(
        bench.main, f"compare {{config}} --out {{out}} --device cpu {BENCH_WORDS}", BENCH, bench_inputs("configs"),
        bench_outputs("compare"),
    ),
    "bench growth": Command(
        bench.main, f"growth {{config}} --out {{out}} --contexts 8 --widths 64 {BENCH_WORDS}", BENCH,
        bench_inputs("configs"), bench_outputs("growth"),
    ),
    "bench decode": Command(
        bench.main, "decode {model} --out {out} --json {json}", {"model": "base.model", "out": "new", "json": "x.json"},
        [Role("model", "models", "base.model"), Role("model", "models", "run.json")],
        [Role("json", "--json"), *bench_outputs("decode")[1:]],
    ),
    "bench train": Command(
        bench.main, f"train --config {{config}} --json {{out}} {BENCH_WORDS}", BENCH, bench_inputs("--config"),
        [Role("out", "--json")],
    ),
    "bench scale": Command(
        bench.main, f"scale --config {{config}} --json {{out}} {BENCH_WORDS}", BENCH, bench_inputs("--config"),
        [Role("out", "--json")],
    ),
}  # fmt: skip
SPELLINGS = ("relative", "absolute", "dots", "symbolic link", "linked folder", "hard link")
TRIPLES = [(name, given, written) for name, command in COMMANDS.items() for given in command.inputs
           for written in command.outputs]  # fmt: skip


def respell(path, spelling):
    """The same path in another spelling."""
    path = Path(path)
    if spelling == "absolute":
        return str(path.resolve())
    if spelling == "dots":
        return f"{path.parent}/../{path.parent.name}/{path.name}"
    if spelling == "linked folder":
        os.symlink(path.parent.resolve(), "linked")
        return f"linked/{path.name}"
    return str(path)


def collide(given, written, spelling):
    """Put an input where the output goes, and return the words for both places, with the paths to look at."""
    suffix = Path(given.file).suffix
    target = Path("here", written.file or f"target{suffix}")
    target.parent.mkdir()
    source = target
    if spelling in ("symbolic link", "hard link"):
        source = Path("there", given.file)
        source.parent.mkdir()
        shutil.copy(given.file, source)
        if spelling == "hard link":
            os.link(source, target)
        else:
            os.symlink(source.resolve(), target)
    else:
        shutil.copy(given.file, target)
    output = Path(respell(target, spelling))
    words = {given.place: given.shape.format(path=source, folder=source.parent)}
    return words | {written.place: written.shape.format(path=output, folder=output.parent)}, source, target


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows makes links for administrators only")
@settings(max_examples=200, deadline=None)
@given(triple=st.sampled_from(TRIPLES), spelling=st.sampled_from(SPELLINGS))
def test_no_command_overwrites_its_input(template, triple, spelling):
    name, given, written = triple
    command = COMMANDS[name]
    with enter_copy(template) as folder:
        words, source, target = collide(given, written, spelling)
        words = command.defaults | words
        if given.place == "data" and given.shape == "{folder}":
            words["single"] = "false"
        model_trained_further = (given.place, written.place) == ("init", "model")
        before = {path: path.read_bytes() for path in (source, target, Path(given.file))}
        there = sorted(folder.rglob("*"))
        if model_trained_further:
            check_outputs(setup.list_outputs(run_of(command, words)), setup.list_inputs(run_of(command, words)))
            return
        code, error = call(command.main, *(word.format(**words) for word in command.line.split()))
        assert {path: path.read_bytes() for path in before} == before
        assert sorted(folder.rglob("*")) == there, "something was left behind"
    assert code == 2 and "Traceback" not in error, error
    last = error[error.index("error: ") :]  # behind warnings
    assert written.name in last and given.name in last, error


def run_of(command, words):
    return train.load_run([word.format(**words) for word in command.line.split()], train.CONFIGS)


def test_commands_that_write_are_all_tested():
    mains = [getattr(command.main, "__module__", "") for command in COMMANDS.values()]
    scripts = {name.rpartition(".")[2] for name in mains} | {"assemble"}
    root = Path(train.__file__).parent
    sources = [*root.glob("*.py"), *root.glob("strawberry/**/*.py")]
    sources = [path for path in sources if "check_outputs(" in path.read_text("utf-8")]
    rooms = {"bench": "bench", "serving": "serve", "inference": "sample"}
    names = {rooms.get(path.parent.name, path.stem) for path in sources} - {"outputs"}  # which defines it
    guarded = {{"setup": "train"}.get(name, name) for name in names}
    assert guarded - {"serve"} == scripts - {__name__}  # serve.py: test_a_lock_never_overwrites_a_file_of_another_kind


# ---- two outputs, and places that cannot be written ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("command,places,message", [
    ("prepare", {"output": "g.bin", "encoder": "g.bin"}, "--encoder: g.bin is the same file as g.bin of --output"),
    ("prepare", {"output": "g.bin", "encoder": "x/../g.bin"}, "--encoder: x/../g.bin is the same file as g.bin of"),
    ("train", {"model": "ck/metrics.jsonl", "checkpoints": "ck"}, "is the same file as ck/metrics.jsonl of model_path"),
    ("train", {"model": "img/loss.png", "images": "./img"}, "img_path: img/loss.png is the same file as img/loss.png"),
    ("train", {"model": "ck/step_00000002/model", "checkpoints": "ck"}, "lies in a checkpoint of ck"),
    ("train", {"model": "base.model/"}, "model_path"),
    ("train", {"checkpoints": "base.txt"}, "checkpoints.path"),
    ("train", {"images": "base.txt"}, "img_path: cannot write base.txt/loss.png: "),
    ("sample", {"out": "new"}, "--out: new is a directory; name a file"),
    ("plot", {"out": "base.txt"}, "base.txt is a file, not a directory"),
    ("assemble", {"folder": "base.txt"}, "base.txt is a file, not a directory"),
    ("bench decode", {"json": "x.md", "out": "base.txt"}, "base.txt is a file, not a directory"),
    ("bench decode", {"json": "new/decode.md"}, "--out: new/decode.md is the same file as new/decode.md of --json"),
    *((command, {"output": path}, message) for command in ("encoder", "prepare") for path, message in {
        "new": "--output: new is a directory; name a file",
        "other/": "--output: other/ ends as a directory does",
        "base.txt/x": "base.txt is a file, not a directory",
        "x" * 300: "File name too long",
        "ring": "symbolic links",
        "pipe": "--output: pipe is not a regular file",
    }.items()),
])  # fmt: skip
@pytest.mark.skipif(sys.platform == "win32", reason="there are no links and pipes to make")
def test_impossible_outputs_are_refused_before_anything_is_done(workdir, command, places, message):
    (workdir / "new").mkdir()
    os.symlink("ring", "ring")
    os.mkfifo("pipe")
    before = sorted(workdir.rglob("*"))
    main, line, defaults, *_ = COMMANDS[command]
    code, error = call(main, *(word.format(**defaults | places) for word in line.split()))
    assert code == 2 and message in error and "Traceback" not in error, error
    assert sorted(workdir.rglob("*")) == before


def test_a_folder_without_the_right_to_write_is_named_at_once(workdir, monkeypatch):
    (workdir / "closed").mkdir()
    real = os.access  # which is no hindrance to root
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed" and real(path, mode))
    code, error = call(encoders.main, "--input", "base.txt", "--output", "closed/new/x.enc", "--vocab_size", "280")
    assert code == 2 and "closed cannot be written to" in error and not any((workdir / "closed").iterdir())


# ---- kinds -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file_kinds(template, tmp_path_factory):
    """A file of each kind, as the program that writes it does: {kind: [paths]}."""
    folder = tmp_path_factory.mktemp("kinds")
    encoders.load(f"chars:{template}/base.txt").save(folder / "chars.enc")
    log = Metrics(folder / "metrics.jsonl")
    log.add(step=1, tokens=8, loss=3.0)
    save_checkpoint(folder / "ck", 2, {"model": lambda file: file.write(b"x")})
    results = Results(str(folder / "texts.jsonl"))
    results.create({"prompts_file": "0", "model": "1", "seed": 2})
    results.append({"index": 0, "prompt": "a", "text": "b", "finish_reason": "stop", "tokens": 1})
    plot.curves(log.path, folder)
    figure = plot.SHEETS["loss.png"]({"a": plot.read_metrics(log.path)}, "step")
    for suffix in ("svg", "pdf"):
        figure.savefig(folder / f"loss.{suffix}")
    row = {"config": "a.json", "axis": "T", "value": 8, "tokens_per_s": 9.0, "memory": None}
    growth.write_growth([row], folder, "python bench.py growth a.json")
    (folder / "step.json").write_text(json.dumps([row], indent=1))
    (folder / "race.json").write_text(json.dumps({"nanogpt": {}, "strawberry": {}, "tokens_per_step": 1}))
    recipe = {"files": [f"{template}/base.txt"], "encoder": f"{template}/base.enc"}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assemble.main([str(folder / "recipe.json"), str(folder / "ds")])
    star = build({"arch": "tinystar", "vocab_size": 300, "block_size": 8, "n_layer": 1, "n_embd": 16})
    write_export(star, encoders.load(str(template / "base.enc")), folder / "hf")
    lock = Lock(folder)
    shutil.copy(lock.path, folder / "a_lock")
    lock.release()
    run, model = make_run({}, CONFIGS), build({"n_embd": 16, "n_head": 2, "n_qkv": 16, "vocab_size": 44})
    write_record(SimpleNamespace(run=run, model=model, root=folder, command="python train.py", config=None,
                                 flops_per_token=9.0, tokens_per_step=8, device=torch.device("cpu")))  # fmt: skip
    files = {"encoder": [template / "base.enc", "chars.enc", "ds/encoder.bin"],
             "tokens": [template / "base.bin", "ds/tokens.bin"], "model": [template / "base.model"],
             "metrics": ["metrics.jsonl"], "latest": ["ck/latest"], "texts": ["texts.jsonl"], "lock": ["a_lock"],
             "record": ["record.json"],
             "texts origin": ["texts.jsonl.from.json"], "export": [f"hf/{name}" for name in FILES],
             "picture": [*plot.SHEETS, "loss.svg", "loss.pdf"],
             "benchmark": ["growth.json", "step.json", "race.json"], "report": ["growth.md"],
             "dataset result": ["ds/result.json"], "progress": ["ds/progress.json"]}  # fmt: skip
    return {kind: [folder / path for path in paths] for kind, paths in files.items()}


FOREIGN = {  # what a user may have under any name
    "text": TEXT.encode(), "json": b'{"name": "x", "text": "format encoder"}', "list": b'[{"text": "a"}, "b"]',
    "jsonl": b'{"text": "a"}\n{"text": "b"}\n', "config": json.dumps(RUN).encode(), "markdown": b"# Notes\n\n| a |\n",
    "other safetensors": (lambda head: len(head).to_bytes(8, "little") + head)(b'{"__metadata__":{"format":"pt"}}'),
    "binary": bytes(range(256)) * 8, "zip": b"PK\x03\x04" + bytes(90), "deep": b"[" * 100_000, "newlines": b"\n\n",
    "zeros of a disk": bytes(1 << 17),
}  # fmt: skip


@pytest.mark.slow
def test_each_kind_of_file_is_recognized_by_its_content_alone(workdir, file_kinds):
    assert file_kinds.keys() == KINDS.keys()
    for kind, paths in file_kinds.items():
        for path in paths:
            Path("anything").write_bytes(Path(path).read_bytes())  # the name says nothing
            assert [known for known in KINDS if has_kind("anything", known)] == [kind], path


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_refused_and_one_of_the_same_replaced(workdir, file_kinds, kind):
    (workdir / "foreign").mkdir()
    others = [path for other, paths in file_kinds.items() if other != kind for path in paths]
    for name, data in FOREIGN.items():
        (workdir / "foreign" / name).write_bytes(data)
        others.append(workdir / "foreign" / name)
    for path in others:
        before = Path(path).read_bytes()
        with pytest.raises(UserError, match=f"--x: .* is there and is not {KINDS[kind].name}.*; name another file"):
            check_outputs([Output("--x", path, kind)])
        assert Path(path).read_bytes() == before and not find_previous([Output("--x", path, kind)])
    for path in file_kinds[kind]:
        check_outputs([Output("--x", path, kind)])
        assert find_previous([Output("--x", path, kind)]) == [path]
    for data in (b"", bytes(100)):  # nothing is lost with them
        Path("blank").write_bytes(data)
        check_outputs([Output("--x", "blank", kind)])
    check_outputs([Output("--x", "not/there/yet", kind)])
    assert not Path("not").exists()


def test_a_refusal_names_the_kind_of_the_existing_file(workdir):
    with pytest.raises(UserError, match="base.bin is there and is not an encoder file but a token file; name another"):
        check_outputs([Output("--output", "base.bin", "encoder")])


def test_a_truncated_line_is_still_recognized_as_its_kind(workdir):
    lines = {"metrics": METRICS, "texts": '{"index": 0, "prompt": "a", "text": "b"}\n'}
    for kind, text in lines.items():
        for end in range(1, len(text)):
            Path("torn").write_text(text[:end])
            check_outputs([Output("--x", "torn", kind)])


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_file_of_another_kind(workdir, command):
    main, line, defaults, _, outputs = COMMANDS[command]
    for written in outputs:
        target = workdir / "here" / (written.file or "target")
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"a diary\n")
        before = sorted(workdir.rglob("*"))
        words = defaults | {written.place: written.shape.format(path="here/target", folder="here")}
        code, error = call(main, *(word.format(**words) for word in line.split()))
        assert code == 2 and f"{written.name}: here/" in error and "is there and is not " in error, error
        assert target.read_bytes() == b"a diary\n" and sorted(workdir.rglob("*")) == before
        target.unlink()


# ---- what stays allowed ----------------------------------------------------------------------------------------------


def succeed(main, *words):
    code, error = call(main, *words)
    assert code == 0, error


def test_encoder_and_prepare_overwrite_their_own_files(workdir):
    """Also where those lie among the documents: there they are no documents."""
    os.mkdir("texts")
    shutil.copy("base.txt", "texts")
    for inputs in (["texts"], ["texts/*"], ["texts/base.txt"]):
        files = []
        for _ in range(2):
            succeed(encoders.main, "--input", *inputs, "--output", "texts/own.enc", "--vocab_size", "280")
            words = ["--input", *inputs, "--output", "texts/own.bin", "--encoder", "texts/own.enc", "--force"]
            succeed(prepare.main, *words)
            files.append([Path("texts", name).read_bytes() for name in ("own.enc", "own.bin")])
        assert files[0] == files[1]
    succeed(prepare.main, "--input", "texts", "--output", "texts/own.bin", "--encoder", "texts/own.enc")
    succeed(encoders.main, "--input", "texts", "--output", "base.enc", "--vocab_size", "270")  # another encoder's place


def test_assemble_overwrites_its_own_dataset(workdir):
    os.mkdir("texts")
    shutil.move("base.txt", "texts")
    Path("recipe.json").write_text('{"files": ["texts"], "vocab_size": 280}')
    Path("texts/.own.tmp").write_text("not assemble's to remove")
    sizes = set()
    for _ in range(2):
        Path("texts/.tokens.bin.99999.tmp").write_bytes(b"half of a killed one")
        succeed(assemble.main, "recipe.json", "texts")
        sizes.add(json.loads(Path("texts/result.json").read_text())["documents"])
    assert sizes == {1} and Path("texts/.own.tmp").exists() and not Path("texts/.tokens.bin.99999.tmp").exists()


@pytest.mark.slow
def test_a_pretrained_model_may_be_overwritten_by_its_own_training(workdir):
    shutil.copy("base.model", "own.model")
    os.symlink("own.model", "link.model")
    for start, end in (("own.model", "./own.model"), ("own.model", "link.model"), ("link.model", "own.model")):
        before = Path("own.model").read_bytes()
        succeed(train.main, "--config", "run.json", f"--init_from={start},pretrained", f"--model_path={end}",
                "--img_path=null")  # fmt: skip
        assert Path("own.model").read_bytes() != before and Path("link.model").is_symlink()
    succeed(train.main, "--config", "run.json", "--init_from=resume", "--max_iters=3")


@pytest.mark.slow
def test_plot_and_sample_overwrite_their_own_files(workdir):
    for _ in range(2):
        succeed(plot.main, "metrics.jsonl", "--out", "img")
        succeed(sample.main, "--model", "base.model", "--prompts_file", "prompts.jsonl", "--out", "texts.jsonl",
                "--length", "3", "--seed", "1")  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="Windows makes links for administrators only")
def test_a_symbolic_link_is_written_through(workdir):
    """A link to an earlier output, or to nothing yet, is written through; one to a file of another kind is refused."""
    os.mkdir("elsewhere")
    shutil.copy("base.enc", "elsewhere/old.enc")
    for link, target in (("a.enc", "elsewhere/old.enc"), ("b.enc", "elsewhere/new.enc")):
        os.symlink(target, link)
        succeed(encoders.main, "--input", "base.txt", "--output", link, "--vocab_size", "280")
        assert os.path.islink(link) and encoders.load(target).vocab_size == 280
    os.symlink("elsewhere/diary.txt", "c.enc")
    Path("elsewhere/diary.txt").write_text("mine")
    code, error = call(encoders.main, "--input", "base.txt", "--output", "c.enc", "--vocab_size", "280")
    assert code == 2 and "c.enc is there and is not an encoder file" in error
    assert Path("elsewhere/diary.txt").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_a_hard_link_to_an_earlier_output_keeps_the_old_contents(workdir):
    os.link("base.enc", "link.enc")
    before = Path("link.enc").read_bytes()
    succeed(encoders.main, "--input", "base.txt", "--output", "base.enc", "--vocab_size", "280")
    assert Path("link.enc").read_bytes() == before != Path("base.enc").read_bytes()


def test_the_temporary_file_of_an_output_is_refused_as_input(workdir):
    aside = f".new.enc.{os.getpid()}.tmp"
    shutil.copy("base.txt", aside)
    code, error = call(encoders.main, "--input", aside, "--output", "new.enc", "--vocab_size", "280")
    assert code == 2 and "--output: new.enc" in error and aside in error and Path(aside).read_text() == TEXT


def test_checking_outputs_stats_each_input_once(workdir, monkeypatch):
    """Nothing grows with outputs times inputs, and where no output is there yet no input is looked at."""
    looks = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: looks.append(path) or real(path, **how))
    inputs = [Input("--input", "base.txt")] * 1000
    check_outputs([Output("--output", "new.bin", "tokens"), Output("--encoder", "new.enc", "encoder")], inputs)
    assert looks.count("base.txt") == 0
    check_outputs([Output("--output", "base.bin", "tokens"), Output("--encoder", "base.enc", "encoder")], inputs)
    assert looks.count("base.txt") == 1000


def test_a_lock_never_overwrites_a_file_of_another_kind(workdir):
    """A run's and a server's lock is a file that is emptied when it is taken, and removed when it is given back."""
    for folder, main, words in (
        ("ck", train.main, ["--config", "run.json", "--checkpoints.path=ck", "--check"]),
        ("data", serve.main, ["--data", "data", "--models", "bin", "--port", "0"]),
    ):
        os.mkdir(folder)
        Path(folder, "lock").write_text("the words to my lock\n")
        code, error = call(main, *words)
        assert code == 2 and f"{folder}/lock is there and is not the lock of a run" in error, error
        assert Path(folder, "lock").read_text() == "the words to my lock\n"


def test_only_unfinished_temporary_files_are_removed(workdir):
    mine = [Path(folder, name) for folder in ("ck", "files") for name in (".tmp_mine", ".tmp_", "tmp_step_1")]
    left = [Path("ck/.tmp_step_00000002_77"), Path("ck/.tmp_remove_step_00000001"), Path("files/.tmp_0123456789abcdef")]
    for path in (*mine, *left):
        path.mkdir(parents=True)
        (path / "file").write_text("x")
    save_checkpoint("ck", 3, {"model": lambda file: file.write(b"x")})
    IdDirectory(Path("files"), "file", "file")
    assert all((path / "file").exists() for path in mine) and not any(path.exists() for path in left)


def test_no_file_is_read_from_within_a_checkpoint_that_may_be_removed(workdir):
    root = Output("checkpoints.path", "ck", CHECKPOINTS)
    with pytest.raises(UserError, match=r"dataset.path: ck/step_00000020/x lies in a checkpoint of ck"):
        check_outputs([root], [Input("dataset.path", "ck/step_00000020/x")])
    check_outputs([root], [Input("dataset.path", "ck/step_1/x"), Input("dataset.path", "ck/x")])
