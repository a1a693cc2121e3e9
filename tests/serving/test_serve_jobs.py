"""Files, datasets and training runs over HTTP: what is stored, what is refused, and what survives.

Requests come from OpenAI's client wherever it has a method. The server runs in this process, unless a test kills it.

Index:  assembling · jobs with children of a few lines · uploads · runs · errors without paths · deleting ·
        full disks · a killed server
"""

import contextlib
import gzip
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import require, require_program

import encoder as encoders
import serve
import train
from model import CONFIGS
from strawberry import status_file
from strawberry.common import UserError
from strawberry.config import check, read_json, to_dict
from strawberry.data import assemble
from strawberry.data.dataset import Corpus
from strawberry.data.near_duplicates import (
    MAX_MISS_PROBABILITY,
    N_HASHES,
    choose_bands,
    compute_signature,
    find_shingles,
    jaccard,
)
from strawberry.data.token_file import TokenFile
from strawberry.model_file import load_model
from strawberry.run_config import Dataset, make_run
from strawberry.serving import jobs
from strawberry.serving.app import create_app
from strawberry.serving.id_directory import ABOUT, EVENTS, PID, RequestError, paginate
from strawberry.serving.job import FINAL, ChildProcess, Job
from strawberry.serving.job_commands import JOB_KINDS, JobCommand, JobKind, build_run
from strawberry.serving.job_requests import (
    SERVER_KEYS,
    check_keys,
    create_dataset_job,
    find_starting_point,
    make_model_name,
    merge_configs,
    nest_keys,
)
from strawberry.serving.job_store import JobStore
from strawberry.serving.server import make_server_config
from strawberry.serving.settings import Settings
from strawberry.serving.uploads import SUFFIXES, TEXT_SUFFIXES, Upload, Uploads

ROOT = Path(serve.__file__).parent
WORDS = sorted(set(Path(serve.__file__).with_name("LICENSE").read_text().lower().split()))[:60]
MIB = 1 << 20
pytestmark = pytest.mark.skipif(os.name == "nt", reason="jobs need fork and signals")


