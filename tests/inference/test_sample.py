"""sample.py: streamed, reproducible text that ends at stop strings; each error is one line, with exit code 2."""

import gzip
import itertools
import json
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

import forks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import encoder as encoders
import model as models
import sample
from strawberry import command_line
from strawberry.common import UserError, run_cli
from strawberry.data.objectives import decode_with_sentinels
from strawberry.inference import bulk, engine
from strawberry.inference.loading import check_can_compile
from strawberry.inference.sampling import Request
from strawberry.inference.scoring import iter_windows, score_text
from strawberry.inference.text import (
    StopStringFilter,
    TextStream,
    encode_source_text,
    encode_text,
    explain_errors,
    make_request,
    stream_in_order,
    stream_texts,
)
from strawberry.model_file import load_model, save_model, write_model
from strawberry.ops import sampling
from strawberry.training import checkpoint
from strawberry.training.checkpoint import save_checkpoint

PROGRAM = Path(sample.__file__)
ALPHABET = "abcdefgh \n"
SHAPE = {"vocab_size": 12, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
ARCHS = {
    "strawberry": {"arch": "strawberry", "n_qkv": 16, **SHAPE},
    "batch": {"arch": "strawberry", "n_qkv": 16, "retention_scope": "batch", **SHAPE},
    "tinystar": {"arch": "tinystar", **SHAPE},
}
LEARNED = {"arch": "tinystar", "pos_encoding": "Learned", **SHAPE}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model file of each kind, with an encoder of the letters a to h, space and newline."""
    path = tmp_path_factory.mktemp("models")
    (path / "letters.txt").write_text(ALPHABET, newline="")
    encoder = encoders.load(f"chars:{path / 'letters.txt'}")
    for name, hyperparams in {**ARCHS, "learned": LEARNED}.items():
        torch.manual_seed(1)
        model = models.build(hyperparams)
        with torch.no_grad():  # so that texts are long: <|eot|> and <|pad|> are never the likeliest
            for p in model.parameters():
                if p.size(0) == SHAPE["vocab_size"]:
                    p[-2:] = 0
        save_model(path / f"{name}.strawberry", model, encoder, {})
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


def cli_error(capsys, monkeypatch, *argv) -> str:
    """The error that the program prints: one line, with exit code 2 and nothing on stdout."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
    with pytest.raises(SystemExit) as exit_info:
        run_cli(sample.main)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert exit_info.value.code == 2 and out == "" and len(lines) == 1 and err.splitlines()[-1] == lines[0]
    return lines[0]


class ScriptedDecoder:
    """A decoder whose tokens are given, a list for each request; it records the requests and counts tokens."""

    def __init__(self, *scripts, rows=1):
        self.scripts, self.rows = [list(script) for script in scripts], rows
        self.requests, self.running, self.num_tokens, self.released = [], {}, 0, []

    @property
    def free(self):
        return self.rows - len(self.running)

    def admit(self, request):
        assert self.free
        self.requests.append(request)
        handle = next(row for row in range(self.rows) if row not in self.running)
        self.running[handle] = [request, 0, iter(self.scripts[len(self.requests) - 1])]
        return handle

    def admit_all(self, requests):
        return [self.admit(request) for request in requests]

    def step(self):
        new_tokens = []
        for handle, row in list(self.running.items()):
            token, row[1], self.num_tokens = next(row[2]), row[1] + 1, self.num_tokens + 1
            why = "stop" if token in row[0].stop else "length" if row[1] == row[0].max_new_tokens else None
            if why:
                del self.running[handle]
            new_tokens.append((handle, token, why))
        return new_tokens

    def release(self, handle):
        self.released.append(handle)
        del self.running[handle]


def bytes_encoder():
    """Each byte is a token, then <|eot|> 256 and <|pad|> 257."""
    return encoders.train(["x"], 258)


def byte_tokens(text: str) -> list[int]:
    encoder = bytes_encoder()
    byte_ids = {encoder.token_bytes(i): i for i in range(256)}
    return [byte_ids[bytes([byte])] for byte in text.encode()]


def make_stream(options=None, prompt=(), source=None, seed=0, label=None):
    """The stream of one text, with the encoder of bytes."""
    encoder, options = bytes_encoder(), options or sample.Settings()
    request = make_request(options, encoder, list(prompt), source, seed)
    return TextStream(encoder, request, options.stop, label)


def stream_pieces(tokens, length=1000, stop=(), **options):
    text = make_stream(sample.Settings(length=length, stop=list(stop)), **options)
    return [piece for _, piece, _ in stream_texts(ScriptedDecoder(tokens), [text])]


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ARCHS)
def test_streaming_equals_generate(run, folder, name, seed):
    model, encoder, _ = load_model(folder / f"{name}.strawberry")
    prompt = torch.tensor([encoder.encode("abc d")])
    generator = torch.Generator().manual_seed(seed)
    tokens = model.generate(prompt, 30, 0.9, 5, 0.95, 0.01, {encoder.eot, encoder.pad}, generator)[0].tolist()
    out, _ = run("--prompt", "abc d", "--length", "30", "--temperature", "0.9", "--top_k", "5", "--top_p", "0.95",
                 "--min_p", "0.01", "--seed", str(seed), "--on_full", "slide", model=name)
    assert out == encoder.decode([i for i in tokens if i not in (encoder.eot, encoder.pad)]) + "\n"


def test_options_reach_the_request():
    options = sample.read_settings(["--temperature=0.7", "--top_k=5", "--top_p", "0.9", "--min_p=0.02", "--length=9"])
    request = make_stream(options, prompt=[1, 2], source=[3], seed=11).request
    assert request == Request([256, 1, 2], 9, 0.7, 5, 0.9, 0.02, 11, frozenset({256, 257}), [3])
    options = sample.read_settings(["--temperature=1e-40"])  # too small to divide by
    request = make_stream(options, prompt=[1]).request
    assert request == Request([1], 256, 0.0, None, None, None, 0, frozenset({256, 257}))
    options = sample.read_settings(["--top_p=1e-300"])  # in float32 it would be 0, which leaves no token
    top_p, logits = make_stream(options, prompt=[1]).request.top_p, torch.tensor([[0.0, 5.0, 1.0]])
    assert sampling.sample(logits, torch.tensor([0.9]), 1.0, None, top_p).item() == 1


def test_each_token_is_streamed_before_the_next_decode_step():
    decoder = ScriptedDecoder(byte_tokens("abc"))
    stream = stream_texts(decoder, [make_stream()])
    for count, letter in enumerate("abc", 1):
        assert next(stream)[1] == letter and decoder.num_tokens == count


def test_each_piece_of_text_is_flushed(folder, monkeypatch):
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


def test_a_seed_repeats_the_text_and_each_sample_has_its_own_seed(run):
    argv = ["--prompt", "a", "--length", "40", "--temperature", "2"]
    three = run(*argv, "--seed", "5", "--num_samples", "3").out
    assert three == run(*argv, "--seed", "5", "--num_samples", "3").out
    parts = three.removesuffix("\n").split("\n---------------\n")
    assert len(parts) == 3 and len(set(parts)) == 3
    assert parts == [run(*argv, "--seed", seed).out.removesuffix("\n") for seed in ("5", "6", "7")]


def test_samples_do_not_depend_on_batch(run):
    argv = ["--prompt", "a", "--length", "30", "--temperature", "2", "--seed", "5", "--num_samples", "5"]
    assert run(*argv).out == run(*argv, "--batch", "1").out == run(*argv, "--batch", "2").out


