"""What transformers makes of exports, in one fresh process for all tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exports import EXPORTS, make_encoders, perturbed, strings_of

import export
from model import build
from strawberry.huggingface.export import write_export
from strawberry.model_file import save_model


@pytest.fixture(scope="session")
def exchanged(tmp_path_factory):
    """models and encoders by name, inputs, results and tokens of transformers, the folder of exports and checkpoints"""
    folder = tmp_path_factory.mktemp("exported")
    models = {name: perturbed(options) for name, (_, options) in EXPORTS.items()}
    codes = make_encoders()
    idx = torch.randint(400, (2, 32), generator=torch.Generator().manual_seed(0))
    for name, model in models.items():
        save_model(folder / "model", model, codes["trained"], {})
        export.main([str(folder / "model"), str(folder / name)])
    for name, code in codes.items():
        tiny = build({"arch": "tinystar", "vocab_size": code.vocab_size, "n_layer": 1, "n_head": 1, "n_embd": 2})
        write_export(tiny, code, folder / "tokens" / name)
    strings = {f"tokens/{name}": strings_of(name) for name in codes}
    (folder / "manifest.json").write_text(json.dumps({"exports": list(models), "strings": strings}), "utf-8")
    torch.save(idx, folder / "inputs.pt")
    offline = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-I", Path(__file__).with_name("with_transformers.py")], cwd=folder,
                          env=offline, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    tokens = json.loads((folder / "tokens.json").read_text("utf-8"))
    return SimpleNamespace(models=models, encoders=codes, idx=idx, strings=strings, tokens=tokens, folder=folder,
                           **torch.load(folder / "results.pt"))  # fmt: skip
