"""Comparisons: equal conditions for all, nothing done twice, tables that say what was found."""

import functools
import http.client
import io
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import forks
import numpy as np
import pytest
import torch

import bench
import encoder as encoders
from model import CONFIGS, build
from strawberry.bench import (
    child_process,
    compare,
    compare_report,
    decode,
    growth,
    hardware,
    scale,
    serve,
    sweep,
    train,
)
from strawberry.bench.common import (
    SHARED_KEYS,
    check_results,
    format_command,
    get_value,
    load_entries,
    parse_override,
    parse_quantity,
)
from strawberry.bench.width import match_params
from strawberry.common import UserError, run_cli
from strawberry.config import check
from strawberry.data.token_file import TokenFileWriter
from strawberry.inference import engine
from strawberry.model_file import save_model
from strawberry.run_config import CONFIG_FOLDER, run_class
from strawberry.training import plot

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .\n"
SMALL = {"vocab_size": 44, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
PRESETS = sorted(path.name for path in CONFIG_FOLDER.glob("*.json") if path.name != "schema.json")
NEXT_TOKEN = [name for name in PRESETS if name not in ("transformer-masked.json", "transformer-pairs.json",
                                                      "transformer-spans.json")]  # fmt: skip

# A child that trains nothing: it notes that it was called, and "measures" what its config says.
FAKE = """
import json, os, signal, sys
role, *arguments = sys.argv[1:]
path = next(word for word in arguments if word.endswith("config.json"))
run = json.load(open(path))
lr, seed, width = run["learning_rate"], run["seed"], run["model_hyperparams"]["n_embd"]
signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
with open("calls.txt", "a") as file:
    file.write(f"{role} {width} {lr:g} {seed} {'--init_from=resume' in arguments}\\n")
if os.path.exists(f"fail_{width}_{role}"):
    print("error: the device is on fire", file=sys.stderr)
    sys.exit(2)
if os.path.exists(f"hang_{width}_{role}"):
    signal.pause()
if role == "_speed":
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps({"tokens_per_s": 1000.0, "steps": 10, "memory": None, "resident": 3 << 30, "compiled": False}))
    sys.exit()
os.makedirs(run["checkpoints"]["path"], exist_ok=True)
with open(os.path.join(run["checkpoints"]["path"], "metrics.jsonl"), "w") as file:
    for step in range(1, run["max_iters"] + 1):
        both = {"step": step, "tokens": 64 * step}
        file.write(json.dumps({**both, "loss": 2.0, "seconds": step / 10, "tokens_per_s": 640.0}) + "\\n")
        if step % run["eval_interval"] == 0 or step == run["max_iters"]:
            bpb = 2 + 10 / step + abs(lr - 3e-3) * 100 + seed / 100
            bpb += run["optimizer_hyperparams"]["use_muon"] * (24 - width) / 16
            file.write(json.dumps({**both, "val_loss": bpb, "val_bpb": bpb}) + "\\n")
sys.exit(3 if lr > 0.5 else 0)
"""


hash_code_once = functools.cache(sweep.hash_code)  # it reads all of the code


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A directory with a corpus and two configs, where children are fakes."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(ALPHABET)
    encoder = encoders.load("chars:text.txt")
    with TokenFileWriter("data.bin", encoder) as writer:
        for n in range(60):
            writer.add(np.array(encoder.encode(f"a cat sat on the mat and saw {n} dogs.\n")))
    write_config("a", {"arch": "tinystar"})
    write_config("b", {"arch": "tinystar", "n_embd": 32})
    command = lambda role, *arguments: [sys.executable, "-c", FAKE, role, *arguments]  # noqa: E731
    monkeypatch.setattr(child_process, "make_command", command)
    monkeypatch.setattr(child_process, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(compare, "hash_code", hash_code_once)
    monkeypatch.setattr(compare_report, "draw_comparison", lambda *arguments: None)
    monkeypatch.setattr(plot, "save", lambda *arguments: None)
    return tmp_path


def write_config(name, model, **changes):
    config = {
        "dataset": {"path": "data.bin", "data_division": 0.8}, "encoder_path": "chars:text.txt", "batch_size": 4,
        "model_hyperparams": SMALL | model, "eval_iters": 2, "compile": False,
    }  # fmt: skip
    Path(f"{name}.json").write_text(json.dumps(config | changes))


def run_compare(*words):
    """20 steps of 64 tokens, two learning rates, two seeds: three runs for each config."""
    defaults = {"--tokens": "1280", "--seeds": "2", "--lrs": "1e-3,3e-3", "--device": "cpu", "--out": "out"}
    for name, value in defaults.items():
        words = words if name in words else (*words, name, value)
    return bench.main(["compare", *words])


def calls(role="_train"):
    """What children were started for, since this was last asked."""
    path = Path("calls.txt")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.removeprefix(f"{role} ") for line in lines if line.startswith(role)]


def table():
    return {row["label"]: row for row in json.loads(Path("out/compare.json").read_text())["rows"]}


def entries(*specs, common=()):
    return load_entries(list(specs), [parse_override(text) for text in common])


def plan(**changes):
    fixed = {"steps": 100, "tokens_per_step": 64, "warmup": 0.05, "cooldown": 0.4, "lrs": [1e-3], "seeds": 1, "jobs": 1,
             "device": torch.device("cpu"), "out": Path("out"),
             "data": {"dataset": "d", "encoder": "e", "code": "c" * 64}}  # fmt: skip
    return sweep.Plan(**fixed | changes)


# ---- what is compared ----------------------------------------------------------------------------------------------


def test_quantities_are_read_short_and_long():
    assert [parse_quantity(text) for text in ("5M", "100k", "1.5B", "2e6", "7")] == [5 * 10**6, 10**5, 15 * 10**8,
                                                                                     2 * 10**6, 7]  # fmt: skip
    for text in ("", "M", "-5M", "0", "many", "nan", "inf"):
        with pytest.raises(UserError, match="5M"):
            parse_quantity(text)


def test_overrides_on_the_command_line_reach_the_model_without_their_section(workdir):
    write_config("s", {"n_qkv": 16})
    found = entries("s.json", "s.json:retention=none,windows=[8],weight_decay=0.5", "s.json:r_layer=0")
    assert [entry.label for entry in found] == ["s", "s retention=none windows=[8] weight_decay=0.5", "s r_layer=0"]
    assert [entry.run.model_hyperparams.retention for entry in found] == ["on", "none", "on"]
    assert [entry.run.model_hyperparams.r_layer for entry in found] == [2, 2, 0]
    assert found[1].run.model_hyperparams.windows == [8]
    assert [entry.run.optimizer_hyperparams.weight_decay for entry in found] == [0.1, 0.5, 0.1]
    assert found[1].params < found[0].params  # without `out` and `tao`


def test_set_is_for_all_and_yields_to_a_config_s_own(workdir):
    found = entries("a.json", "b.json:n_layer=3", common=["n_layer=2", "use_muon=true"])
    assert [entry.run.model_hyperparams.n_layer for entry in found] == [2, 3]
    assert all(entry.run.optimizer_hyperparams.use_muon for entry in found)


def test_all_configs_get_the_shared_keys_of_the_first(workdir):
    write_config("c", {"arch": "tinystar", "block_size": 8}, batch_size=2, eval_iters=9)
    first, second = entries("a.json", "c.json")
    for key in SHARED_KEYS:
        assert get_value(second.run, key) == get_value(first.run, key), key
    output = " ".join(second.changes)
    assert "block_size 8 → 16" in output and "batch_size 2 → 4" in output and "eval_iters 9 → 2" in output
    assert second.run.model_hyperparams.window == 4  # what follows from block_size follows


def test_the_schedule_is_the_same_for_all(workdir):
    own_rates = {"muon_lr": 1e-2, "embedding_lr": 3e-3, "scalar_lr": 5e-4}
    write_config("m", {"arch": "tinystar"}, learning_rate=1e-3, warmup_iters=7, min_lr=1e-5,
                 optimizer_hyperparams={"use_muon": True, **own_rates})  # fmt: skip
    for entry in entries("a.json", "m.json"):
        run = sweep.make_trial(entry, plan(), 4e-3, 5).config
        expected = {"max_iters": 100, "lr_decay_iters": 100, "warmup_iters": 5, "cooldown_frac": 0.4, "seed": 5,
                    "learning_rate": 4e-3, "min_lr": pytest.approx(4e-4), "init_from": "scratch"}  # fmt: skip
        assert {key: run[key] for key in expected} == expected
        _, problems = check(run_class(CONFIGS, "tinystar"), run)
        assert problems == []
    rates = {name: run["optimizer_hyperparams"][name] for name in ("muon_lr", "embedding_lr", "scalar_lr", "head_lr")}
    assert rates.pop("head_lr") is None  # learning_rate
    assert rates == pytest.approx({"muon_lr": 4e-2, "embedding_lr": 1.2e-2, "scalar_lr": 2e-3})  # ratios of the file


# ---- equal sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", NEXT_TOKEN)
def test_every_preset_can_be_given_the_same_size(name):
    target = 800_000
    (entry,) = entries(name)
    before = entry.run.model_hyperparams
    match_params([entry], target, [])
    after = entry.run.model_hyperparams
    params = build(after).num_params()
    assert abs(params / target - 1) <= 0.02 and entry.params == params
    assert (after.n_head, after.n_layer, after.vocab_size) == (before.n_head, before.n_layer, before.vocab_size)
    assert after.n_qkv % (2 * after.n_head) == 0
    ratio = (after.n_qkv / after.n_embd) / (before.n_qkv / before.n_embd)
    assert 0.8 < ratio < 1.25, "not in proportion"
    if name == "strawberry-large.json":
        assert after.memory_width < before.memory_width and after.memory_width % after.memory_head == 0
    if after.n_embd != before.n_embd:
        assert any(change.startswith(f"n_embd {before.n_embd} → {after.n_embd}") for change in entry.changes)


@pytest.mark.slow
def test_the_first_config_says_the_size_unless_another_is_asked_for(workdir):
    for asked, expected in (((), entries("b.json")[0].params), (("--params", "20k"), 20_000)):
        assert run_compare("b.json", "a.json", "--match", "params", *asked, "--out", f"out{expected}") == 0
        rows = json.loads(Path(f"out{expected}/compare.json").read_text())["rows"]
        assert all(abs(row["params"] / expected - 1) <= 0.02 for row in rows), rows
        assert asked or rows[0]["changes"] == []
        assert "n_embd 16 → " in Path(f"out{expected}/compare.md").read_text()


def test_a_size_that_no_width_gives_is_an_error_with_the_nearest(workdir):
    with pytest.raises(UserError, match=r"a: no widths give 10 non-embedding parameters within 2%; the nearest \(.*n_"):
        run_compare("a.json", "--match", "params", "--params", "10")
    assert not Path("out").exists()


# ---- nothing is done twice -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_finished_comparison_is_not_run_again(workdir):
    assert run_compare("a.json", "b.json") == 0
    assert sorted(calls()) == sorted(f"{width} {rest} False" for width in (16, 32)
                                     for rest in ("0.001 1", "0.003 1", "0.003 2"))  # fmt: skip
    times = {path: path.stat().st_mtime_ns for path in Path("out/runs").iterdir()}
    assert len(times) == 8 and all(path.suffix == ".json" for path in times)  # 6 runs and 2 speeds, no leftovers
    first = Path("out/compare.md").read_text()
    assert run_compare("a.json", "b.json") == 0
    assert not Path("calls.txt").exists()
    assert {path: path.stat().st_mtime_ns for path in Path("out/runs").iterdir()} == times
    assert Path("out/compare.md").read_text() == first


@pytest.mark.slow
def test_a_larger_comparison_runs_only_what_is_new(workdir):
    run_compare("a.json")
    calls()
    run_compare("a.json", "--seeds", "3")
    assert calls() == ["16 0.003 3 False"]
    run_compare("a.json", "b.json", "--seeds", "3", "--jobs", "2")
    assert len(calls()) == 4
    next(path for path in Path("out/runs").glob("*.json") if '"lr": 0.001' in path.read_text()).unlink()
    run_compare("a.json", "b.json", "--seeds", "3")
    assert len(calls()) == 1


@pytest.mark.slow
def test_an_interruption_keeps_finished_runs_and_prints_how_to_resume(workdir, monkeypatch, capsys):
    finished = sweep.TrialPool.collect_finished

    def interrupted_after_two(self):
        yield from finished(self)
        if len(list(Path("out/runs").glob("[!s]*.json"))) == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(sweep.TrialPool, "collect_finished", interrupted_after_two)
        assert run_compare("a.json", "b.json") == 128 + signal.SIGTERM
    output = capsys.readouterr().out
    assert "2 of 6 runs are finished" in output and "bench.py compare a.json b.json --tokens 1280" in output
    assert len(calls()) == 2 and not Path("out/compare.md").exists()
    assert run_compare("a.json", "b.json") == 0
    assert len(calls()) == 4 and "2 of them are done already" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals there")
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", None)])
def test_every_command_is_interrupted_by_a_signal(monkeypatch, name, code):
    number = getattr(signal, name)
    before = signal.signal(number, signal.default_int_handler)
    try:
        run = Mock(__doc__="A command.", side_effect=lambda rest: signal.raise_signal(number))
        monkeypatch.setitem(bench.COMMANDS, "decode", run)
        if code is None:
            with pytest.raises(KeyboardInterrupt):
                bench.main(["decode"])
        else:
            assert bench.main(["decode"]) == code
        assert signal.getsignal(number) is signal.default_int_handler
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        assert bench.main(["decode"]) is None
    finally:
        signal.signal(number, before)


@pytest.mark.skipif(sys.platform == "win32", reason="no groups of processes there")
@pytest.mark.parametrize("role", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN); "])
def test_an_interruption_ends_the_processes_that_a_child_has_started(tmp_path, monkeypatch, role):
    """A launcher with a worker, as torchrun is; one that ends its worker too late is killed with it."""
    worker = "import time; time.sleep(600)"
    launcher = f"""import signal, subprocess, sys, time; {role}
child = subprocess.Popen([sys.executable, "-c", {worker!r}]); open("pid", "w").write(f"{{child.pid}} ")
time.sleep(600)"""
    monkeypatch.chdir(tmp_path)
    wait = subprocess.Popen.communicate

    def communicate(child, *arguments, **how):
        if how:
            return wait(child, *arguments, **how)
        while not Path("pid").exists() or not Path("pid").read_text().endswith(" "):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    with pytest.raises(KeyboardInterrupt):
        child_process.run_group([sys.executable, "-c", launcher], patience=0.2)
    pid, end = int(Path("pid").read_text()), time.monotonic() + 30
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie, as one is that has been killed and has nobody to wait for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="children are ended there, not asked")
def test_a_child_that_is_running_is_asked_to_stop_and_has_not_failed(workdir, monkeypatch, capfd):
    def interrupt(seconds):
        if "_train 32" in Path("calls.txt").read_text():
            signal.raise_signal(signal.SIGINT)

    Path("hang_32__train").touch()
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", interrupt)
        assert run_compare("a.json", "b.json") == 130
    assert len(calls()) == 4
    output = capfd.readouterr().out
    assert "3 of 6 runs are finished" in output and "failed" not in output
    Path("hang_32__train").unlink()
    assert run_compare("a.json", "b.json") == 0 and len(calls()) == 3


