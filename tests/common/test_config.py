"""What strawberry/config.py promises: every key declared once, every problem in one message, nothing a traceback."""

import copy
import dataclasses
import importlib
import json
import math
import os
import pickle
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import count, require, require_module
from pydantic import Field, ValidationError
from small_archs import ARCHS, Berry, Star

from optimizer import lr_at
from strawberry import config_docs
from strawberry.common import UserError, atomic_write, is_first_to_report, nearest, report_error, show
from strawberry.config import (
    check,
    declared,
    dotted_names,
    object_schema,
    option,
    path_names,
    read_json,
    sections,
    to_dict,
    validator,
)
from strawberry.run_config import REMOVED, RENAMED, Run, load_run, make_run, run_class

ROOT = Path(__file__).resolve().parents[2]


BERRY_RUN = run_class(ARCHS, "strawberry")
AIR = {
    "dataset": {"data_division": 0.8, "load_from_file": True, "path": "data/webtext.bin"},
    "checkpoints": {"path": "bin/ck", "interval": 2000, "create_checkpoints": True},
    "model_hyperparams": {
        "vocab_size": 8192, "block_size": 256, "r_layer": 2, "n_layer": 2, "n_head": 4, "n_embd": 64, "n_qkv": 256,
    },
    "optimizer_hyperparams": {
        "eps": 1e-10, "beta1": 0.9, "beta2": 0.95, "weight_decay": 1e-1, "use_muon": False, "momentum": 0.95,
    },
    "model_path": "bin/air.strawberry", "encoder_path": "bin/cl8k.bin", "init_from": "scratch", "seed": "auto",
    "gradient_accumulation_steps": 1, "batch_size": 4,
    "max_iters": 50000, "eval_interval": 2000, "log_interval": 200, "eval_iters": 200,
    "decay_lr": True, "lr_decay_iters": 50000, "learning_rate": 3e-3, "cooldown_frac": 0.4, "warmup_iters": 2000,
    "min_lr": 3e-4,
}  # fmt: skip


def problems_of(*argv):
    """The lines of the message that a command line is refused with."""
    with pytest.raises(UserError) as caught:
        load_run(list(argv), ARCHS)
    lines = str(caught.value).split("\n  ")
    assert len(lines) == 1 or lines[0].endswith(f"{len(lines) - 1} problems:")
    return lines if len(lines) == 1 else lines[1:]


def write(folder, text, name="run.json"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


# ---- shared helpers ------------------------------------------------------------------------------------------------


MISTAKE = "batch_size = 0: must be an integer >= 1"


def program(body, *argv, cwd=None, **pipes):
    """Run `body`, the lines of a main(argv) that ends in run_cli, as a program."""
    code = "import sys, time\nfrom strawberry.common import UserError, run_cli\ndef main(argv):\n"
    code += "".join(f"    {line}\n" for line in body.splitlines())
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])}
    command = [sys.executable, "-c", code + "run_cli(main)", *argv]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=not pipes, text=True, timeout=60, **pipes)


