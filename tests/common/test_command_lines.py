"""Every script is called in the same manner, whatever reads its command line."""

import importlib
import re
import sys
from typing import NamedTuple

import pytest

from strawberry.argument_parser import ArgumentParser
from strawberry.bench.common import parse_count, parse_quantity
from strawberry.common import UserError, format_count, run_cli


class Script(NamedTuple):
    """A script, an option of it with one value, words beside it, and a value that is then refused by name."""

    name: str
    option: str
    words: tuple[str, ...] = ()
    bad: str = "-x"

    def __str__(self) -> str:
        return self.name


SCRIPTS = [
    Script("train.py", "--model_path", ("--dataset.path=-x", "--config=tiny.json")),
    Script("sample.py", "--temperature"),
    Script("serve.py", "--port"),
    Script("encoder.py", "--vocab_size", ("--input", "a")),
    Script("prepare.py", "--verify"),
    Script("export.py", "--help", ("a", "b")),
    Script("bench.py compare", "--tokens", ("a.json",)),
    Script("bench.py train", "--jobs", ("--config", "a.json")),
    Script("bench.py growth", "--widths"),
    Script("bench.py scale", "--processes", ("--config", "a.json")),
    Script("bench.py decode", "--batches", ("a.json",)),
    Script("bench.py serve", "--clients", ("a.json",)),
    Script("bench.py kernels", "--help"),
    Script("-m strawberry.training.plot", "--out", ("a.jsonl",), "-x.jpg"),
    Script("-m strawberry.data.loader", "--measure"),
    Script("-m strawberry.data.assemble", "--help"),
    Script("-m strawberry.config_docs", "--help"),
]


OPTIONAL = {"train.py", "sample.py", "serve.py", "prepare.py", "bench.py growth", "bench.py kernels"}  # need no option


