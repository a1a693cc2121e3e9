"""Runs of the command line and of the server in one list, what a run will cost, and what is in files and datasets.

train.py ran the runs that are listed, in this process.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ALPHABET, run, write_config, write_corpus
from test_serve import ServerThread

from model import CONFIGS, build
from strawberry.run_config import make_run
from strawberry.serving.runs import changed_values, flatten
from strawberry.training.lock import Lock

pytestmark = pytest.mark.slow
MADE = ["--max_iters=8", "--eval_interval=4", "--checkpoints.interval=4"]


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    """Two runs of one config, the second with another learning rate and moved aside by a third."""
    folder, before = tmp_path_factory.mktemp("runs"), os.getcwd()
    os.chdir(folder)
    try:
        Path("text.txt").write_text(ALPHABET)
        write_corpus("data.bin")
        write_config("tinystar")
        run(*MADE)
        run(*MADE, "--checkpoints.path=deep/er/ck", "--learning_rate=0.004", "--model_path=out/other.model")
        run("--max_iters=4", "--checkpoints.path=deep/er/ck", "--model_path=out/third.model")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def site(runs_folder, tmp_path_factory):
    server = ServerThread(tmp_path_factory.mktemp("models"), runs=[str(runs_folder)])
    yield server
    server.stop()


def get(site, path, method="GET", body=None):
    status, _, answer = site.send(method, path, body)
    assert status == 200, answer
    return answer


def by_name(site):
    return {found["name"]: found for found in get(site, "/v1/runs")["data"]}


def test_runs_of_the_command_line_are_listed_with_what_differs_and_what_they_reached(site, runs_folder):
    found = by_name(site)
    assert sorted(found) == ["other-earlier_1", "third", "tiny"]
    tiny = found["tiny"]
    lines = [json.loads(line) for line in (runs_folder / "ck" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "val_bpb" in line][-1]
    assert (tiny["status"], tiny["step"], tiny["val_bpb"]) == ("succeeded", 8, last["val_bpb"])
    assert (tiny["source"], tiny["preset"], tiny["dataset"]) == ("command line", "run.json", "data.bin")
    model = build(make_run(json.loads((runs_folder / "run.json").read_text()), CONFIGS).model_hyperparams)
    assert tiny["parameters"] == sum(p.numel() for p in model.parameters())
    same = {"max_iters": 8, "eval_interval": 4, "checkpoints.interval": 4}
    same = {key: value for key, value in same.items() if tiny["changed"].get(key) == value}
    assert found["other-earlier_1"]["changed"] == {**same, "learning_rate": 0.004}
    assert tiny["changed"] == same and "max_iters" in same


def test_a_run_lists_its_keys_command_samples_and_checkpoints(site, runs_folder):
    about = get(site, f"/v1/runs/{by_name(site)['tiny']['id']}")
    assert about["values"]["learning_rate"] == 3e-3 and about["preset_values"]["max_iters"] == 10
    assert not {"model_path", "dataset.path", "checkpoints.path"} & about["values"].keys()
    assert about["command"].endswith("--max_iters=8 --eval_interval=4 --checkpoints.interval=4 --seed=5")
    assert [sample["step"] for sample in about["samples"]] == [8, 4] and all(s["text"] for s in about["samples"])
    assert [point["step"] for point in about["checkpoints"]] == [8, 4]
    metrics = get(site, f"/v1/runs/{about['summary']['id']}/metrics")["data"]
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 9))
    assert not any("sample" in line for line in metrics)
    later = get(site, f"/v1/runs/{about['summary']['id']}/metrics?after=6")["data"]
    assert [line["step"] for line in later] == [7, 8, 8]


def test_a_checkpoint_of_the_command_line_is_downloaded_and_writes(site, runs_folder):
    about = get(site, f"/v1/runs/{by_name(site)['tiny']['id']}")
    newest = about["checkpoints"][0]
    assert newest["model"] == "tiny-step-8.tinystar"
    status, headers, data = site.send("GET", f"/v1/runs/{about['summary']['id']}/checkpoints/8")
    path = runs_folder / "ck" / "step_00000008" / "model.safetensors"
    assert status == 200 and data == path.read_bytes() and newest["model"] in headers["Content-Disposition"]
    assert site.send("GET", f"/v1/runs/{about['summary']['id']}/checkpoints/7")[0] == 404
    request = {"model": newest["model"], "prompt": "a cat", "max_tokens": 4, "seed": 1}
    text = site.send("POST", "/v1/completions", request)
    assert text[0] == 200 and text[2]["usage"]["completion_tokens"] == 4
    assert site.send("POST", "/v1/completions", {"model": "tiny-step-7.tinystar", "prompt": "a"})[0] == 404


def test_notes_stay_with_the_run(site, runs_folder):
    name = by_name(site)["tiny"]["id"]
    assert get(site, f"/v1/runs/{name}/notes", "POST", {"text": "wide <b>"})["text"] == "wide <b>"
    assert get(site, f"/v1/runs/{name}")["notes"] == "wide <b>" and by_name(site)["tiny"]["has_notes"]
    assert (runs_folder / "ck" / "notes.txt").read_text() == "wide <b>"
    assert site.send("POST", f"/v1/runs/{name}/notes", {"text": "x" * 100_001})[0] == 400
    get(site, f"/v1/runs/{name}/notes", "POST", {"text": ""})
    assert not by_name(site)["tiny"]["has_notes"]


def test_no_path_is_a_run_and_no_run_is_a_path(site):
    for name in ("..", "%2e%2e%2fck", "run-" + "0" * 24, "ftjob-" + "0" * 24, "ck"):
        assert site.send("GET", f"/v1/runs/{name}")[0] == 404
        assert site.send("DELETE", f"/v1/runs/{name}")[0] == 404
    for path in ("/page/..%2fapp.py", "/page/app.py", "/page/uPlot.LICENSE", "/page/.."):
        assert site.send("GET", path)[0] == 404


HOLDER = """
import signal, sys, time
from strawberry.training.lock import Lock
lock = Lock(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (lock.release(), sys.exit(7)))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_running_run_is_stopped_as_by_ctrl_c_and_only_then_deleted(site, runs_folder):
    folder = runs_folder / "to_delete"
    shutil.copytree(runs_folder / "ck", folder)
    (folder / "mine.txt").write_text("of a person")
    site.service.runs.searched_at = -float("inf")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True,
                              cwd=Path(__file__).parents[2])  # fmt: skip
    try:
        assert holder.stdout.readline() == "locked\n"
        found = next(one for name, one in by_name(site).items() if "to_delete" in name)
        assert found["status"] == "running"
        status, _, answer = site.send("DELETE", f"/v1/runs/{found['id']}")
        assert status == 409 and "stop it first" in answer["error"]["message"] and (folder / "metrics.jsonl").exists()
        get(site, f"/v1/runs/{found['id']}/stop", "POST")
        assert holder.wait(30) == 7
    finally:
        holder.kill()
    assert site.send("POST", f"/v1/runs/{found['id']}/stop")[0] == 409
    assert get(site, f"/v1/runs/{found['id']}", "DELETE")["deleted"]
    assert [path.name for path in folder.iterdir()] == ["mine.txt"], "what a person put there is not the run's"
    assert found["id"] not in {one["id"] for one in by_name(site).values()}
    assert (runs_folder / "ck" / "metrics.jsonl").exists()