def test_a_stopped_run_resumes_from_its_checkpoint(workdir):
    (entry,) = entries("a.json")
    pool = sweep.TrialPool(plan())
    trial = sweep.make_trial(entry, pool.plan, 1e-3, 1)
    (pool.folder(trial) / "ck" / "step_00000003").mkdir(parents=True)
    pool.start(trial)
    pool.running[trial.key][1].wait()
    assert calls() == ["16 0.001 1 True"]


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"lr": 2e-3}, {"seed": 2}, {"model": {"dropout": 0.1}}, {"weight_decay": 0.2}, {"dataset": "x"}, {"encoder": "x"},
    {"code": "x" * 64}, {"steps": 99}, {"warmup": 0.1}, {"batch_size": 8}, {"data_division": 0.7}])  # fmt: skip
def test_whatever_affects_the_result_changes_the_key_of_a_run(workdir, change):
    def key(lr=1e-3, seed=1, steps=100, warmup=0.05, model=None, weight_decay=0.1, batch_size=4, data_division=0.8,
            **data):  # fmt: skip
        write_config("c", {"arch": "tinystar"} | (model or {}), batch_size=batch_size,
                     dataset={"path": "data.bin", "data_division": data_division},
                     optimizer_hyperparams={"weight_decay": weight_decay})  # fmt: skip
        prints = {"dataset": "d", "encoder": "e", "code": "c" * 64} | data
        return sweep.make_trial(entries("c.json")[0], plan(steps=steps, warmup=warmup, data=prints), lr, seed).key

    assert key() == key() != key(**change)


def test_paths_and_numbers_of_runs_do_not_change_the_key_of_a_run(workdir):
    (entry,) = entries("a.json")
    Path("moved.bin").write_bytes(Path("data.bin").read_bytes())
    (moved,) = entries("a.json", common=["dataset.path=moved.bin"])
    key = sweep.make_trial(entry, plan(), 1e-3, 1).key
    assert sweep.make_trial(moved, plan(out=Path("elsewhere"), jobs=4, seeds=9, lrs=[1, 2]), 1e-3, 1).key == key


def test_comments_and_docstrings_do_not_change_the_hash_of_the_code():
    plain = "def f(x):\n    return x + 1\n"
    dump = sweep.dump_without_comments
    assert dump(plain) == dump('"""A file."""\n\ndef f(x):  # adds\n    """Add."""\n    return x + 1')
    assert dump(plain) != dump(plain.replace("1", "2"))