@pytest.mark.parametrize("env", [
    {"PYTHONIOENCODING": "cp1252"}, {"PYTHONIOENCODING": "ascii:strict"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
])  # fmt: skip
def test_output_to_a_pipe_is_utf_8(env):
    text = "'\\xe9\\u2605\\U0001f600'"  # in ASCII, which any locale can pass on
    code = "import sys\nfrom strawberry.common import run_cli\n"
    code += f"run_cli(lambda argv: print({text}) or print({text}, file=sys.stderr))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", **env}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    assert [ran.returncode, *(out.decode("utf-8").strip() for out in (ran.stdout, ran.stderr))] == [0, "é★😀", "é★😀"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_that_lacks_a_character_shows_a_question_mark():
    import pty

    ours, theirs = pty.openpty()
    code = "from strawberry.common import run_cli\nrun_cli(lambda argv: print('a\\u2605'))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
    ran = subprocess.run([sys.executable, "-c", code], env=env, stdout=theirs, stderr=subprocess.PIPE, timeout=60)
    os.close(theirs)
    assert (ran.returncode, ran.stderr, os.read(ours, 100)) == (0, b"", b"a?\r\n")
    os.close(ours)


PROGRAMS = (
    "bench",
    "encoder",
    "prepare",
    "sample",
    "serve",
    "strawberry/config_docs",
    "strawberry/data/assemble",
    "strawberry/data/loader",
    "strawberry/training/plot",
    "train",
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_runs_through_run_cli(name):
    """Which sets the encoding."""
    text = (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    assert "run_cli(" in text.partition('if __name__ == "__main__":')[2]


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("return", 0, ""),
        ("return 3", 3, ""),
        (f"raise UserError({MISTAKE!r})", 2, f"error: {MISTAKE}\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise KeyboardInterrupt('interrupted: so')", 130, "interrupted: so\n"),
        ("raise BrokenPipeError", 141, ""),
        ("raise UserError('\\ud800')", 2, "error: ?\n"),
        ("raise PermissionError(13, 'Permission denied', 'a/b')", 2,
         "error: a/b: Permission denied; change its rights, or name another path\n"),
        ("raise OSError(28, 'No space left on device')", 2,
         "error: cannot write: No space left on device; free some space, or name a path on another disk\n"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(body, code, stderr):
    ran = program(body)
    assert (ran.returncode, ran.stderr) == (code, stderr)


def test_garbage_collection_skips_imported_modules_and_the_exit():
    """Each search in torch's objects takes a tenth of a second or more."""
    ran = program("import gc\nclass Cycle:\n    def __del__(self):\n        print('searched')\n"
                  "cycle = Cycle()\ncycle.itself = cycle\nprint(gc.get_freeze_count() > 1000)")  # fmt: skip
    assert ran.stdout == "True\n"


@pytest.mark.parametrize("characters", [1, 1_000_000])
def test_a_full_disk_under_the_output_is_one_line(characters):
    require(os.path.exists("/dev/full"), "/dev/full")
    with open("/dev/full", "w") as full:
        ran = program(f"print('x' * {characters})", stdout=full, stderr=subprocess.PIPE)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1) and "No space left on device; free some" in ran.stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes there break in another way")
@pytest.mark.parametrize("characters", [1, 1_000_000])
def test_a_closed_pipe_is_no_error(characters):
    reader, writer = os.pipe()
    os.close(reader)
    ran = program(f"print('x' * {characters})", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, "")


@pytest.mark.skipif(os.name == "nt", reason="its processes do not inherit closed streams")
def test_closed_streams_are_no_error():
    body = "print('x')\nassert sys.stdin.read() == ''\nimport os\nassert os.open(os.devnull, 0) > 2"
    ran = program(body, stderr=subprocess.PIPE, preexec_fn=lambda: (os.close(0), os.close(1)))
    assert (ran.returncode, ran.stderr) == (0, "")


def test_atomic_write_replaces_completely_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "new" / "folder" / "file.bin"
    atomic_write(target, b"old")
    assert target.read_bytes() == b"old"
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"file\.bin: No space left"):
        atomic_write(target, b"new")
    assert target.read_bytes() == b"old" and os.listdir(target.parent) == ["file.bin"]
    with pytest.raises(UserError, match="not a regular file"):
        atomic_write(tmp_path / "new", b"")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_atomic_write_keeps_a_symbolic_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    atomic_write(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"x"


def test_nearest_name():
    assert nearest("n_layers", ["n_head", "n_layer"]) == " (did you mean 'n_layer'?)"
    assert nearest("gqa", ["MHA", "GQA"]) == " (did you mean 'GQA'?)"
    assert nearest("zebra", ["n_layer"]) == nearest("n_layer", []) == ""


# ---- the JSON as pasted --------------------------------------------------------------------------------------------


def test_air_json_is_the_defaults():
    assert read_json(ROOT / "config" / "air.json") == AIR
    run = load_run(["--config", "air.json"], ARCHS)
    assert to_dict(run) == to_dict(load_run([], ARCHS)) == to_dict(BERRY_RUN())
    assert isinstance(run, Run) and isinstance(run.model_hyperparams, Berry)
    for name, value in AIR.items():  # and it says what it sets
        got = to_dict(run)[name]
        assert got == value or {key: got[key] for key in value} == value


@pytest.mark.slow
def test_every_config_is_valid():
    import model

    for path in (ROOT / "config").glob("*.json"):
        if path.name != "schema.json":
            load_run(["--config", str(path)], model.CONFIGS)


def test_comments_and_trailing_commas(tmp_path):
    text = """\ufeff// before
    {"$schema": "./schema.json", /* a "quoted" { */ "model_path": "bin/a//b/*c*/.x", // }
     "model_hyperparams": {"n_layer": 3, "window": [8, 16,],}, "learning_rate": 1, "max_iters": 2e3, } // after"""
    run = load_run(["--config", write(tmp_path, text)], ARCHS)
    assert (run.model_path, run.model_hyperparams.window) == ("bin/a//b/*c*/.x", [8, 16])
    assert (run.learning_rate, type(run.learning_rate), run.max_iters, type(run.max_iters)) == (1.0, float, 2000, int)


def test_config_is_looked_for_here_then_in_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_run(["--config=air.json"], ARCHS).checkpoints.path == "bin/ck"
    write(tmp_path, '{"seed": 5}', "tiny.json")
    assert load_run(["--config", "tiny.json"], ARCHS).seed == 5
    (line,) = problems_of("--config", "tinny.json")
    assert line.startswith('--config "tinny.json": no such file') and "'tiny.json'" in line and "air.json" in line
    (tmp_path / "air.json").mkdir()
    assert load_run(["--config", "air.json"], ARCHS).batch_size == 4


def test_no_config_that_is_read_stays_in_memory():
    """A server reads one for each training run that it is asked for."""
    run = load_run(["--config", "air.json"], ARCHS)
    sizes = [function.cache_info().currsize for function in (declared, validator)]
    for _ in range(3):
        assert load_run(["--config", "air.json"], ARCHS) == run == make_run(to_dict(run), ARCHS)
    assert [function.cache_info().currsize for function in (declared, validator)] == sizes


# ---- overrides -----------------------------------------------------------------------------------------------------


def test_any_key_can_be_overridden():
    argv = "--config air.json --learning_rate=1e-2 --model_hyperparams.n_layer 4 --model_hyperparams.dropout=.5"
    argv += " --compile=False --decay_lr=false --seed 7 --model_hyperparams.window=[4,2]"
    argv += " --optimizer_hyperparams.muon_lr=1"
    run = load_run([*argv.split(), "--sample_prompt=123", "--model_path", "null.x", "--checkpoints.path=true"], ARCHS)
    model = run.model_hyperparams
    assert (run.learning_rate, model.n_layer, model.dropout, model.window) == (0.01, 4, 0.5, [4, 2])
    assert (run.compile, run.decay_lr, run.seed, run.optimizer_hyperparams.muon_lr) == (False, False, 7, 1.0)
    assert (run.sample_prompt, run.model_path, run.checkpoints.path) == ("123", "null.x", "true")
    assert load_run(['--sample_prompt="a\\n"'], ARCHS).sample_prompt == "a\n"
    assert load_run(["--seed=1", "--seed=2"], ARCHS).seed == 2


def test_a_section_on_the_command_line_is_merged_with_the_files(tmp_path):
    path = write(tmp_path, '{"model_hyperparams": {"n_embd": 32, "n_layer": 3}}')
    run = load_run(["--config", path, '--model_hyperparams={"n_layer": 7}', "--model_hyperparams.n_head=2"], ARCHS)
    assert (run.model_hyperparams.n_embd, run.model_hyperparams.n_layer, run.model_hyperparams.n_head) == (32, 7, 2)
    assert problems_of("--config=air.json", '--dataset={"path": "a", "path": "b"}') == [
        'dataset.path = "a", "b": given 2 times; keep one'
    ]


def test_an_empty_file_is_no_config(tmp_path):
    path = write(tmp_path, " \n")
    assert problems_of("--config", path) == [f"{path}: is empty; a config is an object, {{ … }}"]


def test_arch_picks_the_keys_of_the_model():
    run = load_run(["--model_hyperparams.arch=tinystar", "--model_hyperparams.ffn_type=GELU"], ARCHS)
    assert run.model_hyperparams == Star(ffn_type="GELU")
    assert check(type(run), to_dict(run)) == (run, [])


@pytest.mark.slow
def test_lr_decay_iters_follows_max_iters():
    assert load_run(["--max_iters=10"], ARCHS).lr_decay_iters == 10
    assert load_run(["--config=air.json", "--max_iters=10"], ARCHS).lr_decay_iters == 50000


@pytest.mark.parametrize(
    ("text", "path"),
    [("scratch", None), ("resume", None), ("bin/a,b.x,pretrained", "bin/a,b.x"), ("pretrained, bin/a.x", "bin/a.x")],
)
def test_init_from(text, path):
    assert load_run([f"--init_from={text}"], ARCHS).pretrained == path


def test_init_from_another_programs_checkpoint():
    for text, expected in {"hf:gpt2": ("hf", "gpt2"), "nanogpt:a:b.pt": ("nanogpt", "a:b.pt")}.items():
        run = load_run([f"--init_from={text}"], ARCHS)
        assert run.foreign == expected and run.pretrained is None
    assert load_run(["--init_from=hf:a,pretrained"], ARCHS).foreign is None  # a model file of that name


# ---- what is refused -----------------------------------------------------------------------------------------------

CONFIG_FOLDER = Path(__file__).parents[2] / "config"
REFUSED = {
    "--learning_rat=1": "learning_rat = 1: unknown key (did you mean 'learning_rate'?)",
    "--n_layer=4": "n_layer = 4: unknown key (did you mean 'model_hyperparams.n_layer'?)",
    "--n_layr=4": "n_layr = 4: unknown key (did you mean 'model_hyperparams.n_layer'?)",
    "--dataset.max_iter=4": "dataset.max_iter = 4: unknown key (did you mean 'max_iters'?)",
    "--batch_size=atuo":
        "batch_size = \"atuo\": must be an integer >= 1 and <= 1048576 or \"auto\" (did you mean 'auto'?)",
    "--model_hyperparams.min_lr=1": "model_hyperparams.min_lr = 1: unknown key (did you mean 'min_lr'?)",
    "--dataset.zebra=1": "dataset.zebra = 1: unknown key; valid here: data_division, load_from_file, path",
    "--learning_rate=NaN": "learning_rate = NaN: must be a number > 0, finite",
    "--learning_rate=1e999": "learning_rate = Infinity: must be a number > 0, finite",
    "--grad_clip=-Infinity": "grad_clip = -Infinity: must be a number >= 0, finite",
    "--learning_rate=true": "learning_rate = true: must be a number > 0",
    "--learning_rate=0": "learning_rate = 0: must be a number > 0",
    '--learning_rate="1e-3"': 'learning_rate = "1e-3": must be a number > 0',
    "--batch_size=2.5": "batch_size = 2.5: must be an integer >= 1 and <= 1048576 or \"auto\"",
    "--batch_size=true": "batch_size = true: must be an integer >= 1 and <= 1048576 or \"auto\"",
    "--max_iters=1e30": "max_iters = 1e+30: must be an integer >= 1, finite and < 2**63",
    "--decay_lr=1": "decay_lr = 1: must be true or false",
    "--compile=maybe": 'compile = "maybe": must be true or false or "auto" or "blocks"',
    "--device=cuda:0": 'device = "cuda:0": must be "auto" or "cpu" or "cuda" or "mps" (did you mean \'cuda\'?)',
    "--seed=-1": 'seed = -1: must be an integer >= 0 or "auto"',
    "--model_path=": 'model_path = "": must be text',
    "--dataset=5": "dataset = 5: must be an object, { … }",
    "--dataset.data_division=1": "dataset.data_division = 1: must be a number > 0 and < 1",
    "--dataset.path.x=1": 'dataset.path = {"x": 1}: must be text',
    "--model_hyperparams.window=[4,0]": "model_hyperparams.window = [4, 0]: must be a list of integers >= 1 or null",
    "--model_hyperparams.arch=tinystars": 'model_hyperparams.arch = "tinystars": must be one of "strawberry", '
    "\"tinystar\" (did you mean 'tinystar'?)",
    '--model_hyperparams={"arch": []}': 'model_hyperparams.arch = []: must be one of "strawberry", "tinystar"',
    "--model_hyperparams=5": "model_hyperparams = 5: must be an object, { … }",
    "--model_hyperparams.n_qkv=255": "model_hyperparams.n_qkv = 255: must be a multiple of n_head (4)",
    "--min_lr=1": "min_lr = 1.0: must be <= learning_rate (0.003), since decay_lr is true",
    "--init_from=resum": 'init_from = "resum": must be "scratch", "resume", "<path>,pretrained", "hf:<path>" or '
    "\"nanogpt:<path>\" (did you mean 'resume'?)",
    "--init_from=,pretrained": 'init_from = ",pretrained": must be "scratch", "resume", "<path>,pretrained", '
    '"hf:<path>" or "nanogpt:<path>"',
    "--init_from=hf:": 'init_from = "hf:": must be "scratch", "resume", "<path>,pretrained", "hf:<path>" or '
    '"nanogpt:<path>"',
    "--model_path=./data/webtext.bin": 'model_path = "./data/webtext.bin": is dataset.path too, which the trained '
    "model would replace; name another file",
    "--config=.": '--config ".": is a directory; name a JSON file here or in config/; config/ has '
    + ", ".join(sorted(path.name for path in CONFIG_FOLDER.glob("*.json") if path.name != "schema.json")),
    '--dataset={"path": "a", "path": "b"}': 'dataset.path = "a", "b": given 2 times; keep one',
    "air.json": '"air.json" on the command line: must be an option; write --config air.json',
    "--seed": "--seed: has no value; write --seed=value",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("argument", REFUSED)
def test_a_problem_names_key_value_and_what_is_allowed(argument):
    assert problems_of(argument) == [REFUSED[argument]]


@pytest.mark.parametrize("value", ["-h", "--help", "-1", "--", "--unknown"])
def test_a_value_that_begins_with_a_dash_is_a_value(value):
    assert load_run(["--config", "air.json", "--sample_prompt", value], ARCHS).sample_prompt == value
    assert load_run([f"--sample_prompt={value}", "--seed", "3"], ARCHS).sample_prompt == value


def test_an_option_is_no_value_of_another():
    for word in ("--seed", "--dataset.path=x", "--config"):
        assert "--sample_prompt: has no value; write --sample_prompt=value" in problems_of("--sample_prompt", word)


def test_rollback_needs_checkpoints():
    message = 'on_nan = "rollback": needs checkpoints.create_checkpoints: there is nothing else to return to'
    assert problems_of("--on_nan=rollback", "--checkpoints.create_checkpoints=false") == [message]


@pytest.mark.slow
def test_all_problems_are_in_one_message_and_nothing_is_written(tmp_path):
    """Every kind of mistake at once, from file and command line, through the program's front door."""
    config = {**copy.deepcopy(AIR), "lerning_rate": 1, "eval_iters": "many", "min_lr": 1, "batch_size": -1}
    config["model_hyperparams"] |= {"n_qkv": 255, "n_layers": 3, "n_embd": 0}
    text = json.dumps(config).replace('"seed": "auto"', '"seed": 1, "seed": 2').replace("0.95", "NaN", 1)
    write(tmp_path, text)
    body = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\nfrom small_archs import ARCHS\n"
    body += "from strawberry.run_config import load_run\n"
    body += "run = load_run(argv, ARCHS); open('written', 'w').write('x')"
    ran = program(body, "--config", "run.json", "--n_head=3", "--checkpoints.keep=0", cwd=tmp_path)
    assert (ran.returncode, ran.stdout, os.listdir(tmp_path)) == (2, "", ["run.json"])
    first, *lines = ran.stderr.splitlines()
    named = {line.split(" = ")[0].strip() for line in lines}
    assert first == "error: 11 problems:" and len(lines) == 11
    assert named == {
        *("seed", "lerning_rate", "eval_iters", "min_lr", "batch_size", "n_head", "checkpoints.keep"),
        *("model_hyperparams.n_qkv", "model_hyperparams.n_layers", "model_hyperparams.n_embd"),
        "optimizer_hyperparams.beta2",
    }
    valid = program(body, "--config", "air.json", cwd=tmp_path)
    assert (valid.returncode, sorted(os.listdir(tmp_path))) == (0, ["run.json", "written"])


def test_a_list_of_wrong_items_is_one_error():
    """A client may send a million of them."""
    with pytest.raises(ValidationError) as refused:
        validator(Berry).validate_python({"window": [0] * 1000})
    assert refused.value.error_count() == 1


@dataclasses.dataclass
class Pair:
    pair: Annotated[list[int], Field(max_length=2)] | None = option(None, "of numbers", must="at most two integers")


def test_a_pydantic_type_has_an_error_message_of_its_own():
    assert check(Pair, {"pair": [1, 2, 3]}) == (None, ["pair = [1, 2, 3]: must be at most two integers"])
    assert check(Pair, {"pair": [1, 2]}) == (Pair([1, 2]), []) and check(Pair, {"pair": None}) == (Pair(), [])
    assert object_schema(Pair)["properties"]["pair"]["anyOf"][0]["maxItems"] == 2


def test_every_refusal_is_a_sentence_with_articles():
    classes = [Run, *(run_class(ARCHS, arch) for arch in ARCHS), *ARCHS.values()]
    rules = {key.rule for cls in classes for key in declared(cls).values()}
    assert {"an integer >= 1", "a number > 0", "a list of integers >= 1 or null"} <= rules
    assert not [rule for rule in rules if re.search(r"(?<!an )\binteger\b|(?<!a )\b(number|list)\b", rule)]


def test_a_rule_is_not_checked_where_one_of_its_keys_is_invalid():
    assert problems_of("--model_hyperparams.n_qkv=255", "--model_hyperparams.n_head=x") == [
        'model_hyperparams.n_head = "x": must be an integer >= 1'
    ]


def test_a_value_has_no_keys_of_its_own():
    first, second = problems_of("--seed=1", "--seed.x=2", "--max_iters=0")
    assert first == "seed.x = 2: seed is a value, not a section" and second.startswith("max_iters")


def test_text_that_no_path_can_be_is_refused():
    assert check(Run, {"model_path": "\ud800"}) == (None, ['model_path = "\\ud800": must be text'])
    assert check(Run, {"sample_prompt": "a\0b"}) == (None, ['sample_prompt = "a\\u0000b": must be text'])


PATH_KEYS = path_names(Run)


@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_path_with_a_control_character_is_refused_and_slashes_are_named(key, tmp_path):
    """The characters are those of the Unicode category Cc, and the path is one that Windows users write in JSON."""
    message = "a path has no control characters, which \\n and \\t in quotes are; write / or \\\\ instead of \\"
    for character in (c for c in map(chr, range(0x250)) if unicodedata.category(c) == "Cc"):
        raw = {}
        set_key(raw, key, f"a{character}b")
        (problem,) = check(Run, raw)[1]
        assert problem.startswith(f"{key} = ") and problem.endswith(message) and problem.isprintable()
    section, _, name = key.rpartition(".")
    text = f'{{"{name}": "C:\\table\\new.bin"}}'
    path = write(tmp_path, f'{{"{section}": {text}}}' if section else text)
    assert problems_of("--config", path)[0].endswith(f'{key} = "C:\\table\\new.bin": {message}')
    assert problems_of(f"--{section or key}={text if section else 'a' + chr(9)}")[0].endswith(message)


def set_key(raw, dotted, value):
    """Set a dotted key, with the sections that it needs."""
    *sections, name = dotted.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
    raw[name] = value


@pytest.mark.parametrize(("command", "option"), [
    *(("prepare", option) for option in ("--input", "--verify", "--pairs", "--output", "--encoder")),
    ("encoder", "--input"), ("encoder", "--output"), ("strawberry.training.plot", "--out"),
    *(("sample", option) for option in ("--model", "--prompt_file", "--prompts_file", "--out", "--score")),
])  # fmt: skip
def test_every_command_refuses_control_characters_in_paths(tmp_path, monkeypatch, command, option):
    monkeypatch.chdir(tmp_path)
    needed = {"encoder": ["--input", "a"], "strawberry.training.plot": ["a"]}
    needed = needed.get(command, []) if option != "--input" else []
    with pytest.raises(UserError) as refused:
        importlib.import_module(command).main([*needed, option, "C:\table\new"])
    message = f'{option}( =)? "C:\\\\table\\\\new": a path has no control characters'
    assert re.search(message, str(refused.value)) and os.listdir() == []


def test_paths_with_spaces_backslashes_and_letters_of_any_script_pass():
    for path in ("C:\\table\\new.bin", "my file", "données/été", "日本", "a\u00a0b"):
        assert check(Run, {"model_path": path})[1] == []


def test_a_backslash_that_escapes_nothing_is_refused_with_its_line(tmp_path):
    r"""JSON5 would drop it: "C:\data" would become "C:data"."""
    message = "is no escape; write / or \\\\ instead of \\"
    for escape in ("d", "g", "1", "u12", "xz", "ü"):
        text = '// C:\\data is fine here\n{"seed": 1, /* \\q */\n "model_path": "C:\\' + escape + '.bin"}'
        path = write(tmp_path, text)
        (problem,) = problems_of("--config", path)
        assert problem.endswith(f"run.json, line 3: \\{escape[0]} {message}")
        with pytest.raises(UserError, match="line 3"):
            read_json(path)
    assert problems_of('--dataset={"path": "C:\\data"}')[0].endswith(f"\\d {message}")
    good = '{"sample_prompt": "\\\\d \\" \\\' \\/ \\b\\f\\n\\r\\t\\v \\u00e9 \\x41", "model_path": \'C:\\\\data\'}'
    run = load_run(["--config", write(tmp_path, good)], ARCHS)
    assert run.sample_prompt == "\\d \" ' / \b\f\n\r\t\v é A" and run.model_path == "C:\\data"
    assert load_run(["--sample_prompt=C:\\data"], ARCHS).sample_prompt == "C:\\data"


# ---- schedules that do not fit -------------------------------------------------------------------------------------

SHORT = {
    "a warm-up longer than the run": ["--config=air.json", "--max_iters=1000"],
    "a warm-up as long as the run": ["--max_iters=2000"],
    "a warm-up longer than a run of constant rate": ["--max_iters=10", "--decay_lr=false"],
    "a warm-up longer than the decay": ["--max_iters=50000", "--lr_decay_iters=1000"],
    "a warm-up longer than run and decay": ["--max_iters=100", "--lr_decay_iters=50"],
    "a decay that does not begin": ["--config=air.json", "--max_iters=20000"],
    "a decay that does not end": ["--config=air.json", "--max_iters=35000"],
    "a checkpoint at the end only": ["--max_iters=1000", "--warmup_iters=1"],
    "one step": ["--max_iters=1"],
}


def peak_share(run) -> float:
    """The highest learning rate of a run, as a share of the one that it was given, by the schedule itself."""
    return max(lr_at(step, run) for step in range(run.max_iters)) / run.learning_rate


@pytest.mark.slow
@pytest.mark.parametrize("what", SHORT)
def test_a_schedule_that_does_not_fit_is_warned_of_and_the_values_named_fit(what):
    run = load_run(SHORT[what], ARCHS)
    warnings = list(run.warnings())
    assert warnings
    for warning, mend in ((w, mend) for w in warnings for mend in w.partition("; set ")[2].split(", or ")):
        changes = [(key, value) for keys, value in re.findall(r"([a-z_.]+(?: and [a-z_.]+)*) to (\d+)", mend)
                   for key in keys.split(" and ")]  # fmt: skip
        mended = load_run([*SHORT[what], *(f"--{key}={value}" for key, value in changes)], ARCHS)
        assert changes and warning not in mended.warnings()
        if "interval" not in warning:
            assert not any("warm-up" in other or "falls" in other for other in mended.warnings())
            assert peak_share(mended) == 1
            last = lr_at(mended.max_iters - 1, mended)
            assert last < mended.learning_rate or not mended.decay_lr or mended.max_iters == 1


def test_the_warning_of_an_unfinished_warmup_states_the_highest_learning_rate():
    (first, _) = load_run(["--config=air.json", "--max_iters=1000"], ARCHS).warnings()
    share = re.search(r"at (\d+) % of learning_rate", first)[1]
    assert int(share) == round(100 * peak_share(load_run(["--config=air.json", "--max_iters=1000"], ARCHS)))
    assert "max_iters = 1000" in first and "warmup_iters = 2000" in first
    assert "set warmup_iters to 50 and lr_decay_iters to 1000, or max_iters to 50000" in first


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({path.name for path in (ROOT / "config").glob("*.json")} - {"schema.json"}))
def test_no_preset_has_warnings(name):
    import model

    assert list(load_run(["--config", name], model.CONFIGS).warnings()) == []


def test_a_schedule_that_fits_has_no_warnings():
    for words in ("--max_iters=40 --warmup_iters=0 --eval_interval=40 --checkpoints.interval=40",
                  "--max_iters=40 --warmup_iters=39 --eval_interval=40 --checkpoints.interval=40 --cooldown_frac=1",
                  "--max_iters=40 --warmup_iters=5 --eval_interval=90 --checkpoints.create_checkpoints=false",
                  "--config=air.json --max_iters=60000"):  # fmt: skip
        assert list(load_run(words.split(), ARCHS).warnings()) == [], words


# ---- several processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def torchrun(monkeypatch):
    """The store and the environment of a torchrun agent with two processes on this machine."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(store.port), "GROUP_RANK": "0", "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return store


def test_processes_report_an_error_once_and_each_error_of_its_own(torchrun, monkeypatch, capsys):
    for message, is_printed in (("both find this", True), ("both find this", False), ("one finds this", True)):
        report_error(message)
        assert capsys.readouterr().err == (f"error: {message}\n" if is_printed else "")
    monkeypatch.setenv("GROUP_RANK", "1")  # another machine has a console of its own
    report_error("both find this")
    assert capsys.readouterr().err == "error: both find this\n"


def test_an_error_is_printed_where_the_store_is_gone(torchrun, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "not a port")
    assert is_first_to_report("x") and is_first_to_report("x")




def test_problems_of_an_unreadable_file_and_of_the_command_line_come_together(tmp_path):
    first, second = problems_of("--config", write(tmp_path, "{"), "--batch_size=0")
    assert first.startswith(str(tmp_path)) and second.startswith("batch_size = 0")


def test_duplicate_keys_are_all_named(tmp_path):
    text = '{"seed": 1, "dataset": {"path": "a", "path": "b"}, "seed": 2, "seed": 2}'
    path = write(tmp_path, text)
    expected = ["seed = 1, 2, 2: given 3 times; keep one", 'dataset.path = "a", "b": given 2 times; keep one']
    assert problems_of("--config", path) == expected
    with pytest.raises(UserError, match="given 3 times"):
        read_json(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n"seed": 1,\n"batch_size" 4}', 'line 3: Unexpected "4" at column 14'),
        ('{"seed": 1 // no end', "line 1: Unexpected end of input"),
        ("", "is empty; a config is an object"),
        ("[1]", "holds [1], but a config is an object"),
        ("[" * 60_000, "nested too deeply"),
        ('{"a":' * 10_000, "nested too deeply"),
        ('{"seed": ' + "1" * 5000 + "}", "digits"),
        (pickle.dumps({"seed": 1}), "not UTF-8 text"),
        (b"\0" * 100, "Unexpected"),
        ("{" + " " * 70_000 + "}", "larger than 65,536 bytes"),
    ],
)
def test_a_file_that_is_no_config_says_where_and_why(tmp_path, content, message):
    (line,) = problems_of("--config", write(tmp_path, content))
    assert str(tmp_path / "run.json") in line and message in line and "\n" not in line


def test_a_gigabyte_is_refused_at_once(tmp_path):
    with open(tmp_path / "run.json", "wb") as file:
        file.truncate(2**30)
    assert "larger than" in problems_of("--config", str(tmp_path / "run.json"))[0]


# ---- properties ----------------------------------------------------------------------------------------------------

NUMBERS = st.integers() | st.floats() | st.just(10**400)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=5) | st.just("\ud800")
JUNK = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2), max_leaves=4
)


def valid(kind, key):
    """Values of a kind within a key's bounds."""
    if kind is type(None):
        return st.none()
    if kind is bool:
        return st.booleans()
    if kind is str:
        return st.sampled_from(key.choices) if key.choices else st.text("abc,/ é0", min_size=1, max_size=8)
    if kind is int:
        return st.integers(key.low or 0, min(key.high or 10**6, 10**6))
    if kind is float:
        low, high = key.low or key.above or 0, key.high or key.below or 1e6
        return st.floats(low, high, exclude_min=key.above is not None, exclude_max=key.below is not None)
    return st.lists(valid(kind.__args__[0], key), max_size=3)


def configs(cls):
    """Any part of a config, each key right in itself."""
    keys = {
        name: configs(key.section) if key.section else st.one_of([valid(kind, key) for kind in key.kinds])
        for name, key in declared(cls).items()
    }
    return st.fixed_dictionaries({}, optional=keys)


@pytest.mark.slow
@settings(max_examples=count(150, 2_000), deadline=None)
@given(st.sampled_from(list(ARCHS)).flatmap(lambda arch: st.tuples(st.just(arch), configs(run_class(ARCHS, arch)))))
def test_round_trip(pair):
    arch, raw = pair
    raw |= {"init_from": "resume", "decay_lr": False, "on_nan": "stop"}
    raw.get("model_hyperparams", {}).pop("n_qkv", None)
    raw.get("model_hyperparams", {}).pop("n_head", None)
    if raw.get("model_path") is not None:
        raw["model_path"] = "bin/own"
    run, problems = check(run_class(ARCHS, arch), raw)
    assert problems == []
    plain = json.loads(json.dumps(to_dict(run)))
    assert to_dict(check(type(run), plain)[0]) == plain and check(type(run), plain)[0] == run
    for name, value in raw.items():
        assert isinstance(value, dict) or plain[name] == value or (name, value) == ("lr_decay_iters", None)


def mutate(raw, dotted, value):
    *parents, name = dotted.split(".")
    for parent in parents:
        raw = raw[parent]
    raw[name] = value


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.sampled_from(dotted_names(BERRY_RUN)), JUNK)
def test_any_value_anywhere_is_valid_or_refused_by_name(dotted, value):
    raw = copy.deepcopy(AIR)
    mutate(raw, dotted, value)
    run, problems = check(BERRY_RUN, raw)
    assert (run is None) == bool(problems)
    for line in problems:
        key = line.split(" = ")[0]
        mentioned = dotted.rpartition(".")[2]  # the key itself, one inside it, or a rule that mentions it
        assert key == dotted or key.startswith(dotted + ".") or mentioned in line, line
        line.encode()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["", "dataset.", "model_hyperparams.", "optimizer_hyperparams."]), st.text(max_size=6))