def test_the_first_text_streams_and_the_others_are_buffered_in_order():
    decoder = ScriptedDecoder(byte_tokens("abcd"), byte_tokens("12"), byte_tokens("xyz"), rows=3)
    texts = [make_stream(sample.Settings(length=n), label=name) for n, name in ((4, "A"), (2, "B"), (3, "C"))]
    streams = stream_in_order(stream_texts(decoder, texts), texts)
    seen = [(text.label, piece, decoder.num_tokens) for text, piece, _ in streams]
    assert seen[:4] == [("A", "a", 3), ("A", "b", 6), ("A", "c", 8), ("A", "d", 9)]  # at each step, with all others
    assert seen[4:] == [("B", "1", 9), ("B", "2", 9), ("C", "x", 9), ("C", "y", 9), ("C", "z", 9)]


def test_a_free_row_is_given_to_the_next_request():
    scripts = [byte_tokens(word) for word in ("abcdef", "12", "xyz", "KL")]
    decoder = ScriptedDecoder(*scripts, rows=2)
    texts = [make_stream(sample.Settings(length=len(script)), label=i) for i, script in enumerate(scripts)]
    seen = [(text.label, piece) for text, piece, _ in stream_texts(decoder, texts)]
    by_text = ["".join(piece for label, piece in seen if label == i) for i in range(4)]
    assert by_text == ["abcdef", "12", "xyz", "KL"] and decoder.num_tokens == 13
    assert [label for label, _ in seen] == [0, 1, 0, 1, 0, 2, 0, 2, 0, 2, 0, 3, 3]


def test_the_printed_random_seed_repeats_the_text(run):
    argv = ["--prompt", "a", "--length", "40", "--temperature", "2"]
    out, err = run(*argv)
    seed = re.search(r"^seed (\d+)$", err, re.MULTILINE)[1]
    assert run(*argv, "--seed", seed).out == out
    assert re.search(r"^seed (\d+)$", run(*argv).err, re.MULTILINE)[1] != seed


def test_multibyte_characters_are_streamed_whole():
    text = "é🙂中"
    pieces = stream_pieces(byte_tokens(text), length=len(text.encode()))
    assert [piece for piece in pieces if piece] == list(text) and len(pieces) == len(text.encode())


def test_an_incomplete_character_at_the_end_is_one_replacement_character():
    assert "".join(stream_pieces(byte_tokens("a🙂"), length=3)) == "a\ufffd"
    assert "".join(stream_pieces([*byte_tokens("a🙂")[:3], 256])) == "a\ufffd"


@pytest.mark.parametrize("end", [256, 257])
def test_eot_and_pad_end_the_text_and_are_not_printed(end):
    decoder, text = ScriptedDecoder([*byte_tokens("ab"), end, *byte_tokens("cd")]), make_stream()
    assert [piece for _, piece, _ in stream_texts(decoder, [text])] == ["a", "b", ""]
    assert decoder.num_tokens == text.num_tokens == 3 and text.finish_reason == "stop"


def test_token_ids_beyond_the_encoder_decode_to_nothing():
    assert stream_pieces([*byte_tokens("a"), 300, *byte_tokens("b")], length=3) == ["a", "", "b"]


# ---- stop strings --------------------------------------------------------------------------------------------------


