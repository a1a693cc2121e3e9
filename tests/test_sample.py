"""What sample.py promises: text as it is made, repeatable, cut at stop strings; every mistake one line and exit 2."""

import itertools
import math
import os
import pickle
import re
import select
import signal
import subprocess
import sys
import time
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoint
import encoder as encoders
import model as models
import sample
from dataset import spell
from options import UserError, run_cli

PROGRAM = Path(sample.__file__)
ALPHABET = "abcdefgh \n"
SHAPE = {"vocab_size": 12, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
ARCHS = {
    "strawberry": {"arch": "strawberry", "n_qkv": 16, **SHAPE},
    "batch": {"arch": "strawberry", "n_qkv": 16, "retention_scope": "batch", **SHAPE},
    "tinystar": {"arch": "tinystar", **SHAPE},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model file of each kind, with an encoder of the letters a to h, space and newline."""
    path = tmp_path_factory.mktemp("models")
    (path / "letters.txt").write_text(ALPHABET, newline="")
    encoder = encoders.load(f"chars:{path / 'letters.txt'}")
    for name, hyperparams in ARCHS.items():
        torch.manual_seed(1)
        model = models.build(hyperparams)
        with torch.no_grad():  # so that texts are long: <|eot|> and <|pad|> are never the likeliest
            for p in model.parameters():
                if p.size(0) == SHAPE["vocab_size"]:
                    p[-2:] = 0
        checkpoint.save_model(path / f"{name}.strawberry", model, encoder, {})
    return path


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """run("--prompt", "ab", …) -> (stdout, stderr), of the strawberry unless --model is given."""

    def run(*argv, model="strawberry"):
        named = [] if model is None else ["--model", str(folder / f"{model}.strawberry")]
        sample.main([*named, *argv])
        return capsys.readouterr()

    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"")))
    return run


def fails(capsys, monkeypatch, *argv) -> str:
    """The error that the program prints: one line, with exit code 2 and nothing on stdout."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
    with pytest.raises(SystemExit) as exit_info:
        run_cli(sample.main)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert exit_info.value.code == 2 and out == "" and len(lines) == 1 and err.splitlines()[-1] == lines[0]
    return lines[0]


class Scripted(torch.nn.Module):
    """A model that says what it is told to, and remembers what it was asked."""

    causal, max_positions = True, None

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.made, self.weight = tokens, 0, torch.nn.Parameter(torch.zeros(1))

    def stream(self, idx, max_new_tokens, *asked, source=None):
        self.idx, self.asked, self.source = idx, asked, source
        for token in self.tokens[:max_new_tokens]:
            self.made += 1
            yield torch.tensor([token])


def bytes_encoder():
    """Each byte is a token, then <|eot|> 256 and <|pad|> 257."""
    return encoders.train(["x"], 258)


def spoken(text: str) -> list[int]:
    encoder = bytes_encoder()
    byte_ids = {encoder.token_bytes(i): i for i in range(256)}
    return [byte_ids[bytes([byte])] for byte in text.encode()]


def pieces(tokens, length=1000, stop=(), prompt=()):
    options = sample.Settings(length=length, stop=list(stop))
    return list(sample.continuation(Scripted(tokens), bytes_encoder(), list(prompt), options, 0))


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ARCHS)
def test_streaming_equals_generate(run, folder, name, seed):
    model, encoder, _ = checkpoint.load_model(folder / f"{name}.strawberry")
    prompt = torch.tensor([encoder.encode("abc d")])
    generator = torch.Generator().manual_seed(seed)
    made = model.generate(prompt, 30, 0.9, 5, 0.95, 0.01, {encoder.eot, encoder.pad}, generator)[0].tolist()
    out, _ = run("--prompt", "abc d", "--length", "30", "--temperature", "0.9", "--top_k", "5", "--top_p", "0.95",
                 "--min_p", "0.01", "--seed", str(seed), model=name)
    assert out == encoder.decode([i for i in made if i not in (encoder.eot, encoder.pad)]) + "\n"


def test_settings_reach_the_model():
    model = Scripted([])
    options = sample.read_settings(["--temperature=0.7", "--top_k=5", "--top_p", "0.9", "--min_p", "0.02"])
    list(sample.continuation(model, bytes_encoder(), [], options, 11))
    *asked, generator = model.asked
    assert asked == [0.7, 5, 0.9, 0.02, {256, 257}] and generator.initial_seed() == 11
    options = sample.read_settings(["--temperature=1e-40"])  # too small to divide by
    list(sample.continuation(model, bytes_encoder(), [], options, 11))
    assert model.asked[:4] == (0.0, None, 1.0, None)


def test_each_token_is_printed_before_the_next_is_made():
    model, encoder = Scripted(spoken("abc")), bytes_encoder()
    text = sample.continuation(model, encoder, [], sample.Settings(), 0)
    for count, letter in enumerate("abc", 1):
        assert next(text) == letter and model.made == count


def test_what_is_printed_is_flushed(folder, monkeypatch):
    seen = []

    class Out:
        def write(self, text):
            seen.append(text)

        def flush(self):
            seen.append(None)

    monkeypatch.setattr(sys, "stdout", Out())
    model = str(folder / "strawberry.strawberry")
    sample.main(["--model", model, "--prompt", "a", "--length", "5", "--temperature", "0"])
    texts = [i for i, text in enumerate(seen) if text not in (None, "")]
    assert len(texts) == 7 and all(None in seen[i : i + 3] for i in texts)  # prompt, five tokens, the line's end


def test_same_seed_same_text_and_each_sample_has_its_own(run):
    argv = ["--prompt", "a", "--length", "40", "--temperature", "2"]
    three = run(*argv, "--seed", "5", "--num_samples", "3").out
    assert three == run(*argv, "--seed", "5", "--num_samples", "3").out
    parts = three.removesuffix("\n").split("\n---------------\n")
    assert len(parts) == 3 and len(set(parts)) == 3
    assert parts == [run(*argv, "--seed", seed).out.removesuffix("\n") for seed in ("5", "6", "7")]


def test_the_drawn_seed_repeats_the_text(run):
    argv = ["--prompt", "a", "--length", "40", "--temperature", "2"]
    out, err = run(*argv)
    seed = re.search(r"^seed (\d+)$", err, re.MULTILINE)[1]
    assert run(*argv, "--seed", seed).out == out
    assert re.search(r"^seed (\d+)$", run(*argv).err, re.MULTILINE)[1] != seed


def test_characters_are_printed_whole():
    text = "é🙂中"
    said = pieces(spoken(text))
    assert [piece for piece in said if piece] == list(text) and len(said) == len(text.encode())


def test_half_a_character_at_the_end_is_marked_once():
    assert "".join(pieces(spoken("a🙂"), length=3)) == "a\ufffd"
    assert "".join(pieces([*spoken("a🙂")[:3], 256])) == "a\ufffd"


@pytest.mark.parametrize("end", [256, 257])
def test_the_end_of_the_text_ends_the_sample_unprinted(end):
    model = Scripted([*spoken("ab"), end, *spoken("cd")])
    assert "".join(sample.continuation(model, bytes_encoder(), [], sample.Settings(), 0)) == "ab" and model.made == 3


def test_ids_beyond_the_encoder_spell_nothing():
    assert pieces([*spoken("a"), 300, *spoken("b")]) == ["a", "", "b"]


# ---- stop strings --------------------------------------------------------------------------------------------------


def until_first_stop(text: str, stops: list[str]) -> str:
    """Letter by letter: the text before the stop string that is complete first (the longest, of several)."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


LETTERS = st.text("ab\n", min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(LETTERS, max_size=6), st.lists(LETTERS, max_size=3))
def test_stop_strings_are_found_across_borders_and_never_printed(parts, stops):
    until, printed, expected = sample.Until(stops), "", until_first_stop("".join(parts), stops)
    for i, part in enumerate(parts):
        printed += until.push(part, last=i == len(parts) - 1)
        assert expected.startswith(printed)
        if until.found:
            break
    assert printed == expected


def test_no_more_is_held_back_than_may_become_a_stop_string():
    until = sample.Until(["abc", "bx"])
    assert [until.push(letter) for letter in "zababd"] == ["z", "", "", "ab", "", "abd"]


def test_a_stop_string_ends_the_making_of_text():
    model = Scripted(spoken("Once upon a time. And then"))
    options = sample.Settings(stop=["xx", "me. A"])
    assert "".join(sample.continuation(model, bytes_encoder(), [], options, 0)) == "Once upon a ti"
    assert model.made == len("Once upon a time. A")


def test_stop_on_the_command_line(run):
    for seed in range(100):
        argv = ["--prompt", "ab", "--length", "60", "--temperature", "2", "--seed", str(seed)]
        text = run(*argv).out.removeprefix("ab").removesuffix("\n")
        if len(text) > 20:
            break
    cut, other = text[15:18], text[10:13]
    assert run(*argv, "--stop", other, "--stop", cut).out == "ab" + until_first_stop(text, [cut, other]) + "\n"


# ---- prompts -------------------------------------------------------------------------------------------------------


def test_prompt_file_and_standard_input_are_prompts(run, tmp_path, monkeypatch):
    argv = ["--length", "20", "--seed", "3"]
    out = run("--prompt", "ab\ncd\n", *argv).out
    assert out.startswith("ab\ncd\n")
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfab\ncd\n")  # as Windows' editors save it
    assert run("--prompt_file", str(tmp_path / "p.txt"), *argv).out == out
    for source in ([], ["--prompt_file", "-"]):
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"ab\ncd\n")))
        assert run(*source, *argv).out == out


def test_an_empty_prompt_starts_at_the_end_of_text_token(run):
    model = Scripted([])
    list(sample.continuation(model, bytes_encoder(), [], sample.Settings(), 0))
    assert model.idx.tolist() == [[256]]
    argv = ["--length", "20", "--seed", "3"]
    assert run("--prompt", "", *argv).out == run(*argv).out  # standard input is empty


def test_special_strings_in_a_prompt_are_ordinary_text():
    assert sample.encode(bytes_encoder(), "<|eot|>") == spoken("<|eot|>")


@pytest.mark.parametrize(("name", "reads_all"), [("strawberry", True), ("batch", False)])
def test_a_prompt_longer_than_block_size_is_continued_with_a_note(run, name, reads_all):
    out, err = run("--prompt", "abcd" * 10, "--length", "5", "--temperature", "0", model=name)
    assert out.startswith("abcd" * 10) and len(out) == 46
    how = "was trained on no more than" if reads_all else "reads only the last"
    assert f"note: the prompt has 40 tokens, and the model {how} 16 at a time" in err


# ---- which model ---------------------------------------------------------------------------------------------------


def test_the_newest_model_in_bin_is_the_default(run, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "train one" in fails(capsys, monkeypatch, "--prompt", "a")
    bin_folder = tmp_path / "bin"
    (bin_folder / "ck").mkdir(parents=True)
    (bin_folder / "cl8k.bin").write_bytes(b"an encoder, newest of all")
    data = (folder / "strawberry.strawberry").read_bytes()
    for age, name in enumerate(["z.strawberry", "a.safetensors", "m.strawberry"]):
        (bin_folder / name).write_bytes(data)
        os.utime(bin_folder / name, (1000, 1000 - age))
        if name == "a.safetensors":
            os.utime(bin_folder / name, (2000, 2000))
    assert "a.safetensors: strawberry" in run("--prompt", "a", "--length", "1", model=None).err
    os.utime(bin_folder / "m.strawberry", (3000, 3000))
    assert "m.strawberry: strawberry" in run("--prompt", "a", "--length", "1", model=None).err


def test_a_checkpoint_directory_is_a_model(run, folder, tmp_path, monkeypatch, capsys):
    assert "without checkpoints" in fails(capsys, monkeypatch, "--prompt", "a", "--model", str(tmp_path))
    steps = []
    for name in ("strawberry", "tinystar"):
        model, encoder, record = checkpoint.load_model(folder / f"{name}.strawberry")
        parts = {checkpoint.MODEL: checkpoint.write_model(model, encoder, record)}
        steps.append(checkpoint.save_checkpoint(tmp_path / "ck", len(steps) + 1, parts))
    argv = ["--prompt", "a", "--length", "1"]
    assert ": tinystar, " in run(*argv, "--model", str(tmp_path / "ck"), model=None).err
    assert ": strawberry, " in run(*argv, "--model", str(steps[0]), model=None).err


@pytest.mark.parametrize("name", ["strawberry", "tinystar"])
def test_bfloat16(run, name):
    out, err = run("--prompt", "ab", "--length", "20", "--temperature", "0", "--dtype", "bfloat16", model=name)
    assert len(out) == 23 and "bfloat16" in err


def test_the_last_line_says_how_fast(run):
    err = run("--prompt", "ab", "--length", "20", "--temperature", "0", "--num_samples", "2").err
    assert re.fullmatch(r"40 tokens in \d+\.\d\d s, [\d,]+ tokens/s", err.splitlines()[-1])


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temprature", "1"], r"--temprature: unknown option \(did you mean 'temperature'\?\)"),
        (["--qqq", "1"], "--qqq: unknown option; --help lists them"),
        (["--config", "air.json"], "--config: unknown option"),
        (["abc"], "must be an option"),
        (["--length"], "--length: has no value"),
        (["--length", "0"], "--length = 0: must be integer >= 1"),
        (["--length", "-5"], "--length = -5: must be"),
        (["--length", "2.5"], "--length = 2.5: must be integer"),
        (["--length", "ten"], '--length = "ten": must be integer'),
        (["--length", "1e30"], "must be integer >= 1 and <= 1048576"),
        (["--temperature", "-1"], "--temperature = -1: must be number >= 0"),
        (["--temperature", "nan"], "--temperature = NaN: must be number >= 0"),
        (["--temperature", "inf"], "--temperature = Infinity: must be number >= 0"),
        (["--top_p", "0"], "--top_p = 0: must be number > 0 and <= 1"),
        (["--top_p", "1.01"], "--top_p = 1.01: must be"),
        (["--top_k", "-1"], "--top_k = -1: must be"),
        (["--min_p", "2"], "--min_p = 2: must be"),
        (["--seed", "-1"], "--seed = -1: must be integer >= 0$"),
        (["--num_samples", "0"], "--num_samples = 0: must be"),
        (["--seed", "1", "--seed", "2"], "--seed: given twice"),
        (["--stop", ""], "--stop: is empty"),
        (["--device", "gpu"], '--device = "gpu": must be "auto"'),
        (["--dtype", "int8"], '--dtype = "int8": must be "auto"'),
        (["--prompt_file", "x"], "--prompt and --prompt_file exclude each other"),
        (["--length", "0", "--top_p", "0"], "--length = 0.*; --top_p = 0"),
        (["--model", "nowhere.strawberry"], "nowhere.strawberry"),
        (["--model", ""], "--model: is empty"),
    ],
)
def test_wrong_options_are_one_line_and_exit_2(capsys, monkeypatch, argv, message):
    assert re.search(message, fails(capsys, monkeypatch, "--prompt", "a", *argv))


def test_a_missing_device_is_named(folder, capsys, monkeypatch):
    argv = ["--model", str(folder / "tinystar.strawberry"), "--prompt", "a", "--device", "cuda"]
    assert "--device cuda" in fails(capsys, monkeypatch, *argv)


def test_wrong_prompts_are_one_line_and_exit_2(folder, tmp_path, capsys, monkeypatch):
    model = ["--model", str(folder / "strawberry.strawberry")]
    assert "'X' (U+0058) at position 2" in fails(capsys, monkeypatch, *model, "--prompt", "abX")
    assert "not UTF-8 (character 1)" in fails(capsys, monkeypatch, *model, "--prompt", "a\udcff")
    (tmp_path / "latin").write_bytes(b"ab\xff")
    assert "latin is not UTF-8" in fails(capsys, monkeypatch, *model, "--prompt_file", str(tmp_path / "latin"))
    assert "cannot read" in fails(capsys, monkeypatch, *model, "--prompt_file", str(tmp_path / "none"))
    assert "cannot read" in fails(capsys, monkeypatch, *model, "--prompt_file", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"ab\xff")))
    assert "standard input is not UTF-8 text (invalid start byte, byte 2)" in fails(capsys, monkeypatch, *model)


def test_wrong_model_files_are_one_line_and_exit_2(folder, tmp_path, capsys, monkeypatch):
    whole = (folder / "strawberry.strawberry").read_bytes()
    for name, data in (("pickle", pickle.dumps({})), ("short", whole[:-50]), ("empty", b""), ("text", b"hello" * 99)):
        (tmp_path / name).write_bytes(data)
        assert name in fails(capsys, monkeypatch, "--prompt", "a", "--model", str(tmp_path / name))


def test_ruined_weights_and_too_little_memory_are_named(folder, tmp_path, capsys, monkeypatch):
    model, encoder, _ = checkpoint.load_model(folder / "tinystar.strawberry")
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    checkpoint.save_model(tmp_path / "m", model, encoder, {})
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt", "a", "--model", str(tmp_path / "m")])
    with pytest.raises(UserError, match="predicts NaN"):
        sample.main(sys.argv[1:])
    with pytest.raises(UserError, match="not enough memory for 7 tokens"), sample.clear_errors(7):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="something else"), sample.clear_errors(7):
        raise RuntimeError("something else")


def test_help_names_every_option(capsys):
    sample.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"--{name} " in out for name in sample.declared(sample.Settings))


# ---- encoder-decoders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    """Model files of an encoder-decoder that learned pairs, of one that learned spans with 3 sentinels, and of an
    encoder, all with random weights."""
    path = tmp_path_factory.mktemp("answering")
    (path / "letters.txt").write_text(ALPHABET, newline="")
    encoder = encoders.load(f"chars:{path / 'letters.txt'}")  # 10 letters, <|eot|> 10, <|pad|> 11
    kinds = {"pairs": "encoder-decoder", "spans": "encoder-decoder", "masked": "encoder"}
    for seed, (objective, kind) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        model = models.build({"arch": "transformer", "kind": kind, "pad_id": 11, **SHAPE, "vocab_size": 15})
        with torch.no_grad():
            for p in model.parameters():
                p += 0.3 * torch.randn(p.shape)
            model.embed.weight[10:] *= 0.1  # so that texts are long
        checkpoint.save_model(path / f"{objective}.transformer", model, encoder, {"run": {"objective": objective}})
    return path


def answer(capsys, path, *argv):
    sample.main(["--model", str(path), "--length", "12", "--temperature", "1", "--seed", "3", "--device", "cpu", *argv])
    return capsys.readouterr()


def made_by(model, start, source):
    """What a model says, drawn as sample.py's seed 3 is."""
    generator = torch.Generator().manual_seed(3)
    return model.generate(torch.tensor([start]), 12, generator=generator, source=source)[0, 1:].tolist()


def said(encoder, made: list[int]) -> str:
    ends = (encoder.eot, encoder.pad)
    return spell(encoder, list(itertools.takewhile(lambda token: token not in ends, made))) + "\n"


def test_an_encoder_decoder_answers_its_source(answering, capsys):
    path = answering / "pairs.transformer"
    model, encoder, _ = checkpoint.load_model(path)
    answers = set()
    for source in ("abc", "hgfe dcba", "", "hhhhhhhh", "b d f", "aaaaa"):
        given = torch.tensor([[*encoder.encode(source), encoder.eot]])
        made = made_by(model, [encoder.eot], given)
        assert made == made_by(model, [encoder.eot], torch.nn.functional.pad(given, (0, 3), value=encoder.pad))
        wanted = said(encoder, made)
        assert answer(capsys, path, "--source", source).out == wanted
        answers.add(wanted)
    assert len(answers) > 1


def test_a_prompt_begins_the_answer(answering, capsys):
    path = answering / "pairs.transformer"
    model, encoder, _ = checkpoint.load_model(path)
    given = torch.tensor([[*encoder.encode("abc"), encoder.eot]])
    made = made_by(model, [encoder.eot, *encoder.encode("fg")], given)
    wanted = said(encoder, made)
    assert answer(capsys, path, "--source", "abc", "--prompt", "fg").out == wanted


def test_sentinels_are_read_where_spans_were_learned(answering, capsys, monkeypatch):
    path = answering / "spans.transformer"
    model, encoder, record = checkpoint.load_model(path)
    a, b, c = (encoder.decode([i]) for i in range(3))
    asked = sample.Settings(source=f"{a}{b}<|0|>{c}<|2|>")
    assert sample.read_source(asked, model, encoder, record) == [0, 1, 12, 2, 14, encoder.eot]
    answer(capsys, path, "--source", asked.source)
    error = fails(capsys, monkeypatch, "--model", str(path), "--source", "ab<|3|>")
    assert error == "error: --source: <|3|> is one of too many; the model knows 3"
    error = fails(capsys, monkeypatch, "--model", str(answering / "pairs.transformer"), "--source", "ab<|0|>")
    assert "'<'" in error  # which this encoder lacks: without spans it is ordinary text


def test_sentinels_in_an_answer_are_spelled():
    model = Scripted([258, *spoken("aé")[:2], 259, *spoken("é"), 256])
    found = list(sample.continuation(model, bytes_encoder(), [], sample.Settings(), 0, source=[5, 256]))
    assert found == ["<|0|>", "a", "", "\ufffd<|1|>", "", "é", ""]
    assert model.source.tolist() == [[5, 256]] and model.idx.tolist() == [[256]]
    list(sample.continuation(model, bytes_encoder(), [7, 8], sample.Settings(), 0, source=[5, 256]))
    assert model.idx.tolist() == [[256, 7, 8]]  # a prompt begins the answer, which begins where one does


def test_a_long_source_is_noted(answering, capsys):
    for length, noted in ((15, False), (16, True)):
        told = answer(capsys, answering / "pairs.transformer", "--source", "a" * length).err
        assert ("note: the source has 17 tokens, and the model was trained on no more than 16" in told) == noted


def test_an_answer_is_scored_given_its_source(answering, tmp_path, capsys):
    path = answering / "pairs.transformer"
    model, encoder, _ = checkpoint.load_model(path)
    (tmp_path / "answer.txt").write_text("hedge")
    losses = []
    for source in ("abc", "gag"):
        given = torch.tensor([[*encoder.encode(source), encoder.eot]])
        ids = torch.tensor([[encoder.eot, *encoder.encode("hedge")]])
        losses.append(model(ids[:, :-1], ids[:, 1:], source=given)[1].item())
        out = answer(capsys, path, "--source", source, "--score", str(tmp_path / "answer.txt")).out
        assert out.startswith(f"loss {losses[-1]:.4f} nats per token")
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("pairs", ["--prompt", "a"], "an encoder-decoder, which answers to a text; give it one with --source"),
        ("pairs", ["--score", "a.txt"], "give it one with --source"),
        ("masked", ["--prompt", "a"], "this transformer is an encoder: it guesses masked tokens and makes no text"),
        ("masked", ["--source", "a"], "is an encoder: it guesses"),
        ("masked", ["--score", "a.txt"], "is an encoder: it guesses"),
        ("strawberry", ["--source", "a"], "this strawberry reads none; leave it out, or make it the --prompt"),
        ("pairs", ["--source", "a", "--source", "b"], "--source: given twice"),
        ("pairs", ["--source", "\udcff"], "is not UTF-8"),
        ("pairs", ["--source", "x"], "'x'"),
    ],
)
def test_a_source_too_many_or_too_few_is_one_line_and_exit_2(
    answering, folder, tmp_path, capsys, monkeypatch, name, argv, message
):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    path = folder / "strawberry.strawberry" if name == "strawberry" else answering / f"{name}.transformer"
    assert message in fails(capsys, monkeypatch, "--model", str(path), *argv)


