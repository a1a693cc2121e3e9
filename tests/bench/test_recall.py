"""`bench.py recall`: its rows, and what it measures."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import forks
import numpy as np
import pytest

import bench
from strawberry.bench import recall
from strawberry.bench.recall import N_FILLERS, RecallObjective, RecallTask, RecallTrainer
from strawberry.common import UserError

TASK = RecallTask((2, 5), (1, 7, 30))


def rows_of(cell, count=40, seed=1):
    batch = RecallObjective(TASK, cell).make_batch(None, seed, 0, count)
    return list(zip(batch.x.tolist(), batch.y.tolist(), strict=True))


@pytest.mark.parametrize("cell", TASK.cells, ids=str)
def test_the_target_of_a_query_is_the_value_that_followed_its_key(cell):
    """Read as a person would: look for the key in the text before, and take the token behind it."""
    n, d = cell
    for x, y in rows_of(cell):
        queries = [t for t, target in enumerate(y) if target >= 0]
        assert len(queries) == n and queries == list(range(queries[0], queries[0] + n))
        for t in queries:
            (place,) = [s for s in range(t) if x[s] == x[t]]
            assert y[t] == x[place + 1]
        assert queries[0] - max(x.index(x[t]) for t in queries) == d + 2  # filler after the last pair's two tokens


def test_no_value_is_in_the_text_after_the_first_query():
    """Otherwise a model could infer the values of the last queries by elimination."""
    for x, y in rows_of((5, 7), 200):
        first = next(t for t, target in enumerate(y) if target >= 0)
        assert all(token < N_FILLERS + TASK.n_symbols for token in x[first:])  # filler and keys, no values


def test_half_of_the_training_rows_have_several_queries_of_each_key():
    """Their targets are right too, and in no text after the pairs. Evaluation rows have one query of each key."""
    batch = RecallObjective(TASK).make_batch(None, 1, 0, 300)
    scattered = 0
    for x, y in zip(batch.x.tolist(), batch.y.tolist(), strict=True):
        queries = [t for t, target in enumerate(y) if target >= 0]
        assert all(y[t] == x[x.index(x[t]) + 1] for t in queries)
        assert all(token < N_FILLERS + TASK.n_symbols for token in x[queries[0]:])
        keys = [x[t] for t in queries]
        scattered += len(set(keys)) < len(keys)
    assert 90 < scattered < 190  # of 300; some draw no key twice
    for cell in TASK.cells:
        assert all(sum(target >= 0 for target in y) == cell[0] for _, y in rows_of(cell))


def test_the_best_rate_is_a_config_s_result():
    def row(config, lr, *accuracies):
        return {"config": config, "lr": lr} | ({"cells": [{"accuracy": a} for a in accuracies]} if accuracies else {})

    rows = [row("a", 1e-3, 0.5, 0.7), row("a", 3e-3, 0.9, 0.5), row("b", 1e-3), row("b", 3e-3, 0.1), row("c", 1e-3)]
    best = {found["config"]: found for found in recall.choose_best(rows)}
    assert {name: found["lr"] for name, found in best.items()} == {"a": 3e-3, "b": 3e-3, "c": 1e-3}
    assert best["a"]["by_lr"] == {"0.001": pytest.approx(0.6), "0.003": pytest.approx(0.7)}
    assert best["c"]["mean"] is None


def test_the_optimizer_is_the_same_for_all_unless_options_change_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["tinystar-v0.2-modernbase.json", "palm-aft.json:muon_lr=0.01", "--lrs", "1e-3,2e-3", "--batch_size", "7"]
    runs = recall.load_runs(recall.parse_arguments(words), TASK, tmp_path)
    assert [(spec, run.learning_rate) for spec, run in runs] == [
        (words[0], 1e-3), (words[0], 2e-3), (words[1], 1e-3), (words[1], 2e-3)
    ]  # fmt: skip
    assert {(run.batch_size, run.optimizer_hyperparams.use_muon) for _, run in runs} == {(7, True)}
    hypers = [run.optimizer_hyperparams for _, run in runs]
    assert [hyper.muon_lr for hyper in hypers] == [None, None, 0.01, 0.01]
    assert {(hyper.muon_beta2, hyper.weight_decay) for hyper in hypers} == {(0, 0)}
    rates = {(hyper.embedding_lr, hyper.head_lr, hyper.scalar_lr) for hyper in hypers}
    assert rates == {(None, None, None)}  # though both presets have some
    ((_, run),) = recall.load_runs(recall.parse_arguments(["air.json", "--set", "use_muon=false"]), TASK, tmp_path)
    assert run.optimizer_hyperparams.use_muon is False


def test_keys_values_order_and_position_are_random_in_each_row():
    rows = rows_of((5, 7), 400)
    firsts, orders, maps = set(), set(), {}
    for x, y in rows:
        queries = [t for t, target in enumerate(y) if target >= 0]
        firsts.add(queries[0])
        keys = sorted((x.index(x[t]), i) for i, t in enumerate(queries))
        orders.add(tuple(i for _, i in keys))
        for t in queries:
            maps.setdefault(x[t], []).append(y[t])
    assert len(firsts) > 20 and len(orders) > 90  # of 5! = 120
    assert len(maps) == TASK.n_symbols and all(len(set(values)) > TASK.n_symbols / 2 for values in maps.values())


@pytest.mark.parametrize("cell", TASK.cells, ids=str)
def test_the_pairs_of_every_row_begin_at_a_random_place(cell):
    """Also those of the longest: at a fixed place, their positions would do instead of their keys."""
    places = {min(x.index(x[t]) for t, target in enumerate(y) if target >= 0) for x, y in rows_of(cell, 200)}
    assert places == set(range(TASK.block_size - 3 * cell[0] - cell[1] + 1)) and len(places) > 5


def test_batches_are_a_function_of_seed_and_index():
    draw = lambda seed, first, stage=-1: RecallObjective(TASK, stage=stage).make_batch(None, seed, first, 8)  # noqa: E731
    whole, again = draw(3, 0), draw(3, 0)
    assert np.array_equal(whole.x, again.x) and np.array_equal(whole.y, again.y)
    assert whole.n_targets == (whole.y >= 0).sum()
    assert not any(np.array_equal(whole.x, draw(*other).x) for other in ((4, 0), (3, 8)))
    assert whole.x.max() < TASK.vocab_size and whole.x.shape[1] == TASK.block_size == 51


def test_rows_grow_longer_stage_by_stage():
    task = RecallTask((8, 64), (16, 4096))
    assert task.lengths == [24, 144, 864, 4824] and TASK.lengths == [24, 51]
    assert RecallTask((4,), (64,)).lengths == [24, 86]
    for stage, length in enumerate(task.lengths[:2]):
        batch = RecallObjective(task, stage=stage).make_batch(None, 1, 0, 200)
        assert batch.x.shape == (200, length)
        counts = set()
        for x, y in zip(batch.x.tolist(), batch.y.tolist(), strict=True):
            queries = [t for t, target in enumerate(y) if target >= 0]
            assert queries and all(y[t] == x[x.index(x[t]) + 1] for t in queries)
            counts.add(sum(token >= N_FILLERS + task.n_symbols for token in x))  # values, so pairs
        assert counts == {24: {2, 4}, 144: {2, 4, 8, 16, 24}}[length]


def test_stages_share_the_steps_and_short_rows_come_in_large_batches(monkeypatch):
    trainer, stages = object.__new__(RecallTrainer), []
    trainer.task, trainer.task_rows, trainer.total_steps = RecallTask((8, 64), (16, 4096)), 4, 8
    trainer.compiled, trainer.run, trainer.steps = False, SimpleNamespace(batch_size=4, max_iters=8), Mock()
    monkeypatch.setattr(RecallTrainer, "train", lambda self: stages.append(
        (self.run.max_iters, self.run.batch_size, self.objective.length)))  # fmt: skip
    trainer.set_stage(0)
    trainer.train_stages()
    assert stages == [(2, 256, 24), (4, 4 * 33, 144), (6, 4 * 5, 864), (8, 4, 4824)]
    assert trainer.steps.release_graph.call_count == trainer.steps.warm_up.call_count == 3


def test_accuracy_is_the_share_of_correct_targets(monkeypatch):
    """A model that looks up the key is always right; a random value of the row is right once in n on average."""
    import torch

    class Reader:
        training = True

        def __init__(self, choose):
            self.choose = choose

        def eval(self):
            return self

        train = eval

        def __call__(self, x):
            logits = torch.zeros(*x.shape, TASK.vocab_size)
            for row, text in enumerate(x.tolist()):
                values = [t for t in range(len(text)) if text[t] >= N_FILLERS + TASK.n_symbols]
                for t, token in enumerate(text):
                    logits[row, t, self.choose(text, values, t, token)] = 1
            return logits, None

    def look_up(text, values, t, token):
        places = [s for s in values if s < t and text[s - 1] == token]
        return text[places[0]] if places else 0

    trainer = object.__new__(recall.RecallTrainer)
    trainer.task, trainer.device, trainer.dtype = TASK, torch.device("cpu"), torch.float32
    rng = np.random.default_rng(0)
    for choose, expected in ((look_up, 1.0), (lambda text, values, t, token: text[rng.choice(values)], 1 / 5)):
        trainer.model = Reader(choose)
        assert trainer.measure_cell((5, 7), 300) == pytest.approx(expected, abs=0.04)


@pytest.mark.slow
def test_full_attention_recalls_and_a_window_that_is_too_short_does_not(tmp_path, monkeypatch):
    """Two layers with windows of 4 see at most 7 tokens, and the queries are 20 tokens from the pairs. Such a model
    does not even see the row's values, so it is right once in 8, the number of all values, and not once in 2."""
    monkeypatch.chdir(tmp_path)
    task, found = RecallTask((2,), (20,)), []
    for config, steps in (("tinystar-v0.2-modernbase.json:", 300), ("tinystar-v0.7-gqa-swa.json:window=4,", 100)):
        words = [f"{config}n_layer=2,n_embd=32,n_head=2", "--steps", str(steps), "--set", "compile=false"]
        ((_, run),) = recall.load_runs(recall.parse_arguments(words), task, tmp_path)
        run.checkpoints.create_checkpoints = False
        trainer = recall.RecallTrainer(run, task)
        trainer.prepare()
        trainer.train_stages()
        found += [cell["accuracy"] for cell in trainer.measure_recall(200)]
        trainer.close()
    assert found[0] >= 0.95 and found[1] < 0.3