def naive_stop(text: str, stops: list[str]) -> str:
    """Letter by letter: the text before the stop string that is complete first (the longest, of several)."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


LETTERS = st.text("ab\n", min_size=1, max_size=4)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(LETTERS, max_size=6), st.lists(LETTERS, max_size=3))
def test_stop_strings_are_found_across_token_boundaries_and_never_printed(parts, stops):
    stop_filter, printed, expected = StopStringFilter(stops), "", naive_stop("".join(parts), stops)
    for i, part in enumerate(parts):
        printed += stop_filter.push(part, last=i == len(parts) - 1)
        assert expected.startswith(printed)
        if stop_filter.found:
            break
    assert printed == expected


def test_only_a_possible_prefix_of_a_stop_string_is_buffered():
    stop_filter = StopStringFilter(["abc", "bx"])
    assert [stop_filter.push(letter) for letter in "zababd"] == ["z", "", "", "ab", "", "abd"]


def test_a_stop_string_releases_the_row():
    decoder = ScriptedDecoder(byte_tokens("Once upon a time. And then"))
    text = make_stream(sample.Settings(stop=["xx", "me. A"]))
    assert "".join(piece for _, piece, _ in stream_texts(decoder, [text])) == "Once upon a ti"
    assert decoder.num_tokens == len("Once upon a time. A") and decoder.released == [0] and text.finish_reason == "stop"


def test_a_stop_string_at_the_last_token_is_the_finish_reason():
    decoder, text = ScriptedDecoder(byte_tokens("abcd")), make_stream(sample.Settings(stop=["cd"], length=4))
    assert [(piece, why) for _, piece, why in stream_texts(decoder, [text])] == [("a", None), ("b", None), ("", None),
                                                                                ("", "stop")]  # fmt: skip
    assert decoder.released == []  # the decoder ended it too


def test_stop_on_the_command_line(run):
    for seed in range(100):
        argv = ["--prompt", "ab", "--length", "60", "--temperature", "2", "--seed", str(seed)]
        text = run(*argv).out.removeprefix("ab").removesuffix("\n")
        if len(text) > 20:
            break
    cut, other = text[15:18], text[10:13]
    assert run(*argv, "--stop", other, "--stop", cut).out == "ab" + naive_stop(text, [cut, other]) + "\n"


# ---- prompts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "meant"), [
    (r"\n\n", "\n\n"), (r"a\tb\r", "a\tb\r"), (r"\\n", r"\n"), ("\\", "\\"), (r"\\", "\\"), ("\n", "\n"),
    ("é\\n", "é\n"),
])  # fmt: skip
def test_backslashes_in_stop_are_escapes(given, meant):
    assert sample.read_settings(["--stop", given]).stop == [meant]
    assert sample.read_settings([f"--stop={given}", "--stop", "x"]).stop == [meant, "x"]


def test_an_escaped_line_end_stops_a_text(run):
    argv = ["--prompt", "ab", "--temperature", "2", "--length", "200", "--seed", "3"]
    whole = run(*argv).out
    assert "\n" in whole[:-1] and run(*argv, "--stop", r"\n").out == whole[: whole.index("\n")] + "\n"


@pytest.mark.parametrize("value", ["-h", "--help", "-x", "--", "-", "--unknown", "--help=1"])
def test_a_value_that_begins_with_a_dash_is_a_value(run, value):
    for name in ("prompt", "source", "prompt_file", "out"):
        assert command_line.parse_arguments([f"--{name}", value], ["prompt", "seed"]) == (None, [(name, value)], [])
    assert sample.read_settings(["--prompt", value]).prompt == value
    out = run("--prompt", "ab", "--stop", value, "--length", "5").out
    assert out.startswith("ab") and "usage" not in out


def test_prompt_file_and_standard_input_are_prompts(run, tmp_path, monkeypatch):
    argv = ["--length", "20", "--seed", "3"]
    out = run("--prompt", "ab\ncd\n", *argv).out
    assert out.startswith("ab\ncd\n")
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfab\ncd\n")  # as Windows' editors save it
    assert run("--prompt_file", str(tmp_path / "p.txt"), *argv).out == out
    for source in ([], ["--prompt_file", "-"]):
        for end in (b"\n", b"\r\n"):  # echo's, which is no part of the prompt
            monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"ab\ncd\n" + end)))
            assert run(*source, *argv).out == out


def test_an_empty_prompt_starts_at_the_end_of_text_token(run):
    assert make_stream().request.prompt == [256]
    argv = ["--length", "20", "--seed", "3"]
    assert run("--prompt", "", *argv).out == run(*argv).out  # standard input is empty


def test_special_strings_in_a_prompt_are_ordinary_text():
    assert encode_text(bytes_encoder(), "<|eot|>") == byte_tokens("<|eot|>")


@pytest.mark.parametrize(("name", "reads_all"), [("strawberry", True), ("batch", False)])
def test_a_prompt_longer_than_block_size_is_continued_with_a_note(run, name, reads_all):
    out, err = run("--prompt", "abcd" * 10, "--length", "5", "--temperature", "0", model=name)
    assert out.startswith("abcd" * 10) and len(out) == 46
    how = "was trained on no more than" if reads_all else "reads only the last"
    assert f"note: the prompt has 40 tokens, and the model {how} 16 at a time" in err


def test_learned_positions_end_a_text_with_a_note_or_slide(run):
    argv = ["--prompt", "abc", "--temperature", "0", "--length", "40"]
    out, err = run(*argv, model="learned")
    assert len(out) <= 3 + 13 + 1 + 1  # the last token may be drawn from the last position
    assert "note: the text ends where the model's positions do, at 16 tokens with the prompt; --on_full slide" in err
    slid, err = run(*argv, "--on_full", "slide", model="learned")
    assert len(slid) == 3 + 40 + 1 and slid.startswith(out[:-1]) and "note" not in err
    assert "note" not in run(*argv[:-1], "5", model="learned").err


def test_a_prompt_beyond_learned_positions_is_refused_or_cut(run, folder, capsys, monkeypatch):
    argv = ["--prompt", "abcd" * 5, "--length", "5", "--temperature", "0"]
    output = cli_error(capsys, monkeypatch, "--model", str(folder / "learned.strawberry"), *argv)
    assert "the prompt has 20 tokens, and the model's positions end at 16" in output and "--on_full slide" in output
    out, _ = run(*argv, "--on_full", "slide", model="learned")
    assert out.startswith("abcd" * 5) and len(out) == 20 + 5 + 1


# ---- which model ---------------------------------------------------------------------------------------------------


def test_the_newest_model_in_bin_is_the_default(run, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "train one" in cli_error(capsys, monkeypatch, "--prompt", "a")
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
    assert "without checkpoints" in cli_error(capsys, monkeypatch, "--prompt", "a", "--model", str(tmp_path))
    steps = []
    for name in ("strawberry", "tinystar"):
        model, encoder, record = load_model(folder / f"{name}.strawberry")
        parts = {checkpoint.MODEL: write_model(model, encoder, record)}
        steps.append(save_checkpoint(tmp_path / "ck", len(steps) + 1, parts))
    argv = ["--prompt", "a", "--length", "1"]
    assert ": tinystar, " in run(*argv, "--model", str(tmp_path / "ck"), model=None).err
    assert ": strawberry, " in run(*argv, "--model", str(steps[0]), model=None).err


@pytest.mark.parametrize("name", ["strawberry", "tinystar"])
def test_int8_weights_begin_with_the_same_greedy_tokens(run, name):
    """Random weights of 16 channels: another token may be the likeliest here and there, but not at once."""
    argv = ["--prompt", "ab", "--length", "8", "--temperature", "0"]
    out, err = run(*argv, "--quantize", "int8", model=name)
    assert len(out) == 11 and out[:4] == run(*argv, model=name).out[:4] and "float32, int8" in err


@pytest.mark.parametrize("name", ["strawberry", "tinystar"])
def test_bfloat16_texts_have_the_requested_length(run, name):
    out, err = run("--prompt", "ab", "--length", "20", "--temperature", "0", "--dtype", "bfloat16", model=name)
    assert len(out) == 23 and "bfloat16" in err


def test_the_last_line_reports_tokens_per_second(run):
    err = run("--prompt", "ab", "--length", "20", "--temperature", "0", "--num_samples", "2").err
    assert re.fullmatch(r"40 tokens in \d+\.\d\d s, [\d,]+ tokens/s", err.splitlines()[-1])


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temprature", "1"], r"--temprature: unknown option \(did you mean '--temperature'\?\)"),
        (["--qqq", "1"], "--qqq: unknown option; --help lists them"),
        (["--config", "air.json"], "--config: unknown option"),
        (["abc"], "must be an option"),
        (["--length"], "--length: has no value"),
        (["--prompt", "--length", "5"], "--prompt: has no value; write --prompt=value"),
        (["--ignore_eot"], r"--ignore_eot: unknown option \(did you mean '--ignore_eos'\?\)"),
        (["--stop", "a\\d"], r"--stop a\\d: \\d is no escape; write \\\\d for a backslash before d; escapes are \\n, "),
        (["--fast"], "--fast: is about a --prompts_file"),
        (["--stride", "8"], "--stride: is about --score"),
        (["--num_samples", "1e9"], "--num_samples = 1000000000.*<= 65536"),
        (["--length", "0"], "--length = 0: must be an integer >= 1"),
        (["--length", "-5"], "--length = -5: must be"),
        (["--length", "2.5"], "--length = 2.5: must be an integer"),
        (["--length", "ten"], '--length = "ten": must be an integer'),
        (["--length", "1e30"], "must be an integer >= 1 and <= 1048576"),
        (["--temperature", "-1"], "--temperature = -1: must be a number >= 0"),
        (["--temperature", "nan"], "--temperature = NaN: must be a number >= 0"),
        (["--temperature", "inf"], "--temperature = Infinity: must be a number >= 0"),
        (["--top_p", "0"], "--top_p = 0: must be a number > 0 and <= 1"),
        (["--top_p", "1.01"], "--top_p = 1.01: must be"),
        (["--top_k", "-1"], "--top_k = -1: must be"),
        (["--min_p", "2"], "--min_p = 2: must be"),
        (["--seed", "-1"], "--seed = -1: must be an integer >= 0$"),
        (["--num_samples", "0"], "--num_samples = 0: must be"),
        (["--seed", "1", "--seed", "2"], "--seed: given twice"),
        (["--stop", ""], "--stop: is empty"),
        (["--device", "gpu"], '--device = "gpu": must be "auto"'),
        (["--dtype", "int8"], '--dtype = "int8": must be "auto"'),
        (["--prompt_file", "x"], "--prompt and --prompt_file exclude each other"),
        (["--prompts_file", "x", "--out", "y"], "--prompt and --prompts_file exclude each other"),
        (["--out", "y"], "--out: takes the texts of a --prompts_file; name one"),
        (["--batch", "0"], "--batch = 0: must be an integer >= 1"),
        (["--on_full", "wrap"], '--on_full = "wrap": must be "stop" or "slide"'),
        (["--quantize", "int4"], '--quantize = "int4": must be "int8"'),
        (["--compile", "yes"], '--compile = "yes": must be "auto" or "true" or "false"'),
        (["--length", "0", "--top_p", "0"], "--length = 0.*; --top_p = 0"),
        (["--presence_penalty", "2.1"], "--presence_penalty = 2.1: must be a number >= -2 and <= 2"),
        (["--repetition_penalty", "0"], "--repetition_penalty = 0: must be a number >= 0.01"),
        (["--logit_bias", "5"], "--logit_bias = 5: must be an object"),
        (["--logit_bias", "{"], '--logit_bias = "{": must be an object'),
        (["--logit_bias", '{"1": 101}'], "--logit_bias = .* from -100 to 100"),
        (["--stop_token_ids", "3", "--stop_token_ids", "x"], r'_ids = \[3, "x"\]: must be a list of integers'),
        (["--min_tokens", "9", "--length", "8"], "--min_tokens = 9: is more than --length, which is 8"),
        (["--model", "nowhere.strawberry"], "nowhere.strawberry"),
        (["--model", ""], "--model: is empty"),
    ],
)
def test_wrong_options_are_one_line_and_exit_2(capsys, monkeypatch, argv, message):
    assert re.search(message, cli_error(capsys, monkeypatch, "--prompt", "a", *argv))


def test_an_option_of_sampling_is_refused_beside_score(capsys, monkeypatch):
    error = cli_error(capsys, monkeypatch, "--score", "a.txt", "--temperature", "1", "--source", "a", "--stride", "8")
    assert "--temperature: changes nothing about --score" in error
    assert "--source" not in error and "--stride" not in error


def test_a_missing_device_is_named(folder, capsys, monkeypatch):
    argv = ["--model", str(folder / "tinystar.strawberry"), "--prompt", "a", "--device", "cuda"]
    assert "--device cuda" in cli_error(capsys, monkeypatch, *argv)


def test_compiling_needs_a_gpu(folder, capsys, monkeypatch):
    argv = ["--model", str(folder / "tinystar.strawberry"), "--prompt", "a", "--device", "cpu", "--compile", "true"]
    error = "--compile true: steps are compiled on cuda, and this is cpu, where they are recorded and replayed;"
    assert error in cli_error(capsys, monkeypatch, *argv)
    with pytest.raises(UserError, match="--compile true: steps are compiled on cuda, and this is mps; leave it out"):
        check_can_compile("mps", "--compile true")


def test_wrong_prompts_are_one_line_and_exit_2(folder, tmp_path, capsys, monkeypatch):
    model = ["--model", str(folder / "strawberry.strawberry")]
    assert "'X' (U+0058) at position 2" in cli_error(capsys, monkeypatch, *model, "--prompt", "abX")
    assert "not UTF-8 (character 1)" in cli_error(capsys, monkeypatch, *model, "--prompt", "a\udcff")
    (tmp_path / "latin").write_bytes(b"ab\xff")
    output = cli_error(capsys, monkeypatch, *model, "--prompt_file", str(tmp_path / "latin"))
    assert "latin:1: byte 2 (0xFF) is not UTF-8" in output
    assert "cannot read" in cli_error(capsys, monkeypatch, *model, "--prompt_file", str(tmp_path / "none"))
    assert "cannot read" in cli_error(capsys, monkeypatch, *model, "--prompt_file", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"ab\xff")))
    assert "standard input:1: byte 2 (0xFF) is not UTF-8" in cli_error(capsys, monkeypatch, *model)


def test_wrong_model_files_are_one_line_and_exit_2(folder, tmp_path, capsys, monkeypatch):
    whole = (folder / "strawberry.strawberry").read_bytes()
    for name, data in (("pickle", pickle.dumps({})), ("short", whole[:-50]), ("empty", b""), ("text", b"hello" * 99)):
        (tmp_path / name).write_bytes(data)
        assert name in cli_error(capsys, monkeypatch, "--prompt", "a", "--model", str(tmp_path / name))


def test_ruined_weights_and_too_little_memory_are_named(folder, tmp_path, capsys, monkeypatch):
    model, encoder, _ = load_model(folder / "tinystar.strawberry")
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    save_model(tmp_path / "m", model, encoder, {})
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt", "a", "--model", str(tmp_path / "m")])
    with pytest.raises(UserError, match="predicts NaN"):
        sample.main(sys.argv[1:])
    with pytest.raises(UserError, match="not enough memory for 7 tokens"), explain_errors(7):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="something else"), explain_errors(7):
        raise RuntimeError("something else")


def test_help_names_every_option(capsys):
    sample.main(["--help"])
    out = capsys.readouterr().out
    assert all(f"--{name} " in out for name in command_line.declared(sample.Settings))


# ---- encoder-decoders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
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
        save_model(path / f"{objective}.transformer", model, encoder, {"run": {"objective": objective}})
    return path


def run_transformer(capsys, path, *argv):
    sample.main(["--model", str(path), "--length", "12", "--temperature", "1", "--seed", "3", "--device", "cpu", *argv])
    return capsys.readouterr()


def generate_reference(model, start, source):
    """What a model says, drawn as sample.py's seed 3 is."""
    generator = torch.Generator().manual_seed(3)
    return model.generate(torch.tensor([start]), 12, generator=generator, source=source)[0, 1:].tolist()