def test_any_other_key_is_refused_by_name(section, name):
    if section + name not in dotted_names(BERRY_RUN) and "." not in name:
        raw = copy.deepcopy(AIR)
        mutate(raw, section + name, 1)
        _, (line,) = check(BERRY_RUN, raw)
        assert line.startswith(f"{section}{name} = 1: unknown key")


WORDS = st.text(max_size=12) | st.sampled_from(["--", "=", "--=1", "--a..b=1", "--config", "--seed=1", "--seed.x=1"])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(WORDS, max_size=4))
def test_any_command_line_is_a_run_or_a_user_error(argv):
    if "-h" not in argv:
        try:
            load_run(argv, ARCHS)
        except UserError as error:
            assert str(error)


# ---- what is generated from the declarations -------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_help_and_table_have_every_key(arch, capsys):
    with pytest.raises(SystemExit) as stop:
        load_run(["--config", "air.json", f"--model_hyperparams.arch={arch}", "--n_layer=bad", "--help"], ARCHS)
    text, markdown = capsys.readouterr().out, config_docs.table(ARCHS)
    assert stop.value.code == 0
    for prefix, _, keys in sections(run_class(ARCHS, arch)):
        for name, key in keys.items():
            default = key.default if isinstance(key.default, str) else json.dumps(key.default)
            assert f"\n  --{prefix}{name}={default}\n" in text
            row = markdown[markdown.index(f"\n| `{name}` | `{json.dumps(key.default)}` | ") + 1 :].split("\n")[0]
            assert key.doc.replace("<", "&lt;") in row and row.count(" | ") == 3
            assert key.doc


