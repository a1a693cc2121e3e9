"""Steps that the host does not wait for. What is captured on a GPU is called on the CPU, by the same code: it must do
what steps launched one by one do, and where something is not finite, nothing."""

import math
import signal
from pathlib import Path

import pytest
import torch
from runs import assert_same, metrics, prepared, run, weights_and_state, write_config

import train
from strawberry.training import cuda_graph
from strawberry.training.checkpoint import find_latest
from strawberry.training.cuda_graph import CudaGraphStep, NonFinite
from strawberry.training.step import TrainStep

EXPERTS = {"n_experts": 2, "n_ffn_experts": 2}


@pytest.fixture
def graph_steps(monkeypatch):
    """Steps are CudaGraphSteps, and AdamW clips as on a GPU."""
    take_graph_steps(monkeypatch)


def take_graph_steps(monkeypatch):
    build = train.build_optimizer

    def build_for_a_gpu(*arguments):
        optimizer = build(*arguments)
        optimizer._fused_clipping = True
        return optimizer

    monkeypatch.setattr(cuda_graph, "can_capture", lambda device: True)
    monkeypatch.setattr(train, "build_optimizer", build_for_a_gpu)


def close(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("muon", ["true", "false"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_captured_steps_train_as_uncaptured_steps_do(run_folder, monkeypatch, muon, accumulation):
    write_config(model_hyperparams=EXPERTS | {"dropout": 0.1})
    keys = [f"--optimizer_hyperparams.use_muon={muon}", f"--gradient_accumulation_steps={accumulation}"]
    assert run(*keys, "--checkpoints.path=plain") == 0
    take_graph_steps(monkeypatch)
    assert run(*keys) == 0
    plain, captured = weights_and_state("plain"), weights_and_state("ck")
    assert plain[0] == captured[0] == 10
    close(plain[1], captured[1])
    close(plain[2], captured[2])
    muon_steps = [find_latest(path).load_state()["optimizer"]["muon_step"] for path in ("plain", "ck")]
    assert muon_steps[0] == muon_steps[1]
    for a, b in zip(metrics("plain/metrics.jsonl"), metrics(), strict=True):
        assert a.keys() == b.keys()
        numbers = a.keys() - {"seconds", "tokens_per_s", "routers", "sample"}
        assert all(a[key] == pytest.approx(b[key], rel=1e-4) for key in numbers)
        for name, shares in a.get("routers", {}).items():
            assert shares == pytest.approx(b["routers"][name], abs=0.05) and sum(shares) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_a_resumed_captured_run_equals_the_uninterrupted_one(run_folder, graph_steps):
    assert run("--checkpoints.path=whole") == 0
    assert run("--max_iters=6", "--lr_decay_iters=10") == 0
    assert run("--init_from=resume") == 0
    for whole, resumed in zip(weights_and_state("whole")[1:], weights_and_state("ck")[1:], strict=True):
        assert_same(whole, resumed)


def test_the_host_waits_only_for_steps_that_are_logged(run_folder, graph_steps, monkeypatch, capsys):
    """Its rows are of steps that are waited for anyway: the first, those of an interval, and the last."""
    completed, waits = CudaGraphStep.completed, []

    def record_waits(self, lag):
        if lag == 0:
            waits.append(self.state.progress.step)
        return completed(self, lag)

    monkeypatch.setattr(CudaGraphStep, "completed", record_waits)
    assert run("--log_interval=3", "--eval_interval=100", "--checkpoints.create_checkpoints=false",
               "--checkpoints.interval=100") == 0  # fmt: skip
    assert sorted(set(waits)) == [1, 3, 6, 9, 10]
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:8].strip().isdigit()]
    assert rows == ["1", "3", "6", "9", "10"]


class LateEvent:
    """An event of a device that is behind: it has completed only when the host waits for it."""

    waited = False

    def query(self):
        return self.waited

    def synchronize(self):
        self.waited = True


def delay_results(monkeypatch):
    """Results come as late as a GPU's may."""
    launch = CudaGraphStep.launch

    def launch_and_act(self, *arguments):
        launch(self, *arguments)
        self.pending[-1] = self.pending[-1]._replace(ready=LateEvent())

    monkeypatch.setattr(CudaGraphStep, "launch", launch_and_act)


def set_gradients(monkeypatch, *positions, value=math.nan):
    """The loss of the steps at these positions is `value`; what the host sees of them comes late."""
    launch, accumulate = CudaGraphStep.launch, TrainStep.accumulate
    replaced = []

    def launch_and_act(self, *arguments):
        replaced[:] = [self.state.progress.position in positions]
        launch(self, *arguments)
        replaced.clear()

    def accumulate_and_replace(self, micro_batches):
        loss = accumulate(self, micro_batches)
        if any(replaced):
            for p in self.state.model.parameters():
                p.grad.fill_(value)
        return loss

    monkeypatch.setattr(CudaGraphStep, "launch", launch_and_act)
    monkeypatch.setattr(TrainStep, "accumulate", accumulate_and_replace)
    delay_results(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("muon", ["true", "false"])
def test_a_loss_that_is_not_finite_skips_this_and_queued_updates(run_folder, graph_steps, monkeypatch, muon, value):
    write_config(model_hyperparams=EXPERTS)
    keys = [f"--optimizer_hyperparams.use_muon={muon}", "--checkpoints.interval=100", "--log_interval=100",
            "--eval_interval=100", "--max_iters=16", "--lr_decay_iters=16"]
    trainer = prepared(*keys)
    with monkeypatch.context() as patch, pytest.raises(NonFinite, match="step 7: the loss is .* not updated"):
        set_gradients(patch, 6, value=value)
        trainer.train()
    assert trainer.progress.step == 6 and trainer.progress.tokens == 6 * trainer.tokens_per_step
    run(*keys, "--max_iters=6", "--checkpoints.interval=6", "--sample_length=0")
    _, weights, state = weights_and_state()
    assert_same(trainer.model.state_dict(), weights)
    mine = trainer.optimizer.state_dict()
    assert_same({f"{n}.{k}": v for n, values in mine["state"].items() for k, v in values.items()}, state)
    assert mine["muon_step"] == find_latest("ck").load_state()["optimizer"]["muon_step"]


def test_steps_after_a_rollback_are_captured_again(run_folder, graph_steps, monkeypatch, capsys):
    set_gradients(monkeypatch, 6)
    records = []
    capture = CudaGraphStep.capture
    monkeypatch.setattr(CudaGraphStep, "capture", lambda self, batches: records.append(1) or capture(self, batches))
    assert run("--on_nan=rollback", "--log_interval=5") == 0
    assert "going back to step 4" in capsys.readouterr().err and len(records) == 2
    lines = metrics()
    assert [line["from_step"] for line in lines if "rollback" in line] == [7]
    assert [line["step"] for line in lines if "loss" in line] == [1, 5, 10]
    assert find_latest("ck").load_state()["progress"]["skipped"] == 3 and Path("out/tiny.model").exists()


def test_the_host_queues_a_limited_number_of_steps(run_folder, graph_steps, monkeypatch):
    delay_results(monkeypatch)
    waiting, completed = [], CudaGraphStep.completed

    def record_pending(self, lag):
        found = list(completed(self, lag))
        waiting.append(len(self.pending))
        return iter(found)

    monkeypatch.setattr(CudaGraphStep, "completed", record_pending)
    keys = ("--log_interval=100", "--eval_interval=100", "--checkpoints.interval=100")
    assert run("--max_iters=10", *keys) == 0
    assert waiting[:10] == [0, 1, 2, 3, 4, 4, 4, 4, 4, 0]


@pytest.mark.slow
def test_a_signal_waits_for_the_queued_steps(run_folder, graph_steps, monkeypatch):
    delay_results(monkeypatch)
    launch = CudaGraphStep.launch
    calls = []

    def launch_and_act(self, *arguments):
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGTERM)
        launch(self, *arguments)

    monkeypatch.setattr(CudaGraphStep, "launch", launch_and_act)
    keys = ("--log_interval=100", "--eval_interval=100", "--checkpoints.interval=100")
    assert run(*keys) == 143
    assert find_latest("ck").step == 7
    assert run("--init_from=resume", *keys) == 0
    assert run("--checkpoints.path=whole", *keys) == 0
    assert_same(weights_and_state("whole")[1], weights_and_state("ck")[1])


@pytest.mark.slow
def test_steps_that_cannot_be_captured_are_trained_without_a_graph(run_folder, graph_steps, monkeypatch, capsys):
    def broken(self, batches):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(CudaGraphStep, "capture", broken)
    assert run() == 0
    assert "cannot be captured as a CUDA graph" in capsys.readouterr().err
    assert run("--cuda_graph=false") == 0 and "CUDA graph" not in capsys.readouterr().err