def scripts(*left_out: str, valued: bool = False) -> list:
    chosen = [script for script in SCRIPTS if not valued or script.option != "--help"]
    return [pytest.param(script, id=script.name) for script in chosen if script.name not in left_out]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """(exit code, standard output, standard error) of a script, run in this process in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(script: Script, *words: str) -> tuple[int, str, str]:
        file, *command = script.name.removeprefix("-m ").split()
        monkeypatch.setattr(sys, "argv", [file, *command, *words])
        with pytest.raises(SystemExit) as end:
            run_cli(importlib.import_module(file.removesuffix(".py")).main)
        return end.value.code or 0, *capsys.readouterr()

    return call


@pytest.mark.slow
@pytest.mark.parametrize("script", scripts())
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_the_usage(call, script, word):
    code, out, err = call(script, word)
    assert code == 0 and not err
    assert out.startswith(f"usage: python {script.name} ")
    options = re.findall(r"(?<![\w-])--[a-z][\w.-]*", out)
    assert script.option in options
    assert not [option for option in options if "-" in option[2:]]  # words are joined by an underscore


@pytest.mark.parametrize("script", scripts("train.py"))  # whose options are keys, and are named as in the JSON
@pytest.mark.parametrize("form", ["{} x", "{}=x", "{}=-x", "{} -x"])
def test_a_part_of_a_name_is_an_unknown_option(call, script, form):
    part = script.option[:-1]
    code, out, err = call(script, *script.words, *form.format(part).split())
    hint = f"error: {part}: unknown option (did you mean '{script.option}'?)\n"
    assert (code, out, err) == (2, "", hint)


@pytest.mark.parametrize("script", scripts())
def test_an_option_like_no_other_is_refused(call, script):
    code, out, err = call(script, *script.words, "--qqqqq=1")
    assert code == 2 and not out
    assert re.fullmatch(r"error: .*\bqqqqq\b.*unknown .*\n", err)


@pytest.mark.parametrize("script", scripts())
def test_a_misspelt_option_at_the_end_is_named(call, script):
    code, out, err = call(script, *script.words, "--hlep")
    assert (code, out, err) == (2, "", "error: --hlep: unknown option (did you mean '--help'?)\n")


@pytest.mark.parametrize("word,option", [
    ("--quite", "--quiet"), ("--chek", "--check"), ("--confg", "--config"), ("--n_hed", "--n_head"),
    ("--checkpoints.kep", "--checkpoints.keep"),
])  # fmt: skip
def test_train_names_its_own_options_and_its_keys(call, word, option):
    code, out, err = call(SCRIPTS[0], "--config=tiny.json", word)
    assert (code, out, err) == (2, "", f"error: {word}: unknown option (did you mean '{option}'?)\n")


def test_bench_without_a_command_is_an_error_with_its_usage(call):
    bench = Script("bench.py", "--help")
    code, out, err = call(bench)
    assert code == 2 and not out and err.startswith("usage: python bench.py COMMAND")
    assert call(bench, "--help") == (0, err, "")
    assert call(bench, "--hlep")[2].endswith("(did you mean '--help'?)\n")


@pytest.mark.parametrize("name,word,fix", [
    ("sample.py", "Once upon", "--prompt 'Once upon'"), ("sample.py", "a.json", "--prompt a.json"),
    ("serve.py", "bin/", "--models bin/"), ("train.py", "a.json", "--config a.json"),
    ("train.py", "air", "--key=value"), ("sample.py", "bin/a.strawberry", "--model bin/a.strawberry"),
    ("sample.py", ".", "--model ."), ("sample.py", __file__, f"--prompt_file {__file__}"),
])  # fmt: skip
def test_a_word_without_an_option_is_an_error_that_names_one(call, name, word, fix):
    code, out, err = call(Script(name, ""), word)
    assert (code, out) == (2, "") and err.endswith(f"on the command line: must be an option; write {fix}\n")


def test_counts_are_formatted_with_singular_and_plural():
    assert [format_count(n, "file") for n in (0, 1, 2000)] == ["0 files", "1 file", "2,000 files"]


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.name not in OPTIONAL], ids=str)
def test_a_script_without_what_it_needs_is_an_error_that_says_what(call, script):
    code, out, err = call(script)
    assert code == 2 and not out
    assert re.fullmatch(r"error: (the following arguments are required: .*|.* is required; .*|name configs .*)\n", err)


@pytest.mark.parametrize("script", scripts(valued=True))
def test_both_forms_take_a_value_with_a_dash(call, script):
    apart = call(script, *script.words, script.option, script.bad)
    assert apart == call(script, *script.words, f"{script.option}={script.bad}")
    code, out, err = apart
    assert code == 2 and script.bad in err and "unknown option" not in err
    assert len(err.splitlines()) == 1


# ---- the parser itself -----------------------------------------------------------------------------------------------


@pytest.fixture
def parse():
    parser = ArgumentParser("x.py", "An example.")
    parser.add_argument("files", nargs="*")
    parser.add_argument("--name")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--input", nargs="+", action="extend", default=[])
    parser.add_argument("--quiet", action="store_true")

    def parse(*words):
        return {key: value for key, value in vars(parser.parse_args(list(words))).items() if value}

    return parse


@pytest.mark.parametrize("value", ["-x", "--other", "-", "-1", "--other=1", "a=b", "", " "])
def test_any_word_is_a_value(parse, value):
    for words in (["--name", value], [f"--name={value}"]):
        assert parse(*words, "--quiet") == {**({"name": value} if value else {}), "quiet": True}
    assert parse("--set", value, "--set", "b") == {"set": [value, "b"]}


@pytest.mark.parametrize("words,expected", [
    (["--input", "a", "-", "--quiet"], {"input": ["a", "-"], "quiet": True}),
    (["--input=-a", "--input", "b", "c"], {"input": ["-a", "b", "c"]}),
    (["--quiet", "a", "b"], {"quiet": True, "files": ["a", "b"]}),
    (["--", "-a", "--name"], {"files": ["-a", "--name"]}),
])  # fmt: skip
def test_lists_end_at_the_next_option(parse, words, expected):
    assert parse(*words) == expected


@pytest.mark.parametrize("words,message", [
    (["--name"], "--name: expected one argument; see python x.py --help"),
    (["--name", "--quiet"], "--name: expected one argument; see python x.py --help"),
    (["--nmae", "1"], "--nmae: unknown option (did you mean '--name'?)"),
    (["--nam", "1"], "--nam: unknown option (did you mean '--name'?)"),
    (["--hell", "1"], "--hell: unknown option (did you mean '--help'?)"),
    (["--model", "1"], "--model: unknown option; python x.py --help lists them"),
    (["--input", "a", "-b"], "-b: unknown option; python x.py --help lists them"),
    (["--quiet=1"], "--quiet: ignored explicit argument '1'; see python x.py --help"),
    (["-5"], "-5: unknown option; python x.py --help lists them"),
])  # fmt: skip
def test_mistakes_are_user_errors(parse, words, message):
    with pytest.raises(UserError) as refused:
        parse(*words)
    assert str(refused.value) == message


def test_a_wrong_choice_is_an_error_with_the_nearest():
    parser = ArgumentParser("x.py", "Test parser.")
    parser.add_argument("--corpus", choices=("stdlib", "packages"))
    with pytest.raises(UserError) as error:
        parser.parse_args(["--corpus", "package"])
    assert str(error.value) == ("--corpus: 'package' is none of stdlib, packages (did you mean 'packages'?); "
                                "see python x.py --help")  # fmt: skip


@pytest.mark.parametrize("words,problem", [
    (["--max_tokens", "9"], "--max_tokens 9: limits pairs; add --pairs, or leave --max_tokens out"),
    (["--errors", "replace"], "--errors replace: is about files of your own; name them with --input or --pairs"),
    (["--format", "json", "--pairs"], "--format json: is about files of your own"),
])  # fmt: skip
def test_prepare_refuses_an_option_that_would_change_nothing(words, problem):
    from prepare import parse_arguments

    with pytest.raises(UserError) as error:
        parse_arguments(words)
    assert str(error.value).startswith(problem)


@pytest.mark.parametrize("parse_value,text,problem", [
    (parse_quantity, "-1", "'-1' is no positive number"), (parse_count, "1e5", "'1e5' is more than 10,000"),
    (int, "two", "'two' is no whole number"), (float, "two", "'two' is no number"),
])  # fmt: skip
def test_an_error_of_a_value_names_its_option(parse_value, text, problem):
    parser = ArgumentParser("x.py", "Test parser.")
    parser.add_argument("--number", type=parse_value)
    with pytest.raises(UserError) as error:
        parser.parse_args(["--number", text])
    assert str(error.value).startswith(f"--number: {problem}")


def test_an_old_name_of_an_option_works_and_a_warning_names_the_new_one(capsys):
    from prepare import parse_arguments

    for words in (["--longest", "9"], ["--longest=9"], ["--max_tokens", "9"]):
        assert parse_arguments(["--pairs", *words]).max_tokens == 9
        warning = "warning: --longest is now called --max_tokens: write --max_tokens\n" if "long" in words[0] else ""
        assert capsys.readouterr().err == warning
