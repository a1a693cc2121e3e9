"""log_to: TensorBoard's own reader, and the records of a W&B run folder, agree with metrics.jsonl."""

import builtins
import importlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
from machine import require_module
from packaging.requirements import Requirement
from runs import TEXT, metrics, run, write_config, write_corpus

import train
from model import CONFIGS
from strawberry.common import UserError
from strawberry.run_config import load_run
from strawberry.training import loggers
from strawberry.training.loggers import Loggers, flatten, kind_and_position, pinned


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    Path("text.txt").write_text(TEXT)
    write_corpus("data.bin")
    write_config("tinystar", img_path=None)


def numbers_of(line: dict) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step" and isinstance(value, (int, float))}


# ---- TensorBoard ---------------------------------------------------------------------------------------------------


def read_events(path="ck/tensorboard"):
    """({(tag, step): [values]}, {(tag, step): [texts]}, {hyperparameter: value}) as TensorBoard reads them."""
    require_module("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    reader = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0})
    reader.Reload()
    scalars, texts = {}, {}
    for tag in reader.Tags()["scalars"]:
        for event in reader.Scalars(tag):
            scalars.setdefault((tag, event.step), []).append(event.value)
    for tag in reader.Tags()["tensors"]:
        for event in reader.Tensors(tag):
            (text,) = event.tensor_proto.string_val
            name = tag.removesuffix("/text_summary")
            texts.setdefault((name, event.step), []).append(text.decode())
    start = reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    found = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    return scalars, texts, {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


def check_events(path="ck"):
    """The event files have what metrics.jsonl has, each value once, and nothing else."""
    scalars, texts, hyperparameters = read_events(f"{path}/tensorboard")
    lines = metrics(f"{path}/metrics.jsonl")
    expected = [((name, line["step"]), value) for line in lines for name, value in numbers_of(line).items()]
    assert len(expected) > 20 and all(len(values) == 1 or name == "tokens" for (name, _), values in scalars.items())
    assert scalars.keys() == {key for key, _ in expected}
    for key, value in expected:
        assert scalars[key][0] == pytest.approx(value, rel=1e-6), key  # float32
    samples = {("sample", line["step"]): line["sample"] for line in lines if "sample" in line}
    config = texts.pop(("hyperparameters", 0))
    assert samples and samples == {key: re.sub("^    ", "", value[0], flags=re.M) for key, value in texts.items()}
    assert json.loads(config[0])["max_iters"] == hyperparameters["max_iters"]
    return hyperparameters


@pytest.mark.slow
def test_tensorboard_has_what_metrics_jsonl_has():
    require_module("tensorboard")
    assert run("--log_to=tensorboard") == 0
    hyperparameters = check_events()
    assert hyperparameters["model_hyperparams/n_embd"] == 16 and hyperparameters["learning_rate"] == 3e-3
    assert hyperparameters["optimizer_hyperparams/muon_lr"] == "null"
    assert not Path("ck/wandb").exists()


@pytest.mark.slow
def test_a_resumed_run_repeats_no_step_in_tensorboard():
    """Lines after the checkpoint, and an event file that lacks some: both are as in metrics.jsonl afterwards."""
    require_module("tensorboard")
    assert run("--log_to=tensorboard", "--max_iters=6", "--checkpoints.interval=4") == 0
    shutil.rmtree("ck/step_00000006")
    assert run("--log_to=tensorboard", "--init_from=resume") == 0
    assert [line["step"] for line in metrics() if "loss" in line] == list(range(1, 11))
    check_events()
    (file,) = Path("ck/tensorboard").iterdir()
    assert run("--init_from=resume", "--max_iters=12") == 0  # not logged there
    assert list(Path("ck/tensorboard").iterdir()) == [file]
    assert run("--init_from=resume", "--max_iters=14", "--log_to=tensorboard") == 0
    check_events()
    assert run("--log_to=tensorboard") == 0  # from scratch
    check_events()
    check_events("ck/earlier_1")


def test_rewritten_lines_keep_their_time_differences():
    require_module("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Path("ck").mkdir()
    state = train.Trainer(load_run(["--config", "run.json"], CONFIGS), train.Signals())
    logger = loggers.TensorBoard(state)
    logger.rewind([{"step": 1, "loss": 3.0, "seconds": 10.0}, {"step": 1, "val_loss": 2.0},
                   {"step": 2, "loss": 1.0, "seconds": 250.0}])  # fmt: skip
    logger.close()
    reader = EventAccumulator("ck/tensorboard").Reload()
    first, second = (event.wall_time for event in reader.Scalars("loss"))
    assert second - first == pytest.approx(240) and reader.Scalars("val_loss")[0].wall_time == first


# ---- Weights & Biases ----------------------------------------------------------------------------------------------


def read_records(path):
    """The records of a .wandb file: blocks of 32 KiB of chunks, each with checksum, length and type (whole, first,
    middle, last), as in LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""  # after the file's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def read_rows(path):
    """(rows of the history, config) of a W&B run folder."""
    rows, config = [], {}
    for record in (record for file in Path(path).glob("*.wandb") for record in read_records(file)):
        which = record.WhichOneof("record_type")
        if which == "history":
            values = {tuple(item.nested_key) or (item.key,): item.value_json for item in record.history.item}
            rows.append({name: json.loads(value) for (name, *inner), value in values.items() if not inner})
        elif which == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return rows, config


def run_folders(path="ck"):
    return sorted(Path(path, "wandb").glob("offline-run-*"))  # the time is in the name


def check_rows(rows, lines):
    """The rows have the numbers of the lines, in order, and nothing else but W&B's own keys."""
    plain = [{name: value for name, value in row.items() if name[0] != "_" and isinstance(value, (int, float))}
             for row in rows]  # fmt: skip
    assert plain == [{"step": line["step"], **numbers_of(line)} for line in lines]


@pytest.mark.slow
def test_wandb_has_what_metrics_jsonl_has_and_a_resumed_run_is_continued(capfd):
    require_module("wandb")
    assert run("--log_to=wandb", "--max_iters=6") == 0
    (folder,) = run_folders()
    rows, config = read_rows(folder)
    check_rows(rows, metrics())
    assert config["max_iters"] == 6 and config["model_hyperparams"]["n_embd"] == 16
    pages = sorted((folder / "files" / "media" / "html").iterdir(), key=lambda page: int(page.name.split("_")[1]))
    samples = [line["sample"] for line in metrics() if "sample" in line]
    assert [re.search("<pre>(.*?)</pre>", page.read_text(), re.S)[1] for page in pages] == samples
    # the last checkpoint is lost: steps 5 and 6 are repeated, and W&B has them already
    shutil.rmtree("ck/step_00000006")
    ended = int(time.time())
    while int(time.time()) == ended:  # a folder's name has the second of its start
        time.sleep(0.02)
    assert run("--log_to=wandb", "--init_from=resume", "--quiet") == 0
    first, second = run_folders()
    assert first == folder and first.name.split("-")[-1] == second.name.split("-")[-1]
    rows, config = read_rows(second)
    check_rows(rows, [line for line in metrics() if line["step"] > 6])
    assert config["max_iters"] == 10
    assert "log_to" not in capfd.readouterr().err


def test_a_rollback_sends_the_repeated_steps_again():
    sent = WandBWithoutPackage()
    for n in (1, 2, 3):
        sent.add({"step": n, "loss": float(n)})
    sent.rewind([{"step": 1, "loss": 1.0}])
    sent.add({"step": 1, "rollback": 1, "why": "inf"})
    sent.add({"step": 2, "loss": 9.0})
    sent.add({"step": 2, "val_loss": 8.0})
    sent.rewind([{"step": 1, "loss": 1.0}, {"step": 1, "rollback": 1}])
    sent.add({"step": 1, "rollback": 2})
    assert [row["step"] for row in sent.rows] == [1, 2, 3, 1, 2, 2, 1]
    assert sent.rows[3] == {"step": 1, "rollback": 1, "why": "<pre>inf</pre>"}


class WandBWithoutPackage(loggers.WandB):
    def __init__(self):
        self.rows, self.sent, self.states, self.recent = [], {}, [], deque()
        self.package, self.logged = self, self

    Html = staticmethod(str)

    def log(self, row):
        self.rows.append(row)

    def write_state(self, sent):
        self.states.append(dict(sent))


def test_a_line_counts_as_written_after_some_seconds(monkeypatch):
    sent, now = WandBWithoutPackage(), [0.0]
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now[0])
    for step, at in ((1, 0), (2, 1), (3, 2), (4, 4.5), (5, 20)):
        now[0] = at
        sent.add({"step": step, "loss": 1.0})
    assert sent.states == [{}, {}, {}, {"step": 2}, {"step": 4}]


# ---- both ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_resumes_in_tensorboard_and_wandb_without_a_gap():
    require_module("tensorboard")
    require_module("wandb")
    write_config("tinystar", img_path=None, decay_lr=False)  # the same values whatever max_iters is
    both = '--log_to=["tensorboard", "wandb"]'
    words = [sys.executable, str(Path(train.__file__)), "--config", "run.json", both, "--max_iters=100000"]
    # a service of its own, not this process's
    own = {name: value for name, value in os.environ.items() if not name.endswith("WANDB_SERVICE")}
    killed = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=own)
    end = time.monotonic() + 120
    while not Path("ck/metrics.jsonl").exists() or len(metrics()) < 12:
        assert killed.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    reached = metrics()[-1]["step"]
    assert run("--init_from=resume", both, f"--max_iters={reached + 3}") == 0
    check_events()
    first, second = [{row["step"]: row["loss"] for row in read_rows(folder)[0] if "loss" in row}
                     for folder in run_folders()]  # fmt: skip
    assert first | second == {line["step"]: line["loss"] for line in metrics() if "loss" in line}
    assert all(first[step] == second[step] for step in first.keys() & second.keys())


def test_nothing_is_imported_unless_it_is_asked_for(monkeypatch):
    def refuse(name, *rest, load=builtins.__import__):
        assert name.partition(".")[0] not in ("tensorboard", "wandb"), name
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(importlib, "import_module", lambda name: refuse(name))
    assert run("--max_iters=2") == 0
    assert not [name for name in ("tensorboard", "wandb") if Path("ck", name).exists()]


def test_pip_installs_the_packages_only_by_name():
    lines = [line for line in loggers.REQUIREMENTS.read_text().splitlines() if line and line[0] != "#"]
    skipped = {found.name for found in map(Requirement, lines) if found.marker and "extra" in str(found.marker)
               and not found.marker.evaluate({"extra": ""})}  # fmt: skip
    assert skipped == set(loggers.LOGGERS)


@pytest.mark.parametrize("log_to", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_before_anything_is_written(monkeypatch, log_to):
    monkeypatch.setitem(sys.modules, log_to, None)
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError) as found:
        run(f'--log_to=["{log_to}"]')
    version = re.search(rf'^{log_to}==(\S+); extra == "logging"$', loggers.REQUIREMENTS.read_text(), re.M)[1]
    assert str(found.value) == (
        f'log_to = "{log_to}": the package {log_to} is not installed: pip install {log_to}=={version}'
    )
    assert sorted(Path().rglob("*")) == before


def test_wandb_without_a_key_is_an_error_that_names_the_fix(monkeypatch, tmp_path):
    require_module("wandb")
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "setup", lambda: type("Setup", (), {"settings": wandb.Settings(mode="online")}))

    def refuse():
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "login", refuse)
    with pytest.raises(UserError, match="No API key.*wandb login.*WANDB_MODE=offline"):
        run("--log_to=wandb")
    assert not Path("ck").exists()


