"""serve.py: the completions API for other people's clients, for many clients at once, and for hostile ones."""

import asyncio
import base64
import concurrent.futures
import contextlib
import hmac
import http.client
import json
import math
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import forks
import openai
import pytest
import torch
from machine import count
from ports import free_port

import encoder as encoders
import model as models
import sample
import serve
from strawberry.common import UserError
from strawberry.inference.engine import Decoder
from strawberry.inference.text import TextStream, make_request, stream_texts
from strawberry.model_file import load_model, save_model
from strawberry.serving import bodies, engine, scoring
from strawberry.serving.app import create_app
from strawberry.serving.completions import CompletionStream, make_request_group
from strawberry.serving.engine import Engine, decode_token
from strawberry.serving.errors import ApiError, replace_surrogates
from strawberry.serving.metrics import Metrics
from strawberry.serving.model_files import read_model_file
from strawberry.serving.protocol import CompletionRequest, range_pattern
from strawberry.serving.security import HttpProtocol, RateLimiter
from strawberry.serving.server import Server, check_free, make_server_config
from strawberry.serving.settings import KEY_VARIABLE, MIB, Settings, check_folders, read_command

ROOT = Path(serve.__file__).parent
SHAPE = {"vocab_size": 258, "block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 32}
MODELS = {
    "air.strawberry": {"arch": "strawberry", "n_qkv": 32, **SHAPE},
    "future.strawberry": {"arch": "strawberry", "n_qkv": 32, "retention_scope": "batch", **SHAPE, "block_size": 8},
    "learned.tinystar": {"arch": "tinystar", "pos_encoding": "Learned", **SHAPE},
    "pairs.transformer": {"arch": "transformer", "kind": "encoder-decoder", **SHAPE},
    "masked.transformer": {"arch": "transformer", "kind": "encoder", **SHAPE},
}
ROWS = 4
LONG = {"max_tokens": 4000, "temperature": 0}  # some seconds


def make_model(path: Path, seed: int = 1) -> None:
    """A model of bytes, in the arch that the file's name tells."""
    torch.manual_seed(seed)
    model = models.build(MODELS[path.name])
    with torch.no_grad():
        for p in model.parameters():
            if p.size(0) == SHAPE["vocab_size"]:
                p *= 8  # so that some tokens are likelier than others
                p[-2:] = 0  # <|eot|> and <|pad|>, which are never the likeliest: LONG texts don't end
    save_model(path, model, encoders.train(["x"], 258), {})


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    for name in MODELS:
        make_model(path / name)
    return path


class ServerThread:
    """A server in a thread of this process, and what a test asks of it."""

    def __init__(self, folder, **settings):
        self.data = tempfile.TemporaryDirectory()
        settings = {"rate": 0, "batch": ROWS, "device": "cpu", "data": self.data.name} | settings
        self.settings = Settings(models=str(folder), port=0, **settings)
        self.app = create_app(self.settings)
        self.service = self.app.state.service
        config = make_server_config(self.app, self.settings)
        config.log_config = None
        self.uvicorn = Server(config, self.service)
        self.thread = threading.Thread(target=self.uvicorn.run)
        self.thread.start()
        until = time.time() + 30
        while not self.uvicorn.started and time.time() < until:
            time.sleep(0.01)
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def stop(self):
        self.uvicorn.should_exit = True
        self.thread.join(70)
        assert not self.thread.is_alive()
        self.data.cleanup()

    def send(self, method, path, body=None, **headers):
        """(status, headers, what the JSON says)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if body is not None and not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        kind = {} if body is None else {"Content-Type": "application/json"}
        with contextlib.closing(connection):
            connection.request(method, path, body, kind | {k.replace("_", "-"): v for k, v in headers.items()})
            answer = connection.getresponse()
            data = answer.read()
        json_like = answer.getheader("content-type", "").startswith("application/json")
        return answer.status, answer.headers, json.loads(data) if json_like else data

    def complete(self, **body):
        return self.send("POST", "/v1/completions", {"model": "air.strawberry", "prompt": "a", **body})

    def gauge(self, name):
        text = self.send("GET", "/metrics")[2].decode()
        return float(re.search(rf"^strawberry_{name} (\S+)", text, re.M)[1])

    def wait_for(self, name, value, seconds=5.0):
        """How long a gauge took to get there."""
        began = time.time()
        while self.gauge(name) != value:
            assert time.time() - began < seconds, (name, self.gauge(name))
            time.sleep(0.02)
        return time.time() - began


@pytest.fixture(scope="session")
def server(folder):
    server = ServerThread(folder)
    yield server
    server.stop()


@pytest.fixture
def start(folder):
    """start(**settings) → a server of its own, stopped when the test is over."""
    servers = []

    def start(models=folder, **settings):
        servers.append(ServerThread(models, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def error_of(answer, status):
    got, _, body = answer
    assert got == status, answer
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


def sample_alone(folder, prompt, seed, name="air.strawberry", n=24, **options):
    """The text of one request alone, in a decoder of the server's shape."""
    model, encoder, _ = load_model(folder / name)
    settings = sample.Settings(length=n, **{"temperature": 1.0, **options})
    decoder = Decoder(model, ROWS, 4096, batch_invariant=True)
    request = make_request(settings, encoder, encoder.encode(prompt), None, seed)
    stream = stream_texts(decoder, [TextStream(encoder, request, settings.stop)])
    return replace_surrogates("".join(piece for _, piece, _ in stream))


def test_missing_folders_are_errors_and_are_not_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("file").touch()
    for words in ("", "--models bin", "--models bin/", "--models models --runs models --data x"):
        check_folders(read_command(words.split()))
    mistakes = {
        "--models model": r"--models model: there is no such directory \(did you mean 'models'\?\); name one",
        "--models file": "--models file: is a file; name a directory",
        "--models models/bin": "--models models/bin: there is no such directory;",
        "--runs models --runs none --models no": "--models no: .*; --runs none: there is no such directory",
    }
    for words, message in mistakes.items():
        with pytest.raises(UserError, match=f"^{message}"):
            serve.main([*words.split(), "--port=0"])
    assert sorted(map(str, Path().rglob("*"))) == ["file", "models"]
    monkeypatch.setattr("os.access", lambda path, mode: path != "models")
    for words in ("--models models", "--runs models"):
        with pytest.raises(UserError, match=f"^{words}: cannot be read; change its rights"):
            serve.main([*words.split(), "--port=0"])


def test_a_server_that_cannot_compile_does_not_start(folder, monkeypatch):
    monkeypatch.setattr(serve, "check_free", lambda *address: pytest.fail("it starts"))
    with pytest.raises(UserError, match="^--compile true: steps are compiled on cuda, and this is cpu"):
        serve.main(["--models", str(folder), "--device", "cpu", "--compile", "true", "--port", "0"])


# ---- completions, through OpenAI's package -------------------------------------------------------------------------


@pytest.mark.slow
def test_completions_equal_sample(server, folder):
    got = server.client.completions.create(model="air.strawberry", prompt="the cat", seed=7, max_tokens=24)
    assert got.choices[0].text == sample_alone(folder, "the cat", 7) != sample_alone(folder, "the cat", 8)
    assert (
        got.choices[0].finish_reason == "length" and got.object == "text_completion" and got.model == "air.strawberry"
    )
    cold = server.client.completions.create(model="air.strawberry", prompt="x", temperature=0, max_tokens=9)
    hot = server.client.completions.create(model="air.strawberry", prompt="x", max_tokens=9, extra_body={"top_k": 1})
    assert cold.choices[0].text == hot.choices[0].text
    for extra in ({"top_k": 3}, {"min_p": 0.5}):
        got = server.client.completions.create(
            model="air.strawberry", prompt="x", seed=3, max_tokens=24, extra_body=extra
        )
        assert got.choices[0].text == sample_alone(folder, "x", 3, **extra) != sample_alone(folder, "x", 3)
    got = server.client.completions.create(model="air.strawberry", prompt="x", seed=3, max_tokens=24, top_p=0.4)
    assert got.choices[0].text == sample_alone(folder, "x", 3, top_p=0.4) != sample_alone(folder, "x", 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["air.strawberry", "future.strawberry", "learned.tinystar"])
def test_streamed_equals_plain(server, name):
    request = {
        "model": name,
        "prompt": ["the cat", "öä"],
        "seed": 5,
        "n": 3,
        "max_tokens": 20,
        "logprobs": 2,
        "echo": True,
    }
    plain = server.client.completions.create(**request)
    texts, whys, chunk_logprobs, usage = [""] * 6, [None] * 6, [[] for _ in range(6)], None
    for chunk in server.client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert whys[choice.index] is None  # nothing after the end
            texts[choice.index] += choice.text
            whys[choice.index] = choice.finish_reason
            chunk_logprobs[choice.index].append(choice.logprobs)
    assert texts == [choice.text for choice in plain.choices] and len(set(texts)) == 6
    assert whys == [choice.finish_reason for choice in plain.choices]
    for pieces, choice in zip(chunk_logprobs, plain.choices, strict=True):
        for field, whole in choice.logprobs.model_dump().items():
            assert [value for piece in pieces for value in getattr(piece, field)] == whole, field
    assert usage == plain.usage and usage.prompt_tokens == 7 + 4
    assert usage.completion_tokens == sum(len(c.logprobs.tokens) for c in plain.choices) - 3 * (7 + 4) > 60


def test_each_chunk_of_a_stream_has_the_logprobs_of_its_tokens(server):
    """The first chunk has those of the prompt; then one token a chunk, and more where text was buffered."""
    request = {"model": "air.strawberry", "prompt": "aé", "seed": 3, "max_tokens": 30, "logprobs": 1, "stream": True}
    first, *pieces = [chunk.choices[0] for chunk in server.client.completions.create(**request, echo=True)]
    assert first.text == "aé" and len(first.logprobs.tokens) == 3 and first.logprobs.token_logprobs[0] is None
    at, counts = 2, []
    for piece in pieces:
        logprobs = piece.logprobs
        counts.append(len(logprobs.tokens))
        assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == counts[-1]
        assert not logprobs.tokens or logprobs.text_offset[0] in (at, at - 1)  # −1: inside a character
        at += len(piece.text)
    assert sum(counts) == 30 and counts.count(1) > 10
    plain = list(server.client.completions.create(**{**request, "logprobs": None}))
    assert all(chunk.choices[0].logprobs is None for chunk in plain)


@pytest.mark.slow
def test_choices_use_consecutive_seeds(server, folder):
    got = server.client.completions.create(model="air.strawberry", prompt=["a b", "c"], seed=40, n=3, max_tokens=24)
    assert [c.index for c in got.choices] == list(range(6))
    assert [c.text for c in got.choices] == [sample_alone(folder, p, 40 + i) for p in ("a b", "c") for i in range(3)]
    drawn = [server.client.completions.create(model="air.strawberry", prompt="a", max_tokens=24).choices[0].text
             for _ in range(2)]  # fmt: skip
    assert drawn[0] != drawn[1]


def test_the_decoder_is_batch_invariant(server):
    """So that a text is bit for bit the one that the request would get alone."""
    server.complete()
    decoder = server.service.models.loaded["air.strawberry"].decoder
    assert decoder.batch_invariant and decoder.rows == ROWS


def test_stop_strings_end_a_text_before_them(server, folder):
    whole = sample_alone(folder, "the", 2, n=60)
    stop = whole[20:23]
    request = {"model": "air.strawberry", "prompt": "the", "seed": 2, "max_tokens": 60}
    for given in (stop, ["\n\n\n\n", stop]):
        for stream in (False, True):
            got = server.client.completions.create(**request, stop=given, stream=stream)
            chunks = list(got) if stream else [got]
            assert "".join(c.text for chunk in chunks for c in chunk.choices) == whole[: whole.index(stop)]
            assert chunks[-1].choices[0].finish_reason == "stop"
    assert server.gauge("rows_busy") == 0


def test_prompts_may_be_token_ids(server):
    tokens = encoders.train(["x"], 258).encode("the cat")
    request = {"model": "air.strawberry", "seed": 3, "max_tokens": 5}
    texts = [server.client.completions.create(**request, prompt=prompt).choices for prompt in
             ("the cat", tokens, ["the cat", "x"], [tokens, [1]], [float(t) for t in tokens])]  # fmt: skip
    assert len({choices[0].text for choices in texts}) == 1 and [len(choices) for choices in texts] == [1, 1, 2, 2, 1]
    beginning, eot = (server.client.completions.create(**request, prompt=p).choices[0].text for p in ("", [256]))
    assert beginning == eot


def test_logprobs_equal_those_of_the_model_in_float64(server, folder):
    """Against the model itself, token by token, in float64."""
    model, encoder, _ = load_model(folder / "air.strawberry")
    got = server.client.completions.create(model="air.strawberry", prompt="aé", seed=3, max_tokens=3, echo=True,
                                            logprobs=2, temperature=1.5)  # fmt: skip
    logprobs = got.choices[0].logprobs
    tokens = encoder.encode("aé")
    for i in range(1, 6):
        with torch.no_grad():
            logp = model.double()(torch.tensor([tokens]))[0][0, -1].log_softmax(-1) if i >= 3 else None
        if i < 3:
            logp = model.double()(torch.tensor([tokens[:i]]))[0][0, -1].log_softmax(-1)
            own = tokens[i]
        else:
            own = min(range(258), key=lambda t: abs(logp[t].item() - logprobs.token_logprobs[i]))
            tokens.append(own)
        assert math.isclose(logp[own].item(), logprobs.token_logprobs[i], abs_tol=1e-4)
        best = list(logprobs.top_logprobs[i].values())[:2]
        assert best == pytest.approx(logp.topk(2).values.tolist(), abs=1e-4)
        assert decode_token(encoder, own) == logprobs.tokens[i]
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert logprobs.tokens[:3] == ["a", "bytes:\\xc3", "bytes:\\xa9"] and logprobs.text_offset[:4] == [0, 1, 1, 2]
    assert replace_surrogates(encoder.decode(tokens)) == got.choices[0].text


def test_top_logprobs_are_in_the_order_of_probability(server, folder):
    """The likeliest token first, whichever was drawn; the drawn one is among them or after them."""
    request = {"model": "air.strawberry", "prompt": "ab", "seed": 3, "max_tokens": 12, "temperature": 2, "logprobs": 4}
    for stream in (False, True):
        got = server.client.completions.create(**request, echo=True, stream=stream)
        pieces = [chunk.choices[0].logprobs for chunk in (got if stream else [got])]
        own = [logprob for piece in pieces for logprob in piece.token_logprobs][1:]
        best = [list(top.items()) for piece in pieces for top in piece.top_logprobs if top]
        assert len(own) == 13 and {len(top) for top in best} == {4, 5}
        tokens = [token for piece in pieces for token in piece.tokens][1:]
        for token, logprob, top in zip(tokens, own, best, strict=True):
            values = [value for _, value in top]
            assert values == sorted(values, reverse=True) and dict(top)[token] == logprob
    model, encoder, _ = load_model(folder / "air.strawberry")
    with torch.no_grad():
        likeliest = model(torch.tensor([encoder.encode("a")]))[0][0, -1].topk(4).indices.tolist()
    assert [text for text, _ in best[0]][:4] == [decode_token(encoder, token) for token in likeliest]


def test_echo_without_new_tokens_scores_the_prompt(server):
    """max_tokens 0 with echo: nothing is generated, and no row is needed."""
    got = server.client.completions.create(model="air.strawberry", prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert got.choices[0].text == "abc" and len(got.choices[0].logprobs.token_logprobs) == 3
    assert got.usage.completion_tokens == 0 and got.choices[0].finish_reason == "length"
    more = server.client.completions.create(model="air.strawberry", prompt="abc", max_tokens=2, echo=True, logprobs=1)
    assert more.choices[0].logprobs.token_logprobs[1:3] == pytest.approx(got.choices[0].logprobs.token_logprobs[1:])


def test_logprobs_without_echo_are_the_end_of_those_with_it(server):
    request = {"prompt": "abcde", "max_tokens": 6, "seed": 4, "logprobs": 2}
    with_echo, without = (server.complete(**request, echo=echo)[2]["choices"][0]["logprobs"] for echo in (True, False))
    assert without == {name: values[5:] for name, values in with_echo.items()} and len(without["tokens"]) == 6


def test_models_that_are_not_causal_score_each_token_given_its_prefix(server, folder):
    model, encoder, _ = load_model(folder / "future.strawberry")
    request = {"model": "future.strawberry", "prompt": "a longer prompt", "max_tokens": 1, "echo": True, "logprobs": 1}
    got = server.client.completions.create(**request)
    tokens = encoder.encode("a longer prompt")
    with torch.no_grad():
        for i in (1, 5, 14):
            logp = model(torch.tensor([tokens[max(0, i - 8) : i]]))[0][0, -1].log_softmax(-1)
            assert got.choices[0].logprobs.token_logprobs[i] == pytest.approx(logp[tokens[i]].item(), abs=1e-4)


def test_encoder_decoders_take_a_source(server):
    create = server.client.completions.create
    got = create(model="pairs.transformer", prompt="", max_tokens=8, seed=1, extra_body={"source": "abc"})
    other = create(model="pairs.transformer", prompt="", max_tokens=8, seed=1, extra_body={"source": "abd"})
    assert got.choices[0].text != other.choices[0].text
    assert error_of(server.complete(model="pairs.transformer"), 400)["param"] == "source"
    assert error_of(server.complete(source="x"), 400)["param"] == "source"


def test_texts_end_where_positions_or_context_end(server):
    got = server.client.completions.create(model="learned.tinystar", prompt="a" * 60, max_tokens=50, temperature=0)
    assert got.choices[0].finish_reason == "length" and got.usage.completion_tokens == 5
    got = server.client.completions.create(model="air.strawberry", prompt="a" * 4090, max_tokens=50, temperature=0)
    assert got.usage.completion_tokens == 6  # --context


def test_tokenize_answers_as_vllm_does(server):
    encoder = encoders.train(["x"], 258)
    body = {"prompt": "thé cat", "model": "air.strawberry"}
    tokenized = server.send("POST", "/tokenize", body)[2]
    assert tokenized == {"count": 8, "max_model_len": 4096, "tokens": encoder.encode("thé cat")}
    assert server.send("POST", "/detokenize", {"tokens": tokenized["tokens"]})[2] == {"prompt": "thé cat"}
    info = server.send("GET", "/tokenizer_info")[2]
    eot = server.send("POST", "/tokenize", {"prompt": info["eos_token"]})[2]["tokens"]
    assert eot == [encoder.eot] and len(server.send("POST", "/tokenize", {"prompt": "a<|eot|>"})[2]["tokens"]) > 2
    assert error_of(server.send("POST", "/detokenize", {"tokens": [5, 258]}), 400)["param"] == "tokens"
    assert error_of(server.send("POST", "/tokenize", {"prompt": 5}), 400)["param"] == "prompt"
    error_of(server.send("GET", "/tokenizer_info?model=none"), 404)


def test_prompts_that_are_too_long_say_so(server):
    for prompt in ("a" * 4097, "é" * 2049, [97] * 4097, ["a", "a" * 4097]):
        error = error_of(server.complete(prompt=prompt), 400)
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded") and "4,096" in error["message"]
    assert error_of(server.complete(model="learned.tinystar", prompt="a" * 65), 400)["code"] == error["code"]
    assert server.complete(model="learned.tinystar", prompt="a" * 64)[0] == 200


def test_models_are_listed(server, folder):
    listed = server.client.models.list().data
    assert [model.id for model in listed] == sorted(MODELS)
    got = server.client.models.retrieve("air.strawberry")
    assert (got.id, got.object, got.arch, got.vocab_size) == ("air.strawberry", "model", "strawberry", 258)
    assert got.created == int((folder / "air.strawberry").stat().st_mtime)
    assert {model.id: model.bytes for model in listed} == {name: (folder / name).stat().st_size for name in MODELS}
    with pytest.raises(openai.NotFoundError) as error:
        server.client.models.retrieve("air.strawbery")
    assert error.value.code == "model_not_found" and "did you mean 'air.strawberry'" in str(error.value)


def test_models_are_reloaded_when_their_files_change(start, folder, tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "broken.strawberry").write_bytes(b"no model either")
    server = start(tmp_path)
    assert server.client.models.list().data == []
    error_of(server.complete(), 404)
    make_model(tmp_path / "air.strawberry", seed=1)
    first = server.complete(seed=1)[2]["choices"]
    assert [model.id for model in server.client.models.list().data] == ["air.strawberry"]
    make_model(tmp_path / "air.strawberry", seed=2)
    second = server.complete(seed=1)[2]["choices"]
    assert first != second
    server.wait_for("models_loaded", 1)
    (tmp_path / "air.strawberry").unlink()
    error_of(server.complete(), 404)
    error_of(server.complete(model="broken.strawberry"), 500)


def damage(path, kind):
    """Writes a model file that is damaged in one of the ways that disks and copies damage files."""
    make_model(path)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = header["__metadata__"]
    if kind == "shape":
        about["model_hyperparams"] = json.dumps(json.loads(about["model_hyperparams"]) | {"n_embd": 64})
    elif kind == "no arch":
        about["model_hyperparams"] = json.dumps({"vocab_size": 258})
    elif kind == "encoder":
        about["encoder"] = about["encoder"][: len(about["encoder"]) // 2]
    spelled = json.dumps(header).encode()
    rest = data[8 + size :]
    if kind == "nan":
        rest = b"\xff" * len(rest)
    whole = len(spelled).to_bytes(8, "little") + spelled + rest
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "zeros": bytes(len(data)), "text": b"no model",
                      "header": data[: size // 2], "pickle": b"\x80\x04" + data[2:]}.get(kind, whole))  # fmt: skip


DAMAGED = ["cut", "empty", "zeros", "text", "header", "pickle", "shape", "no arch", "encoder", "nan"]


@pytest.mark.slow
def test_damaged_model_files_are_reported_without_paths(start, tmp_path, monkeypatch):
    """Whatever the damage and whoever asks: the file is named, its folder is not, and a retry is not asked for."""
    folder = tmp_path / "secret"
    folder.mkdir()
    make_model(folder / "learned.tinystar")
    monkeypatch.chdir(tmp_path)
    server = start("secret")
    client = server.client.with_options(max_retries=2)
    for kind in DAMAGED:
        damage(folder / "air.strawberry", kind)
        for model in ("air.strawberry", "air"):
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model=model, prompt="a")
            error = caught.value.body
            assert (error["param"], error["code"], error["type"]) == ("model", "model_damaged", "server_error"), kind
            assert "damaged" in error["message"] and '"air.strawberry"' in error["message"], (kind, error)
            assert "secret" not in str(caught.value) and str(tmp_path) not in str(caught.value), (kind, error)
        status, headers, body = server.send("POST", "/tokenize", {"model": "air.strawberry", "prompt": "a"})
        assert (status, headers["x-should-retry"], body["error"]["code"]) == (500, "false", "model_damaged")
        with pytest.raises(openai.APIStatusError) as caught:
            client.fine_tuning.jobs.create(model="air.strawberry", training_file=f"file-{'0' * 24}")
        assert "secret" not in str(caught.value), kind
    text = server.send("GET", "/metrics")[2].decode()
    assert f'route="/v1/completions",status="500"}} {2 * len(DAMAGED):.1f}\n' in text  # each was sent once
    damage(folder / "air.strawberry", "cut")
    assert error_of(server.send("GET", "/v1/models/air.strawberry"), 500)["code"] == "model_damaged"
    assert [model.id for model in client.models.list().data] == ["learned.tinystar"]
    assert server.complete(model="learned.tinystar")[0] == 200
    make_model(folder / "air.strawberry")
    assert server.complete()[0] == 200  # restored


@pytest.mark.slow
def test_a_model_is_found_without_its_suffix(start, tmp_path):
    for name in ("air.strawberry", "future.strawberry", "learned.tinystar"):
        make_model(tmp_path / name)
    server = start(tmp_path)
    create, retrieve = server.client.completions.create, server.client.models.retrieve
    short, whole = (create(model=name, prompt="a", seed=1) for name in ("air", "air.strawberry"))
    assert short.choices[0].text == whole.choices[0].text and short.model == "air.strawberry"
    assert list(server.service.models.loaded) == ["air.strawberry"]  # in memory once
    assert {chunk.model for chunk in create(model="air", prompt="a", stream=True)} == {"air.strawberry"}
    assert retrieve("learned").id == "learned.tinystar" and retrieve("air").loaded
    assert server.send("POST", "/tokenize", {"model": "air", "prompt": "abc"})[2]["count"] == 3
    assert server.send("GET", "/tokenizer_info?model=air")[2]["model"] == "air.strawberry"
    (tmp_path / "air.tinystar").write_bytes((tmp_path / "learned.tinystar").read_bytes())
    with pytest.raises(openai.NotFoundError) as caught:
        create(model="air", prompt="a")
    assert caught.value.code == "model_not_found"
    assert '"air.strawberry"' in str(caught.value) and '"air.tinystar"' in str(caught.value)
    assert create(model="air.tinystar", prompt="a").model == "air.tinystar"
    for name in ("ai", "air.", "air.straw", "future.strawberry.x"):
        with pytest.raises(openai.NotFoundError):
            create(model=name, prompt="a")


def test_a_model_is_deleted_from_disk_and_memory(start, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("air.strawberry", "learned.tinystar"):
        make_model(tmp_path / name)
    server = start(tmp_path)
    models = server.client.models
    server.complete()
    thread = server.service.models.loaded["air.strawberry"].thread
    busy = server.client.completions.create(model="air.strawberry", prompt="a", **LONG, stream=True)
    next(busy)
    with pytest.raises(openai.ConflictError, match="generating"):
        models.delete("air.strawberry")
    assert (tmp_path / "air.strawberry").exists() and next(busy).choices[0].text  # it goes on
    busy.close()
    server.wait_for("rows_busy", 0)
    gone = models.delete("air.strawberry")
    assert (gone.id, gone.object, gone.deleted) == ("air.strawberry", "model", True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learned.tinystar", "notes.txt"]
    assert server.gauge("models_loaded") == 0
    thread.join(10)
    assert not thread.is_alive()
    assert [model.id for model in models.list().data] == ["learned.tinystar"]
    for again in (lambda: models.delete("air.strawberry"), lambda: models.retrieve("air.strawberry"),
                  lambda: server.client.completions.create(model="air.strawberry", prompt="a")):  # fmt: skip
        with pytest.raises(openai.NotFoundError):
            again()
    assert models.delete("learned.tinystar").deleted  # never loaded


@pytest.mark.slow
def test_only_models_of_the_folder_are_deleted_and_by_their_whole_name(start, tmp_path):
    outside, folder = tmp_path / "outside.strawberry", tmp_path / "models"
    folder.mkdir()
    make_model(folder / "air.strawberry")
    outside.write_bytes((folder / "air.strawberry").read_bytes())
    (folder / "notes.txt").write_text("mine")
    (folder / "other.safetensors").write_bytes(b"a file of another kind")
    (folder / "folder.strawberry").mkdir()
    server = start(folder)
    for name in ("air", "notes.txt", "..%2foutside.strawberry", "%2e%2e%2foutside.strawberry", "folder.strawberry",
                 "none.strawberry", "*", "air.strawberry%00", "%2fetc%2fpasswd"):  # fmt: skip
        error_of(server.send("DELETE", f"/v1/models/{name}"), 404)
    assert "air.strawberry" in error_of(server.send("DELETE", "/v1/models/air"), 404)["message"]
    assert error_of(server.send("DELETE", "/v1/models/other.safetensors"), 409)["code"] == "model_damaged"
    there = sorted(path.name for path in folder.iterdir())
    assert outside.exists() and there == ["air.strawberry", "folder.strawberry", "notes.txt", "other.safetensors"]
    link = folder / "linked.strawberry"
    link.symlink_to(outside)
    assert server.client.models.delete("linked.strawberry").deleted
    assert not link.is_symlink() and outside.exists()
    keyed = start(folder, api_key=["k"])
    error_of(keyed.send("DELETE", "/v1/models/air.strawberry"), 401)
    assert (folder / "air.strawberry").exists()


def test_a_model_that_is_deleted_while_it_is_loaded_is_gone(start, tmp_path, monkeypatch):
    make_model(tmp_path / "air.strawberry")
    server, real = start(tmp_path), Engine.load

    def load_deleted(self):
        self.path.unlink()
        real(self)

    monkeypatch.setattr(Engine, "load", load_deleted)
    assert error_of(server.complete(), 404)["code"] == "model_not_found"


def test_errors_do_not_reveal_the_paths_of_models(server, folder):
    message = error_of(server.complete(model="masked.transformer"), 400)["message"]
    assert "masked.transformer" in message and str(folder) not in message


def test_idle_models_are_evicted_and_busy_ones_are_not(start, tmp_path):
    for name in ("air.strawberry", "learned.tinystar", "future.strawberry"):
        make_model(tmp_path / name)
    server = start(tmp_path, memory=0.3 / 1024, context=64)  # of MiB: one of them, not two
    for name in ("air.strawberry", "learned.tinystar", "air.strawberry"):
        assert server.complete(model=name)[0] == 200
        assert server.gauge("models_loaded") == 1
    request = {"model": "air.strawberry", "prompt": ["a"] * 8, "n": 32, "max_tokens": 60, "temperature": 0}
    busy = server.client.completions.create(**request, stream=True)
    next(busy)
    assert error_of(server.complete(model="learned.tinystar"), 503)
    busy.close()


# ---- many at once --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_concurrent_clients_get_their_own_texts_or_retry_after(start, folder):
    clients, queue = count(24, 64), count(6, 32)
    server = start(queue=queue, batch=ROWS)
    solo = [sample_alone(folder, f"prompt {i}", i) for i in range(clients)]
    server.complete()  # loads the model
    together = threading.Barrier(clients)

    def ask(i):
        together.wait()
        request = {"model": "air.strawberry", "prompt": f"prompt {i}", "seed": i, "max_tokens": 24,
                   "stream": i % 2 == 0}  # fmt: skip
        try:
            got = server.client.completions.create(**request)
            return "".join(chunk.choices[0].text for chunk in (got if i % 2 == 0 else [got]))
        except openai.RateLimitError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, range(clients)))
    served = {i: text for i, text in enumerate(answers) if isinstance(text, str)}
    refused = [error for error in answers if not isinstance(error, str)]
    assert len(served) >= queue + ROWS and refused
    assert served == {i: solo[i] for i in served}
    assert all(error.code == "queue_full" and int(error.response.headers["Retry-After"]) >= 1 for error in refused)
    assert server.complete()[0] == 200


class SteppedEngine:
    """An engine without its thread, whose steps take time of a clock of their own: the test calls them."""

    def __init__(self, folder, monkeypatch, step=0.5, prompt=0.0, ends=None, **settings):
        self.now, self.ends, self.token_counts = 1000.0, ends, {}
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(Engine, "run", lambda *_: None)
        file = read_model_file("air.strawberry", folder / "air.strawberry", (0, 0, 0))
        settings = Settings(device="cpu", **settings)

        async def make():
            return Engine(file, settings, Metrics(), [])

        self.engine = asyncio.run(make())
        self.engine.load()
        self.decoder, self.step, self.prompt = self.engine.decoder, step, prompt
        self.decoder_step, self.decoder_admit = self.decoder.step, self.decoder.admit
        monkeypatch.setattr(self.decoder, "step", self.take_step)
        monkeypatch.setattr(self.decoder, "admit", self.read_prompt)

    def read_prompt(self, request):
        self.now += self.prompt
        return self.decoder_admit(request)

    def take_step(self):
        """A token of each row; where texts have `ends`, they end after that share of max_tokens."""
        self.now += self.step
        arrived = []
        for handle, token, why in self.decoder_step():
            self.token_counts[handle] = self.token_counts.get(handle, 0) + 1
            limit = self.engine.running[handle][1].request.max_new_tokens
            if self.ends and not why and self.token_counts[handle] >= self.ends * limit:
                self.decoder.release(handle)
                why = "stop"
            arrived.append((handle, token, why))
        return arrived

    def submit(self, max_tokens, n=1):
        body = CompletionRequest(model="air.strawberry", prompt="a", max_tokens=max_tokens, n=n, temperature=0)
        group = make_request_group(body, self.engine)
        self.engine.submit(group)
        return group


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["equal", "mixed", "several texts", "slow prompts", "texts that end early"])
def test_retry_after_is_the_time_that_the_queue_takes(folder, monkeypatch, kind):
    """By a clock of which each step takes half a second: the time until a group at the queue's end has begun."""
    more = {"slow prompts": {"prompt": 3.0}, "texts that end early": {"ends": 0.3}}.get(kind, {})
    server = SteppedEngine(folder, monkeypatch, batch=ROWS, queue=6, **more)
    rng, engine, ratios = random.Random(kind), server.engine, []

    def draw_request():
        several = kind == "several texts"
        return {"max_tokens": 16 if kind == "equal" else rng.randint(4, 12 if several else 28),
                "n": rng.randint(1, 3) if several else 1}  # fmt: skip

    for _ in range(8):
        refused = None
        while refused is None:  # until the queue is full
            try:
                server.submit(**draw_request())
            except ApiError as error:
                refused = error
            for _ in range(rng.randint(0, 2)):
                engine.step()
        assert (refused.status, refused.code) == (429, "queue_full")
        began = server.now
        while engine.queued >= engine.settings.queue:
            engine.step()
        last = server.submit(**draw_request())
        while not last.active:
            engine.step()
        ratios.append(int(refused.headers["Retry-After"]) / (server.now - began))
    assert all(1 / 2 <= ratio <= 2 for ratio in ratios[1:]), ratios  # nothing was measured before the first
    assert 0.7 < sum(ratios[1:]) / len(ratios[1:]) < 1.4, ratios


@pytest.mark.slow
def test_a_full_queue_answers_with_retry_after(start):
    """By the official client: 10 and 20 tokens of 2 seconds each are generated before a third text begins."""
    server = start(batch=1, queue=1)
    server.complete()
    engine, go = server.service.models.loaded["air.strawberry"], threading.Event()
    step = engine.decoder.step
    engine.decoder.step = lambda: go.wait(30) and step()
    engine.queue_time.step_seconds, engine.queue_time.share = 2.0, 1.0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(server.complete, max_tokens=10, temperature=0)]
        server.wait_for("rows_busy", 1)
        answers.append(pool.submit(server.complete, max_tokens=20, temperature=0))
        server.wait_for("queue", 1)
        try:
            with pytest.raises(openai.RateLimitError) as caught:
                server.client.completions.create(model="air.strawberry", prompt="a")
        finally:
            go.set()
        assert [answer.result()[0] for answer in answers] == [200, 200]
    assert caught.value.response.headers["Retry-After"] == "60" and "in 60 s" in str(caught.value)


@pytest.mark.cuda
def test_models_share_a_gpu(start):
    """Two models record their steps while the other makes text, and each client gets what it gets alone."""
    server = start(device="cuda", batch=16)
    names = ["air.strawberry", "learned.tinystar"]

    def ask(i):
        return server.complete(model=names[i % 2], prompt=f"prompt {i // 2}", seed=i, max_tokens=16 + i)

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        together = list(pool.map(ask, range(24)))
    assert [status for status, *_ in together] == [200] * 24
    assert [answer[2]["choices"] for answer in together] == [ask(i)[2]["choices"] for i in range(24)]


def test_a_new_request_joins_the_running_batch(server, folder):
    long = server.client.completions.create(model="air.strawberry", prompt="a", **LONG, stream=True)
    pieces = [next(long).choices[0].text]
    text = server.complete(prompt="the", seed=5, max_tokens=24)[2]["choices"][0]["text"]
    assert text == sample_alone(folder, "the", 5)
    assert server.gauge("rows_busy") == 1  # the long one goes on
    pieces += [next(long).choices[0].text for _ in range(20)]
    long.close()
    text = "".join(pieces)
    assert sample_alone(folder, "a", 0, n=60, temperature=0.0).startswith(text[:15]) and len(text) >= 15


@pytest.mark.slow
def test_a_large_request_group_does_not_starve_others(server):
    large = server.client.completions.create(
        model="air.strawberry", prompt=["a"] * 40, n=30, **LONG | {"max_tokens": 500}, stream=True
    )
    next(large)
    began = time.time()
    assert server.complete(max_tokens=3)[0] == 200
    assert time.time() - began < 20  # it has to wait for a row, not for 1,200 texts
    large.close()
    server.wait_for("rows_busy", 0)


@pytest.mark.parametrize("kind", ["plain", "streamed", "before the first piece", "while it waits"])
def test_a_cancelled_request_frees_its_rows(server, kind):
    body = {"model": "air.strawberry", "prompt": "a", **LONG, "n": ROWS, "stream": kind != "plain"}
    if kind == "before the first piece":
        body["prompt"] = "a" * 4000
    text = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    head += str(len(text))
    sockets = [
        socket.create_connection(("127.0.0.1", server.port)) for _ in range(2 if kind == "while it waits" else 1)
    ]
    for one in sockets:
        one.sendall(head.encode() + b"\r\n\r\n" + text)
        if kind == "streamed":
            assert one.recv(1000)
        if kind != "before the first piece":
            server.wait_for("rows_busy", ROWS)
        else:
            time.sleep(0.05)
    for one in reversed(sockets):
        one.close()
    assert server.wait_for("rows_busy", 0) < 1
    assert server.gauge("queue") == 0


def test_unread_chunks_are_bounded(server, monkeypatch):
    """A client that stays and reads nothing: its rows are freed, and it gets the error when it reads on."""
    monkeypatch.setattr(engine, "MAX_UNREAD", 50)
    real, stuck = CompletionStream.data, threading.Event()

    async def slow(self, receive):
        async for data in real(self, receive):
            yield data
            while not stuck.is_set():  # as long as nothing can be sent
                await asyncio.sleep(0.01)

    monkeypatch.setattr(CompletionStream, "data", slow)
    got = server.client.completions.create(model="air.strawberry", prompt="a", n=ROWS, **LONG, stream=True)
    server.wait_for("rows_busy", 0)
    stuck.set()
    with pytest.raises(openai.APIError, match="50 pieces unread"):
        list(got)


@pytest.mark.slow
def test_requests_time_out(start):
    server = start(timeout=0.5)
    began = time.time()
    assert error_of(server.complete(**LONG, n=8), 408)["param"] == "timeout"
    assert 0.5 <= time.time() - began < 20  # of which loading the model takes a part; the texts would take minutes
    assert server.wait_for("rows_busy", 0) < 1
    with pytest.raises(openai.APIError, match="more than 0.5 seconds"):  # begun: the error is in the stream
        list(server.client.completions.create(model="air.strawberry", prompt="a", stream=True, **LONG, n=8))
    assert server.wait_for("rows_busy", 0) < 1


@pytest.mark.slow
def test_a_request_has_a_timeout_of_its_own(server):
    began = time.time()
    assert "5 seconds" in error_of(server.complete(**LONG, prompt=["a"] * 8, n=8, timeout=5), 408)["message"]
    assert 5 <= time.time() - began < 30 and server.wait_for("rows_busy", 0) < 1


@pytest.mark.slow
def test_shutdown_finishes_running_requests_within_the_grace_period(folder):
    server = ServerThread(folder, grace=20)
    server.complete()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.complete, max_tokens=600, temperature=0)
        server.wait_for("rows_busy", 1)
        server.stop()
        assert answer.result()[2]["usage"]["completion_tokens"] == 600
    server = ServerThread(folder, grace=1)
    server.complete()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.complete, **LONG, n=32)
        server.wait_for("rows_busy", ROWS)
        server.service.closing.set()
        server.uvicorn.should_exit = True
        assert error_of(answer.result(), 503)
    server.stop()