# ---- what comes out ------------------------------------------------------------------------------------------------


def result(bpb, lr=1e-3, seed=1, curve=None):
    return {"label": "m", "lr": lr, "seed": seed, "bpb": bpb, "curve": curve or [[100, 3.0], [200, bpb]],
            "run": {"optimizer_hyperparams": {"use_muon": False}}}  # fmt: skip


def test_the_table_is_the_mean_and_the_standard_deviation_over_seeds(workdir):
    (entry,) = entries("a.json")
    seeds = [result(1.0, curve=[[100, 2.0], [200, 1.0]]), result(1.2, seed=2, curve=[[100, 2.5], [200, 1.2]]),
             result(1.7, seed=3, curve=[[100, 3.0], [200, 1.7]])]  # fmt: skip
    speed = {"tokens_per_s": 1234.5, "memory": 2.5e9, "compiled": True}
    row = compare_report.make_row(entry, [seeds[0], result(1.1, 3e-3)], seeds, speed)
    # by hand: the mean of 1, 1.2, 1.7 is 1.3; deviations −0.3, −0.1, 0.4; √((0.09 + 0.01 + 0.16) / 2) = √0.13
    assert row["bpb"] == pytest.approx(1.3) and row["bpb_sd"] == pytest.approx(math.sqrt(0.13))
    assert row["curve"] == [[100, 2.5, 0.5], [200, pytest.approx(1.3), pytest.approx(math.sqrt(0.13))]]
    T, C, V = 16, 16, 44
    # GQA of two heads: q 16·16, k and v one head of 8 channels each, out 16·16; SwiGLU of 64 channels; three norms
    hidden = C * C + 2 * C * 8 + C * C + 3 * C * 64 + 3 * C
    # forward 2 per weight of a product, the head's included, and two products per pair of tokens; backward twice that
    flops = 3 * (2 * (hidden - 3 * C + V * C) + 4 * (T + 1) / 2 * C)
    cells = [cell.strip() for cell in compare_report.format_main_table([row]).splitlines()[2].strip("|").split("|")]
    assert cells == ["a", "AdamW", "0.001", f"{hidden:,}", f"{hidden + V * C:,}", f"{flops / 1e6:.1f}", "1,234", "2.50",
                     "1.3000 ± 0.3606"]  # fmt: skip
    assert row["flops_per_token"] == flops
    assert "| a | 1.0000 | 1.1000 |" in compare_report.format_grid_table([row], plan(lrs=[1e-3, 3e-3]))


def test_one_seed_has_no_deviation_and_a_diverged_one_no_mean(workdir):
    (entry,) = entries("a.json")
    one = compare_report.make_row(entry, [], [result(1.25)], None)
    assert compare_report.format_bpb(one) == "1.2500" and one["bpb_sd"] is None
    diverged = compare_report.make_row(entry, [], [result(1.25), result(None)], None)
    assert compare_report.format_bpb(diverged) == "diverged (1 of 2)"


@pytest.mark.slow
def test_the_table_is_sorted_and_has_every_number(workdir):
    run_compare("a.json:dropout=0.3", "b.json")
    rows, text = table(), Path("out/compare.md").read_text()
    # the fake's bits per byte after 20 steps: 2 + 10/20 + 0 + seed/100, for the best rate 3e-3, seeds 1 and 2
    for row in rows.values():
        assert row["lr"] == 3e-3 and row["bpb_seeds"] == pytest.approx([2.51, 2.52])
        assert row["bpb"] == pytest.approx(2.515) and row["bpb_sd"] == pytest.approx(0.01 / math.sqrt(2))
        assert row["grid"] == {"AdamW 0.001": pytest.approx(2.71), "AdamW 0.003": pytest.approx(2.51)}
        assert len(row["curve"]) == 20
    assert "2.5150 ± 0.0071" in text and "1,280 tokens = 20 steps of 4 rows of 16 tokens" in text
    assert "that run is also the first of the mean" in text
    assert "dropout is each config's own: 0.3 for a dropout=0.3; 0.0 for b" in text
    assert "Sizes differ" in text and "the grid's largest for a dropout=0.3, b" in text


@pytest.mark.slow
def test_each_model_gets_the_optimizer_that_it_learns_best_with(workdir):
    """The fake's Muon adds half a bit at width 16 and takes half a bit off at width 32."""
    write_config("b", {"arch": "tinystar", "n_embd": 32}, optimizer_hyperparams={"muon_lr": 1e-2}, learning_rate=1e-3)
    assert run_compare("a.json", "b.json", "--optimizers", "adamw,muon") == 0
    text = Path("out/compare.md").read_text()
    found = {label: (row["optimizer"], row["lr"], row["bpb_seeds"]) for label, row in table().items()}
    assert found == {"a": ("AdamW", 3e-3, [pytest.approx(2.51), pytest.approx(2.52)]),
                     "b": ("Muon", 3e-3, [pytest.approx(2.01), pytest.approx(2.02)])}  # fmt: skip
    assert "Optimizer: for each model the better of AdamW and Muon" in text and "use_muon is each" not in text
    assert "| a, AdamW | 2.7100 | 2.5100 |" in text and "| b, Muon | 2.2100 | 2.0100 |" in text
    assert len(calls()) == 10  # two optimizers at two rates and one more seed, of two configs
    assert table()["b"]["optimizer_hyperparams"]["use_muon"] is True
    assert run_compare("a.json", "b.json", "--optimizers", "adamw,muon") == 0
    assert calls() == []
    assert run_compare("a.json", "b.json", "--optimizers", "adamw,muon", "--muon_lrs", "3e-3,9e-3") == 0
    assert sorted(calls()) == ["16 0.009 1 False", "32 0.009 1 False"]  # the others are done
    text = Path("out/compare.md").read_text()
    assert "the best of 0.001, 0.003 with AdamW, of 0.003, 0.009 with Muon" in text
    assert "the grid's largest for a:" in text and "the grid's smallest for b:" in text
    assert "| b, Muon | – | 2.0100 | 2.6100 |" in text
    assert run_compare("a.json", "b.json", "--optimizers", "muon", "--out", "out2") == 0
    assert "Optimizer: Muon for all" in Path("out2/compare.md").read_text()


def test_value_tables_have_a_column_where_a_model_has_some(workdir):
    a, b = entries("a.json", "b.json:value_embeddings=true")
    rows = [compare_report.make_row(entry, [], [], None) for entry in (a, b)]
    assert "value tables" not in compare_report.format_main_table(rows[:1])
    header, _, _, with_tables = compare_report.format_main_table(rows).splitlines()
    # one layer of 32 channels, two heads of q and one of k and v: a table of 16 channels for each of 44 tokens
    names, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (header, with_tables))
    assert dict(zip(names, cells, strict=True))["value tables"] == f"{44 * 16:,}" == f"{b.params_tables:,}"
    (without,) = entries("b.json")
    gate = 32  # a number for each of the channels that it reads
    assert b.params == without.params + gate and b.params_total == without.params_total + gate + 44 * 16


def test_rates_of_muon_are_for_the_models_that_train_with_it(workdir):
    write_config("b", {"arch": "tinystar"}, optimizer_hyperparams={"use_muon": True})
    schedule = sweep.Sweep(entries("a.json", "b.json"), plan(lrs=[1e-3], muon_lrs=[6e-3, 1e-2]))
    rates = {label: [trial.lr for trial in trials] for label, trials in schedule.grid.items()}
    assert rates == {"a": [1e-3], "b": [6e-3, 1e-2]} and schedule.total == 3


def test_losses_by_quarter_are_means_over_seeds_or_absent(workdir):
    (entry,) = entries("a.json")
    first, second = result(1.25) | {"quarters": [4, 3, 2, 1]}, result(1.5) | {"quarters": [4, 3, 2, 3]}
    row = compare_report.make_row(entry, [], [first, second], None)
    assert row["quarters"] == [[4, 0], [3, 0], [2, 0], [2, pytest.approx(math.sqrt(2))]]
    assert "| a | 4.0000 ± 0.0000 |" in (text := compare_report.format_quarter_table([row]))
    assert text.splitlines()[2].endswith("| 2.0000 ± 1.4142 |")
    for seeds in ([], [first, result(1.5)], [first, result(None)]):  # none has ended, sees the future, diverged
        assert compare_report.make_row(entry, [], seeds, None)["quarters"] is None
    one = compare_report.make_row(entry, [], [first], None)
    assert "| a | 4.0000 | 3.0000 | 2.0000 | 1.0000 |" in compare_report.format_quarter_table([one])