def wait_until(condition, seconds=60, what="it"):
    """The value of the condition, once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.03)
    raise AssertionError(f"{what}: not within {seconds} s")


# ---- assembling ----------------------------------------------------------------------------------------------------


def make_sentence(rng, n):
    return " ".join(rng.choice(WORDS) + str(rng.randrange(100)) for _ in range(n))


def replace_words(rng, text, share):
    words = text.split()
    for i in rng.sample(range(len(words)), round(share * len(words))):
        words[i] = f"changed{rng.randrange(1000)}"
    return " ".join(words)


def make_documents(seed, n=40):
    """Documents, among them copies with more and more of their words changed."""
    rng = random.Random(seed)
    texts = [make_sentence(rng, 60) for _ in range(n)]
    shares = (0, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3)
    copies = [replace_words(rng, rng.choice(texts), rng.choice(shares)) for _ in range(n)]
    shouted = [text.upper().replace(" ", " \n ") for text in texts[:3]]
    mixed = texts + copies + shouted + ["", "short", "shorts", "short"]
    rng.shuffle(mixed)
    return mixed


def naive_shingles(text):
    data = " ".join(text.lower().split()).encode().ljust(8, b"\0")
    return {data[i : i + 8] for i in range(len(data) - 7)}


def naive_deduplicate(texts, similarity):
    """Every pair compared, by sets of strings."""
    distinct, sets = [], []
    for text in texts:
        shingles = naive_shingles(text)
        if all(len(shingles & other) / len(shingles | other) < similarity for other in sets):
            distinct.append(text)
            sets.append(shingles)
    return distinct


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return str(path)


def read_splits(folder):
    """(training documents, validation documents) of a dataset, decoded, in the order of the file."""
    encoder, file = encoders.load(str(folder / assemble.ENCODER)), TokenFile(folder / assemble.TOKENS)
    file.verify()
    cut = file.find_boundary(json.loads((folder / assemble.RESULT).read_bytes())["data_division"])
    parts = []
    for tokens in (file.tokens[:cut], file.tokens[cut:]):
        ends = np.flatnonzero(tokens == encoder.eot)
        assert len(tokens) == 0 or ends[-1] == len(tokens) - 1, "a split ends in the middle of a document"
        starts = [0, *(ends[:-1] + 1).tolist()]
        parts.append([encoder.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends.tolist(), strict=True)])
    return parts


def assemble_dataset(tmp_path, files, **recipe_options):
    """(result, training documents, validation documents) of a recipe."""
    folder = tmp_path / "dataset"
    folder.mkdir(exist_ok=True)
    raw = {"files": files, "encoder": "chars", "validation_share": 0.5, **recipe_options}
    recipe, problems = check(assemble.Recipe, raw)
    assert not problems
    return assemble.assemble(recipe, folder), *read_splits(folder)


@pytest.mark.slow
@pytest.mark.parametrize("similarity", [0.35, 0.6, 0.8, 0.9, 1.0])
def test_near_duplicates_are_those_that_comparing_every_pair_finds(tmp_path, similarity):
    texts = make_documents(seed=round(100 * similarity))
    _, training, validation = assemble_dataset(tmp_path, [write_jsonl(tmp_path / "a.jsonl", texts)], deduplicate="near",
                                               similarity=similarity)
    distinct = [text for text in dict.fromkeys(texts) if text]
    expected = naive_deduplicate(distinct, similarity)
    assert len(expected) < len(distinct) - 2
    assert sorted(training + validation) == sorted(expected)
    between = naive_deduplicate(distinct, min(similarity + 0.15, 1.01))
    assert len(between) > len(expected)  # the threshold matters


def test_lsh_bands_miss_similar_pairs_with_no_more_than_the_allowed_probability():
    for similarity in np.linspace(0.3, 1, 71):
        n, rows = choose_bands(similarity)
        assert n * rows <= N_HASHES
        assert (1 - similarity**rows) ** n <= MAX_MISS_PROBABILITY or rows == 1


def test_signatures_estimate_the_jaccard_index():
    rng = random.Random(3)
    text = make_sentence(rng, 300)
    for share in (0.02, 0.1, 0.3):
        other = replace_words(rng, text, share)
        a, b = find_shingles(text), find_shingles(other)
        assert set(a.tolist()) == {int.from_bytes(run) for run in naive_shingles(text)}
        agree = np.mean(compute_signature(a) == compute_signature(b))
        assert abs(agree - jaccard(a, b)) < 0.15  # 3.4 standard deviations of 128 throws


def test_exact_duplicates_and_documents_beyond_the_length_limits_are_left_out(tmp_path):
    texts = ["aaaa", "bbbbbb", "aaaa", "c", "dddddddd", "bbbbbb", "ééééé"]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    result, training, validation = assemble_dataset(tmp_path, [path], min_chars=4, max_chars=6)
    assert sorted(training + validation) == ["aaaa", "bbbbbb", "ééééé"]
    assert result["left_out"] == {"exact_duplicates": 2, "near_duplicates": 0, "too_short": 1, "too_long": 1,
                                  "not_utf8": 0, "other_kinds": 0, "without_texts": 0}
    _, training, validation = assemble_dataset(tmp_path, [path], deduplicate="none")
    assert sorted(training + validation) == sorted(texts)


def test_text_json_jsonl_gzip_and_folders_are_assembled(tmp_path):
    (tmp_path / "a.txt").write_text("one text", "utf-8")
    (tmp_path / "b.json").write_text(json.dumps(["two", {"text": "three"}]), "utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'"four"\n{"text": "two"}\n'))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "d" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "d" / "package.json").write_text('{"name": "x"}')
    (tmp_path / "d" / "five.txt").write_text("five")
    files = [str(tmp_path / name) for name in ("a.txt", "b.json", "c.jsonl.gz", "d")]
    result, training, validation = assemble_dataset(tmp_path, files)
    assert sorted(training + validation) == ["five", "four", "one text", "three", "two"]
    left_out = result["left_out"]
    assert left_out["exact_duplicates"] == left_out["not_utf8"] == left_out["other_kinds"] == 1
    assert left_out["without_texts"] == 1
    latin = str(tmp_path / "d" / "latin.txt")
    with pytest.raises(UserError, match=r"latin\.txt:1: byte 3 \(0xE9\) is not UTF-8.*\"errors\": \"replace\""):
        assemble_dataset(tmp_path, [latin])
    result, training, validation = assemble_dataset(tmp_path, [latin, files[0]], errors="replace")
    assert sorted(training + validation) == ["caf\ufffd", "one text"]


def test_file_weights_repeat_or_sample_training_documents(tmp_path):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{i:03}" for i in range(40)]) for name in "abc"]
    result, training, validation = assemble_dataset(tmp_path, paths, weights=[1, 2.25, 0.5], validation_share=0.1)
    assert result["documents"] == len({*training, *validation}) == 40 + 40 + 20
    assert len(validation) == len(set(validation)) == 10
    counts = {text: training.count(text) for text in training}
    assert {counts[text] for text in counts if text[0] == "a"} == {1}
    assert {counts[text] for text in counts if text[0] == "b"} == {2, 3}
    more = sum(n == 3 for text, n in counts.items() if text[0] == "b")
    assert 10 - sum(text[0] == "b" for text in validation) <= more <= 10
    assert not set(training) & set(validation)


def test_assembly_is_deterministic_and_shuffles_by_seed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(60)])
    first = assemble_dataset(tmp_path, [path])
    data = (tmp_path / "dataset" / assemble.TOKENS).read_bytes()
    again = assemble_dataset(tmp_path, [path])
    assert (tmp_path / "dataset" / assemble.TOKENS).read_bytes() == data
    assert first[1:] == again[1:]
    assert first[1] != sorted(first[1])
    assert assemble_dataset(tmp_path, [path], seed=1)[1:] != first[1:]


def test_a_single_document_is_split_at_its_end(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "a.txt").write_text(text)
    _, training, validation = assemble_dataset(tmp_path, [str(tmp_path / "a.txt")], validation_share=0.2)
    assert (training, validation) == ([text[:800]], [text[800:]])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 2000), min_size=1, max_size=30), st.floats(0.01, 0.5), st.integers(0, 5))
def test_the_split_covers_each_token_once_and_keeps_the_validation_share(lengths, share, seed):
    ends = list(itertools.accumulate(lengths))
    spans = [(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    training, validation = assemble.split_documents(spans, share, seed)
    assert len(training) == len(spans)
    covered = sorted([span for span in training if span] + validation)
    assert [i for start, end in covered for i in range(start, end)] == list(range(ends[-1]))
    n_validation = sum(end - start for start, end in validation)
    if ends[-1] > 3:
        assert any(span and span[1] > span[0] for span in training)
        assert n_validation <= max(share * ends[-1], 1) + 1
        assert n_validation >= min(share * ends[-1] / 2, max(lengths) - 1) - 1


def test_training_uses_the_split_of_the_assembled_dataset(tmp_path):
    rng = random.Random(5)
    path = write_jsonl(tmp_path / "a.jsonl", [make_sentence(rng, rng.randrange(1, 30)) for _ in range(150)])
    result, *_ = assemble_dataset(tmp_path, [path], weights=[3], validation_share=0.15)
    dataset = Dataset(data_division=result["data_division"], path=str(tmp_path / "dataset" / assemble.TOKENS))
    corpus = Corpus(dataset, None, 8)
    assert corpus.train.n_tokens == result["training"]["tokens"]
    assert corpus.val.n_tokens == result["validation"]["tokens"] > 0


def test_the_encoder_has_the_requested_vocabulary_or_what_the_text_allows(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [make_sentence(random.Random(i), 20) for i in range(20)])
    result, *_ = assemble_dataset(tmp_path, [path], encoder=None, vocab_size=300)
    assert result["encoder"]["vocab_size"] == 300
    result, *_ = assemble_dataset(tmp_path, [path], encoder=None)
    assert 300 < result["encoder"]["vocab_size"] < 8192
    with pytest.raises(UserError, match="too little text for vocab_size 8000"):
        assemble_dataset(tmp_path, [path], encoder=None, vocab_size=8000)
    (tmp_path / "dataset" / assemble.ENCODER).rename(tmp_path / "own.bin")
    own = encoders.load(str(tmp_path / "own.bin"))
    result, *_ = assemble_dataset(tmp_path, [path], encoder=str(tmp_path / "own.bin"))
    assert result["encoder"]["fingerprint"] == own.fingerprint


@pytest.mark.slow
def test_the_assemble_command_reports_outputs_and_errors(tmp_path):
    def run(recipe):
        (tmp_path / "mix.json").write_text(json.dumps(recipe))
        argv = [sys.executable, "-m", "strawberry.data.assemble", "mix.json", "out"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)

    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "two"])
    good = run({"files": ["*.jsonl"], "encoder": "chars"})
    assert good.returncode == 0
    assert "2 documents" in good.stdout
    assert "1 exact duplicates" in good.stdout
    for recipe, message in (
        ({}, "files = []: must name at least one"),
        ({"files": ["a.jsonl"], "weights": [1, 2]}, "must be as many as files, 1"),
        ({"files": ["a.jsonl"], "min_chars": 9, "encoder": "chars"}, "no text is left of the files (left out"),
        ({"files": ["a.jsonl"], "similarty": 1}, "did you mean 'similarity'?"),
        ({"files": ["b.jsonl"]}, "there is no such file"),
    ):
        bad = run(recipe)
        assert bad.returncode == 2
        assert message in bad.stderr
        assert "Traceback" not in bad.stderr


# ---- jobs with children of a few lines -----------------------------------------------------------------------------


@pytest.fixture
def open_store(tmp_path, monkeypatch):
    """open_store() opens a JobStore whose runs are a few lines of Python, which succeed if they write the file "done".
    Another call opens the same store as the next server would."""
    def command(all_jobs, job):
        return JobCommand(["-c", job.request["code"]], job.folder / "done")

    monkeypatch.setitem(JOB_KINDS, "ftjob", JOB_KINDS["ftjob"]._replace(command=command))
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.02)
    stores = []

    def open_store(at_once=2):
        uploads = Uploads(tmp_path / "files", MIB)
        store = JobStore(tmp_path, tmp_path / "models", uploads, JOB_KINDS)
        store.supervisor = jobs.JobSupervisor(store, at_once)
        store.supervisor.start()
        stores.append(store)
        return store

    yield open_store
    for store in stores:
        for job in store.list_running():
            job.child.kill()
        store.supervisor.stop_all(1)


def add_job(store, code):
    return store.new("ftjob", {"code": code}, max_iters=10)


SLEEP = "import time; time.sleep(60)"
DONE = "open('done', 'w')"


@pytest.mark.slow
def test_no_more_than_at_once_jobs_run_and_the_others_queue_in_order(open_store):
    store = open_store(at_once=2)
    waiting = [add_job(store, f"import time; time.sleep(0.4); {DONE}") for _ in range(5)]
    most, orders = 0, []
    while not all(job.status == "succeeded" for job in waiting):
        statuses = [job.status for job in waiting]
        most = max(most, statuses.count("running"))
        orders.append(statuses)
        assert statuses == sorted(statuses, key=["succeeded", "running", "queued"].index) or "running" in statuses
        assert "failed" not in statuses
        time.sleep(0.02)
    assert most == 2
    assert [job.about["started"] for job in waiting] == sorted(job.about["started"] for job in waiting)
    assert any(statuses[2:] == ["queued"] * 3 for statuses in orders)


def test_a_job_kind_is_added_with_a_function_and_a_table_entry(open_store, monkeypatch, tmp_path):
    def nap(all_jobs, job):
        return JobCommand(["-c", f"import time; time.sleep({job.request['seconds']}); {DONE}"], job.folder / "done")

    monkeypatch.setitem(JOB_KINDS, "nap", JobKind("naps", "nap", nap))
    store = open_store()
    short, long = (store.new("nap", {"seconds": seconds}) for seconds in (0, 60))
    wait_until(lambda: short.status == "succeeded" and long.status == "running")
    assert short.folder.parent == tmp_path / "naps"
    store.stop(long, "cancelled")
    wait_until(lambda: long.status == "cancelled")
    assert not long.child.alive()


@pytest.mark.slow
@pytest.mark.parametrize("code, status, message", [
    (DONE, "succeeded", None),
    (f"{DONE}; raise SystemExit(1)", "succeeded", None),  # all was done before it fell
    ("pass", "failed", "ended with code 0"),
    ("import sys; print('error: learning_rate = 9: is too high', file=sys.stderr); sys.exit(2)", "failed",
     "learning_rate = 9: is too high"),
    ("raise ValueError('no such thing')", "failed", "no such thing"),
    ("import os; os.kill(os.getpid(), 9)", "failed", "was killed by SIGKILL"),
])
def test_job_status_follows_from_result_file_exit_code_and_log(open_store, code, status, message):
    store = open_store()
    job = add_job(store, code)
    wait_until(lambda: job.status in FINAL)
    assert job.status == status
    assert (message is None) == (job.about["error"] is None)
    if message:
        assert message in job.about["error"]["message"]
        assert job.events()[0]["level"] == "error"
    assert json.loads((job.folder / ABOUT).read_bytes()) == job.about


@pytest.mark.slow
def test_a_child_that_ignores_sigterm_is_killed_after_the_timeout(open_store, monkeypatch):
    monkeypatch.setattr(jobs, "STOP_TIMEOUT", 0.3)
    store = open_store()
    job = add_job(store, f"import signal, time; signal.signal(15, signal.SIG_IGN); open('ready', 'w'); {SLEEP}")
    wait_until(lambda: (job.folder / "ready").exists())
    store.stop(job, "cancelled")
    wait_until(lambda: job.status == "cancelled")
    assert not job.child.alive()
    assert any(event["level"] == "warn" for event in job.events())


@pytest.mark.slow
def test_a_child_gets_sigterm_only_once(open_store):
    """A second signal would end train.py before it has saved."""
    store = open_store()
    job = add_job(store, "import signal, time\nn = []\nsignal.signal(15, lambda *_: n.append(1))\nopen('ready', 'w')\n"
                    "while not n: time.sleep(0.01)\ntime.sleep(0.5)\nopen('signals', 'w').write(str(len(n)))")
    wait_until(lambda: (job.folder / "ready").exists())
    for wanted in ("paused", "paused", "cancelled"):
        store.stop(job, wanted)
        time.sleep(0.05)
    with pytest.raises(RequestError, match="still saving"):
        store.resume(job)
    wait_until(lambda: job.status == "cancelled")
    assert (job.folder / "signals").read_text() == "1"


def test_server_shutdown_stops_jobs_and_the_next_server_restarts_them(open_store):
    first = open_store()
    job = add_job(first, f"import os; n = os.path.exists('ready'); open('ready', 'w')\n"
                     f"if n: {DONE}\nelse: {SLEEP}")
    wait_until(lambda: (job.folder / "ready").exists())
    first.supervisor.stop_all(20)
    assert not job.child.alive()
    assert job.status == "queued"
    second = open_store()
    wait_until(lambda: second.get("ftjob", job.id).status == "succeeded")


def make_running_job(store, tmp_path, pid, started, **about):
    """What a killed server leaves of a running job whose process has this number and start."""
    job = store.new("ftjob", {"code": DONE}, status="running", max_iters=10, result=str(tmp_path / "LICENSE"), **about)
    (job.folder / PID).write_text(json.dumps({"pid": pid, "born": started}))
    return job.id


def read_start_time(pid):
    """The start time of a process, in clock ticks after the system's."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@pytest.mark.slow