def raise_secret(*arguments):
    raise RuntimeError("secret")


@pytest.mark.parametrize("part", ["step", "admit"])
def test_an_engine_survives_an_exception(server, monkeypatch, part):
    server.complete()
    engine = server.service.models.loaded["air.strawberry"]
    monkeypatch.setattr(engine.decoder, part, raise_secret)
    assert "secret" not in json.dumps(error_of(server.complete(), 500))
    monkeypatch.undo()
    assert server.complete()[0] == 200 and server.gauge("rows_busy") == 0


def test_an_engine_that_cannot_recover_is_replaced(server, monkeypatch):
    server.complete()
    engine = server.service.models.loaded["air.strawberry"]
    monkeypatch.setattr(engine.decoder, "step", raise_secret)
    monkeypatch.setattr(engine, "make_decoder", raise_secret)
    error_of(server.complete(), 500)
    engine.thread.join(10)
    assert server.complete()[0] == 200 and server.service.models.loaded["air.strawberry"] is not engine


def test_an_exception_while_scoring_is_answered_with_500(server, monkeypatch):
    monkeypatch.setattr(scoring, "score_tokens", raise_secret)
    error_of(server.complete(logprobs=1, echo=True), 500)
    assert server.complete(logprobs=1)[0] == 200  # those of new tokens come with the tokens
    monkeypatch.undo()
    assert server.complete(logprobs=1, echo=True)[0] == 200