@pytest.mark.slow
def test_two_configs_are_trained_measured_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_command = recall.child_process.make_command
    monkeypatch.setattr(recall.child_process, "make_command", lambda *words: forks.fork_command(make_command(*words)))
    shape = "n_layer=1,n_embd=16,n_head=2"
    configs = [f"tinystar-v0.2-modernbase.json:{shape}", f"air.json:{shape},r_layer=0,n_qkv=16"]
    words = ["recall", *configs, "--pairs", "2,3", "--distances", "2,5", "--steps", "3", "--rows", "20", "--set",
             "compile=false"]  # fmt: skip
    assert bench.main(words) is None
    found = json.loads(Path("img/recall/recall.json").read_text())
    assert [(c["pairs"], c["distance"]) for c in found["rows"][1]["cells"]] == [(2, 2), (2, 5), (3, 2), (3, 5)]
    assert all(0 <= c["accuracy"] <= 1 for row in found["rows"] for c in row["cells"])
    assert found["rows"][0]["run"]["model_hyperparams"]["block_size"] == 16
    text = Path("img/recall/recall.md").read_text()
    assert "| 3 | 33.3 % |" in text and Path("img/recall/recall.png").stat().st_size > 10_000
    assert "at 2" in capsys.readouterr().out


def test_a_model_that_is_not_causal_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = recall.parse_arguments(["air.json:retention_scope=batch", "--set", "compile=false"])
    ((_, run),) = recall.load_runs(arguments, TASK, tmp_path)
    with pytest.raises(UserError, match="recall needs a causal model"):
        recall.RecallTrainer(run, TASK).set_up()