def test_every_key_is_documented():
    for dotted in dotted_names(Run):
        cls = Run
        for name in dotted.split("."):
            key = declared(cls)[name]
            cls = key.section
        assert len(key.doc) > 8, dotted


@pytest.mark.slow
def test_schema_and_check_agree():
    """On every value of every key: what the editor accepts is what training accepts, rules between keys aside."""
    require_module("jsonschema")
    import jsonschema

    validator = jsonschema.Draft202012Validator(config_docs.schema(ARCHS))
    validator.check_schema(validator.schema)
    values = [None, True, 0, 1, -1, 2.5, 3.0, 0.5, "", "auto", "strawberry", "GELU", [], [1], [0], ["a"], {}, {"x": 1}]
    between_keys = ("init_from", "model_hyperparams.arch", "model_hyperparams.n_head", "model_hyperparams.n_qkv")
    compared = set()
    for arch in ARCHS:
        cls = run_class(ARCHS, arch)
        base = {"init_from": "resume", "decay_lr": False, "model_hyperparams": {"arch": arch}}
        for dotted in [*dotted_names(cls), "n_layer", "dataset.x", "model_hyperparams.x"]:
            for value in values:
                raw = {"dataset": {}, "checkpoints": {}, "optimizer_hyperparams": {}, **copy.deepcopy(base)}
                mutate(raw, dotted, value)
                if dotted in between_keys or dotted == "model_hyperparams":
                    continue
                ok = not check(cls, raw)[1]
                assert validator.is_valid(raw) == ok, (dotted, value)
                compared.add(ok)
    assert compared == {True, False}
    assert validator.is_valid(AIR) and validator.is_valid({"$schema": "./schema.json", **AIR})
    assert not validator.is_valid({"model_hyperparams": {"arch": "palm"}})
    assert not validator.is_valid({"model_hyperparams": {"arch": "tinystar", "n_qkv": 256}})