def test_a_run_of_this_process_is_not_signalled(site, runs_folder, monkeypatch):
    """A lock whose process is another machine's is never killed here."""
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("it was signalled"))
    lock = Lock(runs_folder / "ck")
    try:
        about = json.loads(lock.path.read_bytes())
        lock.path.write_text(json.dumps(about | {"host": "elsewhere"}))
        name = next(one["id"] for one in by_name(site).values() if one["status"] == "running")
        assert site.send("POST", f"/v1/runs/{name}/stop")[0] == 409
    finally:
        lock.release()


def test_a_run_without_a_record_is_read_from_its_checkpoint(runs_folder, tmp_path):
    """As those are that an earlier version trained."""
    shutil.copytree(runs_folder / "ck", tmp_path / "old")
    (tmp_path / "old" / "record.json").unlink()
    site = ServerThread(tmp_path, runs=[str(tmp_path)])
    try:
        (found,) = get(site, "/v1/runs")["data"]
        assert (found["name"], found["status"], found["parameters"]) == ("tiny", "succeeded", None)
        assert found["changed"]["batch_size"] == 3 and get(site, f"/v1/runs/{found['id']}")["command"] is None
    finally:
        site.stop()


def test_files_of_another_program_do_no_harm(runs_folder, tmp_path):
    for i, (line, record) in enumerate([
        ('{"step": "x", "loss": []}', {"run": {"model_hyperparams": [], "dataset": 3}}), ("[1]\n\x00", None),
        ('{"epoch": 1}', {"run": {"max_iters": "many", "model_path": 3}, "started": "today"}), ("", {"run": {}}),
        ('{"step": 2, "loss": 1.5, "tokens": true}', {"run": {}, "parameters": "9", "command": "'", "config": "/no"}),
    ]):  # fmt: skip
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "metrics.jsonl").write_text(line)
        if record:
            (tmp_path / str(i) / "record.json").write_text(json.dumps(record))
    shutil.copytree(runs_folder / "ck", tmp_path / "real")
    site = ServerThread(tmp_path, runs=[str(tmp_path)])
    try:
        found = by_name(site)
        assert found["tiny"]["status"] == "succeeded" and found["4"]["train_loss"] is None  # no end of a line yet
        for one in found.values():
            assert site.send("GET", f"/v1/runs/{one['id']}/metrics")[0] == 200
    finally:
        site.stop()