def test_the_next_server_adopts_live_children_and_concludes_dead_ones(open_store, tmp_path):
    first = open_store()
    first.supervisor.closing.set()
    first.supervisor.thread.join()  # from here on nobody watches
    live, dead, pausing = (subprocess.Popen([sys.executable, "-c", SLEEP]) for _ in range(3))
    dead.kill()
    dead.wait()
    names = {
        "live": make_running_job(first, tmp_path, live.pid, read_start_time(live.pid)),
        "dead": make_running_job(first, tmp_path, dead.pid, "123"),
        "number of another": make_running_job(first, tmp_path, os.getpid(), "123"),
        "pausing": make_running_job(first, tmp_path, pausing.pid, read_start_time(pausing.pid), wanted="paused"),
        "done": make_running_job(first, ROOT, dead.pid, "123"),
        "never started": first.new("ftjob", {"code": DONE}, status="running", result="x", max_iters=1).id,
    }
    second = open_store()
    found = {what: second.get("ftjob", name) for what, name in names.items()}
    wait_until(lambda: all(found[what].status == "failed" for what in ("dead", "number of another", "never started")))
    wait_until(lambda: found["done"].status == "succeeded")  # it came to its end while nobody watched
    assert "it can be resumed" in found["dead"].about["error"]["message"]
    wait_until(lambda: found["pausing"].status == "paused")  # the signal that the first server didn't come to send
    assert found["live"].status == "running"
    assert live.poll() is None
    second.stop(found["live"], "cancelled")
    wait_until(lambda: found["live"].status == "cancelled")  # it is a zombie of this process, and counts as gone
    assert live.wait() == -signal.SIGTERM
    assert pausing.wait() == -signal.SIGTERM


def test_partly_written_folders_are_neither_jobs_nor_uploads(open_store, tmp_path):
    store = open_store()
    job = add_job(store, DONE)
    wait_until(lambda: job.status == "succeeded")
    for folder in (tmp_path / "runs", tmp_path / "files"):
        (folder / ".tmp_0a").mkdir()
        (folder / "nonsense").mkdir()
    (tmp_path / "runs" / f"ftjob-{'0' * 24}").mkdir()  # no about.json
    secret = tmp_path / "secret"
    secret.mkdir()
    about = {"id": f"file-{'0' * 24}", "suffix": ".txt", "created": 0, "filename": "x", "bytes": 1, "purpose": "batch"}
    (secret / "about.json").write_text(json.dumps(about))
    (secret / "content.txt").write_text("secret")
    (tmp_path / "files" / about["id"]).symlink_to(secret)
    with open(job.folder / EVENTS, "ab") as file:
        file.write(b'{"id": "half')
    again = open_store()
    assert [found.id for found in again.all("ftjob")] == [job.id]
    assert again.uploads.all() == []
    assert [event["message"] for event in again.get("ftjob", job.id).events()] == ["succeeded", "started"]
    assert not list(tmp_path.glob("*/.tmp_*"))
    for call in (again.uploads.get, again.uploads.path, again.uploads.remove):
        with pytest.raises(RequestError, match="there is no file"):
            call(about["id"])
    assert (secret / "content.txt").exists()


def test_a_job_whose_deletion_was_interrupted_stays_deleted_after_a_restart(open_store, monkeypatch):
    """The server is killed right after the directory has lost its name, with all files still there."""
    store = open_store()
    deleted, other = add_job(store, DONE), add_job(store, DONE)
    wait_until(lambda: deleted.status == other.status == "succeeded")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *arguments, **more: None)
        store.remove(deleted)
    assert list(deleted.folder.parent.glob(".tmp_*/log.txt"))
    assert not deleted.folder.exists()
    again = open_store()
    assert [job.id for job in again.all("ftjob")] == [other.id]
    assert [path.name for path in deleted.folder.parent.iterdir()] == [other.id]