def test_schema_file_is_current():
    import model

    written = json.loads((ROOT / "config" / "schema.json").read_text(encoding="utf-8"))
    current = json.loads(json.dumps(config_docs.schema(model.CONFIGS)))
    assert written == current, "run: python -m strawberry.config_docs --schema"


def test_no_default_is_out_of_its_own_bounds():
    for arch in ARCHS:
        cls = run_class(ARCHS, arch)
        defaults = {name: key.default for name, key in declared(cls).items() if not key.section}
        assert check(cls, defaults)[1] == []
        assert all(math.isfinite(value) for value in defaults.values() if isinstance(value, float))


def test_every_key_that_takes_a_path_is_known_as_one():
    named = {name for name in dotted_names(Run) if name.rpartition(".")[2].endswith("path")} | {"init_from"}
    assert set(path_names(Run)) == named
    assert len(named) == 6


def test_plain_data_is_validated_as_a_file_and_a_command_line_are(tmp_path):
    run = make_run({"model_hyperparams": {"n_layer": 3}}, ARCHS)
    assert to_dict(run) == to_dict(load_run(["--model_hyperparams.n_layer=3"], ARCHS))
    with pytest.raises(UserError) as refused:
        make_run({"learning_rate": -1, "model_hyperparams": {"n_layr": 3}}, ARCHS)
    with pytest.raises(UserError) as expected:
        load_run(["--learning_rate=-1", "--model_hyperparams.n_layr=3"], ARCHS)
    assert str(refused.value) == str(expected.value)
    assert load_run(["--img_path=null"], ARCHS).img_path is None