def test_the_slowest_models_start_first(workdir):
    schedule = sweep.Sweep(entries("a.json", "b.json"), plan(lrs=[1e-3, 3e-3]))
    assert [trial.label for trial in schedule.list_pending()] == ["a", "a", "b", "b"]
    schedule.speeds = {"a": {"tokens_per_s": 9.0}, "b": {"tokens_per_s": 2.0}}
    assert [trial.label for trial in schedule.list_pending()] == ["b", "b", "a", "a"]


def test_a_model_that_sees_the_future_is_shown_by_its_strict_loss():
    line = {"val_bpb": 2.0, "val_loss": 4.0}
    assert sweep.strict_bpb(line) == 2.0
    # half a bit per byte for each nat; the strict loss is 0.5 nats above the plain one of the same positions
    assert sweep.strict_bpb(line | {"strict_loss": 4.7, "plain_at_strict": 4.2}) == pytest.approx(2.25)


@pytest.mark.slow
def test_a_diverged_run_is_a_result_and_never_the_best(workdir):
    assert run_compare("a.json", "--lrs", "1e-3,1") == 0
    assert table()["a"]["lr"] == 1e-3 and table()["a"]["grid"] == {"AdamW 0.001": pytest.approx(2.71), "AdamW 1": None}
    assert len(calls()) == 3
    run_compare("a.json", "--lrs", "1e-3,1")
    assert calls() == []


@pytest.mark.slow
@pytest.mark.parametrize("role", ["_speed", "_train"])
def test_a_failed_config_is_reported_and_the_others_finish(workdir, role):
    Path(f"fail_16_{role}").touch()
    with pytest.raises(UserError, match="1 of 2 configs failed: a .*the device is on fire; see .*log.txt"):
        run_compare("a.json", "b.json")
    assert table()["a"]["failure"] and table()["b"]["bpb"] == pytest.approx(2.515)
    assert "failed" in Path("out/compare.md").read_text()
    calls()
    Path(f"fail_16_{role}").unlink()
    assert run_compare("a.json", "b.json") == 0  # and what failed is tried again
    assert all(call.startswith("16 ") for call in calls())
    assert table()["a"]["bpb"] == pytest.approx(2.515)


@pytest.mark.slow
def test_the_picture_has_tokens_flops_and_seconds():
    def row(label, flops, speed, last):
        curve = [[100, 3.0, 0.1], [200, last, 0.1]]
        return {"label": label, "flops_per_token": flops, "tokens_per_s": speed, "curve": curve, "bpb": last,
                "bpb_sd": 0.1, "bpb_seeds": [last], "failure": None}  # fmt: skip

    panels = compare_report.draw_comparison([row("a", 5.0, 50.0, 2.0), row("b", 7.0, 10.0, 1.0)], "title", 3).axes
    found = {ax.get_xlabel(): {line.get_label(): list(line.get_xdata()) for line in ax.lines} for ax in panels}
    a, b = "a  2.0000 ± 0.1000", "b  1.0000 ± 0.1000"
    assert found == {
        "training tokens": {a: [100, 200], b: [100, 200]},
        "training FLOPs": {a: [500, 1000], b: [700, 1400]},
        "training time, alone on the device (s)": {a: [2, 4], b: [10, 20]},
    }
    assert [line.get_color() for line in panels[0].lines] == list(plot.COLOURS[1::-1])  # best first, colours as given
    assert list(panels[0].lines[0].get_ydata()) == [3.0, 1.0] and "bits per byte" in panels[0].get_ylabel()


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("words, message", [
    (["a.json", "--tokens", "100"], "too few"),
    (["a.json", "--tokens", "lots"], "5M"),
    (["a.json", "--lrs", "fast"], "--lrs fast"),
    (["a.json", "--optimizers", "adamw,sgd"], "--optimizers adamw,sgd: 'sgd' is none of adamw, muon"),
    (["a.json", "--lrs", "1e-3,-1"], "above 0"),
    (["a.json", "--seeds", "0"], "'0' is no positive number"),
    (["a.json", "--warmup", "2"], "between 0 and 1"),
    (["a.json", "--params", "1M"], "add --match params"),
    (["a.json", "--match", "size"], "params"),
    (["a.json", "--sets", "x=1"], "--sets: unknown option .did you mean '--set'."),
    ([], "required: configs"),
    (["nowhere.json"], "no such file"),
    (["a.json", "a.json"], "given twice"),
    (["a.json", "--muon_lrs", "1e-3"], "--muon_lrs: no config is trained with Muon; add --optimizers"),
    (["a.json:n_layers=2"], "n_layer"),
    (["a.json:n_layer"], "is no override; write key=value"),
    (["a.json:n_layer=none"], "n_layer"),
    (["a.json:max_iters=5"], "use --tokens"),
    (["a.json:learning_rate=5"], "use --lrs"),
    (["a.json", "--set", "seed=5"], "use --seeds"),
    (["a.json", "--set", "eval_interval=5"], "leave it out"),
    (["a.json", "b.json:batch_size=8"], "must be the same for all; use --set batch_size="),
    (["a.json", "--set", "r_layer=1"], "a: .*r_layer"),
    (["a.json", "--set", "vocab_size=20"], "vocab_size"),
    (["a.json", "--set", "batch_size=auto"], "give a number"),
    (["a.json", "--set", "dataset.path=none.bin"], "none.bin"),
    (["a.json:arch=transformer"], "kind=decoder"),
])  # fmt: skip
def test_mistakes_in_compare_are_reported_before_anything_is_written(workdir, words, message):
    with pytest.raises(UserError, match=message):
        run_compare(*words)
    assert not Path("out").exists() and not Path("calls.txt").exists()


def test_an_unknown_command_is_reported_with_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "comapre"])
    with pytest.raises(SystemExit) as left:
        run_cli(bench.main)
    assert left.value.code == 2 and "did you mean 'compare'" in capsys.readouterr().err


# ---- the real thing ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_child_trains(workdir, monkeypatch):
    fake = child_process.make_command
    monkeypatch.undo()
    monkeypatch.chdir(workdir)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(compare, "hash_code", hash_code_once)
    make_command = child_process.make_command
    by_role = {"_train": lambda *words: forks.fork_command(make_command(*words)), "_speed": fake}
    monkeypatch.setattr(child_process, "make_command", lambda role, *rest: by_role[role](role, *rest))
    assert run_compare("a.json", "--seeds", "1", "--lrs", "1e-2") == 0
    row = table()["a"]
    curve, quarters = row["curve"], [mean for mean, _ in row["quarters"]]
    assert f"| a | {quarters[0]:.4f} | {quarters[1]:.4f} |" in Path("out/compare.md").read_text()
    assert len(curve) == 20 and 0 < table()["a"]["bpb"] == curve[-1][1] < curve[0][1]
    assert [path.suffix for path in Path("out/runs").iterdir()] == [".json"] * 2
    assert {path.name for path in Path("out").iterdir()} == {"compare.json", "compare.md", "compare.png", "runs"}
    assert Path("out/compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_speed_child_waits_for_the_go_of_its_parent(workdir, monkeypatch, capsys):
    monkeypatch.setattr(train, "MEASURED_SECONDS", 0.05)
    trial = sweep.make_speed_trial(entries("a.json")[0], plan())
    config = sweep.write_trial_config(Path("x"), trial, checkpoints={"path": "x/ck", "create_checkpoints": False})
    monkeypatch.setattr(sys, "stdin", io.StringIO("go\n"))
    train.speed_child([str(config)])
    ready, answer = capsys.readouterr().out.splitlines()
    found = json.loads(answer)
    assert ready == "ready" and found["tokens_per_s"] > 64 and found["steps"] >= 10 and found["memory"] is None
    assert 2**26 < found["resident"] < 2**36
    steps = [line["step"] for line in plot.read_metrics("x/ck/metrics.jsonl") if "tokens_per_s" in line]
    assert steps[-1] == 10 + found["steps"] and not Path("x/model").exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))  # the parent has ended
    train.speed_child([str(config)])
    assert capsys.readouterr().out == "ready\n"


# ---- decode --------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_decode(workdir, monkeypatch):
    """The working directory, where little is measured."""
    for name, value in {"WARMUP_STEPS": 1, "MAX_STEPS": 3, "MIN_STEPS": 2}.items():
        monkeypatch.setattr(decode, name, value)
    monkeypatch.setattr(hardware, "COPY_BYTES", (2**20, 2**20))
    write_config("t", {"arch": "tinystar"})
    write_config("p", {"arch": "palm", "d_rank": 4, "n_qkv": 16})
    write_config("l", {"arch": "tinystar", "pos_encoding": "Learned"})
    return workdir


def run_decode(*words):
    bench.main(["decode", *words, "--device", "cpu", "--out", "out"])
    return json.loads(Path("out/decode.json").read_text())


def subject(spec):
    (found,) = decode.read_model_sources([spec])
    return found.make()


