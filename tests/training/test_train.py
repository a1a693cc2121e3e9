"""Training: the same run whether interrupted or not, gradients that are exact, losses that are honest."""

import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from runs import (
    ALPHABET,
    MODELS,
    TEXT,
    assert_same,
    metrics,
    prepared,
    run,
    weights_and_state,
    write_config,
    write_corpus,
)

import encoder as encoders
import train
from model import CONFIGS, build
from strawberry.common import UserError
from strawberry.data.loader import map_tensors
from strawberry.data.objectives import Batch
from strawberry.data.token_file import TokenFileWriter
from strawberry.model_file import load_model
from strawberry.run_config import load_run
from strawberry.training import checkpointing, cuda_graph, evaluation, plot, setup
from strawberry.training.checkpoint import find_latest, list_checkpoints
from strawberry.training.console import Console
from strawberry.training.metrics import Metrics
from strawberry.training.signals import Interrupted, Signals
from strawberry.training.step import TrainStep
from train import Trainer


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def at_step(monkeypatch, step, act):
    """Call `act()` once, in the middle of the step of that number."""
    compute = TrainStep.compute_gradients

    def then_compute(self, micro_batches):
        if self.state.progress.step == step - 1:
            act()
        return compute(self, micro_batches)

    monkeypatch.setattr(TrainStep, "compute_gradients", then_compute)


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_accumulated_gradients_are_those_of_one_large_batch(run_folder, model):
    write_config(model)
    trainer = prepared()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 30, (6, 16), generator=generator) for _ in range(2))
    y[0], y[1, 3:], y[4:, ::2] = -1, -1, -1  # the first micro-batch has 0 + 3 targets, the others 32 and 16
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    grads = []
    for parts in ([slice(0, 6)], [slice(0, 2), slice(2, 4), slice(4, 6)], [slice(0, 1), slice(1, 6)]):
        trainer.optimizer.zero_grad()
        loss = trainer.steps.accumulate([Batch(x[part], y[part], None, int((y[part] >= 0).sum())) for part in parts])
        grads.append([loss, *(p.grad.clone() for p in trainer.model.parameters())])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_to_grad_clip(run_folder):
    trainer = prepared("--grad_clip=0.01")
    with trainer.batches() as loader:
        _, before = trainer.steps.compute_gradients(next(loader))
    after = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item()
    assert before > 0.01 and after == pytest.approx(0.01, rel=1e-3)


def test_the_warm_up_step_leaves_weights_and_buffers_unchanged(run_folder, monkeypatch):
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x

    def build_counting(hyper):
        model = build(hyper)
        model.drop = Counting()
        return model

    monkeypatch.setattr(train, "build", build_counting)
    trainer = prepared()
    torch.manual_seed(trainer.run.seed)
    assert_same(trainer.model.state_dict(), build_counting(trainer.run.model_hyperparams).state_dict())
    assert trainer.model.drop.calls == 0 and all(p.grad is None for p in trainer.model.parameters())


# ---- objectives ----------------------------------------------------------------------------------------------------