def decode_answer(encoder, tokens: list[int]) -> str:
    ends = (encoder.eot, encoder.pad)
    return decode_with_sentinels(encoder, list(itertools.takewhile(lambda token: token not in ends, tokens))) + "\n"


@pytest.mark.slow
def test_an_encoder_decoder_answers_its_source(transformers, capsys):
    path = transformers / "pairs.transformer"
    model, encoder, _ = load_model(path)
    answers = set()
    for source in ("abc", "hgfe dcba", "", "hhhhhhhh", "b d f", "aaaaa"):
        given = torch.tensor([[*encoder.encode(source), encoder.eot]])
        tokens = generate_reference(model, [encoder.eot], given)
        padded = torch.nn.functional.pad(given, (0, 3), value=encoder.pad)
        assert tokens == generate_reference(model, [encoder.eot], padded)
        expected = decode_answer(encoder, tokens)
        assert run_transformer(capsys, path, "--source", source).out == expected
        answers.add(expected)
    assert len(answers) > 1


def test_a_prompt_is_the_prefix_of_the_answer(transformers, capsys):
    path = transformers / "pairs.transformer"
    model, encoder, _ = load_model(path)
    given = torch.tensor([[*encoder.encode("abc"), encoder.eot]])
    tokens = generate_reference(model, [encoder.eot, *encoder.encode("fg")], given)
    expected = decode_answer(encoder, tokens)
    assert run_transformer(capsys, path, "--source", "abc", "--prompt", "fg").out == expected


def test_sentinels_in_a_source_are_read_by_span_models_only(transformers, capsys, monkeypatch):
    path = transformers / "spans.transformer"
    model, encoder, record = load_model(path)
    a, b, c = (encoder.decode([i]) for i in range(3))
    source = f"{a}{b}<|0|>{c}<|2|>"
    assert encode_source_text(source, model, encoder, record) == [0, 1, 12, 2, 14, encoder.eot]
    run_transformer(capsys, path, "--source", source)
    error = cli_error(capsys, monkeypatch, "--model", str(path), "--source", "ab<|3|>")
    assert error == "error: --source: <|3|> is too high; the model has 3 sentinels"
    error = cli_error(capsys, monkeypatch, "--model", str(transformers / "pairs.transformer"), "--source", "ab<|0|>")
    assert "'<'" in error  # which this encoder lacks: without spans it is ordinary text


def test_sentinels_in_an_answer_are_printed():
    pieces = stream_pieces([258, *byte_tokens("aé")[:2], 259, *byte_tokens("é"), 256], source=[5, 256])
    assert pieces == ["<|0|>", "a", "", "\ufffd<|1|>", "", "é", ""]
    assert make_stream(source=[5, 256]).request.prompt == [256]
    assert make_stream(source=[5, 256], prompt=[7, 8]).request.prompt == [256, 7, 8]  # a prompt begins the answer


def test_a_long_source_is_noted(transformers, capsys):
    for length, has_note in ((15, False), (16, True)):
        output = run_transformer(capsys, transformers / "pairs.transformer", "--source", "a" * length).err
        assert ("note: the source has 17 tokens, and the model was trained on no more than 16" in output) == has_note


def test_an_answer_is_scored_given_its_source(transformers, tmp_path, capsys):
    path = transformers / "pairs.transformer"
    model, encoder, _ = load_model(path)
    (tmp_path / "answer.txt").write_text("hedge")
    losses = []
    for source in ("abc", "gag"):
        given = torch.tensor([[*encoder.encode(source), encoder.eot]])
        ids = torch.tensor([[encoder.eot, *encoder.encode("hedge")]])
        losses.append(model(ids[:, :-1], ids[:, 1:], source=given)[1].item())
        sample.main(["--model", str(path), "--source", source, "--score", str(tmp_path / "answer.txt")])
        out = capsys.readouterr().out
        assert out.startswith(f"loss {losses[-1]:.4f} nats per token")
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("name", "argv", "message"),
    [
        ("pairs", ["--prompt", "a"], "an encoder-decoder, which needs a source text; give one with --source"),
        ("pairs", ["--score", "a.txt"], "give one with --source"),
        ("masked", ["--prompt", "a"], "this transformer is an encoder: it predicts masked tokens, not text"),
        ("masked", ["--source", "a"], "is an encoder: it predicts"),
        ("masked", ["--score", "a.txt"], "is an encoder: it predicts"),
        ("strawberry", ["--source", "a"], "this strawberry takes no source; leave it out, or make it the prompt"),
        ("pairs", ["--source", "a", "--source", "b"], "--source: given twice"),
        ("pairs", ["--source", "\udcff"], "is not UTF-8"),
        ("pairs", ["--source", "x"], "'x'"),
    ],
)
def test_a_source_too_many_or_too_few_is_one_line_and_exit_2(
    transformers, folder, tmp_path, capsys, monkeypatch, name, argv, message
):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    path = folder / "strawberry.strawberry" if name == "strawberry" else transformers / f"{name}.transformer"
    assert message in cli_error(capsys, monkeypatch, "--model", str(path), *argv)


