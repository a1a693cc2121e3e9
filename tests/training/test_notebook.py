"""strawberry.train: train.py's work, called from a notebook."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import test_docs
import torch
from runs import TEXT, assert_same, run, weights_and_state, write_config, write_corpus

import model
import sample
import strawberry
import strawberry.notebook
import train
from strawberry.common import UserError
from strawberry.config import to_dict
from strawberry.model_file import load_model
from strawberry.run_config import load_run
from strawberry.training import plot

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    write_corpus("data.bin")
    write_config("tinystar", img_path=None)


def test_importing_the_package_loads_nothing_else():
    code = "import sys; before = set(sys.modules); import strawberry; print(*sorted(set(sys.modules) - before))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in ran.stdout.split()} - set(sys.stdlib_module_names) == {"strawberry"}
    assert "strawberry.notebook" not in ran.stdout


@pytest.mark.slow
def test_it_trains_as_the_command_line_does(capsys):
    assert run() == 0
    step, weights, state = weights_and_state()
    done = strawberry.train("run.json", quiet=True, **{"checkpoints.path": Path("other")})
    again, same_weights, same_state = weights_and_state("other")
    assert step == again == 10 and done.finished
    assert_same(weights, same_weights)
    assert_same(state, same_state)
    assert_same(dict(done.model.state_dict()), load_model("out/tiny.model")[0].state_dict())
    assert not done.model.training and done.metrics == plot.read_metrics("other/metrics.jsonl")
    assert capsys.readouterr().out.count("the model is in") == 1  # the command line's


def test_overrides_are_merged_into_a_file_or_a_dict():
    raw = json.loads(Path("run.json").read_text())
    given = json.loads(json.dumps(raw))
    expected = load_run(["--config", "run.json", "--max_iters=3", "--model_hyperparams.n_embd=32",
                         "--checkpoints.keep=2"], model.CONFIGS)  # fmt: skip
    overrides = {"max_iters": 3, "model_hyperparams": {"n_embd": 32}, "checkpoints.keep": 2}
    for config in ("run.json", given):
        merged = strawberry.notebook.merge_overrides(config, overrides)
        assert to_dict(strawberry.notebook.make_run(merged, model.CONFIGS)) == to_dict(expected)
    assert given == raw  # is not changed
    assert strawberry.notebook.merge_overrides(None, {"max_iters": 3}) == {"max_iters": 3}
    numbers = {"max_iters": np.int64(3), "model_hyperparams": {"window": [np.int64(4)], "dropout": torch.tensor(0.5)}}
    plain = strawberry.notebook.merge_overrides({"seed": np.int64(1)}, numbers | {"model_path": Path("a")})
    assert json.loads(json.dumps(plain)) == {"seed": 1, "max_iters": 3, "model_path": "a", "model_hyperparams": {
        "window": [4], "dropout": 0.5}}  # fmt: skip


@pytest.mark.parametrize("config,overrides,says", [
    ("run.json", {"learning_rat": 1}, "did you mean 'learning_rate'"),
    ("nothing.json", {}, "nothing.json.*no such file"),
    ("", {}, "is a directory|no such file"),
    (["run.json"], {}, r'^config = \["run.json"\]: must be the name of a JSON file, a dict or None'),
    ("run.json", {"max_iters": 0, "seed": -1}, "(?s)2 problems.*seed.*max_iters"),
    ("run.json", {"dataset": {"path": "none.bin"}}, "none.bin"),
    ("run.json", {"init_from": "resume"}, "ck"),
])  # fmt: skip
def test_a_mistake_is_a_user_error(config, overrides, says):
    with pytest.raises(UserError, match=says) as found:
        strawberry.train(config, **overrides)
    assert found.value._render_traceback_() == [f"error: {found.value}"]
    assert not Path("ck").exists()


def test_a_loss_that_is_not_finite_is_a_user_error():
    with pytest.raises(UserError, match="gradient nan.*no checkpoint yet.*lower learning_rate"):
        strawberry.train("run.json", quiet=True, learning_rate=1e30, decay_lr=False, grad_clip=0)
    assert strawberry.train("run.json", quiet=True, max_iters=2).finished  # no lock is left


def test_samples_are_those_of_the_command_line(capsys):
    done = strawberry.train("run.json", quiet=True)
    capsys.readouterr()
    options = {"length": 20, "temperature": 0.9, "top_k": 12, "top_p": 0.9, "min_p": 0.01, "seed": 3,
               "repetition_penalty": 1.5, "min_tokens": 5}  # fmt: skip
    sample.main(["--model", "out/tiny.model", "--prompt", "a cat", *(f"--{name}={v}" for name, v in options.items())])
    assert done.sample("a cat", **options) + "\n" == capsys.readouterr().out
    assert done.sample("a cat", seed=1, length=30) == done.sample("a cat", seed=1, length=30)
    assert isinstance(done.sample(length=3), str)
    for call in (lambda: done.sample(5), lambda: done.plot("x.json"), lambda: done.plot(done, None)):
        with pytest.raises(UserError, match="must be text|must be a run"):
            call()
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"length": 0}, {"seed": "x"},
                  {"repetition_penalty": 0}):  # fmt: skip
        with pytest.raises(UserError, match=f"{next(iter(wrong))} = .*must be"):
            done.sample("a", **wrong)
    with pytest.raises(UserError, match="source: this tinystar takes no source"):
        done.sample("a", source="b")


def test_an_encoder_model_generates_no_text():
    shape = {"arch": "transformer", "kind": "encoder", "vocab_size": 44, "block_size": 16, "n_layer": 1, "n_embd": 16}
    raw = json.loads(Path("run.json").read_text()) | {"model_hyperparams": shape}
    done = strawberry.train(raw, quiet=True, max_iters=2)
    with pytest.raises(UserError, match="predicts masked tokens, not text"):
        done.sample("a")


@pytest.mark.slow
def test_the_figure_is_as_matplotlib_and_ipython_want_it(tmp_path):
    from matplotlib.figure import Figure

    first = strawberry.train("run.json", quiet=True)
    second = strawberry.train("run.json", quiet=True, learning_rate=1e-3, warmup_iters=3, seed=6)
    figure = first.plot(second, x="tokens")
    assert isinstance(figure, Figure) and len(figure.axes) == 3 and figure._repr_png_().startswith(b"\x89PNG")
    figure.savefig(tmp_path / "loss.pdf")
    losses = [line["val_loss"] for line in first.metrics if "val_loss" in line]
    assert any(list(line.get_ydata()) == losses for line in figure.axes[0].lines)  # the first run's, replaced on disk
    names = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    full = strawberry.notebook.name_runs([first, second])
    assert full == ["learning_rate 0.003, warmup_iters 2", "learning_rate 0.001, warmup_iters 3"]
    assert names == plot.shorten_names(full)
    assert strawberry.notebook.name_runs([first, first]) == ["tiny 1", "tiny 2"]
    with pytest.raises(UserError, match='x = "token": .*did you mean .tokens.'):
        first.plot(x="token")
    assert repr(first) == f"<run tiny: tinystar, 10 of 10 steps, validation loss {losses[-1]:.4f}>"


# ---- interrupts ----------------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch, step: int, number=signal.SIGINT, times=1):
    log = train.Trainer.log

    def log_and_interrupt(self, bar, n, *values):
        log(self, bar, n, *values)
        for _ in range(times if n == step else 0):
            signal.raise_signal(number)

    monkeypatch.setattr(train.Trainer, "log", log_and_interrupt)


def test_an_interrupt_saves_and_returns_the_run(monkeypatch, capsys):
    whole = strawberry.train("run.json", quiet=True, **{"checkpoints.path": "other"})
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        stopped = strawberry.train("run.json", quiet=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert not stopped.finished and "3 of 10 steps" in repr(stopped) and weights_and_state()[0] == 3
    assert stopped.sample("a", length=3) and stopped.plot()
    assert 'interrupted: step 3 is saved in ck; strawberry.train(…, init_from="resume") goes on' in (
        capsys.readouterr().err
    )
    done = strawberry.train("run.json", quiet=True, init_from="resume")
    assert_same(dict(done.model.state_dict()), dict(whole.model.state_dict()))


def test_a_second_interrupt_ends_the_run_immediately(monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, times=2)
        with pytest.raises(KeyboardInterrupt):
            strawberry.train("run.json", quiet=True)
    assert strawberry.train("run.json", quiet=True, max_iters=2).finished


def test_an_interrupt_before_the_first_step_is_python_s_own(monkeypatch):
    monkeypatch.setattr(train.setup, "print_summary", lambda state: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        strawberry.train("run.json", quiet=True)
    assert not Path("ck").exists()


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM ends a process there")
def test_sigterm_to_a_kernel_ends_it_after_the_step(monkeypatch):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(weights_and_state()[0]))
    try:
        interrupt_at(monkeypatch, 3, signal.SIGTERM)
        strawberry.train("run.json", quiet=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [3]


def test_it_runs_in_another_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(strawberry.train("run.json", quiet=True)))
    thread.start()
    thread.join()
    assert found[0].finished


def test_an_architecture_defined_in_a_cell_is_trained_by_its_name(monkeypatch):
    for registry in (model.MODELS, model.CONFIGS):
        monkeypatch.setitem(registry, "mean", None)  # is taken out again afterwards
    scope = {**vars(model), "__name__": "__main__"}
    exec(test_docs.example(), scope)
    model.CONFIGS["mean"] = scope["Mean"].Config
    shape = {"arch": "mean", "vocab_size": 44, "block_size": 16, "n_embd": 16}
    done = strawberry.train(json.loads(Path("run.json").read_text()) | {"model_hyperparams": shape}, quiet=True)
    assert type(done.model) is scope["Mean"] and done.sample("a", length=4)