# ---- at a terminal -------------------------------------------------------------------------------------------------


def talk(folder, monkeypatch, capsys, *inputs, argv=()):
    """A conversation in which `inputs` are typed: strings, or exceptions for Ctrl-C and Ctrl-D."""
    typed = iter(inputs)

    def type_in(_):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    class Terminal(TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(BytesIO()))
    monkeypatch.setattr("builtins.input", type_in)
    argv = argv or ["--length", "12", "--temperature", "2", "--seed", "4"]
    sample.main(["--model", str(folder / "strawberry.strawberry"), *argv])
    return capsys.readouterr()


def test_conversation(folder, run, monkeypatch, capsys):
    argv = ["--length", "12", "--temperature", "2"]
    asked = (("ab", "4"), ("", "5"), ("cd", "6"))
    texts = [run("--prompt", prompt, *argv, "--seed", seed).out.removeprefix(prompt) for prompt, seed in asked]
    out, err = talk(folder, monkeypatch, capsys, "ab", "X", KeyboardInterrupt(), "", "cd", EOFError())
    assert out == texts[0] + "\n" + texts[1] + texts[2] + "\n"
    assert "error: character 'X'" in err and "tokens/s" in err.splitlines()[-1]


def test_a_stopped_text_uses_up_its_seed(folder, run, monkeypatch, capsys):
    expected = run("--prompt", "ab", "--length", "12", "--temperature", "2", "--seed", "5").out.removeprefix("ab")
    real, calls = sample.continuation, []

    def stopped_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sample, "continuation", stopped_once)
    assert talk(folder, monkeypatch, capsys, "ab", "ab", EOFError()).out == "\n" + expected + "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_session_at_a_pseudo_terminal(folder):
    """Ctrl-C stops a text and gives the prompt back, the up arrow brings the last prompt, Ctrl-D leaves."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    argv = [sys.executable, str(PROGRAM), "--model", str(folder / "strawberry.strawberry"), "--length", "1000000",
            "--temperature", "0"]
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(theirs)
    seen = b""

    def wait_for(pattern: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while not re.search(pattern, seen):
            assert time.monotonic() < end and select.select([ours], [], [], 60)[0], seen[-500:]
            seen += os.read(ours, 1 << 16)
        seen = seen[re.search(pattern, seen).end() :]

    try:
        wait_for(rb"> ")
        os.write(ours, b"\x03")
        while not select.select([ours], [], [], 1)[0]:  # readline misses what comes just as it begins to listen
            os.write(ours, b"\x03")
        wait_for(rb"> ")
        os.write(ours, b"ab cd\n")
        wait_for(rb"ab cd\r?\n[a-h \r\n]{100}")
        os.write(ours, b"\x03")
        wait_for(rb"\n> ")
        os.write(ours, b"\x1b[A\n")
        wait_for(rb"ab cd\r?\n[a-h \r\n]{100}")
        os.write(ours, b"\x03")
        wait_for(rb"\n> ")
        os.write(ours, b"\x04")
        wait_for(rb"tokens/s")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows reports closed pipes in another way")
def test_a_reader_that_leaves_early_is_no_error(folder):
    argv = [sys.executable, str(PROGRAM), "--model", str(folder / "strawberry.strawberry"), "--prompt", "ab",
            "--length", "1000000", "--temperature", "0"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(process.stdout.read(20)) == 20
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) in (141, -signal.SIGPIPE)
    process.stderr.close()
    assert "Error" not in err and "error" not in err and "Traceback" not in err


# ---- score ---------------------------------------------------------------------------------------------------------


TEXT = "abcd efgh\n" * 5 + "abc"


@pytest.mark.parametrize(("name", "stride"), [("strawberry", 1), ("tinystar", 1), ("batch", 0), ("batch", 3)])
def test_score_is_the_mean_over_tokens_each_predicted_from_what_stands_before_it(run, folder, tmp_path, name, stride):
    model, encoder, _ = checkpoint.load_model(folder / f"{name}.strawberry")
    ids, nats = [encoder.eot, *encoder.encode(TEXT)], 0.0
    for t in range(1, len(ids)):
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids[max(0, t - SHAPE["block_size"]) : t]]))
        nats -= logits[0, -1].log_softmax(-1)[ids[t]].item()
    loss, bits = sample.score(model, encoder, TEXT, stride)
    assert loss == pytest.approx(nats / len(TEXT), rel=1e-5)
    assert bits == pytest.approx(nats / len(TEXT) / math.log(2), rel=1e-5)
    (tmp_path / "t.txt").write_text(TEXT, newline="")
    out = run("--score", str(tmp_path / "t.txt"), "--stride", str(stride), model=name).out
    assert out == f"loss {loss:.4f} nats per token, {bits:.4f} bits per byte\n"


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_windows_predict_each_token_once_with_enough_before_it(n, size, stride, causal):
    stride, new = min(stride, size), []
    for begin, done, end in sample.windows(n, size, stride, causal):
        assert 0 <= begin <= done < end <= n and end - begin <= size
        assert begin == 0 or done - begin >= (size - stride if causal else size - 1)
        new += range(done, end)
    assert new == list(range(n))


def test_bits_are_per_byte_not_per_token():
    class Even(Scripted):
        """Every id is as likely as any other."""

        config = models.CONFIGS["tinystar"](block_size=4)

        def forward(self, idx, targets, source=None):
            return None, torch.tensor(math.log(258))

    text = "é🙂"
    loss, bits = sample.score(Even([]), bytes_encoder(), text)
    assert loss == pytest.approx(math.log(258)) and bits == pytest.approx(math.log2(258))
    encoder = encoders.train([text * 20], 262)
    loss, bits = sample.score(Even([]), encoder, text)
    assert bits == pytest.approx(math.log2(258) * len(encoder.encode(text)) / 6) and len(encoder.encode(text)) < 6


def test_what_cannot_be_scored_is_one_line_and_exit_2(folder, tmp_path, capsys, monkeypatch):
    model = ["--model", str(folder / "strawberry.strawberry")]
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "some").write_bytes(b"abc")
    assert "text is empty" in fails(capsys, monkeypatch, *model, "--score", str(tmp_path / "empty"))
    assert "block_size 16" in fails(capsys, monkeypatch, *model, "--score", str(tmp_path / "some"), "--stride", "17")
    assert "exclude" in fails(capsys, monkeypatch, *model, "--score", str(tmp_path / "some"), "--prompt", "a")