@pytest.mark.slow
def test_the_weight_bytes_of_a_step_are_those_counted_by_hand(quick_decode):
    V, C, F = 44, 16, 64
    # GQA of two heads: q 16·16, k and v one head of 8 channels each, out 16·16; SwiGLU of 64 channels; three norms
    tinystar = C * C + 2 * C * 8 + C * C + 3 * C * F + 3 * C + V * C  # the table is the head: read whole
    for rows in (1, 3):
        assert decode.count_weight_bytes(subject("t.json"), rows) == 4 * tinystar
        assert decode.count_weight_bytes(subject("t.json").bfloat16(), rows) == 2 * tinystar
        # a place in 16 is looked up for each text
        assert decode.count_weight_bytes(subject("l.json"), rows) == 4 * (tinystar + rows * C)
    untied = subject("t.json:tie_embeddings=false")
    assert decode.count_weight_bytes(untied, 5) == 4 * (tinystar + 5 * C)  # a head, and 5 lines of the input's table


def test_weights_in_8_bits_are_a_byte_each_and_their_scales_four(quick_decode):
    V, C, F = 44, 16, 64
    model = decode.DecodeBenchmark(torch.device("cpu"), torch.float32, "int8", False, 1.0).prepare(subject("t.json"))
    rows = [C, 8, 8, C, 2 * F, C, V]  # of q, k, v, out, both of the feed-forward, table
    width = [C, C, C, C, C, F, C]
    matrices = sum(r * w for r, w in zip(rows, width, strict=True))
    assert decode.count_weight_bytes(model, 1) == matrices + 4 * sum(rows) + 4 * 3 * C  # norms stay


@pytest.mark.slow
def test_the_bytes_of_the_cache_are_those_counted_by_hand(quick_decode):
    config = entries("t.json")[0].run.model_hyperparams
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        each = 2 * 8 * size  # k and v, one head of 8 channels
        assert decode.count_cache_bytes(config, dtype, 100) == 101 * each
        assert decode.count_cache_bytes_read(config, dtype, 100) == 101 * each
        assert decode.fit_cache_bytes(config, dtype, 100) == (each, each)  # a slot more, which takes what is dropped
    limited = entries("l.json")[0].run.model_hyperparams
    assert decode.fit_cache_bytes(limited, torch.float32, 100) == (64, 64)
    write_config("s", {"arch": "strawberry", "n_qkv": 16, "r_layer": 1, "window": 4})
    config = entries("s.json")[0].run.model_hyperparams
    C = D = 16
    aft = 3 * D  # numerator, denominator and maximum
    attention = 2 * D * (4 + 1)  # k and v of the window and a slot more
    retention = 3 * D * C + 2 * C * D + C * C + 2 * C * C  # the weights of the open chunk, its sum, those before
    found = decode.count_cache_bytes(config, torch.float32, 1000)
    assert found == 4 * (aft + attention + retention)
    assert decode.fit_cache_bytes(config, torch.float32, 1000) == (found, 0)  # the same however long the text
    assert decode.count_cache_bytes_read(config, torch.float32, 1000) == found - 4 * C * C


@pytest.mark.slow
def test_decode_measures_every_batch_at_every_context(quick_decode):
    found = run_decode("t.json", "p.json", "--batches", "1,2", "--contexts", "8,24")
    assert [row["label"] for row in found["rows"]] == ["t", "p"] and found["bandwidth"] > 0
    for row in found["rows"]:
        assert [(cell["context"], cell["batch"]) for cell in row["cells"]] == [(8, 1), (8, 2), (24, 1), (24, 2)]
        for cell in row["cells"]:
            assert cell["why"] is None and cell["tokens_per_s"] > 0 and cell["first_token_s"] > 0
            floor = cell["bytes_per_token"] / found["bandwidth"]
            assert cell["times_floor"] == pytest.approx(1 / cell["tokens_per_s"] / floor)
    V, C, F = 44, 16, 64
    weights = 4 * (C * C + 2 * C * 8 + C * C + 3 * C * F + 3 * C + V * C)
    for cell in found["rows"][0]["cells"]:
        assert cell["bytes_per_token"] == weights / cell["batch"] + 64 * (cell["context"] + 1)
    text = Path("out/decode.md").read_text()
    assert "| t | 1 | 8 |" in text and "| p | 2 | 24 |" in text and "decode t.json p.json --batches 1,2" in text
    lines = text.splitlines()
    assert lines[0] == "| tokens/s (times the floor) | 1 × 8 | 1 × 24 | 2 × 8 | 2 × 24 |"
    assert re.fullmatch(r"\| t( \| [\d,]+ \([\d.,]+×\)){4} \|", lines[2])