def test_a_wrong_name_is_refused():
    with pytest.raises(UserError, match='log_to = "wandbb": must be.*did you mean .wandb.'):
        run("--log_to=wandbb")
    with pytest.raises(UserError, match="log_to = .*must be"):
        run('--log_to=["tensorboard","x"]')


class Failing:
    name, can_retry = "tensorboard", True

    def __init__(self):
        self.broken, self.lines, self.calls = False, [], 0

    def rewind(self, lines):
        self.fail()
        self.lines = list(lines)

    def add(self, line):
        self.fail()
        self.lines.append(line)

    def close(self, finished):
        self.fail()

    def fail(self):
        self.calls += 1
        if self.broken:
            raise OSError(28, "No space left on device")


def test_a_logger_that_fails_warns_once_and_is_tried_again(capsys):
    failing, steady = Failing(), Failing()
    both, lines = Loggers([failing, steady]), []

    def add(step, **values):
        lines.append({"step": step, **values})
        both.add(lines[-1], lambda: lines)

    both.rewind([])
    add(1, loss=1.0)
    failing.broken = True
    add(2, loss=1.0)
    add(2, val_loss=1.0)
    add(3, loss=1.0)
    assert capsys.readouterr().err.count("warning:") == 1
    assert failing.lines == lines[:1] and steady.lines == lines
    failing.broken = False
    add(4, loss=1.0)
    assert failing.lines == lines[:1]
    add(4, val_loss=1.0)
    add(5, loss=1.0)
    assert failing.lines == lines == steady.lines
    failing.can_retry, failing.broken = False, True
    add(6, loss=1.0)
    calls = failing.calls
    add(6, val_loss=1.0)
    both.close(True)
    both.close(True)
    assert failing.calls == calls and steady.calls == 11


