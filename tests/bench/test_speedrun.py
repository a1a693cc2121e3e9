"""`bench.py speedrun`: what it counts as seconds in steps, the loss that it compares, and the order of its runs.

A stand-in has the interface of a nanoGPT checkout: a bigram model, and a clock of its own, so that seconds are exact.
"""

import argparse
import json
import textwrap
from pathlib import Path

import forks
import numpy as np
import pytest
import torch

import bench
from model import CONFIGS
from strawberry.bench import child_process, hardware, speedrun, speedrun_child, speedrun_plan
from strawberry.bench.speedrun_child import HeldOut, NanogptMeter, Point, Stopwatch
from strawberry.common import UserError
from strawberry.run_config import load_run
from strawberry.training import plot
from strawberry.training.evaluation import mean_loss

TEXT = "".join(f"The {who} {did} at {n} o'clock.\n" for n in range(1, 12) for who in ("cat", "fox", "hen")
               for did in ("sat", "ran", "ate")) * 6  # fmt: skip
CPU = torch.device("cpu")

MODEL = """
    import time
    from dataclasses import dataclass
    import torch
    from torch import nn

    clock = [0.0]  # an evaluation takes 1,000 seconds, the first step 30 and another one second
    time.perf_counter = lambda: clock[0]

    @dataclass
    class GPTConfig:
        vocab_size: int
        n_embd: int
        block_size: int

    class GPT(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            self.scale = nn.Parameter(torch.ones(config.n_embd))

        def forward(self, idx, targets=None):
            logits = self.lm_head(self.wte(idx) * self.scale)
            return logits, nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
"""
TRAIN = """
    import pickle, sys
    import numpy as np, torch
    from model import GPT, GPTConfig, clock

    n_layer = n_head = 1
    n_embd, block_size, batch_size, gradient_accumulation_steps, max_iters, lr_decay_iters = 64, 16, 4, 1, 1, 1
    learning_rate, min_lr, warmup_iters, dropout, dtype, device = 1e-2, 1e-3, 0, 0.0, "float32", "cuda"
    eval_interval, eval_iters, always_save_checkpoint, wandb_log, compile, dataset = 1, 1, True, False, True, ""
    exec(open("configurator.py").read())
    torch.manual_seed(1337)
    assert device == "cpu" and not compile and eval_iters == 1
    vocab_size = pickle.load(open(f"data/{dataset}/meta.pkl", "rb"))["vocab_size"]
    data = {name: np.fromfile(f"data/{dataset}/{name}.bin", np.uint16).astype(np.int64) for name in ("train", "val")}
    model = GPT(GPTConfig(vocab_size, n_embd, block_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)

    def get_batch(split):
        ix = torch.randint(len(data[split]) - block_size, (batch_size,)).tolist()
        return [torch.tensor(np.stack([data[split][i + j : i + j + block_size] for i in ix])) for j in (0, 1)]

    def estimate_loss():
        model.eval()
        clock[0] += 1000
        x, y = get_batch("val")
        model(x, y)
        model.train()

    for iter_num in range(max_iters + 1):
        if iter_num % eval_interval == 0:
            estimate_loss()
            np.savez(f"SAVED/{iter_num}.npz", **{name: p.detach().numpy() for name, p in model.named_parameters()})
            torch.save({"model": model.state_dict()}, "SAVED/ckpt.pt")
        model(*get_batch("train"))[1].backward()
        clock[0] += 1 if iter_num else 30
        optimizer.step()
        optimizer.zero_grad()
"""
CONFIGURATOR = """
    import sys
    from ast import literal_eval
    for word in sys.argv[1:]:
        if "=" in word:
            key, value = word[2:].split("=")
            try:
                globals()[key] = literal_eval(value)
            except (SyntaxError, ValueError):
                globals()[key] = value
        else:
            exec(open(word).read())
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A working directory with a stand-in in nano/ and a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    files = {"model.py": MODEL, "train.py": TRAIN.replace("SAVED", str(tmp_path / "saved")),
             "configurator.py": CONFIGURATOR, "config/train_shakespeare_char.py": "\n    max_iters = 12"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / "nano" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nano" / name).write_text(textwrap.dedent(text))
    (tmp_path / "input.txt").write_text(TEXT)
    return tmp_path / "nano"


CONFIG = ("tinystar-v0.8-speedrun.json:n_layer=1,n_head=2,n_embd=8,value_embeddings=false,learning_rate=1e-3,"
          "warmup_iters=1")  # fmt: skip
WORDS = ["speedrun", "--nanogpt_path", "nano", "--config", CONFIG, "--data", "input.txt", "--evaluations", "4",
         "--device", "cpu"]  # fmt: skip


# ---- seconds --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(hardware, "synchronized_time", lambda device: now[0])
    return now


def test_a_stopwatch_is_paused_during_evaluations(clock):
    watch = Stopwatch(CPU)
    clock[0] += 5
    watch.end_first_step()
    watch.pause()
    clock[0] += 1000
    assert watch.read() == 5
    watch.resume()
    clock[0] += 2
    assert watch.read() == 7 and watch.first_step == 5


def test_compilation_is_separated_from_steps():
    """Ready after 20 s; the first step takes 11 s, the others one each; evaluations at steps 0, 4 and 8."""
    found = speedrun_child.summarize([Point(0, 20, 9.0), Point(4, 34, 5.0), Point(8, 38, float("nan"))], 31, 10)
    assert found["step_s"] == 1 and found["compile_s"] == 30
    assert found["curve"] == [[0, 0, 0.0, 9.0], [4, 40, 4.0, 5.0], [8, 80, 8.0, None]]


def test_a_model_s_evaluations_are_found_by_its_mode(clock):
    """Each pair of eval and train is one; train alone, as at the start, is none. Compiled models pass the mode on."""

    class Model(torch.nn.Module):
        def forward(self, x, y):
            assert not self.training and not torch.is_grad_enabled()
            clock[0] += 500
            return None, torch.tensor(2.5)

    meter = NanogptMeter(Stopwatch(CPU), np.zeros((11, 3), np.uint16), torch.autocast("cpu", enabled=False))
    meter.install(Model)
    inner = Model()
    outer = torch.nn.Sequential(inner)
    outer.train()
    for _ in range(2):
        clock[0] += 3
        outer.eval()
        clock[0] += 1000
        outer.train()
        assert inner.training
    assert [(p.seconds, p.loss) for p in meter.points] == [(3, 2.5), (6, 2.5)]


def test_seed_1_is_nanogpts_own_and_others_differ(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", torch.manual_seed)  # restored afterwards
    torch.manual_seed(1339)
    expected = torch.rand(3)
    speedrun_child.shift_seeds(0)
    torch.manual_seed(1337)
    assert not torch.equal(torch.rand(3), expected)
    speedrun_child.shift_seeds(2)
    torch.manual_seed(1337)
    assert torch.equal(torch.rand(3), expected)


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "rows"), [(6, 3), (7, 3), (1, 4)])
def test_each_held_out_window_counts_once_whatever_the_batch(n, rows):
    windows = np.random.default_rng(0).integers(0, 50, (n, 6)).astype(np.uint16)

    def forward(x, y, source=None):
        assert x.shape == y.shape == (rows, 5)
        return None, (x * 50.0 + y)[y >= 0].double().mean()

    held_out = HeldOut(windows, rows)
    found = mean_loss(forward, held_out, held_out.n_batches, rows, torch.ones(50, dtype=torch.int64), held_out)[0]
    expected = np.mean([[50 * row[i] + row[i + 1] for i in range(5)] for row in windows.astype(int)])
    assert found == pytest.approx(expected, rel=1e-6)


def test_windows_divide_the_held_out_tokens_and_do_not_overlap():
    tokens = np.arange(100, dtype=np.int64)
    whole = speedrun_plan.choose_windows(tokens, 8, 10**6)
    assert whole[:, 1:].ravel().tolist() == list(range(1, 97))
    assert speedrun_plan.choose_windows(tokens, 8, 24)[:, 0].tolist() == [0, 40, 88]
    with pytest.raises(UserError, match="fewer than a window of 101"):
        speedrun_plan.choose_windows(tokens, 100, 100)


# ---- the order of the runs, with children that only write a curve ----------------------------------------------------


class Ended:
    def __init__(self, code):
        self.returncode = code

    def poll(self):
        return self.returncode


@pytest.fixture
def children(checkout, monkeypatch):
    """Replaces the processes; the list of (side, learning rate, seed) of those that were started."""
    started = []
    settings = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16, "batch_size": 4, "max_iters": 12,
                "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 0,
                "dropout": 0.0, "dtype": "float32", "params": 8, "params_total": 10**6}  # fmt: skip
    monkeypatch.setattr(child_process, "run_in_turns", lambda role, words: [settings])
    monkeypatch.setattr(child_process, "POLL_SECONDS", 0)
    monkeypatch.setattr(speedrun_plan, "hash_code", lambda: "c")  # the code is not read again for each command
    monkeypatch.setattr(plot, "save", lambda fig, path: path.write_bytes(b"\x89PNG\r\n\x1a\n"))

    def start(command, log, jobs, gpus, extra):
        job = json.loads(Path(command[-1]).read_text())
        if command[-2] == "_speedrun_nanogpt":
            lr, seed = next(float(w.partition("=")[2]) for w in job["words"] if "learning_rate" in w), job["seed"]
            curve = [[6, 384, 60.0, 2.5], [12, 768, 120.0, 2 + abs(lr - 2e-2) + seed / 10]]
        else:
            run = json.loads(Path(job["config"]).read_text())
            lr, seed, target = run["learning_rate"], run["seed"], job["target"]
            assert Path(run["dataset"]["path"]).exists() and run["lr_decay_iters"] == run["max_iters"] == 5
            speed = 1 if lr < 3e-3 else 2
            curve = [[4, 256, 40.0 / speed, target + 0.2], [5, 320, 50.0 / speed, target - 0.1 if lr < 1 else 9.0]]
        started.append((command[-2].rpartition("_")[2], lr, seed))
        result = {"curve": curve, "compile_s": 10.0, "step_s": 1.0, "machine": "m", "torch": "t"}
        Path(job["result"]).write_text(json.dumps(result))
        return Ended(0)

    monkeypatch.setattr(child_process, "start", start)
    return started


def test_rates_are_chosen_then_seeds_are_run_and_nothing_is_repeated(children, capsys):
    words = [*WORDS, "--nanogpt_lrs", "1e-2,2e-2", "--lrs", "1e-3,4e-3", "--seeds", "2"]
    assert bench.main(words) is None
    order = [("nanogpt", 1e-2, 1), ("nanogpt", 2e-2, 1), ("nanogpt", 2e-2, 2), ("strawberry", 1e-3, 1),
             ("strawberry", 4e-3, 1), ("strawberry", 4e-3, 2)]  # fmt: skip
    assert sorted(children) == sorted(order) and children.index(order[1]) < children.index(order[2])
    found = json.loads(Path("img/speedrun/speedrun.json").read_text())
    assert [row["target"] for row in found["rows"]] == pytest.approx([2.1, 2.2, 2.1, 2.2])
    assert [row["seconds"] for row in found["rows"]] == [120, 120, 25, 25]
    ratios = {"seconds in steps": 25 / 120, "seconds with compilation": 35 / 130, "tokens": 320 / 768}
    assert found["ratios"] == pytest.approx(ratios)
    assert "| **strawberry, mean of 2** | 0.004 |" in Path("img/speedrun/speedrun.md").read_text()
    assert "0.208 of its seconds in steps" in capsys.readouterr().out
    assert bench.main(words) is None and len(children) == 6
    assert [path.name for path in Path("img/speedrun/runs").iterdir() if path.is_dir()] == []


def test_other_data_another_target_or_another_key_is_another_run(children):
    words = [*WORDS, "--seeds", "1", "--out", "img/speedrun"]
    assert bench.main([*words]) is None and len(children) == 2
    assert bench.main([*words, "--set", "n_embd=16"]) is None
    assert len(children) == 2  # the spec's own n_embd wins
    assert bench.main([*words, "--set", "weight_decay=0.3"]) is None and len(children) == 3
    Path("input.txt").write_text(TEXT.replace("cat", "dog"))
    assert bench.main([*words]) is None and len(children) == 5


def test_a_loss_that_is_not_reached_is_reported_by_how_much(children, capsys):
    assert bench.main([*WORDS, "--seeds", "1", "--lrs", "2"]) is None
    text = Path("img/speedrun/speedrun.md").read_text()
    assert "not reached: best 2.3100 at step 4, 0.2000 above nanoGPT's" in text
    assert "give more --steps" in text and json.loads(Path("img/speedrun/speedrun.json").read_text())["ratios"] is None


def test_a_failed_run_is_named_and_the_others_are_kept(children, monkeypatch):
    works = child_process.start

    def start(command, log, jobs, gpus, extra):
        if command[-2] == "_speedrun_nanogpt":
            return works(command, log, jobs, gpus, extra)
        log.write_text("error: no such thing\n")
        return Ended(2)

    monkeypatch.setattr(child_process, "start", start)
    with pytest.raises(UserError, match=r"1 runs failed: exit code 2, error: no such thing; see .*log.txt"):
        bench.main([*WORDS, "--seeds", "2"])
    monkeypatch.setattr(child_process, "start", works)
    assert bench.main([*WORDS, "--seeds", "2"]) is None
    assert sorted(children) == [("nanogpt", 1e-2, 1), ("nanogpt", 1e-2, 2), ("strawberry", 1e-3, 1),
                                ("strawberry", 1e-3, 2)]  # fmt: skip


def test_after_an_interruption_the_same_command_goes_on(children, monkeypatch, capsys):
    works, stopped = child_process.start, []

    def start(command, log, jobs, gpus, extra):
        return works(command, log, jobs, gpus, extra) if not children else Ended(None)

    def interrupt(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(child_process, "start", start)
        patch.setattr(child_process, "stop_all", lambda running: stopped.extend(running))
        patch.setattr(speedrun.time, "sleep", interrupt)
        assert bench.main([*WORDS, "--seeds", "1"]) == 130
    assert len(stopped) == 1 and "bench.py speedrun --nanogpt_path nano" in capsys.readouterr().out.splitlines()[-1]
    assert bench.main([*WORDS, "--seeds", "1"]) is None
    assert children == [("nanogpt", 1e-2, 1), ("strawberry", 1e-3, 1)]


def test_no_two_runs_share_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    speedrun_plan.check_jobs(2, torch.device("cuda"))
    for jobs, device in ((3, "cuda"), (2, "cpu")):
        with pytest.raises(UserError, match=f"--jobs {jobs}: at most {jobs - 1} on"):
            speedrun_plan.check_jobs(jobs, torch.device(device))


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "message"), [
    (["--nanogpt_path", "nowhere"], "no .*nowhere/train.py; name a checkout of nanoGPT: git clone"),
    (["--set", "max_iters=3"], "use --steps"),
    (["--set", "objective=next"], "leave it out"),
    (["--nanogpt_set", "learning_rate=1"], "use --nanogpt_lrs"),
    (["--nanogpt_set", "n_layer"], "write key=value"),
    (["--nanogpt_lrs", "fast"], "--nanogpt_lrs fast: must be numbers"),
    (["--data_division", "1"], "between 0 and 1"),
    (["--kind", "gpt2"], "needs --encoder"),
    (["--encoder", "x.bin"], "leave it out"),
    (["--data", "nothing.txt"], "nothing.txt: cannot be read as text"),
    (["--set", "batch_size=auto"], "give a number"),
    (["--steps", "1"], "warmup_iters = 1: .* --set warmup_iters="),
    (["--config", "tinystar-v0.8-speedrun.json:n_embd=1024,warmup_iters=1"],
     "and nanoGPT's 1,000,000; make it no larger"),
    (["--config", "air.json:retention_scope=batch,n_embd=8,n_qkv=8,n_head=2,warmup_iters=1"],
     "give a causal decoder"),
])  # fmt: skip
def test_errors_name_the_fix(children, words, message):
    with pytest.raises(UserError, match=message):
        bench.main([*WORDS, *words])
    assert children == []


def test_equal_sizes_are_asked_of_gpt2(children, monkeypatch):
    found = {"params": 1000, "params_total": 1}
    plan = speedrun_plan.Plan(speedrun.parse_arguments([*WORDS[1:], "--kind", "gpt2", "--encoder", "e"]), CPU, Path(),
                              None, nanogpt=found, ours={"params": 1009, "params_total": 9})  # fmt: skip
    speedrun_plan.check_sizes(plan)
    plan.ours["params"] = 1011
    with pytest.raises(UserError, match="1,011 .* 1,000; make them equal within 1%"):
        speedrun_plan.check_sizes(plan)


# ---- whole, with the stand-in's train.py in a child ----------------------------------------------------------------


@pytest.mark.slow
def test_the_stand_in_s_curve_is_exact_and_a_config_reaches_its_loss(checkout, monkeypatch):
    make_command = child_process.make_command
    monkeypatch.setattr(child_process, "make_command", lambda *words: forks.fork_command(make_command(*words)))
    words = ["--seeds", "1", "--steps", "60", "--lrs", "3e-2", "--set", "compile=false"]
    assert bench.main([*WORDS, *words]) is None
    theirs, ours = json.loads(Path("img/speedrun/speedrun.json").read_text())["rows"]
    assert [point[:3] for point in theirs["curve"]] == [[n, n * 64, n] for n in (0, 3, 6, 9, 12)]
    assert theirs["compile_s"] == 29 and theirs["step_s"] == 1
    chars = sorted(set(TEXT))
    held_out = np.array([chars.index(char) for char in TEXT[int(0.9 * len(TEXT)) :]])
    n = (len(held_out) - 1) // 16 * 16
    for step, _, _, loss in theirs["curve"]:
        weights = {name: value.astype(np.float64) for name, value in np.load(f"saved/{step}.npz").items()}
        logits = (weights["wte.weight"][held_out[:n]] * weights["scale"]) @ weights["lm_head.weight"].T
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert loss == pytest.approx(-log_p[np.arange(n), held_out[1 : n + 1]].mean(), rel=1e-5)
    assert not Path("saved/ckpt.pt").exists()  # no time goes into checkpoints
    assert ours["reached"] and ours["loss"] <= theirs["loss"] and ours["seconds"] > 0 and len(ours["curve"]) < 5
    assert Path("img/speedrun/speedrun.png").stat().st_size > 10_000
    assert theirs["params"] == 64 and theirs["params_total"] == 64 + 2 * 64 * len(chars) >= ours["params_total"]
    assert sorted(path.name for path in checkout.iterdir()) == ["config", "configurator.py", "model.py", "train.py"]


def test_our_rates_keep_their_proportions(tmp_path):
    run = load_run(["--config", "tinystar-v0.8-speedrun.json"], CONFIGS)
    given = argparse.Namespace(evaluations=5)
    plan = speedrun_plan.Plan(given, torch.device("cpu"), tmp_path, None, run=run, steps=100)
    trial = speedrun_plan.make_trial(plan, run.learning_rate / 2, 1, 1.5).job["run"]
    before, after = vars(run.optimizer_hyperparams), trial["optimizer_hyperparams"]
    rates = [name for name in before if name.endswith("_lr") and before[name]]
    assert len(rates) == 4 and all(after[name] == pytest.approx(before[name] / 2) for name in rates)
    assert trial["min_lr"] == pytest.approx(run.min_lr / 2) and trial["learning_rate"] == run.learning_rate / 2