# ---- at a terminal -------------------------------------------------------------------------------------------------


def run_session(folder, monkeypatch, capsys, *inputs, argv=()):
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


def test_an_interactive_session_answers_each_prompt(folder, run, monkeypatch, capsys):
    argv = ["--length", "12", "--temperature", "2"]
    prompts = (("ab", "4"), ("", "5"), ("cd", "6"))
    texts = [run("--prompt", prompt, *argv, "--seed", seed).out.removeprefix(prompt) for prompt, seed in prompts]
    out, err = run_session(folder, monkeypatch, capsys, "ab", "X", KeyboardInterrupt(), "", "cd", EOFError())
    assert out == texts[0] + "\n" + texts[1] + texts[2] + "\n"
    assert "error: character 'X'" in err and "tokens/s" in err.splitlines()[-1]


def test_an_interrupted_text_uses_up_its_seed(folder, run, monkeypatch, capsys):
    expected = run("--prompt", "ab", "--length", "12", "--temperature", "2", "--seed", "5").out.removeprefix("ab")
    real, calls = stream_texts, []

    def interrupted_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(sample, "stream_texts", interrupted_once)
    assert run_session(folder, monkeypatch, capsys, "ab", "ab", EOFError()).out == "\n" + expected + "\n"


def test_a_session_reuses_its_decoder_until_it_needs_a_longer_cache_or_is_interrupted(folder, monkeypatch, capsys):
    real, lengths, interrupts = engine.Decoder, [], iter([False, False, False, True, False])

    def recording_decoder(model, rows, longest, **options):
        lengths.append(longest)
        return real(model, rows, longest, **options)

    def interrupted_once(decoder, texts):
        if next(interrupts):
            raise KeyboardInterrupt
        return stream_texts(decoder, texts)

    monkeypatch.setattr(engine, "Decoder", recording_decoder)
    monkeypatch.setattr(sample, "stream_texts", interrupted_once)
    long = "abcdefgh" * 40
    run_session(folder, monkeypatch, capsys, "ab", "abcd", long, "ab", "ab", EOFError())
    assert lengths == [256, 512, 256]  # for two prompts; for the long one and the one after it, which is stopped; anew


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows reports closed pipes in another way")
def test_a_reader_that_leaves_early_is_no_error(folder):
    argv = [*forks.start(with_model=True), str(PROGRAM), "--model", str(folder / "strawberry.strawberry"),
            "--prompt", "ab", "--length", "1000000", "--temperature", "0"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(process.stdout.read(20)) == 20
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) in (141, -signal.SIGPIPE)
    process.stderr.close()
    assert "Error" not in err and "error" not in err and "Traceback" not in err


# ---- bulk ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def desk(folder, tmp_path, monkeypatch):
    """A directory to work in: desk(lines) writes prompts.jsonl."""
    monkeypatch.chdir(tmp_path)

    def write(*lines, name="prompts.jsonl"):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        Path(name).write_text("".join(f"{text}\n" for text in texts))

    write.model = str(folder / "strawberry.strawberry")
    return write


BULK = ["--prompts_file", "prompts.jsonl", "--out", "texts.jsonl", "--temperature", "2", "--seed", "7"]


def run_bulk(desk, *argv, out="texts.jsonl"):
    sample.main(["--model", desk.model, *BULK[:2], "--out", out, *BULK[4:], *argv])
    return read_results(out)


def read_results(name="texts.jsonl"):
    """What is in --out, by index."""
    found = [json.loads(line) for line in Path(name).read_text().splitlines()]
    assert len({line["index"] for line in found}) == len(found)
    return {line["index"]: line for line in found}


def test_bulk_texts_are_those_of_each_prompt_alone(desk, run):
    lines = [{"prompt": "ab"}, {"prompt": "hedge a cab", "length": 9, "id": "x", "temperature": 0.5, "top_k": 3},
             {"prompt": "", "max_tokens": 21, "top_p": 0.7, "min_p": 0.1, "id": 5},
             {"prompt": "c", "seed": 99, "stop": ["a", "b"]}, {"prompt": "f", "stop": []},
             {"prompt": "abc", "repetition_penalty": 3, "presence_penalty": 2, "frequency_penalty": 0.5},
             {"prompt": "abc", "logit_bias": {"0": 5, "1": -100}, "stop_token_ids": [3], "min_tokens": 4}]  # fmt: skip
    desk(*lines)
    found = run_bulk(desk, "--length", "15", "--batch", "3", "--stop", "h")
    assert sorted(found) == [0, 1, 2, 3, 4, 5, 6]
    for index, line in enumerate(lines):
        own = {"length": 15, "temperature": 2, "seed": 7 + index, **line}
        own["length"] = own.pop("max_tokens", own["length"])
        own.pop("id", None)
        stops = own.pop("stop", ["h"])
        ends = own.pop("stop_token_ids", [])
        argv = [word for name, value in own.items() for word in (f"--{name}", json.dumps(value).strip('"'))]
        argv += [word for token in ends for word in ("--stop_token_ids", str(token))]
        text = run(*argv, *(word for stop in stops for word in ("--stop", stop))).out.removeprefix(line["prompt"])
        assert found[index]["text"] + "\n" == text
        assert found[index]["prompt"] == line["prompt"] and found[index].get("id") == line.get("id")
        assert found[index]["tokens"] <= own["length"]
        assert found[index]["finish_reason"] == ("length" if len(text) == own["length"] + 1 else "stop")


def test_bulk_texts_do_not_depend_on_the_other_lines(desk):
    """Letter for letter, in whatever company and order; see engine.py's tests for the tokens."""
    lines = [{"prompt": "abcdefgh"[: i % 7 + 1], "max_tokens": 5 + 7 * i % 23, "seed": i} for i in range(12)]
    desk(*lines)
    together = run_bulk(desk, "--batch", "5")
    desk(*lines[::-1], name="prompts.jsonl")
    reverse = run_bulk(desk, "--batch", "4", out="reverse.jsonl")
    desk(lines[4])
    alone = run_bulk(desk, out="alone.jsonl")
    assert {line["text"] for line in together.values()} == {line["text"] for line in reverse.values()}
    assert alone[0]["text"] == together[4]["text"] == reverse[7]["text"]


OPTIONS = [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0},
           {"repetition_penalty": 1.5, "frequency_penalty": 0.7, "logit_bias": {"2": 3}, "min_tokens": 4}]  # fmt: skip
VARIED = [{"prompt": "abcdefgh"[: i % 7 + 1], "max_tokens": 280 if i % 13 == 5 else 5 + 7 * i % 23, **OPTIONS[i % 6]}
          for i in range(26)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["strawberry", "tinystar"])
def test_texts_in_bulk_do_not_depend_on_batch(desk, folder, name, capsys):
    desk(*VARIED)
    argv = ["--model", str(folder / f"{name}.strawberry"), *BULK[:2], *BULK[4:], "--device", "cpu"]
    for batch in ("8", "1", "16"):
        sample.main([*argv, "--out", f"{batch}.jsonl", "--batch", batch])
        assert read_results(f"{batch}.jsonl") == read_results("8.jsonl")
        assert ("on a CPU 8 texts are generated at once" in capsys.readouterr().err) == (batch != "8")


