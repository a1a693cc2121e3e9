"""What a run leaves for a person who looks at it later: its record, the text of each evaluation, its routers' loads."""

import json
from pathlib import Path

import pytest
from runs import metrics, run, write_config

from strawberry.training.record import read_record

pytestmark = pytest.mark.usefixtures("run_folder")


def test_a_run_records_what_it_is_and_what_it_wrote_and_keeps_its_start_when_it_is_resumed():
    write_config(model_hyperparams={"n_ffn_experts": 2, "a_ffn_experts": 1})
    run("--max_iters=6", "--eval_interval=3")
    record = read_record("ck")
    assert record["run"]["max_iters"] == 6 and record["run"]["model_hyperparams"]["n_embd"] == 16
    assert record["config"] == str(Path("run.json").resolve())
    assert record["command"].endswith("train.py --config run.json --max_iters=6 --eval_interval=3")
    assert record["tokens_per_step"] == 3 * 16 and record["parameters"] > record["parameters_without_embeddings"] > 0
    texts = [line["sample"] for line in metrics() if "val_loss" in line]
    assert len(texts) == 2 and all(texts)
    loads = [line["routers"] for line in metrics() if "loss" in line]
    assert len(loads) == 6
    for shares in (shares for routers in loads for shares in routers.values()):
        assert sum(shares) == pytest.approx(1, abs=1e-3) and min(shares) >= 0

    run("--max_iters=9", "--init_from=resume")
    again = read_record("ck")
    assert again["run"]["max_iters"] == 9
    assert (again["started"], again["command"]) == (record["started"], record["command"])

    run("--max_iters=3")  # from scratch: the earlier run is moved with its record
    assert read_record("ck/earlier_1") == again and read_record("ck")["run"]["max_iters"] == 3


def test_a_damaged_record_is_none():
    for text in ("", "[]", '{"run": 3}', "{", json.dumps({"started": 1})):
        Path("record.json").write_text(text)
        assert read_record(".") == {}