def test_flat_and_changed_keys():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": None}) == {"a.b.c": 1, "e": None}
    base = {"max_iters": 10, "lr_decay_iters": 10, "seed": 1, "a": {"b": 2}, "dataset": {"path": "x"}}
    run = {"max_iters": 20, "lr_decay_iters": 20, "seed": 2, "a": {"b": 2, "c": 3}, "dataset": {"path": "y"}}
    assert changed_values(run, base) == {"max_iters": 20, "a.c": 3}


# ---- what a run will cost ------------------------------------------------------------------------------------------


def test_presets_come_with_every_key_and_the_schema(site):
    found = get(site, "/v1/presets")
    tiny = next(preset["values"] for preset in found["data"] if preset["id"] == "tiny")
    assert tiny["max_iters"] == 480 and tiny["lr_decay_iters"] is None and tiny["model_hyperparams.n_layer"] == 3
    assert not set(found["server_keys"]) & tiny.keys() and "max_iters" in found["config_schema"]["properties"]
    assert get(site, "/v1/presets/tiny")["values"] == tiny
    assert site.send("GET", "/v1/presets/tinny")[0] == 404


@pytest.mark.parametrize("preset", ["tiny", "transformer-pairs"])
def test_an_estimate_counts_what_the_model_has_and_warns_as_the_run_does(site, preset):
    keys = {"max_iters": 10, "batch_size": 2, "model_hyperparams.n_layer": 1, "warmup_iters": 20}
    request = {"model": preset, "hyperparameters": keys, "vocab_size": 300}
    found = get(site, "/v1/fine_tuning/estimates", "POST", request)
    hyper = {**CONFIGS_OF[preset], "n_layer": 1, "vocab_size": 300}
    model = build(hyper)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["tokens"] == 10 * found["tokens_per_step"] == 10 * 2 * model.config.block_size
    assert found["memory_parts"]["weights"] == 4 * found["parameters"] and found["memory_parts"]["activations"] > 0
    assert any("the run ends during its warm-up" in text for text in found["warnings"])
    assert found["seconds"] is None or found["known_from"]


CONFIGS_OF = {
    "tiny": {"arch": "strawberry", "block_size": 256, "r_layer": 1, "n_head": 4, "n_embd": 128, "n_qkv": 128,
             "retention": "none"},
    "transformer-pairs": {"arch": "transformer", "kind": "encoder-decoder", "block_size": 256, "n_head": 4,
                          "n_embd": 128},
}  # fmt: skip