def test_the_decoder_shape_depends_on_the_line_alone(desk, monkeypatch):
    """Whatever --batch, the other lines, and what is there already."""
    decoders, real = [], engine.Decoder
    monkeypatch.setattr(engine, "Decoder", lambda *args, **more: decoders.append((args[1:], more)) or
                        real(*args, **more))  # fmt: skip
    shapes = {}
    for lines in ([{"prompt": "a", "max_tokens": 9}], [{"prompt": "a", "max_tokens": 300}], VARIED[:9]):
        desk(*lines)
        for batch in ("1", "16"):
            run_bulk(desk, "--batch", batch, "--device", "cpu", out=f"{len(shapes)}.jsonl")
            shapes[len(lines), lines[0]["max_tokens"], batch] = decoders.copy()
            decoders.clear()
    short, long = ([((8, room), {"on_full": "stop", "batch_invariant": True, "min_bucket": room, "max_source": 32})]
                   for room in (256, 512))  # fmt: skip
    assert shapes == {(n, tokens, batch): {9: short, 300: long, 5: short + long}[tokens]
                      for n, tokens in ((1, 9), (1, 300), (9, 5)) for batch in ("1", "16")}  # fmt: skip


def test_fast_uses_batch_and_notes_what_it_gives_up(desk, monkeypatch, capsys):
    desk(*VARIED[:9])
    rows, real = [], engine.Decoder
    monkeypatch.setattr(engine, "Decoder", lambda *args, **more: rows.append(args[1]) or real(*args, **more))
    run_bulk(desk, "--fast", "--batch", "3", "--device", "cpu")
    assert rows == [3] and "note: --fast: a text may differ with --batch" in capsys.readouterr().err
    Path("texts.jsonl").write_bytes(Path("texts.jsonl").read_bytes().splitlines(keepends=True)[0])
    assert "--fast was true and is false" in cli_error(capsys, monkeypatch, "--model", desk.model, *BULK)


def test_results_are_written_as_they_finish(desk):
    desk(*({"prompt": "a", "max_tokens": n, "temperature": 0} for n in (40, 3, 8)))
    assert list(run_bulk(desk, "--batch", "2")) == [1, 2, 0]