TRANSFORMER = {"arch": "transformer", "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.1}
OBJECTIVES = {
    "spans": {"kind": "encoder-decoder", "vocab_size": 42},  # the encoder has 41 ids, a window of 16 one span
    "pairs": {"kind": "encoder-decoder", "vocab_size": 41},
    "masked": {"kind": "encoder", "vocab_size": 42},
}


@pytest.fixture(params=OBJECTIVES)
def objective(request, run_folder, monkeypatch):
    """The name of an objective, for which there are data and a config."""
    monkeypatch.setitem(MODELS, "transformer", TRANSFORMER | OBJECTIVES[request.param])
    write_config("transformer", dataset={"path": "pairs.bin" if request.param == "pairs" else "data.bin"})
    encoder = encoders.load("chars:text.txt")
    with TokenFileWriter("pairs.bin", encoder, kind="pairs") as writer:
        for line in TEXT.splitlines():
            for half in (line[:6], line[6:]):
                writer.add(np.array(encoder.encode(half)))
    return request.param


@pytest.mark.slow
def test_a_resumed_run_of_any_objective_is_the_uninterrupted_one(objective):
    run("--gradient_accumulation_steps=2")
    whole = weights_and_state()
    evaluations = [line for line in metrics() if "val_loss" in line]
    run("--gradient_accumulation_steps=2", "--max_iters=7", "--lr_decay_iters=10", "--checkpoints.path=other")
    run("--gradient_accumulation_steps=2", "--init_from=resume", "--checkpoints.path=other")
    step, weights, state = weights_and_state("other")
    assert step == whole[0] == 10
    assert_same(weights, whole[1])
    assert_same(state, whole[2])
    again = [line for line in metrics("other/metrics.jsonl") if "val_loss" in line]
    assert again[0] == evaluations[0] and again[-1] == evaluations[-1]


@pytest.mark.slow
def test_losses_of_any_objective_are_means_over_the_targets(objective):
    trainer = prepared()
    split, encoder = trainer.corpus.val, trainer.encoder
    with evaluation.evaluation_mode(trainer.model):
        got = evaluation.mean_loss(trainer.model, split, 2, 3, trainer.lengths, trainer.objective)
        nats, n_bytes, count = 0.0, 0, 0
        for sample in range(6):  # one at a time
            x, y, source, _ = map_tensors(trainer.objective.make_batch(split, 0, sample, 1), torch.from_numpy)
            log_p = trainer.model(x, source=source)[0][0].log_softmax(-1)
            for t, target in enumerate(y[0].tolist()):
                if target >= 0:
                    nats -= log_p[t, target].item()
                    n_bytes += target not in (encoder.eot, encoder.pad)
                    count += 1
    assert got[0] == pytest.approx(nats / count, rel=1e-5)
    if objective == "pairs":  # how well the answers are predicted, in bits for each byte of them
        assert got[1] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    else:
        assert math.isnan(got[1])


@pytest.mark.slow
def test_accumulation_weights_rows_by_their_targets(objective):
    """Batches of 1 as one of 6, though they have unequally many targets."""
    trainer = prepared("--model_hyperparams.dropout=0")
    grads = []
    for rows in (6, 1):
        trainer.optimizer.zero_grad()
        batches = [evaluation.make_batch(trainer.objective, trainer.corpus.train, 5, i, rows, "cpu")
                for i in range(0, 6, rows)]  # fmt: skip
        grads.append([trainer.steps.accumulate(batches), *(p.grad.clone() for p in trainer.model.parameters())])
    batch = evaluation.make_batch(trainer.objective, trainer.corpus.train, 5, 0, 6, "cpu")
    assert grads[0][0].item() == pytest.approx(trainer.model(batch.x, batch.y, source=batch.source)[1].item(), rel=1e-5)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_evaluations_print_samples_of_each_objective(objective, capsys):
    run("--max_iters=1")
    out, line = capsys.readouterr().out, metrics()[-1]
    assert f"\nobjective    {objective}" in out
    assert (objective == "pairs") == ("bits per byte" in out) == (line["val_bpb"] is not None)
    assert "strict_loss" not in line
    assert (objective != "masked") == ("    | → " in out)
    assert (objective == "spans") == ("<|0|>" in out.partition("    | → ")[0])
    run("--max_iters=1", "--sample_prompt=the cat")
    assert (objective != "masked") == ("    | the cat<|eot|>\n    | → " in capsys.readouterr().out)


@pytest.mark.slow
def test_objective_and_pad_id_are_inferred_and_recorded(objective):
    trainer = prepared()
    assert trainer.run.objective == trainer.checkpoints.training_record()["run"]["objective"] == objective
    assert trainer.model.config.pad_id == trainer.encoder.pad
    assert prepared(f"--model_hyperparams.pad_id={trainer.encoder.pad}").model.config.pad_id == trainer.encoder.pad
    with pytest.raises(UserError, match=r"pad_id = 3: the encoder pads with 40; set it to that or to null"):
        prepared("--model_hyperparams.pad_id=3")


def test_truncated_pairs_are_counted_at_the_start(run_folder, monkeypatch, capsys):
    encoder = encoders.load("chars:text.txt")
    with TokenFileWriter("pairs.bin", encoder, kind="pairs") as writer:
        for length in (3, 15, 16, 40) * 3:
            writer.add(np.zeros(3))
            writer.add(np.zeros(length))
    monkeypatch.setitem(MODELS, "transformer", TRANSFORMER | OBJECTIVES["pairs"])
    write_config("transformer", dataset={"path": "pairs.bin"})
    prepared()
    assert "objective    pairs; 6 of 12 are cut to 16 tokens" in capsys.readouterr().out


# ---- the same run, interrupted or not ------------------------------------------------------------------------------


@pytest.mark.parametrize("model,muon,stop", [("strawberry", "true", 7), ("tinystar", "false", 3)])
def test_a_resumed_run_is_the_uninterrupted_one(run_folder, monkeypatch, capsys, model, muon, stop):
    write_config(model, gradient_accumulation_steps=2, model_hyperparams={"dropout": 0.2})
    options = [f"--optimizer_hyperparams.use_muon={muon}"]
    assert run(*options, "--checkpoints.path=whole") == 0
    with monkeypatch.context() as patch:
        at_step(patch, stop, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(*options) == 143
    assert find_latest("ck").step == stop == metrics()[-1]["step"]
    capsys.readouterr()
    assert run(*options, "--init_from=resume") == 0
    assert "changed keys" not in capsys.readouterr().out
    whole, resumed = weights_and_state("whole"), weights_and_state("ck")
    assert whole[0] == resumed[0] == 10
    assert_same(whole[1], resumed[1])
    assert_same(whole[2], resumed[2])
    timeless = [[{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in metrics(path)]
                for path in ("whole/metrics.jsonl", "ck/metrics.jsonl")]  # fmt: skip
    assert timeless[0] == timeless[1]


def test_steps_draw_dropout_and_batches_of_their_own(run_folder):
    write_config(model_hyperparams={"dropout": 0.5})
    trainer = prepared()
    with trainer.batches() as loader:
        batch = next(loader)
        other = next(loader)
    assert not torch.equal(batch[0][0], other[0][0])
    losses = []
    for trainer.progress.step in (0, 0, 1):
        trainer.optimizer.zero_grad()
        losses.append(trainer.steps.compute_gradients(batch)[0])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_what_was_logged_after_the_checkpoint_is_dropped_on_resume(run_folder, monkeypatch):
    at_step(monkeypatch, 7, lambda: os.kill(os.getpid(), 0) or (_ for _ in ()).throw(RuntimeError("power cut")))
    with pytest.raises(RuntimeError):
        run()
    assert [line["step"] for line in metrics()] == [1, 2, 3, 4, 5, 5, 6]
    with open("ck/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    monkeypatch.undo()
    os.chdir(run_folder)
    monkeypatch.setattr(plot, "curves", lambda *arguments: None)
    assert run("--init_from=resume") == 0
    assert [line["step"] for line in metrics()] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]


@pytest.mark.slow
def test_an_evaluation_interrupted_by_a_signal_is_done_on_resume(run_folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "mean_loss", lambda *arguments: signal.raise_signal(signal.SIGINT))
        assert run() == 130
    assert find_latest("ck").step == 5 and not any("val_loss" in line for line in metrics())
    assert run("--init_from=resume") == 0
    assert [line["step"] for line in metrics() if "val_loss" in line] == [5, 10]


@pytest.mark.slow
def test_resuming_a_finished_run_only_writes_the_model(run_folder, capsys):
    assert run() == 0
    before = metrics()
    Path("out/tiny.model").unlink()
    assert run("--init_from=resume") == 0
    assert Path("out/tiny.model").exists() and metrics() == before


@pytest.mark.slow
def test_a_seed_of_auto_is_drawn_and_recorded(run_folder):
    run("--seed=auto", "--max_iters=1")
    first = find_latest("ck").meta["run"]["seed"]
    run("--seed=auto", "--max_iters=2", "--init_from=resume")
    assert isinstance(first, int) and find_latest("ck").meta["run"]["seed"] == first
    run("--seed=auto", "--max_iters=1")
    assert find_latest("ck").meta["run"]["seed"] != first


@pytest.mark.slow
def test_resume_lists_what_has_changed(run_folder, capsys):
    run()
    capsys.readouterr()
    assert run("--init_from=resume", "--max_iters=12", "--learning_rate=0.002") == 0
    out = capsys.readouterr().out
    assert "max_iters: 10 → 12" in out and "learning_rate: 0.003 → 0.002" in out and "init_from" not in out


@pytest.mark.slow
@pytest.mark.parametrize("change,named", [
    (lambda: write_corpus("data.bin", TEXT + "one line more\n"), "dataset"),
    (lambda: (Path("text.txt").write_text(ALPHABET + "ZQ"), write_corpus("data.bin", TEXT)), "encoder"),
])  # fmt: skip
def test_resume_refuses_changed_data_and_encoders_with_both_fingerprints(run_folder, change, named):
    run()
    then = find_latest("ck").meta[named][:12]
    change()
    with pytest.raises(UserError, match=f"the {named} has changed") as refused:
        run("--init_from=resume")
    trainer = Trainer(load_run(["--config", "run.json"], CONFIGS), Signals())
    encoder, corpus = setup.load_data(trainer.run)
    now = {"dataset": corpus, "encoder": encoder}[named].fingerprint[:12]
    assert then in str(refused.value) and now in str(refused.value) and now != then


def test_resume_refuses_a_model_of_another_shape(run_folder):
    run()
    with pytest.raises(UserError, match="model_hyperparams.n_embd: 16 → 32"):
        run("--init_from=resume", "--model_hyperparams.n_embd=32")


def test_a_new_run_archives_the_earlier_one_unchanged(run_folder, capsys):
    run()
    before = metrics()
    assert run("--seed=6", "--max_iters=3") == 0
    assert "ck/earlier_1" in capsys.readouterr().out.replace(os.sep, "/")
    assert find_latest("ck").step == 3 and find_latest("ck/earlier_1").step == 10
    assert metrics("ck/earlier_1/metrics.jsonl") == before and metrics()[-1]["step"] == 3


# ---- stopping ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_update(run_folder, monkeypatch, capsys):
    grabbed = []
    compute, count = TrainStep.compute_gradients, Trainer.count

    def poisoned(self, micro_batches):
        loss, norm = compute(self, micro_batches)
        return (math.nan, norm) if self.state.progress.step == 6 else (loss, norm)

    def counted(self, seconds):
        count(self, seconds)
        grabbed[:] = [self, {name: p.clone() for name, p in self.model.state_dict().items()}]

    monkeypatch.setattr(TrainStep, "compute_gradients", poisoned)
    monkeypatch.setattr(Trainer, "count", counted)
    assert run() == 3
    error = capsys.readouterr().err
    assert "step 7: the loss is nan" in error and "step 4 is saved" in error and "--init_from=resume" in error
    trainer, before = grabbed
    assert_same(trainer.model.state_dict(), before)
    assert find_latest("ck").step == 4 and not Path("out/tiny.model").exists()


def test_a_weight_that_is_not_finite_is_never_saved(run_folder):
    trainer = prepared()
    with torch.no_grad():
        trainer.model.embed.weight[0, 0] = math.nan
    with trainer.batches() as loader:
        loss, norm = trainer.steps.compute_gradients(next(loader))
    with pytest.raises(cuda_graph.NonFinite, match="step 1"):
        trainer.steps.update_weights(loss, norm)
    with pytest.raises(cuda_graph.NonFinite, match=r"embed\.weight"):
        trainer.save()
    assert trainer.saved == -1


def test_an_exploding_run_ends_with_code_3(run_folder, capsys):
    assert run("--learning_rate=1e20", "--warmup_iters=0", "--max_iters=200", "--log_interval=50") == 3
    assert "lower learning_rate" in capsys.readouterr().err


def test_a_signal_before_the_first_step_changes_nothing(run_folder, monkeypatch, capsys):
    run("--max_iters=2")
    before = sorted(Path("ck").rglob("*"))
    monkeypatch.setattr(train, "build", lambda hyper: signal.raise_signal(signal.SIGTERM))
    assert run() == 143
    assert sorted(Path("ck").rglob("*")) == before
    assert capsys.readouterr().out.rstrip().endswith("--config run.json")  # not resume: that is the older run's


def test_deferred_signals_are_raised_at_the_end_of_the_block():
    done = []
    with Signals() as signals:
        with pytest.raises(Interrupted), signals.deferred():
            with signals.deferred():
                signal.raise_signal(signal.SIGINT)
            done.append("inner")
        assert done == ["inner"] and signals.received == signal.SIGINT
    with Signals(), pytest.raises(Interrupted, match="SIGTERM"):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_exits_immediately(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with Signals() as signals, pytest.raises(Interrupted), signals.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert left == [130]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send SIGINT to a process alone")
def test_sigint_saves_and_prints_the_command_that_resumes(run_folder):
    script = str(Path(train.__file__).resolve())
    command = [sys.executable, script, "--config", "run.json", "--init_from", "scratch", "--max_iters=100000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        for line in process.stdout:
            if line.startswith("step 5:"):  # the first evaluation
                break
        process.send_signal(signal.SIGINT)
        last = process.stdout.read().rstrip().splitlines()[-2:]
        assert process.wait(20) == 130
    step = find_latest("ck").step
    assert f"step {step:,} is saved" in last[0]
    words = shlex.split(last[1])
    assert words[1] == script and words[2:] == ["--config", "run.json", "--max_iters=100000", "--init_from=resume"]
    assert train.main([*words[2:], f"--max_iters={step + 1}"]) == 0
    assert metrics()[-1]["step"] == step + 1


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_is_retried(run_folder, monkeypatch, capsys):
    save, calls = checkpointing.save_checkpoint, []

    def full_disk(root, step, *rest):
        calls.append(step)
        if len(calls) == 1:
            raise UserError("cannot save: No space left on device")
        return save(root, step, *rest)

    monkeypatch.setattr(checkpointing, "save_checkpoint", full_disk)
    assert run() == 0
    assert calls == [4, 5, 8, 10] and "No space left" in capsys.readouterr().err


@pytest.mark.slow
def test_data_that_becomes_unreadable_loses_no_step(run_folder, monkeypatch):
    at_step(monkeypatch, 7, lambda: (_ for _ in ()).throw(UserError("data.bin was replaced")))
    with pytest.raises(UserError):
        run()
    assert find_latest("ck").step == 6


def test_metrics_survive_a_full_disk(tmp_path, monkeypatch, capsys):
    log = Metrics(tmp_path / "metrics.jsonl")
    log.add(step=1, loss=1.0)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        log.add(step=2, loss=math.nan)
    log.add(step=3, loss=3.0)
    assert metrics(log.path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 3.0}]
    assert "No space left" in capsys.readouterr().err


# ---- what is learned and printed -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_overfits_a_small_corpus_and_writes_a_model_that_knows_it(run_folder, capsys, model):
    write_config(model)
    write_corpus("data.bin", "the cat sat on the mat.\n" * 40)
    assert run("--max_iters=150", "--eval_interval=150", "--learning_rate=0.02", "--batch_size=8",
               "--sample_prompt=the cat", "--checkpoints.interval=1000") == 0  # fmt: skip
    assert metrics()[-1]["val_loss"] < 0.1
    assert "| the cat sat on " in capsys.readouterr().out
    model, encoder, record = load_model("out/tiny.model")
    idx = torch.tensor([encoder.encode("the cat")])
    assert encoder.decode(model.generate(idx, 8, temperature=0)[0]) == "the cat sat on "
    assert record["step"] == 150 and record["run"]["seed"] == 5 and record["val_loss"] < 0.1


@pytest.mark.slow
def test_metrics_have_every_logged_step_and_evaluation(run_folder, capsys):
    assert run("--log_interval=2", "--max_iters=7", "--gradient_accumulation_steps=2") == 0
    logged = [line for line in metrics() if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 4, 6, 7]
    assert [line["tokens"] for line in logged] == [96 * line["step"] for line in logged]
    for line in logged:
        assert line.keys() == {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "seconds"}
        assert all(value > 0 for value in line.values())
    evaluations = [line for line in metrics() if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [5, 7]
    assert evaluations[0].keys() == {"step", "tokens", "train_loss", "train_bpb", "val_loss", "val_bpb", "sample"}
    out = capsys.readouterr().out
    for text in ("parameters", "96 tokens of 0.0", "float32", "aft → tea", "muon", "bits per byte"):
        assert text in out


@pytest.mark.slow
@pytest.mark.parametrize("scope,agree", [("causal", True), ("batch", False)])
def test_strict_and_plain_loss_agree_exactly_where_the_model_is_causal(run_folder, scope, agree):
    write_config(model_hyperparams={"retention_scope": scope})
    trainer = prepared()
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    with evaluation.evaluation_mode(trainer.model):
        strict, plain = evaluation.strict_loss(trainer.model, trainer.corpus.val, positions=40, rows=3)
        again = evaluation.strict_loss(trainer.model, trainer.corpus.val, positions=40, rows=3)
    assert (strict, plain) == again
    assert (abs(strict - plain) < 1e-5) == agree
    assert agree or abs(strict - plain) > 1e-3


def test_the_strict_loss_sees_each_prefix_alone(run_folder):
    write_config(model_hyperparams={"retention_scope": "batch"})
    trainer = prepared()
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    split = trainer.corpus.val
    with evaluation.evaluation_mode(trainer.model):
        got = evaluation.strict_loss(trainer.model, split, positions=3, rows=2)[0]
        expected = 0
        places = (0, 9, 3)  # 16 · (0, 0.618, 0.236)
        for window, t in zip(split.read_windows(evaluation.EVAL_SEED, 0, 3).tolist(), places, strict=True):
            logits, _ = trainer.model(torch.tensor([window[: t + 1]]))
            expected -= logits[0, t].log_softmax(-1)[window[t + 1]].item() / 3
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_strict_loss_of_a_model_that_is_not_causal_is_printed(run_folder, capsys):
    write_config(model_hyperparams={"retention_scope": "batch"})
    assert run("--max_iters=2") == 0
    assert "strict loss in validation" in capsys.readouterr().out
    assert {"strict_loss", "plain_at_strict"} <= metrics()[-1].keys()


def test_evaluation_is_the_mean_over_tokens_and_bytes(run_folder):
    Path("text.txt").write_text(ALPHABET + "é", encoding="utf-8")  # two bytes a character
    write_corpus("data.bin", "été café né\n" * 60)
    trainer = prepared()
    split, encoder = trainer.corpus.val, trainer.encoder
    with evaluation.evaluation_mode(trainer.model):
        got = evaluation.mean_loss(trainer.model, split, 2, 3, trainer.lengths)
        nats, n_bytes, count = 0.0, 0, 0
        for window in split.read_windows(evaluation.EVAL_SEED, 0, 6):
            log_p = trainer.model(torch.from_numpy(window[None, :-1]))[0][0].log_softmax(-1)
            for t, target in enumerate(window[1:].tolist()):
                nats -= log_p[t, target].item()
                n_bytes += 0 if target == encoder.eot else len(encoder.decode([target]).encode())
                count += 1
    assert n_bytes > count  # the é
    assert got == pytest.approx((nats / count, nats / math.log(2) / n_bytes), rel=1e-5)


def test_losses_by_quarter_are_means_over_their_targets(run_folder):
    trainer = prepared()
    split, T = trainer.corpus.val, trainer.run.model_hyperparams.block_size
    nats = [[], [], [], []]
    with evaluation.evaluation_mode(trainer.model):
        got = evaluation.mean_loss_by_quarter(trainer.model, split, 2, 3, trainer.device)
        for window in split.read_windows(evaluation.EVAL_SEED, 0, 6):
            log_p = trainer.model(torch.from_numpy(window[None, :-1]))[0][0].double().log_softmax(-1)
            for t, target in enumerate(window[1:].tolist()):
                nats[4 * t // T].append(-log_p[t, target].item())
    assert T % 4 == 0 and got == pytest.approx([sum(part) / len(part) for part in nats], rel=1e-5)
    assert len({round(loss, 4) for loss in got}) == 4


def test_evaluations_read_each_window_at_most_once_and_always_the_same(run_folder):
    trainer = prepared()
    seen = []

    def forward(x, y, source):
        seen.append(y)
        return None, torch.tensor(1.0)

    n = trainer.corpus.val.n_windows
    assert evaluation.mean_loss(forward, trainer.corpus.val, 10_000, 3, trainer.lengths)[0] == 1
    rows = torch.cat(seen)
    epoch = torch.from_numpy(trainer.corpus.val.read_windows(evaluation.EVAL_SEED, 0, n))  # n windows: each once
    assert torch.equal(rows, epoch[: n // 3 * 3, 1:])
    first, seen = rows, []
    evaluation.mean_loss(forward, trainer.corpus.val, 10_000, 3, trainer.lengths)
    assert torch.equal(first, torch.cat(seen))


def test_training_starts_from_a_pretrained_model(run_folder):
    run()
    trainer = prepared("--init_from=out/tiny.model,pretrained", "--checkpoints.path=ck2")
    assert_same(trainer.model.state_dict(), load_model("out/tiny.model")[0].state_dict())
    assert trainer.progress.step == 0
    with pytest.raises(UserError, match="model_hyperparams.n_layer: 1 → 2"):
        run("--init_from=pretrained,out/tiny.model", "--model_hyperparams.n_layer=2")


def test_training_continues_where_compilation_fails(run_folder, monkeypatch, capsys):
    run("--checkpoints.path=eager")

    def broken(*arguments):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", lambda model, **options: broken)
    assert run("--compile=true") == 0
    assert "torch.compile failed" in capsys.readouterr().err
    assert_same(weights_and_state("eager")[1], weights_and_state("ck")[1])


@pytest.mark.parametrize("model,muon,said", [
    ("strawberry", "false", True), ("strawberry", "true", False), ("tinystar", "false", True),
    ("strawberry-silia", "false", True), ("palm", "false", False), ("transformer", "false", False),
])  # fmt: skip
def test_a_family_that_learns_better_with_muon_is_reported_once(run_folder, capsys, model, muon, said):
    write_config("tinystar", model_hyperparams={"arch": model})
    run("--max_iters=2", f"--optimizer_hyperparams.use_muon={muon}")
    assert capsys.readouterr().out.count(f"{model} learned better with Muon") == said


@pytest.mark.parametrize("model,keys,rate", [
    ("palm", [], "0.1"), ("palm", ["optimizer_hyperparams.embedding_lr=0.1"], None),
    ("tinystar", ["model_hyperparams.tie_embeddings=false"], "0.1"),
    ("tinystar", [], "0.02"), ("tinystar", ["optimizer_hyperparams.use_muon=false"], None),
    ("strawberry", [], "0.006"), ("strawberry", ["learning_rate=1e-2"], None), ("transformer", [], None),
])  # fmt: skip
def test_an_embedding_without_a_rate_of_its_own_is_reported_once(run_folder, capsys, model, keys, rate):
    write_config("tinystar", model_hyperparams={"arch": model})
    run("--max_iters=2", *(f"--{key}" for key in keys))
    output = capsys.readouterr().out
    assert output.count("embedding learned better with a rate of its own") == bool(rate)
    assert output.count(f"--optimizer_hyperparams.embedding_lr={rate}\n") == bool(rate)


@pytest.fixture
def compiled_graphs(monkeypatch):
    """A list of whether gradients were enabled in each compiled graph, in a run whose graphs are not optimized; those
    without gradients fail to compile if `compiled_graphs.fail` is set."""
    graphs, compile = types.SimpleNamespace(grad=[], fail=False), torch.compile

    def backend(graph, inputs):
        graphs.grad.append(torch.is_grad_enabled())
        if graphs.fail and not torch.is_grad_enabled():
            raise RuntimeError("no registers left")
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **options: compile(model, backend=backend, **options))
    yield graphs
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["true", "blocks"])
def test_an_evaluation_is_compiled_at_the_first_evaluation(run_folder, compiled_graphs, capsys, how):
    trainer = prepared(f"--compile={how}")
    assert compiled_graphs.grad and all(compiled_graphs.grad)
    assert trainer.compiled == {"true": True}.get(how, how)
    assert run(f"--compile={how}", "--eval_interval=2", "--checkpoints.path=ck2") == 0
    assert not all(compiled_graphs.grad)
    assert capsys.readouterr().out.count("compiling the evaluation") == 1


@pytest.mark.slow
def test_evaluation_continues_where_compilation_fails(run_folder, compiled_graphs, capsys):
    run("--checkpoints.path=eager", "--eval_interval=2")
    compiled_graphs.fail = True
    assert run("--compile=true", "--eval_interval=2") == 0
    assert capsys.readouterr().err.count("torch.compile failed, so that evaluations take longer") == 1
    losses = [[line["val_loss"] for line in metrics(f"{path}/metrics.jsonl") if "val_loss" in line]
              for path in ("eager", "ck")]  # fmt: skip
    assert len(losses[0]) > 1 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_continues_where_drawing_fails(run_folder, monkeypatch, capsys):
    def broken(*arguments):
        raise ValueError("no fonts")

    monkeypatch.setattr(plot, "curves", broken)
    assert run() == 0
    assert "cannot draw the curves" in capsys.readouterr().err


@pytest.mark.slow
def test_training_starts_from_a_checkpoint_or_a_directory_of_them(run_folder):
    run()
    Path("empty").mkdir()
    with pytest.raises(UserError, match=r"init_from: empty is a directory without checkpoints; name a model file or"):
        prepared("--init_from=empty,pretrained", "--checkpoints.path=ck2")
    for name, step in (("ck", 10), ("ck/step_00000004", 4)):
        expected = build(find_latest("ck").meta["run"]["model_hyperparams"])
        checkpoint = next(found for found in list_checkpoints("ck") if found.step == step)
        checkpoint.load_weights(expected)
        trainer = prepared(f"--init_from={name},pretrained", "--checkpoints.path=ck2")
        assert_same(trainer.model.state_dict(), expected.state_dict())
    assert run("--init_from=ck,pretrained") == 0  # whose checkpoints it then sets aside
    assert find_latest("ck/earlier_1").step == 10


# ---- the console ---------------------------------------------------------------------------------------------------

HEADER = "    step      loss  learning rate  grad norm    tokens/s   elapsed  remaining"


class Terminal(io.StringIO):
    """A stream that a terminal shows. `screen()` is what is to be seen, `bars` how often a bar was drawn."""

    def isatty(self):
        return True

    @property
    def bars(self):
        return self.getvalue().count("%|")

    def screen(self):
        rows, column = [""], 0
        for character in self.getvalue():
            if character == "\n":
                rows.append("")
            elif character != "\r":
                rows[-1] = rows[-1][:column].ljust(column) + character + rows[-1][column + 1 :]
            column = 0 if character in "\r\n" else column + 1
        return [row.rstrip() for row in rows]


def table_of(out: str) -> list[list[str]]:
    """The cells of the console's rows, which stand under one another."""
    lines = [line for line in out.splitlines() if line == HEADER or line[:8].strip().replace(",", "").isdigit()]
    ends = [match.end() for match in re.finditer(r"\S+( \S+)*", HEADER)]
    assert lines[0] == HEADER and {len(line) for line in lines} == {len(HEADER)}
    for line in lines:
        assert all(line[end - 1] != " " and line[end : end + 1] in (" ", "") for end in ends), line
    return [line.split() for line in lines if line != HEADER]


@pytest.mark.slow
def test_stdout_has_a_row_for_each_logged_step_and_a_log_file_no_progress_bar(run_folder, capsys):
    assert run("--log_interval=2", "--max_iters=7") == 0
    out, err = capsys.readouterr()
    assert "\r" not in out + err and "%|" not in out + err
    rows, logged = table_of(out), [line for line in metrics() if "loss" in line]
    assert [row[0] for row in rows] == ["1", "2", "4", "6", "7"]
    for row, line in zip(rows, logged, strict=True):
        assert float(row[1]) == pytest.approx(line["loss"], abs=5e-5)
        assert float(row[2]) == pytest.approx(line["lr"], rel=5e-3)
        assert float(row[3]) == pytest.approx(line["grad_norm"], abs=5e-5)
        assert float(row[4].replace(",", "")) == pytest.approx(line["tokens_per_s"], abs=0.5)
    assert rows[-1][6] == "00:00"


def test_the_header_is_printed_again_after_twenty_lines_of_any_kind(capsys):
    console = Console()
    console.start(0, 60, hidden=False)
    for step in range(1, 51):
        console.print_step(step, 60, 2.0, 1e-3, 1e-5, 1e6)
        if step == 30:
            console.print("an evaluation\n" * 14 + "its end")
    lines = capsys.readouterr().out.splitlines()
    assert [i for i, line in enumerate(lines) if line == HEADER] == [0, 21, 47]
    assert table_of("\n".join(lines))[0][:5] == ["1", "2.0000", "1.00e-03", "1e-05", "1,000,000"]


def test_remaining_time_follows_the_pace_since_this_start(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    console = Console()
    console.start(400, 1000, hidden=True)
    now[0] += 200
    console.print_step(500, 1000, 2.0, 1e-3, 1.0, 10.0)
    console.start(450, 1000, hidden=True)  # a rollback
    now[0] += 5000
    console.print_step(460, 1000, 2.0, 1e-3, 1.0, 10.0)
    rows = table_of(capsys.readouterr().out)
    assert [row[5:] for row in rows] == [["03:20", "16:40"], ["1:26:40", "75:00:00"]]


def test_on_a_terminal_a_progress_bar_is_below_the_lines_and_removed_at_the_end(run_folder, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    seen = []
    row = Console.print_step
    monkeypatch.setattr(Console, "print_step", lambda *args: (row(*args), seen.append(terminal.screen())))
    assert run("--log_interval=2", "--max_iters=8") == 0
    assert len(seen) == 5 and all("%|" in screen[-1] and "steps" in screen[-1] for screen in seen)
    assert all("%|" not in line for screen in seen for line in screen[:-1])
    assert not any("%|" in line for line in terminal.screen())
    assert [row[0] for row in table_of("\n".join(terminal.screen()))] == ["1", "2", "4", "6", "8"]


def test_a_terminal_on_stderr_alone_has_the_bar_and_the_file_the_lines(run_folder, monkeypatch):
    log, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", log)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run("--max_iters=2") == 0
    assert terminal.bars and "\r" not in log.getvalue() and len(table_of(log.getvalue())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--check"]])
def test_quiet_prints_warnings_and_errors_only(run_folder, monkeypatch, capsys, words):
    assert run("--quiet", *words) == 0
    assert capsys.readouterr() == ("", "")
    assert run("--quiet", "--warmup_iters=10", *words) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("warning: max_iters = 10: the run ends during") and err.count("\n") == 1
    with pytest.raises(UserError, match="none.bin"):
        run("--quiet", "--dataset.path=none.bin", *words)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run("--quiet", *words) == 0
    assert terminal.getvalue() == ""


def test_a_quiet_run_that_is_stopped_prints_how_to_resume(run_folder, monkeypatch, capsys):
    at_step(monkeypatch, 7, lambda: signal.raise_signal(signal.SIGTERM))
    assert run("--quiet") == 143
    out, err = capsys.readouterr()
    assert out == "" and "step 7 is saved" in err and "--quiet --init_from=resume" in err


@pytest.mark.parametrize("words", [[], ["--check"]])
def test_a_schedule_that_does_not_fit_is_warned_of_at_the_start(run_folder, capsys, words):
    assert run("--warmup_iters=20", "--checkpoints.interval=11", *words) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: max_iters = 10: the run ends during its warm-up (warmup_iters = 20)")
    assert "set warmup_iters to 0, or max_iters" in first
    assert second.startswith("warning: checkpoints.interval = 11: more than max_iters (10)")


@pytest.mark.slow
def test_a_closed_stdout_loses_no_step(run_folder, monkeypatch):
    class Left(io.StringIO):
        def write(self, text):
            if text.lstrip().startswith("7 "):
                raise BrokenPipeError
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Left())
    with pytest.raises(BrokenPipeError):
        run()
    assert find_latest("ck").step == metrics()[-1]["step"] == 7


@pytest.mark.slow
def test_processes_of_torchrun_report_a_mistake_once(run_folder):
    launcher = forks.fork_command([sys.executable, "-m", "torch.distributed.run"])
    command = [*launcher, "--standalone", "--nproc_per_node=2", train.__file__]
    for mistake in ("--learning_rat=1", "--dataset.path=none.bin"):  # before and after they have met
        done = subprocess.run([*command, "--config", "run.json", mistake], capture_output=True, text=True, timeout=120)
        assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1, done.stderr
        assert "exitcode  : 2 " in done.stderr and done.stdout == ""


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("overrides,message", [
    (["--model_hyperparams.vocab_size=20"], r"model_hyperparams.vocab_size = 20: encoder_path chars:text.txt has \d+"),
    (["--model_hyperparams.block_size=4000"], "block_size"),
    (["--dataset.path=none.bin"], "none.bin"),
    (["--encoder_path=none.bin"], "none.bin"),
    (["--init_from=resume"], "no checkpoint"),
    (["--init_from=none.model,pretrained"], "none.model"),
    (["--device=mps"], 'device = "mps"'),
    (["--sample_prompt=Ж"], "character"),
    (["--model_path=."], "model_path"),
    (["--learning_rat=1"], "learning_rate"),
])  # fmt: skip
def test_mistakes_are_reported_and_nothing_is_created(run_folder, overrides, message):
    if "mps" in overrides[0] and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    before = sorted(run_folder.rglob("*"))
    with pytest.raises(UserError, match=message):
        run(*overrides)
    assert sorted(run_folder.rglob("*")) == before


@pytest.mark.slow
def test_out_of_memory_says_which_keys_to_lower(run_folder, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainStep, "accumulate", full)
    with pytest.raises(UserError, match="Halve batch_size and double gradient_accumulation_steps") as error:
        run()
    assert "cuda_graph" not in str(error.value)
    monkeypatch.setattr(cuda_graph, "can_capture", lambda device: True)
    with pytest.raises(UserError, match="or set cuda_graph to false"):
        run()
    with pytest.raises(UserError, match="Halve") as error:
        run("--cuda_graph=false")
    assert "cuda_graph" not in str(error.value)
    assert not Path("ck").exists()


# ---- from Python -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_trained_from_python_as_from_the_command_line(run_folder):
    assert run() == 0
    step, weights, state = weights_and_state()
    trainer = train.train(load_run(["--config", "run.json", "--checkpoints.path=other"], CONFIGS), quiet=True)
    again, same_weights, same_state = weights_and_state("other")
    assert step == again == trainer.progress.step == 10
    assert_same(weights, same_weights)
    assert_same(state, same_state)
    assert_same(load_model("out/tiny.model")[0].state_dict(), dict(trainer.model.state_dict()))


@pytest.mark.slow
def test_a_run_from_python_that_fails_unlocks_its_directory(run_folder, monkeypatch):
    write_config(learning_rate=1e30, on_nan="stop", decay_lr=False)
    with pytest.raises(cuda_graph.NonFinite):
        train.train(load_run(["--config", "run.json"], CONFIGS))
    write_config()
    assert run() == 0  # no lock is left, and nothing else


@pytest.mark.slow
def test_a_default_model_path_replaces_only_a_model_of_the_same_inputs(run_folder):
    write_config(max_iters=1, eval_interval=1, eval_iters=1, sample_length=0)
    raw = json.loads(Path("run.json").read_text())
    del raw["model_path"]
    Path("run.json").write_text(json.dumps(raw))
    path = Path("bin/air.strawberry")
    run()
    first = path.read_bytes()
    run("--seed=6", "--learning_rate=2e-3")
    second = path.read_bytes()
    assert second != first
    others = ["--model_hyperparams.n_layer=2", "--dataset.data_division=0.7", "--encoder_path=chars:./text.txt"]
    for other in others:
        with pytest.raises(UserError, match=r"^model_path: .*, the default, .*--model_path=bin.air\.strawberry$"):
            run(other)
    assert path.read_bytes() == second
    run(others[0], f"--model_path={path}")  # asked for
    assert path.read_bytes() != second
    run(others[0], "--max_iters=2", "--init_from=resume")
    path.write_bytes(b"")
    run()