def test_a_full_disk_stops_tensorboard_and_not_the_run(monkeypatch, capsys):
    require_module("tensorboard")
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, calls = RecordWriter.write, []

    def fill(self, data):
        calls.append(data)
        if len(calls) == 45:
            raise OSError(28, "No space left on device")
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", fill)
        assert run("--log_to=tensorboard") == 0
    assert capsys.readouterr().err.count("warning: log_to") == 1
    assert len(metrics()) == 12
    check_events()


def test_only_rank_0_logs(monkeypatch):
    trainer = train.Trainer(load_run(["--config", "run.json", "--log_to=tensorboard"], CONFIGS), train.Signals())
    monkeypatch.setattr(type(trainer.ranks), "main", False)
    trainer.set_up()
    assert trainer.metrics.loggers.working == []
    trainer.close()


def test_lines_are_flattened_and_versions_pinned():
    line = {"step": 3, "loss": None, "lr": 0.5, "loads": {"b": [1, 2]}, "why": "x"}
    assert dict(flatten(line))["loads/b/1"] == 2
    assert loggers.split_line(line) == ({"lr": 0.5, "loads/b/0": 1, "loads/b/1": 2}, {"why": "x"})
    assert kind_and_position({"step": 3, "val_loss": None}) == ("evaluation", 3)
    assert pinned("torch").startswith("torch==") and pinned("tensorboard").count("=") == 2
    assert pinned("nothing") == "nothing"