def test_empty_lines_are_skipped_but_counted(desk, run):
    Path("prompts.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n  \n{"prompt": "b"}')
    found = run_bulk(desk, "--length", "5")
    assert sorted(found) == [0, 3]
    argv = ["--temperature", "2", "--length", "5", "--seed"]
    assert found[3]["text"] == run("--prompt", "b", *argv, "10").out[1:-1]


def test_a_complete_output_is_not_rewritten(desk, monkeypatch, capsys):
    desk({"prompt": "a"}, {"prompt": "b"})
    run_bulk(desk, "--length", "5")
    before = Path("texts.jsonl").read_bytes(), Path("texts.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(engine, "Decoder", None)
    run_bulk(desk, "--length", "5")
    assert (Path("texts.jsonl").read_bytes(), Path("texts.jsonl").stat().st_mtime_ns) == before
    assert "all 2 texts are in texts.jsonl already" in capsys.readouterr().err


def test_a_truncated_output_is_completed_and_finished_texts_stay(desk):
    desk(*({"prompt": "ab"[i % 2], "max_tokens": 3 + i} for i in range(6)))
    whole = run_bulk(desk)
    data = Path("texts.jsonl").read_bytes()
    for cut in [*range(0, len(data), 37), len(data) - 1]:
        Path("texts.jsonl").write_bytes(data[:cut])
        finished = data[:cut].rpartition(b"\n")[0]
        assert run_bulk(desk) == whole, cut
        assert Path("texts.jsonl").read_bytes().startswith(finished)


def test_finished_texts_are_not_generated_again(desk, monkeypatch):
    desk(*({"prompt": "a", "max_tokens": 4} for _ in range(5)))
    run_bulk(desk)
    lines = Path("texts.jsonl").read_bytes().splitlines(keepends=True)
    Path("texts.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:10])
    generated = []
    monkeypatch.setattr(bulk, "stream_texts", lambda decoder, texts: stream_texts(
        decoder, (generated.append(t) or t for t in texts)))  # fmt: skip
    run_bulk(desk)
    done = {json.loads(line)["index"] for line in lines[:3]}
    assert {text.label["index"] for text in generated} == set(range(5)) - done


def test_ctrl_c_keeps_finished_texts_and_says_how_to_continue(desk, monkeypatch, capsys):
    desk(*({"prompt": "a", "max_tokens": n, "temperature": 0} for n in (3, 30, 5, 30)))
    whole = run_bulk(desk)
    Path("texts.jsonl").unlink()
    real = stream_texts

    def interrupted(decoder, texts):
        for count, piece in enumerate(real(decoder, texts)):
            if count == 40:
                raise KeyboardInterrupt
            yield piece

    message = "^interrupted: 2 of 4 texts are in texts.jsonl; the same command continues$"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=message):
        patch.setattr(bulk, "stream_texts", interrupted)
        run_bulk(desk)
    assert sorted(read_results()) == [0, 2]
    assert run_bulk(desk) == whole


# A process that the system ends, unasked and wherever it is, some milliseconds after its first line.
RUN_WITH_TIMER = """
import signal, sys
import sample
from strawberry.inference.bulk import Results
delay, *argv = sys.argv[1:]
real = Results.append
def append(self, line):
    real(self, line)
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.setitimer(signal.ITIMER_REAL, float(delay))
Results.append = append
sample.main(argv)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such timer")
def test_bulk_generation_survives_kills_at_any_time(desk):
    """Killed while it works at places that nobody chose, it ends up with what one that was left alone makes."""
    desk(*({"prompt": "abc"[i % 3], "max_tokens": 40 + i, "id": f"n{i}"} for i in range(40)))
    Path("timer.py").write_text(RUN_WITH_TIMER)
    whole = run_bulk(desk, "--device", "cpu", out="whole.jsonl")
    killed = 0
    for delay, batch in ((0.02, "2"), (0.05, "5"), (0.1, "16")):
        argv = ["--model", desk.model, *BULK, "--batch", batch, "--device", "cpu"]
        process = subprocess.run([*forks.start(with_model=True), "timer.py", str(delay), *argv], stderr=subprocess.PIPE)
        assert process.returncode in (0, -signal.SIGALRM), process.stderr.decode()
        killed += process.returncode != 0
        finished = Path("texts.jsonl").read_bytes().rpartition(b"\n")[0].splitlines()
        assert all(json.loads(line) == whole[json.loads(line)["index"]] for line in finished)
    assert killed and len(finished) > 0
    assert run_bulk(desk, "--batch", "2", "--device", "cpu") == whole


@pytest.mark.cuda
def test_bulk_generation_on_a_gpu_resumes(desk):
    desk(*({"prompt": "abc"[i % 3], "max_tokens": 20 + i, "temperature": 0} for i in range(24)))
    argv = ["--device", "cuda", "--batch", "4"]
    whole = run_bulk(desk, *argv)
    assert sorted(whole) == list(range(24)) and all(whole[i]["tokens"] == 20 + i for i in whole)
    lines = Path("texts.jsonl").read_bytes().splitlines(keepends=True)
    Path("texts.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:7])
    assert sorted(run_bulk(desk, *argv)) == list(range(24))
    assert Path("texts.jsonl").read_bytes().startswith(b"".join(lines[:9]))


def test_a_random_seed_is_recorded_and_reused_on_resume(desk):
    desk(*({"prompt": "a", "max_tokens": 9} for _ in range(4)))
    argv = ["--model", desk.model, "--prompts_file", "prompts.jsonl", "--out", "texts.jsonl", "--temperature", "2"]
    sample.main(argv)
    whole, data = read_results(), Path("texts.jsonl").read_bytes()
    Path("texts.jsonl").write_bytes(data.splitlines(keepends=True)[0])
    sample.main(argv)
    assert read_results() == whole
    Path("texts.jsonl").unlink()
    sample.main(argv)
    assert read_results() != whole  # and drawn anew where nothing is there


@pytest.mark.parametrize(("change", "message"), [
    (["--temperature", "1"], "--temperature was 2.0 and is 1.0"),
    (["--length", "5"], "--length was 256 and is 5"),
    (["--stop", "a"], r'--stop was \[\] and is \["a"\]'),
    (["--seed", "8"], "--seed was 7 and is 8"),
    (["--dtype", "bfloat16"], '--dtype was "float32" and is "bfloat16"'),
    (["--on_full", "slide", "--top_k", "4"], '--top_k was 0 and is 4; --on_full was "stop" and is "slide"'),
    (["--min_tokens", "2", "--logit_bias", '{"1": 5}'],
     r'--logit_bias was \{\} and is \{"1": 5.0\}; --min_tokens was 0 and is 2'),
    (["--model", "tinystar"], "the model is another, or was changed"),
    ("prompts", "the prompts file is another, or was changed"),
])  # fmt: skip
def test_results_of_other_inputs_are_not_continued(desk, folder, capsys, monkeypatch, change, message):
    desk({"prompt": "a", "max_tokens": 3}, {"prompt": "b", "max_tokens": 3})
    run_bulk(desk)
    Path("texts.jsonl").write_bytes(Path("texts.jsonl").read_bytes().splitlines(keepends=True)[0])
    before = Path("texts.jsonl").read_bytes()
    if change == "prompts":
        desk({"prompt": "a", "max_tokens": 3}, {"prompt": "c", "max_tokens": 3})
        change = []
    options = dict(zip(BULK[::2], BULK[1::2], strict=True)) | {"--model": desk.model}
    options |= dict(zip(change[::2], change[1::2], strict=True))
    if options["--model"] == "tinystar":
        options["--model"] = str(folder / "tinystar.strawberry")
    argv = [word for pair in options.items() for word in pair]
    output = cli_error(capsys, monkeypatch, *argv)
    assert re.search(f"texts.jsonl has other inputs: {message}. Give the same again, or name another --out", output)
    assert Path("texts.jsonl").read_bytes() == before


def test_batch_may_change_on_resume(desk):
    desk(*({"prompt": "a", "max_tokens": 6} for _ in range(4)))
    whole = run_bulk(desk)
    Path("texts.jsonl").write_bytes(Path("texts.jsonl").read_bytes().splitlines(keepends=True)[0])
    assert run_bulk(desk, "--batch", "2", "--compile", "false", "--device", "cpu") == whole


@pytest.mark.parametrize(("line", "message"), [
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("5", r'holds 5; write an object, \{"prompt": "…"\}'),
    ("{}", 'has no prompt; give it one, "" for the beginning of a text'),
    ({"prompt": None}, "has no prompt"),
    ({"prompt": 5}, "prompt = 5: must be text"),
    ({"prompt": "aX"}, "'X'.* at position 1"),
    ('{"prompt": "a\\ud800"}', "is not UTF-8"),
    ({"prompt": "a", "tempe": 1}, r"tempe = 1: unknown key \(did you mean 'temperature'"),
    ({"prompt": "a", "temperature": -1}, "temperature = -1: must be a number >= 0"),
    ({"prompt": "a", "top_p": 0}, "top_p = 0: must be a number > 0 and <= 1"),
    ({"prompt": "a", "top_k": 1.5}, "top_k = 1.5: must be an integer >= 0"),
    ({"prompt": "a", "min_p": True}, "min_p = true: must be a number"),
    ({"prompt": "a", "seed": -1}, "seed = -1: must be an integer >= 0"),
    ({"prompt": "a", "length": 0}, "length = 0: must be an integer >= 1"),
    ({"prompt": "a", "max_tokens": "9"}, 'max_tokens = "9": must be an integer'),
    ({"prompt": "a", "max_tokens": 3, "length": 4}, "length = 4: is max_tokens too, which is 3; keep one"),
    ({"prompt": "a", "min_tokens": 9, "max_tokens": 8}, "min_tokens = 9: is more than max_tokens, which is 8"),
    ({"prompt": "a", "stop_token_ids": [99]}, "stop_token_ids: token 99 is none of the"),
    ({"prompt": "a", "logit_bias": {"99": 1}}, "logit_bias: token 99 is none of the"),
    ({"prompt": "a", "logit_bias": {"1": "x"}}, "logit_bias = .*: must be an object"),
    ({"prompt": "a", "frequency_penalty": 3}, "frequency_penalty = 3: must be a number >= -2 and <= 2"),
    ({"prompt": "a", "stop": "b"}, 'stop = "b": must be a list of text'),
    ({"prompt": "a", "stop": [""]}, r'stop = \[""\]: must be a list of text'),
    ({"prompt": "a", "id": [1]}, r"id = \[1\]: must be text or an integer"),
    ({"prompt": "a", "source": "b"}, "source: this strawberry takes no source"),
])  # fmt: skip
def test_an_invalid_line_is_named_before_anything_is_written(desk, capsys, monkeypatch, line, message):
    desk({"prompt": "a"}, line)
    output = cli_error(capsys, monkeypatch, "--model", desk.model, *BULK)
    assert re.match(f"error: prompts.jsonl, line 2: .*{message}", output) and len(output) < 400
    assert sorted(path.name for path in Path().iterdir()) == ["prompts.jsonl"]


def test_all_invalid_lines_are_counted_and_the_first_ten_listed(desk, capsys, monkeypatch):
    desk(*({"prompt": "a", "top_k": -i} for i in range(20)))
    with pytest.raises(UserError) as raised:
        run_bulk(desk)
    output = str(raised.value).splitlines()
    assert output[0] == "19 of 20 lines are wrong:" and len(output) == 12 and output[-1] == "  … and 9 more"
    assert output[1].startswith("  prompts.jsonl, line 2: top_k = -1: must be")


def test_a_prompts_file_that_cannot_be_read_is_named(desk, tmp_path, capsys, monkeypatch):
    argv = ["--model", desk.model, *BULK]
    assert "cannot read prompts.jsonl: No such file" in cli_error(capsys, monkeypatch, *argv)
    desk()
    assert 'prompts.jsonl has no prompts; write a line {"prompt": "…"}' in cli_error(capsys, monkeypatch, *argv)
    Path("prompts.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    assert "prompts.jsonl, line 2: byte 28 (0xFF) is not UTF-8" in cli_error(capsys, monkeypatch, *argv)


def test_prompts_are_read_from_a_pipe_a_list_and_a_gzip_alike(desk):
    lines = [{"prompt": "ab"}, {"prompt": "hedge", "length": 9}]
    desk(*lines)
    data = Path("prompts.jsonl").read_bytes()
    expected = run_bulk(desk)
    Path("list.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(lines, indent=1).encode())
    Path("lines.json").write_bytes(data)
    Path("packed.ndjson.gz").write_bytes(gzip.compress(data))
    for name in ("list.json", "lines.json", "packed.ndjson.gz", "pipe"):
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        path = f"/dev/fd/{reader}" if name == "pipe" else name
        sample.main(["--model", desk.model, "--prompts_file", path, "--out", f"{name}.out", *BULK[4:]])
        os.close(reader)
        assert read_results(f"{name}.out") == expected


@pytest.mark.parametrize(("name", "data", "message"), [
    ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "a", "prompt": "b"}\n', 'p.jsonl, line 3: has the key "prompt" twice'),
    ("p.json", b'[{"prompt": "a"}, {"prompt": "a", "prompt": "b"}]', 'p.json: entry 2 has the key "prompt" twice'),
    ("p.json", b'[{"prompt": "a"}, 5]', "p.json, entry 2: holds 5; write an object"),
    ("p.json", b'[\n"\xff"]', "p.json, line 2: byte 3 (0xFF) is not UTF-8"),
    ("p.csv", b"prompt\na\n", "p.csv is a table (CSV); write a line"),
    ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), "p.jsonl is UTF-16 text; write a line"),
])  # fmt: skip
def test_a_wrong_prompts_file_is_named_with_its_place(desk, capsys, monkeypatch, name, data, message):
    Path(name).write_bytes(data)
    output = cli_error(capsys, monkeypatch, "--model", desk.model, "--prompts_file", name, *BULK[2:])
    assert output.startswith(f"error: {message}") and not Path("texts.jsonl").exists()


def test_a_prompt_from_a_pipe_ends_before_its_line_end_and_from_a_file_does_not(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"a\r\nb\n\n")
    assert sample.read_prompt_file(str(tmp_path / "p.txt")) == "a\r\nb\n\n"
    for data, text in ((b"a \n", "a "), (b"a\r\n", "a"), (b"a\n\n", "a\n"), (b"a", "a"), (b"\n", ""), (b"a\r", "a\r")):
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        assert sample.read_prompt_file(f"/dev/fd/{reader}") == text
        os.close(reader)


def test_an_output_that_sample_did_not_write_is_not_changed(desk, capsys, monkeypatch):
    desk({"prompt": "a"}, {"prompt": "b"})
    argv = ["--model", desk.model, *BULK]
    Path("texts.jsonl").write_text("my diary\n")
    message = "texts.jsonl is there and is not a file of texts that sample.py wrote"
    assert message in cli_error(capsys, monkeypatch, *argv)
    assert Path("texts.jsonl").read_text() == "my diary\n"
    Path("texts.jsonl").unlink()
    run_bulk(desk)
    data = Path("texts.jsonl").read_text()
    Path("texts.jsonl.from.json").rename("aside")
    assert "texts.jsonl exists, but texts.jsonl.from.json, which states" in cli_error(capsys, monkeypatch, *argv)
    assert Path("texts.jsonl").read_text() == data
    Path("aside").rename("texts.jsonl.from.json")
    Path("texts.jsonl").write_text(data + "more\n")
    assert "texts.jsonl, line 3: is no text that sample.py wrote" in cli_error(capsys, monkeypatch, *argv)
    Path("texts.jsonl").unlink()
    Path("texts.jsonl.from.json").unlink()
    Path("texts.jsonl").mkdir()
    assert "texts.jsonl" in cli_error(capsys, monkeypatch, *argv)
    assert "cannot write" in cli_error(capsys, monkeypatch, *argv[:5], "prompts.jsonl/x", *argv[6:])


def test_bulk_needs_both_files_and_one_text_a_line(capsys, monkeypatch):
    assert "--prompts_file: needs a file for the texts; name one with --out" in cli_error(
        capsys, monkeypatch, "--prompts_file", "x")
    argv = ["--prompts_file", "x", "--out", "y"]
    assert "--num_samples: a --prompts_file has one text" in cli_error(capsys, monkeypatch, *argv, "--num_samples", "2")


def test_a_prompt_in_bulk_that_leaves_no_position_is_named(desk, folder, capsys, monkeypatch):
    desk({"prompt": "abc", "max_tokens": 30}, {"prompt": "abcd" * 5})
    desk.model = str(folder / "learned.strawberry")
    output = cli_error(capsys, monkeypatch, "--model", desk.model, *BULK)
    assert "prompts.jsonl, line 2: the prompt has 20 tokens, and the model's positions end at 16" in output
    desk({"prompt": "abc", "max_tokens": 30, "temperature": 0}, {"prompt": "d", "max_tokens": 4})
    found = run_bulk(desk)
    assert found[0]["finish_reason"] == "full" and found[0]["tokens"] in (13, 14)
    assert "note: the text ends where the model's positions do, at 16 tokens" in capsys.readouterr().err
    found = run_bulk(desk, "--on_full", "slide", out="slid.jsonl")
    assert found[0]["tokens"] == 30 and found[0]["finish_reason"] == "length"


def test_an_encoder_decoder_answers_in_bulk(transformers, desk, capsys):
    path = transformers / "pairs.transformer"
    desk({"source": "abc"}, {"source": "hgfe dcba", "prompt": "fg"}, {"source": ""}, {"prompt": "a"})
    argv = ["--length", "12", "--temperature", "1", "--device", "cpu"]
    sample.main(["--model", str(path), *BULK[:4], *argv, "--seed", "3", "--source", "hhhh"])
    found = read_results()
    requests = [("abc", ""), ("hgfe dcba", "fg"), ("", ""), ("hhhh", "a")]
    for index, (source, prompt) in enumerate(requests):
        capsys.readouterr()
        sample.main(["--model", str(path), *argv, "--seed", str(3 + index), "--source", source, "--prompt", prompt])
        assert capsys.readouterr().out == prompt + found[index]["text"] + "\n"
    assert found[1]["source"] == "hgfe dcba" and "prompt" not in found[2]


# ---- score ---------------------------------------------------------------------------------------------------------


TEXT = "abcd efgh\n" * 5 + "abc"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stride"), [("strawberry", 1), ("tinystar", 1), ("batch", 0), ("batch", 3)])
def test_score_is_the_mean_loss_of_each_token_given_its_prefix(run, folder, tmp_path, name, stride):
    model, encoder, _ = load_model(folder / f"{name}.strawberry")
    ids, nats = [encoder.eot, *encoder.encode(TEXT)], 0.0
    for t in range(1, len(ids)):
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids[max(0, t - SHAPE["block_size"]) : t]]))
        nats -= logits[0, -1].log_softmax(-1)[ids[t]].item()
    loss, bits = score_text(model, encoder, TEXT, stride)
    assert loss == pytest.approx(nats / len(TEXT), rel=1e-5)
    assert bits == pytest.approx(nats / len(TEXT) / math.log(2), rel=1e-5)
    (tmp_path / "t.txt").write_text(TEXT, newline="")
    out = run("--score", str(tmp_path / "t.txt"), "--stride", str(stride), model=name).out
    assert out == f"loss {loss:.4f} nats per token, {bits:.4f} bits per byte\n"


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_scoring_windows_predict_each_token_once_with_enough_context(n, size, stride, causal):
    stride, new = min(stride, size), []
    for begin, done, end in iter_windows(n, size, stride, causal):
        assert 0 <= begin <= done < end <= n and end - begin <= size
        assert begin == 0 or done - begin >= (size - stride if causal else size - 1)
        new += range(done, end)
    assert new == list(range(n))


def test_bits_are_per_byte_not_per_token():
    class Even(torch.nn.Module):
        """Every id is as likely as any other."""

        config, causal = models.CONFIGS["tinystar"](block_size=4), True

        def __init__(self):
            super().__init__()
            self.device = torch.device("cpu")

        def forward(self, idx, targets, source=None):
            return None, torch.tensor(math.log(258))

    text = "é🙂"
    loss, bits = score_text(Even(), bytes_encoder(), text)
    assert loss == pytest.approx(math.log(258)) and bits == pytest.approx(math.log2(258))
    encoder = encoders.train([text * 20], 262)
    loss, bits = score_text(Even(), encoder, text)
    assert bits == pytest.approx(math.log2(258) * len(encoder.encode(text)) / 6) and len(encoder.encode(text)) < 6


def test_invalid_scoring_input_is_one_line_and_exit_2(folder, tmp_path, capsys, monkeypatch):
    model = ["--model", str(folder / "strawberry.strawberry")]
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "some").write_bytes(b"abc")
    assert "text is empty" in cli_error(capsys, monkeypatch, *model, "--score", str(tmp_path / "empty"))
    score = [*model, "--score", str(tmp_path / "some")]
    assert "block_size 16" in cli_error(capsys, monkeypatch, *score, "--stride", "17")
    assert "exclude" in cli_error(capsys, monkeypatch, *score, "--prompt", "a")