def test_the_time_of_a_step_is_that_of_a_run_like_it(site, runs_folder):
    """The runs here have the config of run.json: the same keys give their own seconds."""
    tiny = by_name(site)["tiny"]
    given = json.loads((runs_folder / "run.json").read_text())["model_hyperparams"]
    hyper = {f"model_hyperparams.{key}": value for key, value in given.items() if key != "arch"}
    keys = {**hyper, "batch_size": 3, "max_iters": 100, "warmup_iters": 1,
            "model_hyperparams.attention_type": "GQA", "model_hyperparams.norm_type": "RMSNorm",
            "model_hyperparams.ffn_type": "SwiGLU", "model_hyperparams.pos_encoding": "RoPE"}  # fmt: skip
    found = get(site, "/v1/fine_tuning/estimates", "POST", {"model": "tinystar-v0.3-mha", "hyperparameters": keys})
    assert found["flops_per_token"] == pytest.approx(tiny["flops_per_token"])
    assert found["known_from"]["is_alike"]
    known = next(one for one in by_name(site).values() if one["id"] == found["known_from"]["run"])
    assert found["seconds_per_step"] == pytest.approx(found["tokens_per_step"] / known["tokens_per_s"])
    assert found["seconds"] == pytest.approx(100 * found["seconds_per_step"])


@pytest.mark.parametrize(
    "body,message",
    [({"model": "tinny"}, "tiny"), ({"model": "tiny", "hyperparameters": {"max_itres": 1}}, "max_iters"),
     ({"model": "tiny", "hyperparameters": {"model_path": "x"}}, "model_path"),
     ({"model": "tiny", "hyperparameters": {"learning_rate": -1}}, "learning_rate"),
     ({"model": "tiny", "hyperparameters": {"model_hyperparams.n_layer": 4096}}, "n_layer"), ({}, "model")],
)  # fmt: skip
def test_an_estimate_refuses_what_a_run_refuses(site, body, message):
    status, _, answer = site.send("POST", "/v1/fine_tuning/estimates", body)
    assert status in (400, 404) and message in answer["error"]["message"]


# ---- what is in files and datasets -----------------------------------------------------------------------------------


def test_the_first_documents_of_files_and_datasets_are_shown(site):
    texts = [f"document {i}, with ünïcode" for i in range(9)] + ["x" * 5000]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    file_ids = {}
    for name, data in (("a.txt", texts[0].encode()), ("b.jsonl", lines), ("c.json", json.dumps(texts).encode()),
                       ("d.jsonl.gz", gzip.compress(lines)), ("e.md", b"y" * 9000)):  # fmt: skip
        file_ids[name] = site.client.files.create(file=(name, data), purpose="fine-tune").id

    def documents(path):
        return get(site, path)["data"]

    assert documents(f"/v1/files/{file_ids['a.txt']}/documents") == [{"text": texts[0], "is_whole": True}]
    for name in ("b.jsonl", "c.json", "d.jsonl.gz"):
        found = documents(f"/v1/files/{file_ids[name]}/documents?limit=20")
        assert [one["text"] for one in found] == [*texts[:9], "x" * 2000] and not found[-1]["is_whole"]
        assert len(documents(f"/v1/files/{file_ids[name]}/documents?limit=2")) == 2
    assert documents(f"/v1/files/{file_ids['e.md']}/documents") == [{"text": "y" * 2000, "is_whole": False}]
    assert site.send("GET", "/v1/files/file-" + "0" * 24 + "/documents")[0] == 404

    recipe = {"files": [file_ids["b.jsonl"]], "encoder": "chars"}
    dataset = site.client.post("/datasets", body=recipe, cast_to=dict)["id"]
    until = time.time() + 60
    while get(site, f"/v1/datasets/{dataset}")["status"] != "succeeded":
        assert time.time() < until
        time.sleep(0.1)
    shown = {split: [one["text"] for one in documents(f"/v1/datasets/{dataset}/documents?limit=20&split={split}")]
             for split in ("training", "validation")}  # fmt: skip
    result = get(site, f"/v1/datasets/{dataset}")["result"]
    assert len(shown["training"]) == result["training"]["documents"]
    assert {text[:2000] for text in texts} >= set(shown["training"]) and shown["validation"]
    use = get(site, "/v1/disk")
    assert use["files"] > len(lines) and use["datasets"] > 0 and use["free"] > 0
    assert b"# Strawberry" in site.send("GET", "/v1/example_text")[2]