def test_concurrent_requests_cannot_revive_a_deleted_job(open_store):
    """Whoever found the job before it was deleted gets the error that it is not there."""
    store = open_store()
    for seed in range(10):
        job = add_job(store, SLEEP)
        store.stop(job, "cancelled")
        wait_until(lambda job=job: job.status == "cancelled")
        calls = [lambda job=job: store.remove(job), lambda job=job: store.resume(job),
                 lambda job=job: store.stop(job, "paused"), lambda job=job: store.stop(job, "cancelled")]
        random.Random(seed).shuffle(calls)
        outcomes = []

        def attempt(call, outcomes=outcomes):
            try:
                outcomes.append(call())
            except RequestError as error:
                outcomes.append(error.status)

        threads = [threading.Thread(target=attempt, args=[call]) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(outcomes) <= {None, 404, 409}
        if job.id in store.jobs:  # it was resumed first
            store.stop(job, "cancelled")
            wait_until(lambda job=job: job.status == "cancelled")
            store.remove(job)
        for late in (store.remove, store.resume, lambda job: store.stop(job, "cancelled")):
            with pytest.raises(RequestError, match="there is no fine-tuning job"):
                late(job)
        assert not job.folder.exists()
    assert open_store().all("ftjob") == []


def test_running_jobs_and_datasets_in_use_are_not_deleted(open_store):
    store = open_store(at_once=0)
    dataset = store.new("ds", {"recipe": {"encoder": None, "files": []}, "name": ""}, status="succeeded")
    derived = store.new("ds", {"recipe": {"encoder": dataset.id, "files": []}, "name": ""})
    run = store.new("ftjob", {"dataset": dataset.id}, max_iters=1)
    for job, status in ((run, "validating_files"), (run, "queued"), (run, "running"), (run, "paused"),
                        (derived, "queued")):
        job.about["status"] = status
        with pytest.raises(RequestError, match=f"needed by the .* {job.id}, which is {status}") as caught:
            store.remove(dataset)
        assert caught.value.status == 409
        run.about["status"] = "succeeded"
    derived.about["status"] = "running"
    with pytest.raises(RequestError, match="is running; cancel it first"):
        store.remove(derived)
    derived.about["status"] = "succeeded"
    for status in FINAL:
        run.about["status"] = status
        assert store.find_reader(dataset) is None
    store.remove(dataset)
    assert not dataset.folder.exists()


MESSAGES = {  # what a child says → what the client reads; {data} and {models} are the server's
    "{data}/files/{file}/content.jsonl:2: text is given twice": "my book.jsonl, line 2: text is given twice",
    "{data}/files/{file}/content.jsonl:1234 is not JSON": "my book.jsonl, line 1,234 is not JSON",
    "{data}/files/{file}/content.txt.gz: entry 3 is bad": "my book.jsonl: entry 3 is bad",
    "line 2, byte 17 of {data}/files/{file}/content.md.": "line 2, byte 17 of my book.jsonl.",
    "[Errno 13] no: '{data}/files/{file}/content.txt'": "[Errno 13] no: 'my book.jsonl'",
    "{data}/files/file-000000000000000000000000/content.py: gone": "file-000000000000000000000000: gone",
    "{data}/datasets/{ds}/tokens.bin is cut short": "the dataset mine is cut short",
    "no encoder at '{data}/datasets/{ds}/encoder.bin'": "no encoder at 'the encoder of the dataset mine'",
    "cannot write {data}/datasets/{ds}/result.json: full": "cannot write result.json: full",
    "{data}/datasets/{ds}/given.bin: damaged": "the encoder of tiny.tinystar: damaged",
    "{data}/runs/{run}/run.json: max_iters = 0": "max_iters = 0",
    "cannot write {data}/runs/{run}/run.json: full": "cannot write run.json: full",
    "cannot save {data}/runs/{run}/checkpoints/step_00000050: full": "cannot save checkpoints/step_00000050: full",
    "recipe.json: files = []: must name at least one": "files = []: must name at least one",
    "cannot write {models}/ft-x.tinystar: full": "cannot write ft-x.tinystar: full",
    "File {root}/dataset.py, line 3; {python}/x.py": "File dataset.py, line 3; x.py",
    "1.5 tokens/s, a/b and /v1/datasets, https://a.b/c/d": "1.5 tokens/s, a/b and /v1/datasets, https://a.b/c/d",
}


@pytest.mark.parametrize("message", MESSAGES)
def test_error_messages_replace_server_paths_by_names_that_the_client_knows(open_store, tmp_path, message):
    store = open_store(at_once=0)
    upload = Upload(store.uploads)
    upload.write(b"text")
    file = upload.finish("my book.jsonl", "fine-tune")["id"]
    ds = store.new("ds", {"recipe": {"encoder": "tiny.tinystar", "files": [file]}, "name": "mine"}).id
    run = add_job(store, DONE).id
    names = {"data": tmp_path, "models": tmp_path / "models", "file": file, "ds": ds, "run": run, "root": ROOT,
             "python": Path(os.__file__).parent}
    assert store.names.rewrite(message.format(**names)) == MESSAGES[message].format(**names)


def test_the_status_file_keeps_its_size_and_counts_distinct_warnings(tmp_path):
    path = tmp_path / "status"
    status_file.allocate(path)
    before = path.stat()
    status = status_file.StatusFile(str(path))
    for text in ("step 1 is bad", *(f"é {chr(97 + i)}" * 300 for i in range(20)), "step 2 is bad"):
        status.warn(text)
        about = path.stat()
        assert (about.st_size, about.st_ino) == (status_file.SIZE, before.st_ino)
        number, last = status_file.read(path)["warnings"][-1]
        assert last in text or text == "step 2 is bad"
    assert number == 21  # those that differ in more than a number
    status.update(step=6, saved=5)
    status.warn("step 6 is bad")
    assert status_file.read(path)["warnings"][-1][0] == 21
    status.update(step=7, saved=7)  # from here on it is another one
    status.warn("step 8 is bad")
    assert status_file.read(path)["warnings"][-1] == [22, "step 8 is bad"]
    path.write_bytes(b"{" * 9)
    assert status_file.read(path) == status_file.read(tmp_path / "none") == {}


def test_pagination_continues_after_the_last_id():
    items = [{"id": f"x{i}"} for i in range(7)]
    seen, after = [], None
    while True:
        found = paginate(items, after, 3)
        seen += found["data"]
        assert found["has_more"] == (len(seen) < 7)
        if not found["has_more"]:
            break
        after = found["last_id"]
    assert seen == items
    assert paginate([], None, 3)["data"] == []
    with pytest.raises(RequestError, match="nothing in this list"):
        paginate(items, "y", 3)


def test_hyperparameters_are_nested_or_dotted_and_never_paths():
    assert nest_keys({"a.b": 1, "a.c.d": 2, "e": {"f": 3}, "e.g": 4, "n_epochs": "auto"}) == {
        "a": {"b": 1, "c": {"d": 2}}, "e": {"f": 3, "g": 4}}
    for bad in ({"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}):
        with pytest.raises(RequestError):
            nest_keys(bad)
    for name in ("n_epochs", "learning_rate_multiplier"):
        assert [nest_keys({name: value, "a": 1}) for value in ("auto", 1, 1.0, None)] == [{"a": 1}] * 4
        for value in (3, True, "1", {}, [1]):
            with pytest.raises(RequestError, match=f"hyperparameters.{name} = .*leave it out"):
                nest_keys({name: value})
    paths = {"model_path", "encoder_path", "init_from", "img_path", "dataset.path", "checkpoints.path"}
    assert paths <= SERVER_KEYS
    for key in SERVER_KEYS:
        *sections, last = key.split(".")
        raw = {last: "/etc/x"}
        for section in reversed(sections):
            raw = {section: raw}
        for spelled in ({key: "/etc/x"}, raw):
            with pytest.raises(RequestError, match=key):
                check_keys(nest_keys(spelled))


def test_model_names_contain_base_model_suffix_and_job_id():
    name = make_model_name("tiny", "mine", "ftjob-" + "0" * 16 + "89abcdef", "strawberry")
    assert name == "ft-tiny-mine-89abcdef.strawberry"
    assert make_model_name(name, None, "ftjob-" + "1" * 24, "palm") == "ft-tiny-mine-11111111.palm"
    assert "/" not in make_model_name("../x y", None, "ftjob-" + "1" * 24, "palm")


# ---- uploads -------------------------------------------------------------------------------------------------------


class JobServer:
    """A server in a thread of this process, and clients for it."""

    def __init__(self, folder, **more):
        self.data, self.models = folder / "data", folder / "models"
        paths = {"data": str(self.data), "models": str(self.models)}
        self.settings = Settings(**paths, port=0, rate=0, device="cpu", **more)

    def __enter__(self):
        app = create_app(self.settings)
        self.server = uvicorn.Server(make_server_config(app, self.settings))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        wait_until(lambda: self.server.started or not self.thread.is_alive(), 60, "the server")
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.service = app.state.service
        self.client = make_client(self.port)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(90)
        assert not self.thread.is_alive()

    def raw(self, method, path, body=None, headers=(), **more):
        return send_request(self.port, method, path, body, headers, **more)


def wait_for_port(log):
    """The port of a server of another process, which its log names."""
    return int(wait_until(lambda: re.search(r"http://127.0.0.1:(\d+)", log.read_text()), 60, "the server")[1])


def make_client(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=90)


def send_request(port, method, path, body=None, headers=(), **more):
    """(status, bytes) of a request whose path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), [*headers, ("Content-Type", "application/json")]
        if body is not None and not any(name.lower() in ("content-length", "transfer-encoding") for name, _ in headers):
            headers = [*headers, ("Content-Length", str(len(body)))]
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in [body] if isinstance(body, bytes) else body or ():
                connection.send(piece)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


BOUNDARY = "-------xyz"


def make_form(parts, end=True):
    """multipart/form-data, with names as they are given."""
    out = b""
    for name, filename, content in parts:
        named = f'; filename="{filename}"' if filename is not None else ""
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
        out += head.encode() + content + b"\r\n"
    return out + (f"--{BOUNDARY}--\r\n".encode() if end else b"")


FORM = [("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")]


def snapshot(folder):
    """When each thing in it was changed. Unlike rglob, os.walk does not mind folders that go away meanwhile."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            with contextlib.suppress(FileNotFoundError):
                found[Path(parent, name)] = os.stat(Path(parent, name)).st_mtime_ns
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory, forked_training):
    with JobServer(tmp_path_factory.mktemp("site"), max_upload=1) as site:
        yield site


def test_upload_list_retrieve_content_delete(site):
    files = site.client.files
    contents = {"no ending": b"x", "a.txt": "héllo\r\n--\n".encode() * 999, "b.JSONL": b'"x"\n' * 50,
                "c.json.gz": gzip.compress(b'["y"]'),
                "dir/é 中.txt": b"", "d.txt": bytes(range(256)) * 300}
    uploaded = {name: files.create(file=(name, data), purpose="fine-tune") for name, data in contents.items()}
    for name, data in contents.items():
        about = uploaded[name]
        assert (about.object, about.bytes, about.filename) == ("file", len(data), name.rpartition("/")[2])
        assert (about.status, about.purpose) == ("processed", "fine-tune")
        assert abs(about.created_at - time.time()) < 60
        assert files.retrieve(about.id) == about
        assert files.content(about.id).content == data
    listed = [file.id for file in files.list(limit=2)]  # the client turns the pages
    assert listed[: len(uploaded)] == [about.id for about in reversed(uploaded.values())]
    assert [file.id for file in files.list(order="asc")] == listed[::-1]
    assert files.list(purpose="batch").data == []
    assert files.wait_for_processing(uploaded["a.txt"].id).status == "processed"
    gone = files.delete(uploaded["a.txt"].id)
    assert (gone.id, gone.deleted) == (uploaded["a.txt"].id, True)
    for call in (files.retrieve, files.content, files.delete):
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            call(uploaded["a.txt"].id)
    assert uploaded["a.txt"].id not in [file.id for file in files.list()]
    assert not (site.data / "files" / uploaded["a.txt"].id).exists()


def run_curl(site, *argv):
    """What curl prints, as JSON."""
    command = ["curl", "-s", "--max-time", "60", *argv[:-1], f"http://127.0.0.1:{site.port}{argv[-1]}"]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def create_dataset(site, **options):
    """The dataset once it is done, or has failed."""
    dataset = json.loads(site.raw("POST", "/v1/datasets", {"encoder": "chars", **options})[1])

    def poll():
        found = json.loads(site.raw("GET", f"/v1/datasets/{dataset['id']}")[1])
        return found if found["status"] not in ("queued", "running") else None

    return wait_until(poll, what="the dataset")


@pytest.mark.slow
def test_files_of_every_text_suffix_can_be_uploaded_and_assembled(site, tmp_path):
    require_program("curl")
    names = [f"x{suffix}" for suffix in TEXT_SUFFIXES] + ["NOTES.MD", "Makefile", ".profile", "y.rst.gz"]
    contents = {name: f"{i} is the text of {name}\n" for i, name in enumerate(names)}
    lists = {"a.jsonl": '"one"\n', "b.ndjson": '{"text": "two"}\n', "c.JSONLINES.gz": '"three"\n', "d.json": '["four"]'}
    ids = []
    for name, text in {**contents, **lists}.items():
        data = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
        (tmp_path / name).write_bytes(data)
        ids.append(run_curl(site, "-F", "purpose=fine-tune", "-F", f"file=@{tmp_path / name}", "/v1/files")["id"])
    done = create_dataset(site, files=ids)
    assert done["status"] == "succeeded", done
    found = sum(read_splits(site.data / "datasets" / done["id"]), [])
    assert sorted(found) == sorted([*contents.values(), "one", "two", "three", "four"])
    for name in ("x.exe", "thesis.pdf", "photo.png.gz", "a.zip", "b.docx"):
        (tmp_path / name).write_bytes(b"x")
        error = run_curl(site, "-F", "purpose=fine-tune", "-F", f"file=@{tmp_path / name}", "/v1/files")["error"]
        assert (error["param"], error["code"]) == ("file", "file_kind")
        assert name in error["message"]
        assert all(f"{suffix}," in error["message"] for suffix in SUFFIXES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../../x.txt", "/etc/passwd.txt", "..\\..\\x.txt", "a/../../b.txt"])
def test_upload_filenames_never_become_paths(site, name):
    before = snapshot(site.data.parent.parent)
    form = make_form([("purpose", None, b"fine-tune"), ("file", name, b"text")])
    status, body = site.raw("POST", "/v1/files", form, FORM)
    assert status == 200
    about = json.loads(body)
    new = set(snapshot(site.data.parent.parent)) - set(before)
    folder = site.data / "files" / about["id"]
    assert new == {folder, folder / "about.json", folder / "content.txt"}
    assert about["filename"] in ("x.txt", "passwd.txt", "b.txt")


@pytest.mark.parametrize("parts, message", [
    ([("file", "x.exe", b"")], "must end in .txt"),
    ([("file", "x" * 300 + ".txt", b"")], "must have 1 to 255"),
    ([("file", "x\0.txt", b"")], "printable"),
    ([("file", "", b"")], "must have 1 to 255"),
    ([("purpose", None, b"fine-tune")], "lacks a part of that name"),
    ([("file", "a.txt", b"1"), ("file", "b.txt", b"2")], "given twice"),
    ([("file", "a.txt", b"1"), ("purpose", None, b"evil")], "must be one of"),
    ([("file", "a.txt", b"1"), ("purpose", None, b"")], "must be one of"),
    ([("file", "a.txt", b"1"), ("purpose", None, b"x" * 5000)], "longer than"),
    ([("file", "a.txt.gz", b"no gzip")], "not a whole gzip"),
    ([("file", "a.txt.gz", gzip.compress(os.urandom(9999))[:-20])], "not a whole gzip"),
    ([("x", None, b"")] * 40, "more than 32 parts"),
])
def test_invalid_uploads_are_refused_and_leave_no_files(site, parts, message):
    before = snapshot(site.data / "files")
    status, body = site.raw("POST", "/v1/files", make_form(parts), FORM)
    assert status == 400
    error = json.loads(body)["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert set(snapshot(site.data / "files")) == set(before)


def test_an_unsupported_method_is_answered_405_with_allow(site):
    connection = http.client.HTTPConnection("127.0.0.1", site.port)
    connection.request("PUT", "/v1/files/file-1")
    answer = connection.getresponse()
    assert (answer.status, answer.headers["Allow"]) == (405, "DELETE, GET")
    connection.close()


def test_a_second_server_cannot_lock_the_data_directory(site):
    argv = [f"--data={site.data}", f"--models={site.models}", "--port=0"]
    with pytest.raises(UserError, match="--data = .*: is written to by process"):
        serve.main(argv)


def test_malformed_multipart_forms_are_refused(site):
    before = set(snapshot(site.data / "files"))
    whole = make_form([("file", "a.txt", b"text")])
    assert site.raw("POST", "/v1/files", whole[:-9], FORM)[0] == 400  # its end is missing
    assert site.raw("POST", "/v1/files", b"nonsense" * 99, FORM)[0] == 400
    assert site.raw("POST", "/v1/files", b"", FORM)[0] == 400
    for more in (b"; x=" + b"x" * 100_000, b"\r\nX-More: x" * 100):
        status, body = site.raw("POST", "/v1/files", whole.replace(b"form-data", b"form-data" + more), FORM)
        assert status == 400
        assert b"the body is not multipart/form-data (Maximum header" in body
    for kind in ("application/json", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 99, "\xff"):
        assert site.raw("POST", "/v1/files", whole, [("Content-Type", kind)])[0] == 415
    assert set(snapshot(site.data / "files")) == before


def make_large_form(n, size=65536):
    yield make_form([("file", "big.txt", b"")], end=False)[:-2]
    for _ in range(n):
        yield b"x" * size
    yield f"\r\n--{BOUNDARY}--\r\n".encode()


def encode_chunked(chunks):
    for chunk in chunks:
        yield f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n"
    yield b"0\r\n\r\n"


@pytest.mark.slow
def test_the_upload_limit_holds_whatever_the_headers_say(site):
    before = set(snapshot(site.data / "files"))
    exact = site.client.files.create(file=("exact.txt", b"x" * MIB), purpose="fine-tune")  # just fits
    assert exact.bytes == MIB
    site.client.files.delete(exact.id)
    with pytest.raises(openai.APIStatusError) as caught:
        site.client.files.create(file=("big.txt", b"x" * (MIB + 1)), purpose="fine-tune")
    assert caught.value.status_code == 413
    assert caught.value.code == "file_too_large"
    long = [("Transfer-Encoding", "chunked"), *FORM]
    assert site.raw("POST", "/v1/files", encode_chunked(make_large_form(40)), long)[0] == 413
    stated = [("Content-Length", str(10**12)), *FORM]
    assert site.raw("POST", "/v1/files", make_large_form(1), stated)[0] == 413
    status, body = site.raw("POST", "/v1/files", encode_chunked(make_large_form(4)), long)
    assert status == 200
    assert json.loads(body)["bytes"] == 4 * 65536
    site.client.files.delete(json.loads(body)["id"])
    lying = make_form([("file", "a.txt", b"x" * 5000)])  # says less than it sends
    assert site.raw("POST", "/v1/files", lying, [("Content-Length", "1000"), *FORM])[0] == 400
    assert set(snapshot(site.data / "files")) == before


@pytest.mark.slow
def test_gzip_bombs_stop_at_the_upload_limit(site):
    before = set(snapshot(site.data / "files"))
    bomb = gzip.compress(bytes(200 * MIB), 9)
    assert len(bomb) < MIB
    start = time.monotonic()
    for name in ("bomb.txt.gz", "bomb.jsonl.gz"):
        status, body = site.raw("POST", "/v1/files", make_form([("file", name, bomb)]), FORM)
        assert status == 413
        assert "unpacked" in json.loads(body)["error"]["message"]
    assert time.monotonic() - start < 60
    assert set(snapshot(site.data / "files")) == before


def test_the_upload_of_a_disconnected_client_is_removed(site):
    before = set(snapshot(site.data / "files"))
    connection = http.client.HTTPConnection("127.0.0.1", site.port)
    connection.request("POST", "/v1/files", None, dict([*FORM, ("Content-Length", "900000")]))
    connection.send(make_form([("file", "a.txt", b"x" * 3000)], end=False))
    wait_until(lambda: set(snapshot(site.data / "files")) != before, what="the beginning of the upload")
    connection.close()
    wait_until(lambda: set(snapshot(site.data / "files")) == before, what="the end of it")


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "../LICENSE", "..%2f..%2fLICENSE", "%2e%2e/%2e%2e/etc/passwd", "%2e%2e%2fabout.json", "/etc/passwd", ".", "..", "*",
    "%2fetc%2fpasswd", "%00", "file-%00" + "0" * 24, "x" * 300, "file-" + "0" * 24 + "%0a", "file-" + "٣" * 24, "%ff",
    "file-" + "A" * 24, "file-link", "file-" + "1" * 24, "con",
])
def test_ids_are_never_paths(site, name):
    if isinstance(name, str):
        name = "".join(char if char.isascii() else "%" + "%".join(f"{b:02x}" for b in char.encode()) for char in name)
    link = site.data / "files" / ("file-" + "1" * 24)
    if not link.is_symlink():
        secret = site.data.parent / "secret"
        secret.mkdir()
        (secret / "about.json").write_text(json.dumps({"id": link.name, "suffix": ".txt", "created": 0}))
        (secret / "content.txt").write_text("secret")
        link.symlink_to(secret)
    real = site.client.files.create(file=("real.txt", b"text"), purpose="fine-tune").id
    before = snapshot(site.data.parent)
    for method, path in (("GET", "files/{}"), ("GET", "files/{}/content"), ("DELETE", "files/{}"),
                         ("GET", "datasets/{}"), ("POST", "datasets/{}/cancel"), ("GET", "fine_tuning/jobs/{}"),
                         ("GET", "fine_tuning/jobs/{}/curves.png"), ("GET", "fine_tuning/jobs/{}/events"),
                         ("POST", "fine_tuning/jobs/{}/resume"), ("POST", "fine_tuning/jobs/{}/cancel")):
        status, body = site.raw(method, "/v1/" + path.format(name), b"" if method == "POST" else None)
        assert status in (404, 405), (method, path)
        assert "error" in json.loads(body)
        assert b"secret" not in body
    for body in ({"files": [name]}, {"files": ["file-" + "1" * 24]}):
        assert site.raw("POST", "/v1/datasets", body)[0] == 404
    assert site.raw("POST", "/v1/datasets", {"files": [real], "encoder": name})[0] == 404
    for fields in ({"model": name}, {"model": "tiny", "training_file": name}):
        body = {"training_file": "file-" + "1" * 24, **fields}
        status, _ = site.raw("POST", "/v1/fine_tuning/jobs", body)
        assert status == 404
    assert snapshot(site.data.parent) == before
    site.client.files.delete(real)


# ---- runs ----------------------------------------------------------------------------------------------------------

TINY = {
    "batch_size": 2, "max_iters": 20, "eval_interval": 10**6, "log_interval": 5, "eval_iters": 1, "warmup_iters": 2,
    "sample_length": 0, "compile": False, "checkpoints.interval": 10**6,
    "model_hyperparams": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 300},
}  # fmt: skip
PRESET = "tinystar-v0.1-baseline"
LONG = {**TINY, "max_iters": 800, "log_interval": 50, "checkpoints.interval": 50}
STEPS = [1, *range(50, 801, 50), 800]  # that LONG tells of
ENDLESS = {**TINY, "max_iters": 10**6}


def stories():
    return "".join(json.dumps({"text": make_sentence(random.Random(i), 40)}) + "\n" for i in range(60)).encode()


@pytest.fixture(scope="module")
def story(site):
    return site.client.files.create(file=("stories.jsonl", stories()), purpose="fine-tune").id


def wait_for_end(client, job, seconds=90):
    def poll():
        found = client.fine_tuning.jobs.retrieve(job.id)
        return found if found.status not in ("validating_files", "queued", "running") else None

    return wait_until(poll, seconds, f"the end of {job.id}")


def wait_for_step(client, job, step=1):
    """Wait until the run has reached this step."""
    def poll():
        found = client.fine_tuning.jobs.retrieve(job.id)
        assert found.status in ("validating_files", "queued", "running"), found
        return found.progress["step"] >= step

    return wait_until(poll, 120, f"a step of {job.id}")


def was_resumed(site, job):
    """Whether the run went on from a checkpoint, and did not begin anew."""
    folder = site.data / "runs" / job.id
    return "resuming" in (folder / "log.txt").read_text() and not (folder / "checkpoints" / "earlier_1").exists()


def load_weights(site, job):
    return load_model(site.models / job.fine_tuned_model)[0].state_dict()


def find_processes(data):
    """The processes that run something in that directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(data) in path.joinpath("cmdline").read_text() or str(data) in str(path.joinpath("cwd").readlink()):
                state = path.joinpath("stat").read_text().rpartition(")")[2].split()[0]
                found += [int(path.name)] if state not in "ZX" else []
    return found


@pytest.mark.slow
def test_equal_dataset_requests_share_one_dataset_and_its_result(site):
    files = site.client.files
    one, two = (files.create(file=("a.jsonl", stories() + b'"%d"\n' % i), purpose="fine-tune").id for i in range(2))
    options = {"files": [one, two], "weights": [1, 2], "deduplicate": "near", "encoder": "chars", "name": "mine"}
    dataset = json.loads(site.raw("POST", "/v1/datasets", options)[1])
    assert dataset["object"] == "dataset"
    assert dataset["status"] in ("queued", "running")

    def poll():
        found = json.loads(site.raw("GET", f"/v1/datasets/{dataset['id']}")[1])
        assert 0 <= found["progress"]["done"] <= 1
        return found if found["status"] not in ("queued", "running") else None

    def poll_broken():
        found = json.loads(site.raw("GET", f"/v1/datasets/{broken['id']}")[1])
        return found if found["status"] == "failed" else None

    ready = wait_until(poll)
    assert ready["status"] == "succeeded", ready
    assert ready["result"]["documents"] == 62
    assert ready["result"]["left_out"]["exact_duplicates"] == 60
    assert ready["recipe"]["files"] == [one, two]
    again = files.create(file=("other name.jsonl", stories() + b'"0"\n'), purpose="fine-tune").id
    same = json.loads(site.raw("POST", "/v1/datasets", {**options, "files": [again, two], "name": "other"})[1])
    assert (same["id"], same["status"], same["created_at"]) == (dataset["id"], "succeeded", dataset["created_at"])
    for change in ({"weights": [2, 1]}, {"files": [two, one]}, {"similarity": 0.9}, {"seed": 1}):
        other = json.loads(site.raw("POST", "/v1/datasets", {**options, **change})[1])
        assert other["id"] != dataset["id"]
    listed = json.loads(site.raw("GET", "/v1/datasets?limit=2")[1])
    assert listed["has_more"]
    assert listed["data"][0]["id"] == other["id"]
    for bad, field in (({"files": []}, "files"), ({"files": [one], "min_chars": 0}, "min_chars"),
                       ({"files": [one], "fils": 1}, "fils"),
                       ({"files": [one], "similarity": float("nan")}, "similarity"),
                       ({"files": [one], "weights": [1, 2]}, "weights"), ({"files": one}, "files"), ({}, "files")):
        status, body = site.raw("POST", "/v1/datasets", bad)
        assert (status, json.loads(body)["error"]["param"]) == (400, field)
    for found in json.loads(site.raw("GET", "/v1/datasets")[1])["data"]:
        if found["status"] in ("queued", "running"):
            with pytest.raises(openai.ConflictError, match="is needed by the dataset"):
                files.delete(one)
            stopped = json.loads(site.raw("POST", f"/v1/datasets/{found['id']}/cancel", b"")[1])
            assert stopped["status"] in ("cancelled", "succeeded")
    files.delete(one)
    broken = json.loads(site.raw("POST", "/v1/datasets", {"files": [two], "min_chars": 10**6})[1])
    failed = wait_until(poll_broken)
    assert "no text is left" in failed["error"]["message"]
    assert str(site.data) not in failed["error"]["message"]


def check_events(tuning, job):
    """The events of a run that was paused once, newest first, a few at a time."""
    events = list(tuning.list_events(job.id, limit=4))
    messages = [event.message for event in events]
    plain = [message for message in messages if not message.startswith("step ")]
    assert plain == ["succeeded", "started", "resumed", "paused", "started", "created"]
    assert len({event.id for event in events}) == len(events)
    steps = [event.data["step"] for event in reversed(events) if event.type == "metrics"]
    assert steps == STEPS
    assert any("full_valid_loss" in event.data for event in events)
    assert [event.created_at for event in events] == sorted((event.created_at for event in events), reverse=True)


@pytest.mark.slow
def test_a_paused_and_resumed_run_ends_as_an_uninterrupted_one(site, story, uninterrupted_weights):
    """It ends with the weights of one that nothing has disturbed."""
    tuning = site.client.fine_tuning.jobs
    job = tuning.create(model=PRESET, training_file=story, hyperparameters=LONG, seed=3, suffix="mine",
                        metadata={"who": "me"})
    assert job.object == "fine_tuning.job"
    assert job.status in ("validating_files", "queued")
    assert job.fine_tuned_model is None
    wait_for_step(site.client, job)
    paused = tuning.pause(job.id)
    assert paused.status == "paused"
    assert find_processes(site.data) == []
    assert 1 <= paused.progress["step"] < 800
    assert tuning.resume(job.id).status in ("queued", "running")
    done = wait_for_end(site.client, job)
    assert done.status == "succeeded", done
    found = load_weights(site, done)
    assert all(torch.equal(uninterrupted_weights[name], found[name]) for name in found)
    assert was_resumed(site, job)
    assert (done.seed, done.trained_tokens, done.metadata) == (3, 800 * 2 * 16, {"who": "me"})
    assert done.created_at <= done.finished_at <= time.time()
    assert done.fine_tuned_model.startswith(f"ft-{PRESET}-mine-")
    assert done.fine_tuned_model in [model.id for model in site.client.models.list()]
    text = site.client.completions.create(model=done.fine_tuned_model, prompt="the", max_tokens=4, seed=1)
    assert text.usage.completion_tokens == 4
    check_events(tuning, job)
    points = list(tuning.checkpoints.list(job.id))
    assert points[0].step_number == 800
    assert points[0].metrics.full_valid_loss == pytest.approx(done.progress["val_loss"])
    name = points[0].fine_tuned_model_checkpoint
    same = site.client.completions.create(model=name, prompt="the", max_tokens=4, seed=1)
    assert same.choices[0].text == text.choices[0].text and same.model == name
    assert site.client.models.retrieve(name).id == name
    with pytest.raises(openai.BadRequestError, match="checkpoint"):
        site.client.models.delete(name)
    with pytest.raises(openai.NotFoundError):
        site.client.models.retrieve(name.replace("800", "799"))
    lines = json.loads(site.raw("GET", f"/v1/fine_tuning/jobs/{job.id}/metrics")[1])["data"]
    assert [line["step"] for line in lines] == STEPS
    for query in ("", "?sheet=learning_rate&x=tokens"):
        status, png = site.raw("GET", f"/v1/fine_tuning/jobs/{job.id}/curves.png{query}")
        assert (status, png[:8]) == (200, b"\x89PNG\r\n\x1a\n")
    assert site.raw("GET", f"/v1/fine_tuning/jobs/{job.id}/curves.png?sheet=../x")[0] == 400
    assert b"strawberry_jobs_running 0.0" in site.raw("GET", "/metrics")[1]
    for call in (tuning.cancel, tuning.pause, tuning.resume):
        with pytest.raises(openai.ConflictError):
            call(job.id)
    more = tuning.create(model=done.fine_tuned_model, training_file=story, hyperparameters={"max_iters": 5}, seed=1)
    again = wait_for_end(site.client, more)
    assert again.status == "succeeded", again
    assert again.fine_tuned_model.startswith(f"ft-{PRESET}-mine-")
    begin = [next(event.data["train_loss"] for event in tuning.list_events(run.id) if event.data.get("step") == 1)
             for run in (job, more)]
    assert begin[1] < begin[0] - 0.2  # it went on from what was learned


@pytest.mark.slow
def test_models_in_use_by_a_job_are_not_deleted(site, story):
    """Neither the one that a run starts from, nor the one that it writes, nor one whose encoder a dataset takes."""
    client, tuning = site.client, site.client.fine_tuning.jobs
    base = wait_for_end(client, tuning.create(model=PRESET, training_file=story, hyperparameters=TINY)).fine_tuned_model
    more = tuning.create(model=base, training_file=story, hyperparameters=ENDLESS | {"model_hyperparams": {}})
    wait_for_step(client, more)
    all_jobs = site.service.job_service.jobs
    own = all_jobs.jobs[more.id].about["model"]
    shutil.copy(site.models / base, site.models / own)  # as when it has just been written
    for model in (base, own):
        with pytest.raises(openai.ConflictError, match=f"{more.id}, which is running"):
            client.models.delete(model)
    (site.models / own).unlink()
    tuning.pause(more.id)
    with pytest.raises(openai.ConflictError, match=f"{more.id}, which is paused"):
        client.models.delete(base)
    tuning.cancel(more.id)
    with all_jobs.lock:  # so that it does not begin
        waiting = create_dataset_job(all_jobs, assemble.Recipe(files=[story], encoder=base, validation_share=0.3))
        with pytest.raises(RequestError, match=f"{waiting.id}, which is queued"):
            all_jobs.remove_model(base)
    wait_until(lambda: waiting.status == "succeeded", 60, "the dataset")
    assert client.models.delete(base).deleted and not (site.models / base).exists()


@pytest.mark.slow
def test_a_seed_is_drawn_and_recorded_unless_one_is_given(site, story):
    tuning, request = site.client.fine_tuning.jobs, {"model": PRESET, "training_file": story}
    assert read_json(ROOT / "config" / f"{PRESET}.json")["seed"] == 1
    drawn = [tuning.create(**request, hyperparameters=ENDLESS | more) for more in ({}, {}, {"seed": "auto"})]
    drawn += [tuning.create(**{**request, "model": "tiny"}, hyperparameters=ENDLESS)]
    given = [tuning.create(**request, hyperparameters={**ENDLESS, "seed": 7}),
             tuning.create(**request, hyperparameters=ENDLESS, seed=7)]
    assert len({*(job.seed for job in drawn), 1}) == 5
    assert [job.seed for job in given] == [7, 7]
    config = site.data / "runs" / drawn[0].id / "run.json"  # what train.py is to read
    wait_until(config.exists, what="the run")
    assert json.loads(config.read_text())["seed"] == drawn[0].seed
    for job in [*given, *drawn[::-1]]:
        assert tuning.cancel(job.id).seed == job.seed


@pytest.mark.slow
@pytest.mark.parametrize("hyperparameters, param", [
    ({"model_path": "/tmp/x"}, "hyperparameters.model_path"),
    ({"dataset": {"path": "/etc/passwd"}}, "hyperparameters.dataset.path"),
    ({"dataset.path": "x"}, "hyperparameters.dataset.path"),
    ({"checkpoints": {"path": "../x"}}, "hyperparameters.checkpoints.path"),
    ({"encoder_path": "tiktoken:gpt2"}, "hyperparameters.encoder_path"),
    ({"init_from": "/x,pretrained"}, "hyperparameters.init_from"),
    ({"img_path": "x"}, "hyperparameters.img_path"),
    ({"checkpoints.create_checkpoints": False}, "hyperparameters.checkpoints.create_checkpoints"),
])
def test_hyperparameters_that_name_paths_are_refused(site, story, hyperparameters, param):
    before = len(site.service.job_service.jobs.all("ftjob"))
    with pytest.raises(openai.BadRequestError) as caught:
        site.client.fine_tuning.jobs.create(model="tiny", training_file=story, hyperparameters=hyperparameters)
    assert caught.value.param == param
    assert len(site.service.job_service.jobs.all("ftjob")) == before


@pytest.mark.slow
def test_invalid_hyperparameters_get_the_message_of_the_command_line(site, story):
    for wrong in ({"learning_rate": -1}, {"learnin_rate": 1e-3}, {"model_hyperparams": {"n_layer": 0, "n_head": "x"}},
                  {"batch_size": 1.5}, {"max_iters": 10**30}, {"device": "gpu"}, {"model_hyperparams": {"arch": "x"}}):
        raw = merge_configs(read_json(ROOT / "config" / "tiny.json"), wrong)
        raw.pop("$schema")
        with pytest.raises(UserError) as error:
            make_run(raw, CONFIGS)
        with pytest.raises(openai.BadRequestError) as caught:
            site.client.fine_tuning.jobs.create(model="tiny", training_file=story, hyperparameters=wrong)
        assert caught.value.body["message"] == str(error.value)
    for body in ({"training_file": story}, {"model": "tiny"},
                 {"model": "tiny", "training_file": story, "suffix": "a/b"},
                 {"model": "tiny", "training_file": story, "hyperparameters": [1]},
                 {"model": "tiny", "training_file": story, "validation_file": story},
                 {"model": "tiny", "training_file": story, "metadata": {"a": 1}},
                 {"model": "tiny", "training_file": story, "metadata": {"\ud800": "a"}},
                 {"model": "tiny", "training_file": story, "method": {"type": "dpo"}},
                 {"model": "tiny", "training_file": story, "method": {"type": "supervised", "supervised": []}},
                 {"model": "tiny", "training_file": story, "hyperparameters": {"sample_prompt": "x" * 99_999}}):
        assert site.raw("POST", "/v1/fine_tuning/jobs", body)[0] == 400


def test_hyperparameters_of_openai_that_change_nothing_are_accepted(site, story):
    request = {"model": "tiny", "training_file": story}
    job = site.client.fine_tuning.jobs.create(**request, suffix="", validation_file=None, integrations=[],
                                              hyperparameters={"n_epochs": 1, "learning_rate_multiplier": 1.0})
    site.client.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(openai.BadRequestError, match="hyperparameters.n_epochs = 3: .*max_iters") as caught:
        site.client.fine_tuning.jobs.create(**request, hyperparameters={"n_epochs": 3})
    assert caught.value.body["param"] == "hyperparameters.n_epochs"


@pytest.mark.parametrize("depth", [20, 200, 330, 500, 900, 990, 10_000])
@pytest.mark.parametrize("field", ["hyperparameters", "method", "metadata", "integrations"])
def test_deeply_nested_json_is_refused(site, story, depth, field):
    for opening, closing in (('{"a":', "}"), ("[", "]")):
        value = opening * depth + "1" + closing * depth
        body = f'{{"model": "tiny", "training_file": "{story}", "{field}": {value}}}'.encode()
        status, answer = site.raw("POST", "/v1/fine_tuning/jobs", body, [("Content-Type", "application/json")])
        assert status == 400
        assert "deep" in json.loads(answer)["error"]["message"]


@pytest.mark.slow
def test_queueing_idempotency_and_cancelling(site, story):
    tuning = site.client.fine_tuning.jobs
    request = {"model": PRESET, "training_file": story, "hyperparameters": ENDLESS, "seed": 1}
    first = tuning.create(**request, extra_headers={"Idempotency-Key": "a key"})
    same = [None] * 4
    threads = [threading.Thread(target=lambda i=i: same.__setitem__(i, tuning.create(
        **request, extra_headers={"Idempotency-Key": "b key"}))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job.id for job in same}) == 1
    assert same[0].id != first.id
    assert tuning.create(**request, extra_headers={"Idempotency-Key": "a key"}).id == first.id
    with pytest.raises(openai.ConflictError, match="another request"):
        tuning.create(**{**request, "seed": 2}, extra_headers={"Idempotency-Key": "a key"})
    wait_for_step(site.client, first)
    waiting = tuning.retrieve(same[0].id)
    assert waiting.status in ("validating_files", "queued")  # max_jobs is 1
    assert tuning.cancel(waiting.id).status == "cancelled"
    pid = site.service.job_service.jobs.get("ftjob", first.id).child.pid
    assert pid in find_processes(site.data)
    gone = tuning.cancel(first.id)
    assert gone.status == "cancelled"
    assert gone.fine_tuned_model is None
    assert find_processes(site.data) == []
    steps = [point.step_number for point in tuning.checkpoints.list(first.id)]
    assert len(steps) == 1
    assert steps[0] >= 1
    assert tuning.cancel(first.id).status == "cancelled"  # a second time changes nothing
    assert [event.message for event in tuning.list_events(waiting.id)] == ["cancelled", "created"]


def test_a_warning_about_the_schedule_is_an_event_of_the_job(site, story):
    tuning = site.client.fine_tuning.jobs
    short = {**TINY, "warmup_iters": 40, "checkpoints.interval": 20}
    job = tuning.create(model=PRESET, training_file=story, hyperparameters=short)
    tuning.cancel(job.id)
    events = [event for event in tuning.list_events(job.id) if event.level == "warn"]
    assert len(events) == 1
    assert events[0].message.startswith("max_iters = 20: the run ends during its warm-up (warmup_iters = 40)")
    assert "set warmup_iters to 1, or max_iters" in events[0].message


@pytest.fixture(scope="module")
def uninterrupted_weights(site, story, tmp_path_factory):
    """The weights of the run of LONG with seed 3, as train.py makes them at one go, in this process."""
    folder, service = tmp_path_factory.mktemp("undisturbed"), site.service.job_service
    recipe = assemble.Recipe(files=[story], vocab_size=300, validation_share=0.05)
    dataset = create_dataset_job(service.jobs, recipe)
    wait_until(lambda: dataset.status == "succeeded")
    raw = merge_configs(find_starting_point(service.jobs, PRESET)[1], nest_keys(LONG) | {"seed": 3})
    job = Job(folder, {"id": "ftjob-0", "model": str(folder / "model.tinystar"),
                             "request": {"raw": raw, "base": None, "vocab_size": 300}})
    run = to_dict(build_run(service.jobs, job, dataset.folder))
    (folder / "run.json").write_text(json.dumps(run))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train.main(["--config", str(folder / "run.json")]) == 0
    torch.set_num_threads(threads)
    return load_model(folder / "model.tinystar")[0].state_dict()


# ---- errors without paths ------------------------------------------------------------------------------------------


def assert_no_path(site, message):
    for path in (site.data, site.models, ROOT, Path(sys.prefix), site.data.resolve().parent):
        assert str(path) not in message
    assert not re.search(r"(^|[\s'\"(=])/\w", message), message
    assert not re.search(r"\bcontent\b|file-[0-9a-f]{24}|run\.json|recipe\.json", message), message


INVALID_FILES = {  # a file's name: its bytes, and what the error says
    "bad bytes.txt": (b"abc\xff", "bad bytes.txt"),
    "missing.jsonl": (b'"a"\n{"txt": "b"}\n', "missing.jsonl, line 2"),
    "number.jsonl.gz": (gzip.compress(b'"a"\n\n3\n'), "number.jsonl.gz, line 3"),
    "cut (2).jsonl": (b'{"text": "a"}\n{"text": \n', "cut (2).jsonl, line 2"),
    "object.json": (b'{"a": 1}', "object.json"),
    "entry.json": (b'["a", 3]', "entry.json: entry 2"),
    "empty.txt": (b"", "empty.txt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INVALID_FILES)
def test_a_failed_dataset_names_the_file_as_it_was_uploaded(site, name):
    data, message = INVALID_FILES[name]
    file = site.client.files.create(file=(name, data), purpose="fine-tune").id
    failed = create_dataset(site, files=[file])
    assert failed["status"] == "failed"
    assert message in failed["error"]["message"]
    assert_no_path(site, failed["error"]["message"])


@pytest.mark.slow
def test_a_failed_run_names_its_dataset_and_no_path(site, story):
    """By its configuration, by its encoder, by its tokens, and by what is refused at once."""
    tuning, model = site.client.fine_tuning.jobs, TINY["model_hyperparams"]
    dataset = create_dataset(site, files=[story], encoder=None, vocab_size=300, name="tales")
    folder, request = site.data / "datasets" / dataset["id"], {"model": PRESET, "training_file": dataset["id"]}

    def failure(changes):
        job = tuning.create(**request, hyperparameters={**TINY, "model_hyperparams": model | changes})
        failed = wait_for_end(site.client, job)
        assert failed.status == "failed", failed
        assert failed.error.message == tuning.list_events(job.id).data[0].message
        assert_no_path(site, failed.error.message)
        return failed.error.message

    assert "vocab_size = 100: encoder_path the encoder of the dataset tales has 300" in failure({"vocab_size": 100})
    messages = {assemble.ENCODER: "the encoder of the dataset tales", assemble.TOKENS: "the dataset tales"}
    for name, message in messages.items():
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        assert message in failure({})
        (folder / name).write_bytes(whole)
    (site.models / "damaged.tinystar").write_bytes(b"no model")
    with pytest.raises(openai.BadRequestError) as caught:
        tuning.create(model="damaged.tinystar", training_file=story)
    (site.models / "damaged.tinystar").unlink()
    assert "damaged.tinystar" in caught.value.body["message"]
    assert_no_path(site, caught.value.body["message"])


# ---- deleting ------------------------------------------------------------------------------------------------------


def count_bytes(folder):
    """Bytes of the files in it, as find counts them."""
    printed = subprocess.run(["find", str(folder), "-type", "f", "-printf", "%s\n"], capture_output=True, check=True)
    return sum(map(int, printed.stdout.split()))


@pytest.mark.slow
def test_deleting_runs_and_datasets_keeps_the_model(site, story):
    client, tuning = site.client, site.client.fine_tuning.jobs
    dataset = create_dataset(site, files=[story], encoder=None, vocab_size=300, name="to delete")
    request = {"model": PRESET, "training_file": dataset["id"]}
    finished = wait_for_end(client, tuning.create(**request, hyperparameters=TINY, seed=1))
    running = tuning.create(**request, hyperparameters=ENDLESS, extra_headers={"Idempotency-Key": "to delete"})
    wait_for_step(client, running)
    paths = {job.id: site.data / "runs" / job.id for job in (finished, running)}

    # disk use, in the lists and alone
    listed = {job.id: job for job in tuning.list()}
    assert listed[finished.id].bytes == tuning.retrieve(finished.id).bytes == count_bytes(paths[finished.id]) > 50_000
    datasets = {found["id"]: found for found in json.loads(site.raw("GET", "/v1/datasets")[1])["data"]}
    assert datasets[dataset["id"]]["bytes"] == count_bytes(site.data / "datasets" / dataset["id"]) > 10_000

    # what is in use stays
    for path in (f"/fine_tuning/jobs/{running.id}", f"/datasets/{dataset['id']}"):
        with pytest.raises(openai.ConflictError, match="cancel"):
            client.delete(path, cast_to=object)
    tuning.pause(running.id)
    with pytest.raises(openai.ConflictError, match=f"needed by the fine-tuning job {running.id}, which is paused"):
        client.delete(f"/datasets/{dataset['id']}", cast_to=object)
    tuning.cancel(running.id)

    # a dataset: the run names what it lacks, and can be resumed once the same files have been assembled again
    assert client.delete(f"/datasets/{dataset['id']}", cast_to=object) == {
        "id": dataset["id"], "object": "dataset", "deleted": True}
    assert not (site.data / "datasets" / dataset["id"]).exists()
    assert site.raw("GET", f"/v1/datasets/{dataset['id']}")[0] == 404
    with pytest.raises(openai.NotFoundError):
        tuning.create(**request, hyperparameters=TINY)
    with pytest.raises(openai.ConflictError, match=dataset["id"]):
        tuning.resume(running.id)
    assert create_dataset(site, files=[story], encoder=None, vocab_size=300, name="again")["id"] == dataset["id"]
    tuning.resume(running.id)
    wait_for_step(client, running, step=tuning.retrieve(running.id).progress["step"] + 1)
    tuning.cancel(running.id)

    # runs: everything of them goes but the model
    checkpoint = tuning.checkpoints.list(finished.id).data[0].fine_tuned_model_checkpoint
    assert run_curl(site, "-X", "DELETE", f"/v1/fine_tuning/jobs/{running.id}")["deleted"] is True
    assert client.delete(f"/fine_tuning/jobs/{finished.id}", cast_to=object) == {
        "id": finished.id, "object": "fine_tuning.job", "deleted": True}
    assert not any(path.exists() for path in paths.values())
    assert not {finished.id, running.id} & {job.id for job in tuning.list()}
    for call in (tuning.retrieve, tuning.resume, tuning.cancel, tuning.list_events):
        with pytest.raises(openai.NotFoundError):
            call(finished.id)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=checkpoint, prompt="the", max_tokens=1)
    text = client.completions.create(model=finished.fine_tuned_model, prompt="the", max_tokens=2)
    assert text.usage.completion_tokens == 2
    new = tuning.create(**request, hyperparameters=ENDLESS, extra_headers={"Idempotency-Key": "to delete"})
    assert new.id != running.id
    tuning.cancel(new.id)


# ---- full disks ----------------------------------------------------------------------------------------------------


def list_warnings(client, job):
    return [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.level == "warn"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sets limits of another process")
def test_a_stopped_run_reports_the_steps_that_it_could_not_save(site, story):
    """No file of the run can grow beyond 4 kB: neither a checkpoint nor, in the long run, the metrics."""
    import resource

    client, tuning = site.client, site.client.fine_tuning.jobs
    options = {**ENDLESS, "log_interval": 1, "checkpoints.interval": 10**6}
    job = tuning.create(model=PRESET, training_file=story, hyperparameters=options)
    wait_for_step(client, job)
    for pid in find_processes(site.data / "runs" / job.id):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (status_file.SIZE, resource.RLIM_INFINITY))
    wait_until(lambda: any("metrics.jsonl" in line for line in list_warnings(client, job)), what="the warning")
    stopped = tuning.cancel(job.id)
    assert (stopped.status, stopped.error.code) == ("cancelled", "not_saved")
    message = stopped.error.message
    assert re.match(r"nothing was saved of [\d,]+ steps, resuming starts again: .*File too large", message)
    assert_no_path(site, message)
    assert tuning.checkpoints.list(job.id).data == []
    warnings = list_warnings(client, job)
    assert warnings[0] == stopped.error.message
    assert any("cannot save the checkpoint" in line for line in warnings)
    assert len({re.sub(r"\d+", "", line) for line in warnings}) == len(warnings), "one of them is given twice"
    assert tuning.resume(job.id).error is None  # the new process has no limit
    wait_for_step(client, job, step=stopped.progress["step"] + 10)
    saved = tuning.cancel(job.id)
    assert (saved.status, saved.error) == ("cancelled", None)
    assert tuning.checkpoints.list(job.id).data[0].step_number >= saved.progress["step"]
    assert list_warnings(client, job) == warnings


def can_mount():
    unshare = shutil.which("unshare")
    return bool(unshare) and not subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode


def fill_disk(path):
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
def test_a_full_disk_is_reported_and_recovered_from(tmp_path):
    """Neither the run nor the server can write anything: events and the answer to pause say it all the same."""
    require_program("unshare")
    require(can_mount(), "a kernel that lets users mount a tmpfs (unshare -rm)")
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    serving = f"mount -t tmpfs -o size=6m none {tmp_path / 'data'} && exec \"$0\" \"$@\""
    argv = [sys.executable, str(ROOT / "serve.py"), f"--data={tmp_path / 'data'}", f"--models={tmp_path / 'models'}",
            "--port=0"]
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(["unshare", "-rm", "sh", "-c", serving, *argv], stdout=log, stderr=log)
    try:
        client, data = make_client(wait_for_port(tmp_path / "log")), Path(f"/proc/{server.pid}/root{tmp_path / 'data'}")
        tuning = client.fine_tuning.jobs
        story = client.files.create(file=("stories.jsonl", stories()), purpose="fine-tune").id
        options = {**ENDLESS, "log_interval": 10, "checkpoints.interval": 10}
        job = tuning.create(model=PRESET, training_file=story, hyperparameters=options)
        wait_until(lambda: tuning.checkpoints.list(job.id).data, what="a checkpoint")
        fill_disk(data / "ballast")
        lost = ("cannot save the checkpoint", "metrics.jsonl", "cannot write the log")
        wait_until(lambda: all(what in "\n".join(list_warnings(client, job)) for what in lost), 120, "the warnings")
        paused = tuning.pause(job.id)
        assert (paused.status, paused.error.code) == ("paused", "not_saved")
        saved = tuning.checkpoints.list(job.id).data[0].step_number
        steps = re.match(r"steps ([\d,]+) to ([\d,]+) were not saved, resuming goes on from step ([\d,]+): .*No space",
                         paused.error.message)
        assert [int(step.replace(",", "")) for step in steps.group(1, 3)] == [saved + 1, saved]
        assert paused.error.message in list_warnings(client, job)
        for call in (lambda: client.files.create(file=("more.txt", b"more" * 5000), purpose="fine-tune"),
                     lambda: tuning.create(model=PRESET, training_file=story, hyperparameters=ENDLESS)):
            with pytest.raises(openai.InternalServerError, match="cannot be stored: No space left on device") as caught:
                call()
            assert (caught.value.status_code, str(tmp_path) in str(caught.value)) == (507, False)
        (data / "ballast").unlink()

        def is_stored():
            about = json.loads((data / "runs" / job.id / ABOUT).read_bytes())
            events = (data / "runs" / job.id / EVENTS).read_text()
            return about["status"] == "paused" and paused.error.message in events

        wait_until(is_stored, what="what the disk did not take")
        resumed = tuning.resume(job.id)
        assert resumed.error is None
        wait_for_step(client, job, step=saved + 20)
        again = tuning.pause(job.id)
        assert (again.status, again.error) == ("paused", None)
    finally:
        server.terminate()
        server.wait(90)


# ---- a killed server -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_survives_a_kill_of_the_server_and_of_its_process(tmp_path, uninterrupted_weights):
    """kill −9 of the server: the next one watches the run on. kill −9 of the run too: it has failed, and can go on."""
    data, models = tmp_path / "data", tmp_path / "models"
    models.mkdir()
    argv = [sys.executable, str(ROOT / "serve.py"), "--data", str(data), "--models", str(models), "--port", "0"]
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(argv, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
    port = wait_for_port(tmp_path / "log")
    client = make_client(port)
    check_upload_memory(server.pid, port, data)
    story = client.files.create(file=("stories.jsonl", stories()), purpose="fine-tune").id
    request = {"model": PRESET, "training_file": story, "hyperparameters": LONG, "seed": 3}
    job = client.fine_tuning.jobs.create(**request, extra_headers={"Idempotency-Key": "once"})
    wait_for_step(client, job, step=50)
    [pid] = find_processes(data / "runs")
    os.kill(pid, signal.SIGSTOP)  # so that it doesn't come to its end before this test does
    os.killpg(server.pid, signal.SIGKILL)  # and all that a terminal would end with it
    server.wait()
    with JobServer(tmp_path) as site:
        found = site.client.fine_tuning.jobs.retrieve(job.id)
        assert found.status == "running"
        assert find_processes(data / "runs") == [pid]
        os.kill(pid, signal.SIGKILL)
        dead = wait_for_end(site.client, job)
        assert dead.status == "failed"
        assert dead.error.code == "interrupted"
        assert dead.fine_tuned_model is None
        assert list(models.glob("*")) == []
        again = site.client.fine_tuning.jobs.create(**request, extra_headers={"Idempotency-Key": "once"})
        assert again.id == job.id
        site.client.fine_tuning.jobs.resume(job.id)
        done = wait_for_end(site.client, job)
        assert done.status == "succeeded", done
        found = load_weights(site, done)
        assert all(torch.equal(uninterrupted_weights[name], found[name]) for name in found)
        assert was_resumed(site, job)
        events = list(site.client.fine_tuning.jobs.list_events(job.id))[::-1]
        assert [event.data["step"] for event in events if event.type == "metrics"] == STEPS


def check_upload_memory(pid, port, data):
    """Two uploads of 64 MB go to disk and not into memory, by Content-Length and in chunks."""
    def memory(what):
        return int(re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1024

    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is from now on
    before = memory("VmRSS")
    for headers, change in (([("Transfer-Encoding", "chunked")], encode_chunked), ([], list)):
        body = list(change(make_large_form(64, MIB)))
        length = [] if headers else [("Content-Length", str(sum(map(len, body))))]
        status, answer = send_request(port, "POST", "/v1/files", body, [*headers, *length, *FORM])
        assert status == 200
        assert json.loads(answer)["bytes"] == 64 * MIB
    assert memory("VmHWM") - before < 50, "MB of memory for two uploads of 64 MB"


@pytest.mark.slow
@pytest.mark.parametrize(("n_jobs", "given", "expected"), [(1, None, "-"), (2, None, "4"), (16, None, "1"),
                                                           (2, "3", "3")])  # fmt: skip
def test_concurrent_jobs_share_the_cores(tmp_path, monkeypatch, n_jobs, given, expected):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    child = ChildProcess(tmp_path)
    child.start(["-c", "import os; print(os.environ.get('OMP_NUM_THREADS', '-'))"], n_jobs)
    child.process.wait(60)
    assert (tmp_path / "log.txt").read_text().split() == [expected]