# ---- keys under their old names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--record=false"], ["--record", "false"], ["--config", "old.json"]])
def test_an_old_name_works_and_a_warning_names_the_new_one(tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    Path("old.json").write_text('{"record": false, "max_iters": 5000}')
    run = load_run(argv, ARCHS)
    assert run.cuda_graph is False and "record" not in to_dict(run)
    assert list(run.warnings())[0] == "record is now called cuda_graph: write cuda_graph = false"


def test_old_names_are_validated_as_the_new_ones_are(tmp_path):
    with pytest.raises(UserError, match="^cuda_graph = 7: must be true or false or \"auto\"$"):
        make_run({"record": 7}, ARCHS)
    with pytest.raises(UserError, match="record = true: is the old name of cuda_graph, which is given too; keep cuda"):
        make_run({"record": True, "cuda_graph": True}, ARCHS)
    assert make_run({"cuda_graph": True}, ARCHS).renamed == ()


def test_every_old_name_leads_to_a_key():
    names = dotted_names(Run)
    assert RENAMED and all(new in names and old not in names for old, new in RENAMED.items())


def test_removed_keys_are_dropped_with_the_value_that_is_computed_now():
    section = {"newton_schulz": "jordan", "cautious_decay": False, "momentum": 0.9}
    run = make_run({"optimizer_hyperparams": dict(section)}, ARCHS)
    assert to_dict(run) == to_dict(make_run({"optimizer_hyperparams": {"momentum": 0.9}}, ARCHS))
    for name, value in {"newton_schulz": "polar_express", "cautious_decay": True}.items():
        message = f"^optimizer_hyperparams.{name} = {show(value)}: this key was removed, .*; leave it out$"
        with pytest.raises(UserError, match=message):
            make_run({"optimizer_hyperparams": section | {name: value}}, ARCHS)
    assert not set(REMOVED) & {name.rpartition(".")[2] for name in dotted_names(Run)}


@pytest.mark.parametrize(("word", "option"), [("--confg=a.json", "--config"), ("--chek=1", "--check"),
                                               ("--quite=1", "--quiet")])  # fmt: skip
def test_an_option_of_train_py_that_is_misspelt_is_named(word, option):
    name = word.partition("=")[0]
    with pytest.raises(UserError, match=f"^{name}: unknown option \\(did you mean '{option}'\\?\\)$"):
        load_run([word], ARCHS)


@pytest.mark.parametrize("name", ["check", "checkpoint", "compil", "learning_rat", "n_head", "checkpoints.kep"])
def test_keys_are_named_before_options(name):
    with pytest.raises(UserError) as refused:
        load_run([f"--{name}=1"], ARCHS)
    assert "unknown option" not in str(refused.value) or name == "check"