@pytest.mark.slow
def test_speeds_are_computed_from_the_clock(quick_decode, monkeypatch):
    """With a clock that a fake decoder advances: a second for each token of a prompt, 0.25 for a step."""
    now = [0.0]

    class FakeDecoder:
        def __init__(self, model, rows, max_length, **options):
            self.rows, self.lengths, self.under_way, self.steps = rows, {}, [], 0
            assert max_length == 8 + decode.WARMUP_STEPS + decode.MAX_STEPS + 2

        def admit(self, request):
            now[0] += len(request.prompt)
            assert len(self.lengths) < self.rows
            handle = len(self.under_way)
            self.under_way.append(handle)
            self.lengths[handle] = len(request.prompt)
            return handle

        def admit_all(self, requests):
            return [self.admit(request) for request in requests]

        def release(self, handle):
            del self.lengths[handle]

        def step(self):
            now[0] += 0.25
            return [(handle, 0, None) for handle in self.lengths]

    monkeypatch.setattr(hardware, "synchronized_time", lambda device: now[0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(engine, "Decoder", FakeDecoder)
    measured = decode.DecodeBenchmark(torch.device("cpu"), torch.float32, None, False, 1000.0)
    cell = measured.measure_cell(subject("t.json"), 3, 8)
    assert cell["first_token_s"] == 8.25 and cell["tokens_per_s"] == 3 / 0.25 and cell["steps"] == decode.MAX_STEPS
    assert cell["floor_s"] == cell["bytes_per_token"] / 1000 and cell["times_floor"] == 0.25 / 3 / cell["floor_s"]


def test_a_copy_counts_what_is_read_and_what_is_written(quick_decode, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(hardware, "synchronized_time", lambda device: 0.5 * next(ticks))
    assert hardware.measure_copy_bandwidth(torch.device("cpu")) == 2 * 2**20 / 0.5


@pytest.mark.slow
def test_contexts_that_do_not_fit_are_reported_in_the_table(quick_decode, monkeypatch):
    found = run_decode("l.json", "t.json", "--batches", "1,2", "--contexts", "8,14,40")
    cells = {(cell["context"], cell["batch"]): cell for cell in found["rows"][0]["cells"]}
    assert cells[8, 1]["why"] is None and cells[8, 1]["steps"] == 3
    assert cells[14, 1]["why"] == cells[40, 2]["why"] == "its positions end at 16"
    assert all(cell["why"] is None for cell in found["rows"][1]["cells"])
    text = Path("out/decode.md").read_text()
    assert "— l, context 14, 40, batch 1, 2: its positions end at 16." in text
    assert re.search(r"\| l \| [\d,]+ \([\d.,]+×\) \| — \| — \| [\d,]+ \([\d.,]+×\) \| — \| — \|", text)


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])  # fmt: skip
def test_out_of_memory_is_reported_and_other_batches_are_measured(quick_decode, monkeypatch, error):
    real = engine.Decoder

    def short_of_memory(model, rows, *rest, **options):
        if rows == 2:
            raise error
        return real(model, rows, *rest, **options)

    monkeypatch.setattr(engine, "Decoder", short_of_memory)
    cells = run_decode("t.json", "--batches", "1,2,3", "--contexts", "8")["rows"][0]["cells"]
    assert [cell["why"] for cell in cells] == [None, "not enough memory", None]


@pytest.mark.slow
def test_a_cache_larger_than_the_memory_is_not_measured(quick_decode, monkeypatch):
    monkeypatch.setattr(hardware, "get_free_memory", lambda device: 64 * 60)
    cells = run_decode("t.json", "--batches", "1,4", "--contexts", "8")["rows"][0]["cells"]
    assert cells[0]["why"] is None and re.match(r"needs .* of cache, and .* are free", cells[1]["why"])


@pytest.mark.slow
def test_results_are_written_when_a_later_model_fails(quick_decode, monkeypatch):
    real = decode.measure_model

    def fails_at_p(subject, *rest):
        if subject.label == "p":
            raise ZeroDivisionError
        return real(subject, *rest)

    monkeypatch.setattr(decode, "measure_model", fails_at_p)
    with pytest.raises(ZeroDivisionError):
        run_decode("t.json", "p.json", "--batches", "1", "--contexts", "8", "--json", "elsewhere.json")
    assert [row["label"] for row in json.loads(Path("elsewhere.json").read_text())["rows"]] == ["t"]
    assert "| t |" in Path("out/decode.md").read_text() and not Path("out/decode.json").exists()


@pytest.mark.slow
def test_an_error_of_another_kind_is_not_hidden(quick_decode, monkeypatch):
    monkeypatch.setattr(engine, "Decoder", lambda *_, **__: [][0])
    with pytest.raises(IndexError):
        run_decode("t.json", "--batches", "1", "--contexts", "8")


@pytest.mark.cuda
@pytest.mark.whole_gpu
def test_decode_measures_on_a_gpu(quick_decode):
    bench.main(["decode", "t.json", "p.json", "--batches", "1,3", "--contexts", "8,250", "--out", "out"])
    found = json.loads(Path("out/decode.json").read_text())
    cells = [cell for row in found["rows"] for cell in row["cells"]]
    assert found["dtype"] == "torch.bfloat16" and found["bandwidth"] > 1e9
    assert len(cells) == 8 and all(cell["tokens_per_s"] > 100 for cell in cells)


@pytest.mark.slow
def test_trained_files_and_models_without_a_cache_are_measured_too(quick_decode):
    encoder, model = encoders.load("chars:text.txt"), subject("t.json")
    save_model("mine.tinystar", model, encoder, {})
    write_config("b", {"arch": "strawberry", "n_qkv": 16, "retention_scope": "batch"})
    found = run_decode("mine.tinystar", "b.json", "--batches", "1", "--contexts", "8", "--dtype", "bfloat16")["rows"]
    assert [row["label"] for row in found] == ["mine", "b"] and all(row["cells"][0]["tokens_per_s"] for row in found)
    assert found[0]["weight_bytes"] == decode.count_weight_bytes(model.bfloat16(), 1)
    assert found[1]["cache_constant"] == 0 and found[1]["cells"][0]["bytes_per_token"] == found[1]["weight_bytes"]
    assert "each token recomputes the last block_size tokens: b." in Path("out/decode.md").read_text()


def test_an_untrained_model_has_no_zero_parameters(quick_decode):
    write_config("s", {"arch": "strawberry", "n_qkv": 16})
    model, same = subject("s.json"), subject("s.json")
    assert all(p.any() for p in model.parameters())
    assert all(p.equal(q) for p, q in zip(model.parameters(), same.parameters(), strict=True))


@pytest.mark.slow
def test_the_speeds_are_drawn_a_panel_for_each_batch():
    def row(label, *cells):
        return {"label": label, "cells": [
            {"batch": b, "context": c, "tokens_per_s": speed, "why": None if speed else "no"} for b, c, speed in cells]}

    rows = [row("a", (1, 128, 50.0), (1, 1000, 20.0), (8, 128, 400.0), (8, 1000, None)), row("b", (1, 128, 7.0))]
    panels = decode.draw_speeds(rows, [1, 8], "title").axes
    assert [ax.get_title(loc="left") for ax in panels] == ["batch 1", "batch 8"]
    found = [{line.get_label(): line.get_xydata().tolist() for line in ax.lines} for ax in panels]
    assert found == [{"a": [[128, 50], [1000, 20]], "b": [[128, 7]]}, {"a": [[128, 400]], "b": []}]
    assert all(ax.get_xscale() == ax.get_yscale() == "log" for ax in panels)
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["128", "1k"]


def test_the_picture_names_a_batch_that_fits_nowhere(tmp_path):
    cell = {"batch": 1, "context": 4000, "why": "its positions end at 1,024"}
    fig = decode.draw_speeds([{"label": "a", "cells": [cell]}], [1], "title")
    decode.plot.save(fig, tmp_path / "a.png")
    assert [text.get_text() for text in fig.axes[0].texts] == ["nothing fits"]


@pytest.mark.parametrize("words, message", [
    ([], "name configs or model files, or --against nanogpt"),
    (["t.json", "--against", "nanogpt"], "name configs or model files, or --against nanogpt, one of the two"),
    (["--against", "nanogpt"], "needs --nanogpt_path"),
    (["t.json", "--batches", "1,none"], "--batches 1,none: 'none' is no positive number"),
    (["t.json", "--contexts", "0"], "--contexts 0: '0' is no positive number"),
    (["t.json", "--quantize", "int4"], "int8"),
    (["t.json", "t.json"], "given twice"),
    (["t.json", "--n_layer", "3"], "--n_layer 3: is about --against nanogpt; add that, or leave --n_layer out"),
    (["t.json:n_layers=2"], "n_layer"),
    (["nowhere.json"], "no such file"),
    (["nowhere.strawberry"], "nowhere.strawberry"),
    (["t.json:arch=transformer,kind=encoder"], "kind=decoder"),
])  # fmt: skip
def test_mistakes_in_decode_are_reported_before_anything_is_written(quick_decode, words, message):
    with pytest.raises(UserError, match=message):
        bench.main(["decode", *words, "--device", "cpu", "--out", "out"])
    assert not Path("out").exists()


# ---- nanogpt -------------------------------------------------------------------------------------------------------

STAND_IN = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool

class GPT(torch.nn.Embedding):
    def __init__(self, c):
        super().__init__(c.vocab_size, c.n_embd)
        self.config = c

    def forward(self, x, y):
        return None, super().forward(x).square().mean()

    def configure_optimizers(self, decay, rate, betas, device):
        return torch.optim.SGD(self.parameters(), rate)

    def generate(self, idx, max_new_tokens):
        return torch.cat((idx, idx[:, :1].expand(-1, max_new_tokens)), dim=1)
"""


@pytest.mark.slow
def test_nanogpt_s_generate_is_timed_beside_ours(quick_decode, capsys):
    (quick_decode / "model.py").write_text(STAND_IN)
    small = ["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--vocab_size", "40", "--block_size", "32"]
    bench.main(["decode", "--against", "nanogpt", "--nanogpt_path", str(quick_decode), "--device", "cpu", *small,
                "--batches", "2", "--contexts", "8,30"])  # fmt: skip
    output = capsys.readouterr().out
    number = r"[\d,.]+"
    line = rf"batch 2, context 8: nanoGPT {number} tokens/s, tinystar {number} \(\d+% of .*\), {number} times as many"
    assert re.search(line, output)
    assert "batch 2, context 30: — (its positions end at 32)" in output


def test_times_as_many_is_the_median_of_the_turns(monkeypatch):
    turns = iter([(100.0, 0.5), (300.0, 0.5), (200.0, 0.5)])
    theirs = iter([10.0, 20.0, 40.0])

    class Turns:
        def measure_cell(self, model, batch, context):
            speed, first = next(turns)
            return {"why": None, "tokens_per_s": speed, "first_token_s": first, "floor_s": 1 / 500}

    monkeypatch.setattr(decode, "measure_nanogpt", lambda *_: next(theirs))
    output = decode.compare_with_nanogpt(Turns(), None, None, 2, 512)
    # ratios 10, 15, 5; 64 tokens for two rows take 128 / 200 + 2 · 0.5 = 1.64 s, and nanoGPT's at 20/s 6.4 s
    assert "nanoGPT 20.0 tokens/s, tinystar 200.0 (40% of the upper bound), 10.0 times as many" in output
    assert "(5.0 to 15.0)" in output
    assert "with the prefill, 64 tokens are 3.9 times as fast" in output


def test_a_missing_nanogpt_is_named(tmp_path):
    with pytest.raises(UserError, match=f"there is no {re.escape(str(tmp_path / 'model.py'))}"):
        bench.main(["decode", "--against", "nanogpt", "--nanogpt_path", str(tmp_path)])


# ---- train ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def real_children(workdir, monkeypatch):
    """Children are those of bench.py; little is measured."""
    Path("quick.py").write_text(f"""
import sys
sys.path.insert(0, {str(CONFIG_FOLDER.parent)!r})
import bench
from strawberry.bench import hardware, train
train.MEASURED_SECONDS, train.TIMED_STEPS, hardware.MATMUL_SIZES = 0.01, 2, (64, 64)
bench.main(sys.argv[1:])
""")
    script = str(workdir / "quick.py")
    monkeypatch.setattr(child_process, "make_command", lambda *words: [*forks.start(), script, *words])


@pytest.mark.slow
def test_train_reports_the_parts_of_a_step(real_children, capsys):
    bench.main(["train", "--config", "a.json:n_layer=2", "b.json", "--set", "gradient_accumulation_steps=2",
                "--jobs", "2", "--json", "t.json"])  # fmt: skip
    rows = json.loads(Path("t.json").read_text())
    assert [row["config"] for row in rows] == ["a.json:n_layer=2", "b.json"]
    for row, width, layers in zip(rows, (16, 32), (2, 1), strict=True):
        model = build(SMALL | {"arch": "tinystar", "n_embd": width, "n_layer": layers})
        assert row["params"] == model.num_params(non_embedding=False)
        assert row["flops_per_token"] == model.flops_per_token(16) and row["tokens_per_step"] == 2 * 4 * 16
        assert row["step_ms"] == pytest.approx(1e3 * 128 / row["tokens_per_s"])
        assert row["flops_per_s"] == pytest.approx(row["flops_per_token"] * row["tokens_per_s"])
        assert row["share"] == pytest.approx(row["flops_per_s"] / row["ceiling"])
        assert list(row["parts_ms"]) == ["data", "forward", "backward", "optimizer"]
        assert all(ms > 0 for ms in row["parts_ms"].values())
    output = capsys.readouterr().out
    assert "neither compiled nor a CUDA graph" in output and "one after another, without a CUDA graph: data" in output


@pytest.mark.slow
def test_train_counts_flops_shared_by_rows_once(real_children):
    hyper = SMALL | {"arch": "strawberry", "n_embd": 16, "r_layer": 1, "retention_scope": "batch"}
    config = json.loads(Path("a.json").read_text()) | {"model_hyperparams": hyper}
    Path("c.json").write_text(json.dumps(config))
    bench.main(["train", "--config", "c.json", "--json", "t.json"])
    (row,), model = json.loads(Path("t.json").read_text()), build(hyper)
    assert row["flops_per_token"] == model.flops_per_token(16, rows=4) < model.flops_per_token(16)


def test_stage_times_are_medians_between_marks(monkeypatch):
    ticks = iter([0.0, 0.001, 0.004, 10.0, 10.001, 10.004, 20.0, 20.009, 20.010])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    marks = train.StageTimer(torch.device("cpu"))
    for _ in range(3):
        marks.start_step()
        marks()
        marks()
    assert marks.median_intervals() == pytest.approx([1.0, 3.0])  # medians of 1, 1, 9 and of 3, 3, 1 ms


@pytest.mark.slow
def test_a_config_that_fails_is_reported_and_the_others_are_measured(real_children, capsys):
    assert bench.main(["train", "--config", "a.json:dataset.path=nowhere.bin", "b.json"]) == 2
    output = capsys.readouterr().out
    assert "nowhere.bin" in output.splitlines()[0] and "b.json on cpu" in output


@pytest.mark.parametrize("words, message", [
    ([], "--config, or --against nanogpt, one of the two"),
    (["--config", "a.json", "--against", "nanogpt"], "one of the two"),
    (["--against", "nanogpt"], "needs --nanogpt_path"),
    (["--against", "nanogpt", "--nanogpt_path", "."], "there is no .*train.py"),
    (["--against", "nanogpt", "--nanogpt_path", ".", "--steps", "19"], "--steps 19: .* give at least 20"),
    (["--config", "a.json:n_layers=2"], "n_layer"),
    (["--config", "a.json", "--set", "n_layer"], "write key=value"),
    (["--config", "nowhere.json"], "no such file"),
    (["--config", "a.json", "--steps", "3"], "--steps 3: is about --against nanogpt; .* with --set, or leave --steps"),
    (["--config", "a.json", "--beside", "-1"], "--beside: '-1' is no positive number"),
    (["--config", "a.json", "--beside", "65"], "--beside 65: at most 64 more processes"),
])  # fmt: skip
def test_mistakes_in_train_are_reported_before_anything_is_written(workdir, words, message):
    with pytest.raises(UserError, match=message):
        bench.main(["train", *words])


THEIR_TRAIN = """
import os, pickle, sys, time
import numpy as np, torch
keys = dict(word[2:].split("=", 1) for word in sys.argv[1:])
exec(open("configurator.py").read())
folder = os.path.join("data", keys["dataset"])
tokens = [np.memmap(os.path.join(folder, name), dtype=np.uint16, mode="r") for name in ("train.bin", "val.bin")]
assert [len(part) for part in tokens] == [2252, 78] and max(part.max() for part in tokens) < 44
assert pickle.load(open(os.path.join(folder, "meta.pkl"), "rb"))["vocab_size"] == 44
raw_model = torch.nn.Linear(3, 4, bias=False)
from model import name
assert name == "theirs"
for i in range(int(keys["max_iters"]) + 1):
    time.sleep(0.01)
    if i % int(keys["log_interval"]) == 0:
        print(f"iter {i}: loss {5 - i / 100:.4f}, time 1.00ms, mfu -100.00%", flush=True)
"""


@pytest.mark.slow
def test_both_train_scripts_run_on_the_same_text(real_children, capsys, monkeypatch):
    hypers, write = [], train.write_benchmark_config
    monkeypatch.setattr(train, "write_benchmark_config", lambda folder, run, **keys: (
        hypers.append(run.optimizer_hyperparams), write(folder, run, **keys))[1])  # fmt: skip
    Path("theirs").mkdir()
    model_text = "class GPT(dict): ...\nname = 'theirs'"
    for name, text in (("train.py", THEIR_TRAIN), ("model.py", model_text), ("configurator.py", "")):
        Path("theirs", name).write_text(text)
    shape = ["--n_layer", "1", "--n_head", "2", "--n_embd", "16", "--vocab_size", "44", "--block_size", "16"]
    data = ["--set", "dataset.path=data.bin", "--set", "encoder_path=chars:text.txt", "--set", "compile=false"]
    bench.main(["train", "--against", "nanogpt", "--nanogpt_path", "theirs", "--steps", "60", "--batch_size", "2",
                *shape, *data, "--json", "r.json"])  # fmt: skip
    found = json.loads(Path("r.json").read_text())
    assert found["nanogpt"]["params"] == 12 and found["nanogpt"]["losses"][-1] == [60, 4.4]
    assert 0.01 <= found["nanogpt"]["step_s"] < 0.05
    assert [step for step, _ in found["strawberry"]["losses"]] == [10, 20, 30, 40, 50, 60]
    assert [(hyper.use_muon, hyper.weight_decay, hyper.weight_decay_schedule) for hyper in hypers] == [
        (False, 0.1, "constant")]  # nanoGPT's
    ours = build(SMALL | train.GPT2_KEYS_WITHOUT_BIAS | {"arch": "tinystar"})
    assert found["strawberry"]["params"] == ours.num_params(False)
    assert re.search(r"[\d.]+ times as fast", capsys.readouterr().out)
    assert sorted(path.name for path in Path("theirs").iterdir()) == ["configurator.py", "model.py", "train.py"]


# ---- growth --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_growth_measures_each_window_and_width(workdir, capsys):
    a = "a.json:attention_type=MHA,batch_size=1"
    bench.main(["growth", a, "b.json", "--contexts", "8,16", "--widths", "64", "--tokens", "32", "--jobs", "3",
                "--out", "out"])  # fmt: skip
    rows = json.loads(Path("out/growth.json").read_text())["rows"]
    assert [(row["config"], row["axis"], row["value"]) for row in rows] == [
        (label, axis, value) for label in ("a attention_type=MHA batch_size=1", "b")
        for axis, value in (("T", 8), ("T", 16), ("C", 64))]
    assert len(calls("_speed")) == 6 and all(row["tokens_per_s"] == 1000 for row in rows)
    assert "| b | C | 64 | 1,000 | 3.00 |" in Path("out/growth.md").read_text()


def test_default_results_are_replaced_by_the_same_command_only(workdir):
    inputs = []
    for name in ("compare", "decode", "growth", "recall", "speedrun"):
        out, argv = Path("img") / name, ["a.json", "--jobs", "2"]
        out.mkdir(parents=True)
        check_results(name, out, argv, inputs)
        command = format_command("python", name, argv)
        (out / f"{name}.md").write_text(f"| a |\n\n```\n{command}\n```\n")
        for same in (argv, [*argv[:1], "--out", str(out)], [f"--out={out}"]):
            check_results(name, out, same, inputs)
        for other in ([], ["a.json"], ["a.json", "--jobs", "3"]):
            with pytest.raises(UserError, match=f"^--out: img.{name}.{name}.md.*{command}; .*--out img.{name}$"):
                check_results(name, out, other, inputs)


@pytest.mark.slow
def test_a_command_does_not_replace_default_results_of_another(workdir):
    argv = ["growth", "a.json", "--contexts", "8", "--widths", "64", "--tokens", "32"]
    bench.main(argv)
    bench.main(argv)
    report = Path("img/growth/growth.md").read_bytes()
    with pytest.raises(UserError, match="results of another command: python .*--tokens 32;"):
        bench.main([*argv[:-1], "64"])
    assert Path("img/growth/growth.md").read_bytes() == report


def test_growth_keeps_the_tokens_of_a_step(workdir):
    arguments = growth.parse_arguments(["a.json", "--contexts", "8,64", "--widths", "128", "--tokens", "32"])
    runs = [point["run"] for point in growth.list_points(arguments)]
    assert [(run.model_hyperparams.block_size, run.batch_size) for run in runs] == [(8, 4), (64, 1), (32, 1)]
    assert (runs[2].model_hyperparams.n_embd, runs[2].model_hyperparams.n_head) == (128, 2)
    with pytest.raises(UserError, match="100 is no multiple of 64"):
        growth.parse_arguments(["--widths", "100"])


def test_growth_is_drawn_an_axis_for_each_question():
    rows = [{"config": label, "axis": axis, "value": value, "tokens_per_s": 10.0 * value, "memory": 2**30 * value}
            for label in "ab" for axis in "TC" for value in (64, 128)]
    rows.append({"config": "a", "axis": "T", "value": 256, "why": "no"})
    panels = growth.draw_growth(rows, "title").axes
    assert len(panels) == 4
    found = [{line.get_label(): line.get_xydata().tolist() for line in panel.lines} for panel in panels]
    assert found[0] == {label: [[64, 640], [128, 1280]] for label in "ab"} and found[0] == found[1]
    assert found[2]["a"] == [[64, 64], [128, 128]]
    highest = [max(y for line in panel.lines for y in line.get_ydata()) for panel in panels]
    assert all(panel.get_ylim()[1] > 1.05 * y for panel, y in zip(panels, highest, strict=True))
    assert len(growth.draw_growth([row | {"memory": None} for row in rows], "title").axes) == 2


# ---- scale ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scale_measures_processes_as_train_runs_them(workdir, monkeypatch, capsys):
    run_group = child_process.run_group
    monkeypatch.setattr(child_process, "run_group", lambda words: run_group(forks.fork_command(words)))
    bench.main(["scale", "--config", "a.json:n_layer=1", "--processes", "1,1", "--steps", "2", "--json", "s.json"])
    (row,) = json.loads(Path("s.json").read_text())["rows"]  # one process divides nothing: no second time
    assert row["processes"] == 1 and row["tokens_per_s"] > 0 and row["loss"] < 10 and row["warnings"] == []
    assert row["tokens_per_step"] * row["tokens_per_s"] ** -1 == pytest.approx(row["step_ms"] / 1e3)
    assert "100.0% of 1 × one" in capsys.readouterr().out


def test_scale_gives_each_process_as_many_rows_by_default(workdir, monkeypatch):
    seen = []
    row = {"tokens_per_s": 1.0, "step_ms": 1.0, "tokens_per_step": 1, "loss": 1.0, "memory": None, "compile": False,
           "link_bytes_per_s": None, "cuda_graph": False, "ready_s": 1.0, "warnings": ["warning: slow"]}  # fmt: skip

    def scaled(run, n, steps):
        seen.append((n, run.parallel, run.batch_size))
        return {"processes": n, **row}

    monkeypatch.setattr(scale, "measure_processes", scaled)
    bench.main(["scale", "--config", "a.json", "--processes", "1,4", "--parallel", "ddp,fsdp"])
    assert seen == [(1, "ddp", 4), (4, "ddp", 16), (4, "fsdp", 16)]
    bench.main(["scale", "--config", "a.json", "--processes", "4", "--same_batch"])
    assert seen[-1] == (4, "ddp", 4)


@pytest.mark.slow
def test_scale_reports_why_processes_could_not_start(workdir, monkeypatch, capsys):
    run_group = child_process.run_group
    monkeypatch.setattr(child_process, "run_group", lambda words: run_group(forks.fork_command(words)))
    bench.main(["scale", "--config", "a.json", "--processes", "1", "--set", "dataset.path=nowhere.bin"])
    assert "nowhere.bin" in capsys.readouterr().out


def test_efficiency_is_relative_to_as_many_single_processes():
    row = {"parallel": "", "processes": 1, "tokens_per_s": 100.0, "step_ms": 1.0, "tokens_per_step": 1, "loss": 1.0,
           "memory": 2**30, "compile": "blocks", "link_bytes_per_s": None, "cuda_graph": True, "ready_s": 1.0,
           "warnings": []}  # fmt: skip
    four = row | {"parallel": "ddp", "processes": 4, "tokens_per_s": 360.0, "link_bytes_per_s": 3e11}
    four["cuda_graph"] = False
    assert "90.0% of 4 × one" in scale.format_row([row, four]) and "300.0 GB/s" in scale.format_row([row, four])
    assert "× one" not in scale.format_row([four])
    assert "1.00 GiB at most; blocks compiled, CUDA graph" in scale.format_row([row])


# ---- serve ---------------------------------------------------------------------------------------------------------


def test_statuses_of_clients_are_counted_and_their_texts_compared():
    """Three turns of three clients; one is answered with 429, one gets another client's text."""
    arguments = serve.parse_arguments(["air.json", "--clients", "3", "--rows", "2", "--tokens", "9"])
    alone, good = ["a", "b", "c"], [(200, "a", 9), (200, "b", 9), (200, "c", 9)]
    turns = [good, [(200, "a", 9), (429, "", 0), (200, "c", 9)], [(200, "a", 9), (200, "a", 9), (200, "c", 9)]]
    found = [((100.0, good), (speed, turn)) for speed, turn in zip((400.0, 200.0, 300.0), turns)]
    output = serve.format_result(found, alone, arguments)
    assert "3 clients at once, 9 tokens each: 100 tokens/s a text at a time, 300 with 2 rows, 3.0 times" in output
    assert "(2.0 to 4.0)" in output and "8 of 9 requests were served, 1 answered with status 429" in output
    assert "7 of the 8 texts are exactly" in output


def test_each_client_of_the_server_asks_for_its_own_text(monkeypatch):
    server, asked = serve.ServerProcess.__new__(serve.ServerProcess), []
    server.name, server.port = "m", 1

    class Connection:
        status = 200

        def __init__(self, host, port, timeout):
            assert (host, port) == ("127.0.0.1", 1)

        def request(self, method, path, body, headers):
            asked.append(json.loads(body))

        def getresponse(self):
            return self

        def read(self):
            return b'{"choices": [{"text": "x"}], "usage": {"completion_tokens": 7}}'

        def close(self):
            pass

    monkeypatch.setattr(http.client, "HTTPConnection", Connection)
    arguments = serve.parse_arguments(["air.json", "--clients", "5", "--tokens", "7", "--prompt", "4"])
    speed, answers = server.request_all_at_once(arguments)
    assert speed > 0 and answers == [(200, "x", 7)] * 5
    assert sorted(body["seed"] for body in asked) == list(range(5)) and {body["max_tokens"] for body in asked} == {7}
    assert len({tuple(body["prompt"]) for body in asked}) == 5 and {len(body["prompt"]) for body in asked} == {4}


@pytest.mark.slow
def test_a_server_that_does_not_start_is_reported(tmp_path):
    arguments = serve.parse_arguments(["air.json", "--queue", "4"])
    server = serve.ServerProcess(tmp_path, "m", 1, arguments)
    server.command = [*forks.fork_command(server.command[:2]), "--batch=0"]
    with pytest.raises(UserError, match="did not start: .*--batch = 0"), server:
        pass


BARRIER = """
import os, sys, time
print("some output", "ready", sep="\\n", flush=True)
sys.stdin.readline()
open(sys.argv[1], "w").close()
while sum(name.startswith("going") for name in os.listdir(".")) < int(sys.argv[2]):
    time.sleep(0.01)
print("warning: slow")
print('{"tokens_per_s": ' + sys.argv[1][-1] + '}')
"""


def test_children_beside_each_other_measure_at_the_same_time(tmp_path, monkeypatch):
    """Each of three ends only when all three have begun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(child_process, "make_command", lambda role, *words: [sys.executable, "-c", BARRIER, *words])
    rows = child_process.run_together("_speed", [[f"going{i}", "3"] for i in (1, 2, 3)])
    assert rows == [{"tokens_per_s": 1}, {"tokens_per_s": 2}, {"tokens_per_s": 3}]


def test_a_child_that_fails_beside_others_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = "import sys; sys.exit('error: no memory') if sys.argv[1] == 'b' else 0; print('ready', flush=True); " \
           "sys.stdin.readline(); print('{\"tokens_per_s\": 2}')"  # fmt: skip
    monkeypatch.setattr(child_process, "make_command", lambda role, *words: [sys.executable, "-c", body, *words])
    assert child_process.run_together("_speed", [["a"], ["b"]]) == [{"tokens_per_s": 2}, {"why": "no memory"}]
    monkeypatch.setattr(child_process, "run_together", lambda role, words: [{"tokens_per_s": 2}, {"why": "no memory"}])
    monkeypatch.setattr(train, "write_benchmark_config", lambda folder, run: "a.json")
    assert train.measure_beside(None, 1) == {"why": "no memory"}


@pytest.mark.slow
def test_train_measures_beside_others(real_children, capsys):
    bench.main(["train", "--config", "a.json", "--beside", "1", "--json", "t.json"])
    (row,) = json.loads(Path("t.json").read_text())
    assert len(row["beside"]) == 2 and min(row["beside"]) > 0
    share = sum(row["beside"]) / 2 / row["tokens_per_s"]
    assert re.search(rf"2 at once: [\d,]+ tokens/s each, {share:.1%} of one", capsys.readouterr().out)