@pytest.mark.slow
def test_a_model_may_be_wider_than_its_encoder(start, tmp_path, monkeypatch):
    """Ids that the encoder has no text for, in the prompt and in the text."""
    monkeypatch.setitem(MODELS, "air.strawberry", MODELS["air.strawberry"] | {"vocab_size": 300})
    make_model(tmp_path / "air.strawberry")
    server = start(tmp_path)
    got = server.complete(prompt=[97, 299, 98], echo=True, logprobs=3, max_tokens=40, seed=1)[2]
    logprobs, text = got["choices"][0]["logprobs"], got["choices"][0]["text"]
    assert text.startswith("ab") and logprobs["text_offset"][:3] == [0, 1, 1]
    assert logprobs["tokens"][1] not in ("a", "b")
    assert error_of(server.complete(prompt=[300]), 400)["param"] == "prompt"


# ---- what is refused -----------------------------------------------------------------------------------------------

WRONG = {
    "max_tokens": [-1, 1e9, 1.5, "5", True, [1], 2**70],
    "temperature": [math.nan, math.inf, -1, 1e9, "hot", {}],
    "top_p": [0, 1.1, math.nan], "top_k": [-2, 0.5], "min_p": [-0.1, 2],
    "n": [0, 10**6, -1, 1.5, "2"],
    "seed": [-2, 2**63, "x"],
    "stop": ["", ["a", ""], ["a"] * 17, 5, [["a"]], "\ud800", ["a", "b\udfff"]],
    "prompt": [[], [[]], 5, {}, [1.5], [-1], [258], ["a", 1], [[1], "a"], [True], ["a"] * 65, "a" * 5000, "\ud800",
               None, [2**40], [[1, 2**31]]],
    "echo": ["yes", 1], "logprobs": [6, -1, True], "stream": ["yes"], "stream_options": [5, {"x": 1}],
    "best_of": [0, 2, True, [1]], "suffix": ["x", 0, False],
    "logit_bias": [[], 0, "x", {"1": 101}, {"1": math.nan}, {"1": "5"}, {"1": True}, {"x": 1}, {"-1": 1}, {"258": 1},
                   {"1" * 10: 1}, {str(i): 1 for i in range(513)}, {"1": [1]}, {"01": 1}],
    "presence_penalty": [2.5, False, "0", {}, math.nan], "frequency_penalty": [-2.01], "length_penalty": [0.5],
    "repetition_penalty": [0, 0.001, -1, True, 101, math.inf], "min_tokens": [-1, False, 1.5],
    "ignore_eos": [1, "yes"], "stop_token_ids": [[258], [-1], {}, ["a"], [1] * 129, 5, [True]],
    "bad_words": [["a"]], "allowed_token_ids": [[1]], "use_beam_search": [True], "skip_special_tokens": [False, 1],
    "include_stop_str_in_output": [True], "truncate_prompt_tokens": [5], "prompt_logprobs": [0, 1],
    "response_format": [{"type": "json_object"}, {}], "structured_outputs": [{"regex": "a"}], "guided_regex": ["a"],
    "prompt_embeds": ["AAAA"], "return_token_ids": [True], "priority": [1], "request_id": ["x"],
    "timeout": [0, -5, math.inf],
    "model": [5, None, "../air.strawberry", "%2e%2e/x", "x" * 300, "a\0b", "/etc/passwd", "masked.transformer"],
    "unheard_of": [1], "max_tokns": [4],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("field", WRONG)
def test_invalid_values_name_their_field(server, field):
    for value in WRONG[field]:
        status, _, body = server.complete(**{field: value})
        assert 400 <= status < 500, (value, body)
        assert body["error"]["param"].partition(".")[0] == field and field in body["error"]["message"], (value, body)
    assert server.complete()[0] == 200


def test_null_fields_get_their_defaults(server):
    fields = {name: None for name in WRONG if name not in ("model", "prompt", "unheard_of", "max_tokns")}
    assert server.complete(**fields)[2]["usage"]["completion_tokens"] <= 16


# What vLLM's CompletionRequest and OpenAI's create() document as defaults, written out: clients send them unasked.
VLLM_DEFAULTS = {
    "echo": False, "frequency_penalty": 0.0, "logit_bias": None, "logprobs": None, "max_tokens": 16, "n": 1,
    "presence_penalty": 0.0, "seed": None, "stop": [], "stream": False, "stream_options": None, "suffix": None,
    "temperature": None, "top_p": None, "user": None, "use_beam_search": False, "top_k": None, "min_p": None,
    "repetition_penalty": None, "length_penalty": 1.0, "stop_token_ids": [], "include_stop_str_in_output": False,
    "ignore_eos": False, "min_tokens": 0, "skip_special_tokens": True, "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None, "truncation_side": None, "allowed_token_ids": None, "prompt_logprobs": None,
    "bad_words": [], "prompt_embeds": None, "add_special_tokens": True, "response_format": None,
    "structured_outputs": None, "priority": 0, "return_tokens_as_token_ids": None, "return_token_ids": None,
    "return_token_offsets": False, "cache_salt": None, "kv_transfer_params": None, "ec_transfer_params": None,
    "vllm_xargs": None, "repetition_detection": None, "thinking_token_budget": None,
}  # fmt: skip
SPELLED_OUT = {
    "best_of": 1, "suffix": "", "logit_bias": {}, "top_k": -1, "repetition_penalty": 1.0, "min_p": 0.0, "top_p": 1.0,
    "temperature": 1.0, "presence_penalty": 0, "user": "", "response_format": {"type": "text"},
}  # fmt: skip


@pytest.mark.slow
def test_fields_that_change_nothing_are_accepted(server):
    """All that clients send by default, at once and one by one: the text is the same."""
    create, request = server.client.completions.create, {"model": "air.strawberry", "prompt": "the cat", "seed": 7}
    text = create(**request).choices[0].text
    for fields in (VLLM_DEFAULTS, SPELLED_OUT, VLLM_DEFAULTS | SPELLED_OUT, {"top_k": 0}, {"best_of": 1.0}):
        body = {name: value for name, value in fields.items() if name != "seed"}
        assert create(**request, extra_body=body).choices[0].text == text
    openais = {"best_of": 1, "echo": False, "frequency_penalty": 0, "logit_bias": {}, "n": 1, "presence_penalty": 0,
               "suffix": "", "temperature": 1, "top_p": 1, "user": "me", "stop": None, "logprobs": None}  # fmt: skip
    assert create(**request, **openais).choices[0].text == text
    three = create(**request, n=3, best_of=3).choices
    assert len(three) == 3 and three[0].text == text
    drawn = {create(**request | {"seed": -1}).choices[0].text for _ in range(2)}
    assert len(drawn) == 2
    schema = server.send("GET", "/openapi.json")[2]
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert VLLM_DEFAULTS.keys() | SPELLED_OUT.keys() <= body["properties"].keys()


def test_a_field_that_is_not_supported_is_refused_with_what_is_accepted(server):
    message = error_of(server.complete(priority=3), 400)["message"]
    assert "priority = 3" in message and "leave it out" in message and "0" in message
    with pytest.raises(openai.BadRequestError, match="suffix"):
        server.client.completions.create(model="air.strawberry", prompt="a", suffix="x")


def test_penalties_are_those_of_sample(server, folder):
    """Against the decoder alone, which test_penalties.py judges; each of them changes the text, or how it ends."""
    create, request = server.client.completions.create, {"model": "air.strawberry", "prompt": "the", "seed": 2}
    plain = sample_alone(folder, "the", 2)
    openais = {"presence_penalty": 2.0, "frequency_penalty": 1.5, "logit_bias": {"101": 9, "32": -100}}
    for wish in (*({name: value} for name, value in openais.items()), openais):
        text = create(**request, **wish, max_tokens=24).choices[0].text
        assert text == sample_alone(folder, "the", 2, **wish) != plain
    for wish in ({"repetition_penalty": 2.5}, {"stop_token_ids": list(plain.encode()[5:6])}):
        text = create(**request, extra_body=wish, max_tokens=24).choices[0].text
        assert text == sample_alone(folder, "the", 2, **wish) != plain
    ends = {"logit_bias": {"256": 100}, "min_tokens": 7}
    got = create(**request, max_tokens=24, extra_body=ends)
    assert got.usage.completion_tokens == 8 and got.choices[0].finish_reason == "stop"
    got = create(**request, max_tokens=24, extra_body=ends | {"ignore_eos": True})
    assert got.usage.completion_tokens == 24 and got.choices[0].finish_reason == "length"
    assert got.choices[0].text == ""  # <|eot|> is no text
    got = create(**request, max_tokens=5, extra_body={"logit_bias": {"256": 50}, "min_tokens": 9})
    assert got.usage.completion_tokens == 5


def test_each_chunk_of_a_stream_can_report_the_usage(server):
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    chunks = list(server.client.completions.create(model="air.strawberry", prompt="abc", max_tokens=5, temperature=0,
                                                    stream=True, stream_options=options))  # fmt: skip
    usages = [chunk.usage for chunk in chunks]
    assert all(usage.prompt_tokens == 3 for usage in usages) and usages[-1].completion_tokens == 5
    counts = [usage.completion_tokens for usage in usages]
    assert counts == sorted(counts)


def test_invalid_bodies_are_refused(server):
    deep = '{"model": "air.strawberry", "prompt": "a", "user": ' + "[" * 10_000 + "]" * 10_000 + "}"
    no_json = ["[" * 10_000, b'{"model": "\xff\xfe"}', "", "{", '{"n": ' + "9" * 5000 + "}", "{} x"]
    no_object = ["[]", '"x"', "null", b"\xef\xbb\xbf\x00"]
    for body in (deep, *no_json, *no_object, json.dumps({"\ud800" * 50: 1, "prompt": "a"})):
        error_of(server.send("POST", "/v1/completions", body), 400)
    for kind in ("text/plain", "", "application/x-www-form-urlencoded", "application/jsonx"):
        assert (
            error_of(server.send("POST", "/v1/completions", "{}", Content_Type=kind), 415)["param"] == "Content-Type"
        )
    error_of(server.send("GET", "/v1/completions"), 405)
    error_of(server.send("GET", "/nothing"), 404)
    error_of(server.send("GET", "/v1/models/..%2f..%2fetc%2fpasswd"), 404)
    error_of(server.send("GET", "/v1/models/" + "x" * 300), 404)
    assert server.complete()[0] == 200


def test_chat_is_refused_because_the_models_continue_texts(server):
    """By every method of OpenAI's client that would chat, and by curl."""
    client, hello = server.client, [{"role": "user", "content": "Hello"}]
    request = {"model": "air.strawberry", "messages": hello}
    calls = [lambda: client.chat.completions.create(**request),
             lambda: client.chat.completions.create(**request, stream=True),
             lambda: client.chat.completions.parse(**request),
             lambda: client.chat.completions.retrieve("chatcmpl-1"),
             lambda: client.chat.completions.update("chatcmpl-1", metadata={}),
             lambda: client.chat.completions.delete("chatcmpl-1"),
             lambda: client.responses.create(model="air.strawberry", input="Hello"),
             lambda: client.with_options(base_url=server.url).chat.completions.create(**request)]  # fmt: skip
    for call in calls:
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert "base models" in str(caught.value) and "/v1/completions" in str(caught.value)
        assert caught.value.body["param"] == "model"
    done = subprocess.run(["curl", "-s", "-w", "%{http_code}", f"{server.url}/v1/chat/completions", "-H",
                           "Content-Type: application/json", "-d", json.dumps(request)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.endswith("404") and "/v1/completions" in json.loads(done.stdout[:-3])["error"]["message"]
    for method in ("GET", "PUT", "PATCH", "OPTIONS"):
        assert server.send(method, "/v1/chat/completions")[1]["Allow"] == "POST"


def test_a_base_url_without_v1_or_with_two_is_reported(server):
    for base in (server.url, f"{server.url}/v1/v1"):
        client = server.client.with_options(base_url=base)
        with pytest.raises(openai.NotFoundError, match="base_url ends in /v1"):
            client.models.list()
        with pytest.raises(openai.NotFoundError, match="base_url ends in /v1"):
            client.completions.create(model="air.strawberry", prompt="a")
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        server.client.embeddings.create(model="air.strawberry", input="a")
    assert "base_url" not in error_of(server.send("GET", "/nothing"), 404)["message"]


def test_every_problem_of_a_body_is_named_once(server):
    body = json.dumps({"model": "air.strawberry", "temperature": -1, "n": 0})
    error = error_of(server.send("POST", "/v1/completions", body), 400)
    assert [error["message"].count(f"{name}") for name in ("temperature", "n = 0", "prompt")] == [1, 1, 1]


def test_fields_that_are_given_twice_are_refused(server):
    body = '{"model": "air.strawberry", "prompt": "a", "n": 1, "prompt": "b"}'
    assert error_of(server.send("POST", "/v1/completions", body), 400)["param"] == "prompt"


BIG = {
    "fields": json.dumps({f"n{i}": i for i in range(90_000)}),
    "nested fields": json.dumps({"stream_options": {f"n{i}": i for i in range(90_000)}}),
    "tokens": json.dumps({"model": "air.strawberry", "prompt": [1] * 650_000}),
    "texts": json.dumps({"model": "air.strawberry", "prompt": [""] * 450_000}),
    "a text": json.dumps({"model": "air.strawberry", "prompt": "a b" * 650_000}),
    "a number": '{"n": 1' + "0" * 2_000_000 + "}",
    "brackets": "[" * 2_000_000,
    "a name": json.dumps({"model": "air.strawberry" * 130_000, "prompt": "a"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BIG)
def test_large_invalid_bodies_do_not_delay_other_requests(server, kind):
    """Bodies of some megabytes, four at once, of which each costs the most that we could think of."""
    assert 1_000_000 < len(BIG[kind]) < 2 * MIB
    server.complete()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.send, "POST", "/v1/completions", BIG[kind]) for _ in range(4)]
        waited = []
        while not all(answer.done() for answer in answers):
            began = time.time()
            assert server.send("GET", "/health")[0] == 200
            waited.append(time.time() - began)
    # a body on the event loop would hold up every request for seconds; one that the machine holds up is no fault
    assert sorted(waited or [0])[len(waited) // 2] < 1 and max(waited, default=0) < 5
    for answer in answers:
        assert 400 <= answer.result()[0] < 500, answer.result()


def test_a_body_that_does_not_arrive_times_out(server, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.3)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest("POST", "/v1/completions")
    for name, value in (("Content-Type", "application/json"), ("Content-Length", "100")):
        connection.putheader(name, value)
    connection.endheaders(b'{"model": ')
    assert connection.getresponse().status == 408
    connection.close()


def test_bodies_over_max_body_are_refused(start):
    server = start(max_body=0.01)
    long = json.dumps({"model": "air.strawberry", "prompt": "a" * 20_000}).encode()
    error_of(server.send("POST", "/v1/completions", long), 413)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    pieces = (long[i : i + 1000] for i in range(0, len(long), 1000))  # chunked: without a Content-Length
    connection.request("POST", "/v1/completions", pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert server.complete()[0] == 200


def test_invalid_http_gets_an_error_object(server):
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.sendall(b"nonsense\r\n\r\n")
        data = b""
        while piece := one.recv(1000):
            data += piece
    assert data.startswith(b"HTTP/1.1 400") and json.loads(data.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_slow_clients_do_not_delay_other_requests(server, monkeypatch):
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for one in slow:
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: local")
    busy = server.client.completions.create(model="air.strawberry", prompt="a", n=ROWS, **LONG, stream=True)
    next(busy)
    for _ in range(5):
        began = time.time()
        assert server.send("GET", "/health")[2] == {"status": "ok"}
        assert time.time() - began < 10  # the slow ones never end
    busy.close()
    for one in slow:
        one.close()


def test_connections_over_the_limit_are_closed(start, monkeypatch):
    monkeypatch.setattr(HttpProtocol, "MAX_CONNECTIONS", 5)
    server = start()
    many = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.settimeout(5)
        assert one.recv(100) == b""
    for one in many:
        one.close()
    time.sleep(0.1)
    assert server.complete()[0] == 200


@pytest.mark.slow
def test_headers_that_do_not_arrive_time_out(start, monkeypatch):
    monkeypatch.setattr(HttpProtocol, "HEADER_SECONDS", 0.3)
    server = start()
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.settimeout(5)
        one.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        assert one.recv(100) == b""  # closed
    assert server.complete(max_tokens=400)[0] == 200  # who has said what it wants may take longer


# ---- who may ask ---------------------------------------------------------------------------------------------------


def test_every_route_but_health_needs_an_api_key(start):
    server = start(api_key=["first-key", "second"])
    paths = ["/v1/models", "/metrics", "/openapi.json", "/docs", "/v1/models/air.strawberry", "/nothing"]
    wrong = ["", "Bearer", "Bearer wrong", "Bearer first-ke", "Bearer first-key2", "first-key", "Bearer kéy",
             "Bearer \xff", "Basic !!", "Basic eDp3cm9uZw==", "Basic first-key", "Digest first-key"]  # fmt: skip
    for path in paths:
        for authorization in [None, *wrong]:
            headers = {} if authorization is None else {"Authorization": authorization.encode("utf-8")}
            got = server.send("GET", path, **headers)
            assert error_of(got, 401)["code"] == "invalid_api_key" and "WWW-Authenticate" in got[1]
    error_of(server.complete(), 401)
    assert server.send("GET", "/health")[0] == 200
    basic = "Basic " + base64.b64encode(b"anybody:first-key").decode()
    for right in ("Bearer first-key", "bearer second", basic):
        assert server.send("GET", "/v1/models", Authorization=right)[0] == 200
    assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="second", max_retries=0).models.list().data
    with pytest.raises(openai.AuthenticationError):
        server.client.models.list()


@pytest.mark.slow
def test_every_key_is_compared_in_constant_time(start, monkeypatch):
    compared, real = [], hmac.compare_digest
    server = start(api_key=["first-key", "second"])
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b))
    for key in ("first-key", "x" * 500, ""):
        server.send("GET", "/v1/models", Authorization=f"Bearer {key}")
    assert compared == [(32, 32)] * 6


@pytest.mark.slow
def test_foreign_hosts_and_origins_are_refused(server, start):
    for host in (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "localhost@evil.example", "[", "]:80", "[::1", "[zz]", "a:b:c",
        "10.0.0.1",
    ):
        assert error_of(server.send("GET", "/health", Host=host), 403)["param"] == "Host"
    for host in ("localhost", "127.0.0.1:1", "LOCALHOST:99", "[::1]:80"):
        assert server.send("GET", "/health", Host=host)[0] == 200
    own = f"127.0.0.1:{server.port}"
    for origin in (
        "http://evil.example",
        "null",
        f"http://localhost:{server.port}",
        f"http://{own}.evil.example",
        "x",
    ):
        assert error_of(server.send("GET", "/v1/models", Origin=origin), 403)["param"] == "Origin"
        error_of(server.send("OPTIONS", "/v1/completions", Origin=origin), 403)
    assert server.send("GET", "/v1/models", Origin=f"http://{own}")[0] == 200
    server = start(allow_host=["Box.example"])
    assert server.send("GET", "/health", Host="box.example:80", Origin="https://box.example:80")[0] == 200


CORS = re.compile("access-control-.*", re.I)


def test_cors_allows_the_named_origins_only(start):
    named = ["https://box.example", "http://localhost:3000"]
    server = start(allow_origin=named, api_key=["k"])
    ask = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,x-stainless-os"}
    for origin in named:
        status, headers, body = server.send("OPTIONS", "/v1/completions", Origin=origin, **ask)
        assert (status, body, headers["Access-Control-Allow-Origin"]) == (204, b"", origin)
        assert "POST" in headers["Access-Control-Allow-Methods"] and headers.get_all("Vary") == ["Origin"]
        assert headers["Access-Control-Allow-Headers"].split(", ") == ["Authorization", "*"]
        assert "Access-Control-Allow-Credentials" not in headers
        body = {"model": "air.strawberry", "prompt": "a", "max_tokens": 2}
        for key, expected in (("k", 200), ("wrong", 401)):  # a page may read its errors too
            answer = server.send("POST", "/v1/completions", body, Origin=origin, Authorization=f"Bearer {key}")
            assert (answer[0], answer[1].get_all("Access-Control-Allow-Origin")) == (expected, [origin])
        body["stream"] = True
        answer = server.send("POST", "/v1/completions", body, Origin=origin, Authorization="Bearer k")
        assert answer[0] == 200 and answer[1]["Access-Control-Allow-Origin"] == origin
    strangers = ("https://box.example.evil", "https://box.example:443", "http://box.example", "https://BOX.example",
                 "https://a.box.example", "null", "", "*", "https://box.example/", "https://box.example, x")
    for origin in strangers:
        for method in ("OPTIONS", "GET"):
            status, headers, _ = server.send(method, "/v1/models", Origin=origin, Authorization="Bearer k", **ask)
            assert status == 403 and not [name for name in headers if CORS.match(name)]
    status, headers, _ = server.send("GET", "/v1/models", Authorization="Bearer k")
    assert status == 200 and headers["Vary"] == "Origin" and not [name for name in headers if CORS.match(name)]
    assert error_of(server.send("OPTIONS", "/v1/models", Origin=named[0], Authorization="Bearer k"), 405)
    assert error_of(server.send("OPTIONS", "/v1/models", Origin=named[0], Host="evil.example", **ask), 403)


def test_without_allowed_origins_there_are_no_cors_headers(server):
    for origin in ("https://box.example", f"http://127.0.0.1:{server.port}"):
        headers = server.send("OPTIONS", "/v1/models", Origin=origin, Access_Control_Request_Method="POST")[1]
        assert "Vary" not in headers and not [name for name in headers if CORS.match(name)]


def test_the_rate_limit_is_per_key(start):
    server = start(rate=20, api_key=["one", "two"])  # of which two may come at once
    got = [server.send("GET", "/v1/models", Authorization="Bearer one") for _ in range(4)]
    assert [status for status, *_ in got] == [200, 200, 429, 429]
    assert error_of(got[2], 429)["type"] == "rate_limit_error" and 1 <= int(got[2][1]["Retry-After"]) <= 3
    assert server.send("GET", "/v1/models", Authorization="Bearer two")[0] == 200
    assert [server.send("GET", "/v1/models", Authorization=f"Bearer {i}")[0] for i in range(3)] == [401, 401, 429]
    assert all(server.send("GET", "/health")[0] == 200 for _ in range(9))


def test_the_rate_limit_refills_with_time(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    rate, served = RateLimiter(60), 0
    for step in range(600):  # ten a second for a minute: six at once, then one a second
        now = step / 10
        with contextlib.suppress(ApiError):
            rate.acquire("me")
            served += 1
    assert 64 <= served <= 66


def test_settings_of_the_command(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "a b")
    settings = read_command(["--host", "0.0.0.0", "--port=9", "--allow_host", "x", "--allow_host=y"])
    assert (settings.api_key, settings.host, settings.port, settings.allow_host) == (
        ["a", "b"],
        "0.0.0.0",
        9,
        ["x", "y"],
    )
    monkeypatch.delenv(KEY_VARIABLE)
    assert read_command([]).host == "127.0.0.1" and read_command(["--host", "::1"])
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.example.org"):
        with pytest.raises(UserError, match="takes a key"):
            read_command(["--host", host])
    for argv, message in ((["--prt", "5"], "did you mean '--port'"), (["--port", "70000"], "--port = 70000"),
                       (["--api_key", "ü"], "ASCII"), (["--allow_origin", "*"], "* is no origin"),
                       (["--allow_origin=https://x.org/"], "without a path"), (["--allow_origin", "null"], "no origin"),
                       (["--allow_origin", "box.example"], "no origin"),
                        (["--queue=-1"], "= -1"), (["x"], "an option")):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(message)):
            read_command(argv)


def test_addresses_in_use_are_reported(server):
    check_free("127.0.0.1", 0)
    for host, port in (("127.0.0.1", server.port), ("localhost", server.port), ("no.such.host.invalid", 80)):
        with pytest.raises(UserError, match=f"--port {port}: cannot listen there"):
            serve.main(["--host", host, "--port", str(port), "--api_key=k"])


# ---- the command, the schema, the numbers --------------------------------------------------------------------------


def serve_command(folder, data):
    """A free port, and the words that serve the models of a folder there in another process."""
    python, port = forks.start(with_model=True), free_port()
    return port, [*python, "serve.py", "--models", str(folder), "--port", str(port), "--data", str(data)]


@pytest.mark.slow
def test_the_command_serves_until_a_signal_stops_it(folder):
    port, argv = serve_command(folder, folder / "data")
    child = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        until = time.time() + 60
        while time.time() < until and "Uvicorn running" not in child.stderr.readline():
            assert child.poll() is None
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
        assert (
            client.completions.create(
                model="air.strawberry", prompt="a", max_tokens=2, temperature=0
            ).usage.completion_tokens
            == 2
        )
        child.send_signal(signal.SIGTERM)
        child.wait(20)
        assert "Traceback" not in child.stderr.read()
    finally:
        child.kill()


@pytest.mark.slow
def test_successful_polling_is_not_logged(folder, tmp_path):
    """What the page asks every two seconds is not written down while it succeeds; all else is, errors above all."""
    port, argv = serve_command(folder, tmp_path / "data")
    child = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    try:
        lines = []
        while "Uvicorn running" not in (lines or [""])[-1]:
            lines.append(child.stdout.readline())
            assert child.poll() is None, lines
        polled = ["/v1/models", "/v1/files?limit=100", "/v1/datasets?limit=100", "/v1/fine_tuning/jobs?limit=100",
                  "/health", "/metrics"]  # fmt: skip
        for path in polled * 2:
            curl = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:{port}{path}"]
            assert subprocess.run(curl, capture_output=True, text=True).stdout == "200"
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)
        client.completions.create(model="air.strawberry", prompt="a", max_tokens=1)
        for call in (lambda: client.models.retrieve("none"), lambda: client.fine_tuning.jobs.retrieve("ftjob-none"),
                     lambda: client.files.list(after="none"), lambda: client.files.delete("file-none")):  # fmt: skip
            with pytest.raises(openai.NotFoundError):
                call()
        subprocess.run(["curl", "-s", "-o", "/dev/null", f"http://127.0.0.1:{port}/"])
    finally:
        child.send_signal(signal.SIGTERM)
        lines += child.communicate(timeout=60)[0].splitlines()
    logged = [re.search(r'"(\S+ \S+) HTTP/1.1" (\d+)', line) for line in lines]
    assert [match.groups() for match in logged if match] == [
        ("POST /v1/completions", "200"), ("GET /v1/models/none", "404"), ("GET /v1/fine_tuning/jobs/ftjob-none", "404"),
        ("GET /v1/files?after=none", "404"), ("DELETE /v1/files/file-none", "404"), ("GET /", "200")]  # fmt: skip


@pytest.mark.slow
def test_training_and_sampling_import_no_serving_packages():
    others = {"fastapi", "uvicorn", "starlette", "prometheus_client", "rustbpe", "ijson", "serve", "prepare"}
    others |= {"torch._dynamo"}  # half of the time that a script would take to start
    code = f"import sys, train, sample; bad = {others} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_metrics_count_requests_tokens_and_errors(start, monkeypatch):
    server = start()
    monkeypatch.setattr(server.service.models, "find", raise_secret)
    assert "secret" not in json.dumps(error_of(server.send("GET", "/v1/models/x"), 500))
    monkeypatch.undo()
    server.complete(max_tokens=7, prompt="abc", temperature=0)
    error_of(server.complete(n=0), 400)
    server.send("GET", "/some/path/that/is/none")
    text = server.send("GET", "/metrics")[2].decode()
    for line in ('requests_total{method="POST",route="/v1/completions",status="200"} 1.0',
                 'requests_total{method="POST",route="/v1/completions",status="400"} 1.0',
                 'requests_total{method="any",route="none",status="404"} 1.0',
                 'requests_total{method="GET",route="/v1/models/{model}",status="500"} 1.0',
                 'tokens_total{kind="prompt"} 3.0', 'tokens_total{kind="completion"} 7.0', "models_loaded 1.0",
                 "queue 0.0", "rows_busy 0.0", "first_token_seconds_count 1.0",
                 'request_seconds_count{route="/v1/completions"} 2.0'):  # fmt: skip
        assert f"strawberry_{line}\n" in text, text


def test_the_schema_of_logit_bias_matches_the_token_ids():
    for top in (0, 5, 9, 10, 19, 99, 100, 257, 300, 999, 1000):
        pattern = re.compile(range_pattern(top))
        assert [n for n in range(2 * top + 200) if pattern.search(str(n))] == list(range(top + 1))
        assert not any(map(pattern.search, ("", "-1", "01", "1.0", " 1", "x")))


@pytest.mark.slow
def test_the_schema_lists_models_and_the_docs_load(server, start, tmp_path):
    schema = server.send("GET", "/openapi.json")[2]
    body = schema["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["model"]["enum"] == sorted(MODELS.keys() - {"masked.transformer"})
    assert body["required"] == ["model", "prompt"]
    assert body["properties"]["source"]["anyOf"]
    page = server.send("GET", "/docs")
    used = re.findall(r"""(?:src|href)=["']([^"']+)""", page[2].decode())
    assert len(used) >= 2 and all(path.startswith("/") and server.send("GET", path)[0] == 200 for path in used)
    assert "default-src 'self'" in page[1]["Content-Security-Policy"]
    empty = start(tmp_path).send("GET", "/openapi.json")[2]
    empty = empty["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "enum" not in json.dumps([empty["properties"][name] for name in ("model", "prompt", "source")])