@pytest.mark.slow
def test_after_an_interruption_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = []

    def measure(role, words, jobs, device):
        for i, _ in enumerate(words):
            asked.append(i)
            yield i, {"cells": [{"pairs": 2, "distance": 2, "accuracy": 0.5}]}
            if len(asked) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(recall.child_process, "run_at_once", measure)
    monkeypatch.setattr(recall, "hash_code", lambda: "c")  # the code is not read again for each command
    shape = "n_layer=1,n_embd=16,n_head=2"
    words = ["recall", f"tinystar-v0.2-modernbase.json:{shape}", f"air.json:{shape},r_layer=0,n_qkv=16", "--pairs", "2",
             "--distances", "2"]  # fmt: skip
    assert bench.main(words) == 130
    assert "finished runs are kept in img/recall/runs; to go on:" in capsys.readouterr().out
    assert bench.main(words) is None
    assert "1 of them are done already" in capsys.readouterr().out and asked == [0, 0]
    assert bench.main([*words, "--rows", "8", "--out", "img/recall"]) is None and asked == [0, 0, 0, 1]


@pytest.mark.parametrize("words, message", [
    ([], "required: configs"),
    (["a.json", "--pairs", "0"], "--pairs 0: '0' is no positive number"),
    (["a.json", "--pairs", "2,many"], "--pairs 2,many"),
    (["a.json", "--pairs", "2000"], "--pairs 2000: at most 1,024"),
    (["a.json", "--distances", "1e9"], "--distances 1e9: at most 1,048,576"),
    (["nowhere.json"], "no such file"),
    (["air.json", "--set", "n_layers=2"], "n_layer"),
    (["air.json:vocab_size=10"], "'vocab_size=10': recall sets model_hyperparams.vocab_size itself; use --pairs"),
    (["air.json", "--set", "learning_rate=1"], "use --lrs"),
    (["air.json", "air.json"], "given twice"),
    (["transformer-pairs.json"], "kind = 'encoder-decoder' does not continue text; try :kind=decoder"),
])  # fmt: skip
def test_mistakes_in_recall_are_named_before_anything_is_trained(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        bench.main(["recall", *words])
    assert not list(tmp_path.iterdir())
