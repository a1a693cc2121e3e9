"""serve.py with other people's clients: lm-eval scores through it, and schemathesis tries to break it.

By hand, with the counts that count, against a server of your own (a short context keeps the texts short):

    python serve.py --context 64 --batch 8 --rate 0
    schemathesis run http://127.0.0.1:8000/openapi.json --mode all --phases examples,coverage,fuzzing,stateful -n 200
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from machine import require_module
from test_serve import ServerThread, make_model

from strawberry.inference.scoring import score_text
from strawberry.model_file import load_model

pytestmark = pytest.mark.slow
TEXTS = ["The cat sat on the mat.", "import os\nprint(os.getcwd())\n", "def close(self):\n    return Né\n"]
CHOICES = [("The sky is", ["blue", "qzx"]), ("2 + 2 =", ["5", "4"]), ("def f(", ["self", "!!!"]), ("a", ["aaa", "zz"])]
SCORES = """
task: scores
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""
CHOOSES = """
task: chooses
dataset_path: json
dataset_kwargs: {data_files: {test: CHOICES}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    make_model(path / "air.strawberry")
    return path


def write_tasks(path: Path) -> None:
    rows = {"TEXTS": [{"page": text} for text in TEXTS],
            "CHOICES": [{"question": question, "choices": choices} for question, choices in CHOICES]}  # fmt: skip
    for name, task in (("TEXTS", SCORES), ("CHOICES", CHOOSES)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        (path / f"{name}.yaml").write_text(task.replace(name, str(path / f"{name}.jsonl")))


def likelihood(folder, question: str, answer: str) -> float:
    """Log likelihood of an answer: the score of sample.py --score with it, less that without it."""
    model, encoder, _ = load_model(folder / "air.strawberry")
    whole, without = (-len(encoder.encode(text)) * score_text(model, encoder, text)[0] for text in (
        f"{question} {answer}", question))  # fmt: skip
    return whole - without


def test_lm_eval_gets_the_scores_that_sample_gives(folder, tmp_path):
    require_module("lm_eval")
    write_tasks(tmp_path)
    script = tmp_path / "run_lm_eval.py"  # python -m lm_eval, for a fork
    script.write_text('import runpy\nrunpy.run_module("lm_eval", run_name="__main__", alter_sys=True)\n')
    server = ServerThread(folder)
    try:
        where = f"model=air.strawberry,base_url={server.url}/v1/completions,max_length=65"
        argv = [*forks.start(with_model=True), str(script), "run", "--model", "local-completions",
                "--model_args", where, "--tasks", "scores,chooses", "--include_path", str(tmp_path),
                "--output_path", str(tmp_path / "out")]  # fmt: skip
        offline = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        done = subprocess.run(argv, env=os.environ | offline, capture_output=True, text=True, cwd=tmp_path)
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text())["results"]
    model, encoder, _ = load_model(folder / "air.strawberry")
    sizes = [len(text.encode()) for text in TEXTS]
    bits = sum(score_text(model, encoder, text)[1] * size for text, size in zip(TEXTS, sizes)) / sum(sizes)
    assert math.isclose(results["scores"]["bits_per_byte,none"], bits, rel_tol=1e-5)
    right = [likelihood(folder, question, first) > likelihood(folder, question, second)
             for question, (first, second) in CHOICES]  # fmt: skip
    assert 0 < sum(right) < len(right) and results["chooses"]["acc,none"] == sum(right) / len(right)


def test_schemathesis_finds_no_error(tmp_path):
    require_module("schemathesis")
    models = tmp_path / "models"  # its own, which it may delete
    models.mkdir()
    make_model(models / "air.strawberry")
    server = ServerThread(models, context=64, batch=8)
    try:
        phases = "examples,coverage,fuzzing,stateful"
        argv = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", "--mode",
                "all", "--phases", phases, "-n", "6", "--seed", "1"]  # fmt: skip
        done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    finally:
        server.stop()
    assert done.returncode == 0, done.stdout[-5000:]
