"""The presets in config/: what they are, and that each of them trains, evaluates, is saved and generates text."""

import functools
import io
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import encoder as encoders
import sample
import train
from model import CONFIGS, build
from strawberry.common import UserError
from strawberry.config import check, read_json, to_dict
from strawberry.data.token_file import TokenFileWriter
from strawberry.model_file import load_model
from strawberry.run_config import CONFIG_FOLDER, load_run
from strawberry.training import plot
from strawberry.training.setup import BETTER_WITH_EMBEDDING_LR, BETTER_WITH_MUON

CONFIG = CONFIG_FOLDER
PRESETS = sorted(path.stem for path in CONFIG.glob("*.json") if path.name != "schema.json")
SPECIAL = {"air", "tiny"}  # the reference and the first run, whose files have names of their own
TINYSTAR = ["v0.1-baseline", "v0.2-modernbase", "v0.3-mha", "v0.4-mqa", "v0.5-mhla", "v0.6-gelu", "v0.7-gqa-swa",
            "v0.8-speedrun"]
WANTED = {
    "strawberry": ["strawberry-large", "strawberry-experts", "strawberry-s1", "air", "tiny"],
    "strawberry-silia": ["strawberry-silia"],
    "strawberry-v0": ["strawberry-v0", "strawberry-v0-compaction"],
    "palm": ["palm-aft", "palm-lam", "palm-kv"],
    "tinystar": [f"tinystar-{version}" for version in TINYSTAR],
    "transformer": ["transformer-spans", "transformer-pairs", "transformer-decoder", "transformer-masked"],
}
SMALL = {"block_size": 32, "n_layer": 1, "n_head": 4, "n_embd": 16, "n_qkv": 16, "d_rank": 8}


def read_preset(name):
    return read_json(CONFIG / f"{name}.json")


@functools.cache
def load_preset(name):
    return load_run(["--config", str(CONFIG / f"{name}.json")], CONFIGS)


# ---- what they are -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_family_has_its_presets():
    assert sorted(sum(WANTED.values(), [])) == PRESETS
    for arch, names in WANTED.items():
        assert all(load_preset(name).model_hyperparams.arch == arch for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(PRESETS) - SPECIAL))
def test_paths_have_the_name_of_the_preset(name):
    run = load_preset(name)
    assert run.model_path == f"bin/{name}.{run.model_hyperparams.arch}"
    assert run.checkpoints.path == f"bin/ck_{name}"
    assert read_preset(name)["$schema"] == "./schema.json"
    assert (CONFIG / f"{name}.json").read_text(encoding="utf-8").startswith("// ")


@pytest.mark.slow
def test_no_two_presets_write_to_the_same_path():
    for key in (lambda run: run.model_path, lambda run: run.checkpoints.path):
        assert len({key(load_preset(name)) for name in PRESETS}) == len(PRESETS)


@pytest.mark.slow
def test_every_preset_builds_a_small_model():
    for name in PRESETS:
        model = build(load_preset(name).model_hyperparams)
        assert model.num_params(non_embedding=False) < (31e6 if name == "strawberry-s1" else 7e6)


def test_presets_use_muon_where_it_was_measured_to_be_better():
    """Except air, which is the original of the project, unchanged."""
    for name in set(PRESETS) - {"air"}:
        run = load_preset(name)
        decodes = getattr(run.model_hyperparams, "kind", "decoder") == "decoder"  # what was measured of transformer
        measured = run.model_hyperparams.arch in BETTER_WITH_MUON and decodes
        assert run.optimizer_hyperparams.use_muon or not measured, name
    assert not load_preset("air").optimizer_hyperparams.use_muon
    first, *others = (read_preset(f"tinystar-{version}")["optimizer_hyperparams"] for version in TINYSTAR)
    untied = {"embedding_lr": 0.1, "head_lr": 6e-3, "scalar_lr": 1e-2}  # of v0.8
    assert all(other in (first, first | untied) for other in others)


def test_presets_have_an_embedding_lr_where_it_was_measured_to_be_better():
    """With Muon, where it was measured; tiny's learning rate is as high as the embedding's would be."""
    for name in PRESETS:
        run = load_preset(name)
        with torch.device("meta"):
            tied = "input" not in build(run.model_hyperparams).roles().values()
        assert run.optimizer_hyperparams.embedding_lr or tied, name
        measured = run.optimizer_hyperparams.use_muon and (run.model_hyperparams.arch, tied) in BETTER_WITH_EMBEDDING_LR
        assert run.optimizer_hyperparams.embedding_lr or not measured or name == "tiny", name


def test_presets_of_tinystar_differ_from_v0_2_in_one_option():
    base = read_preset("tinystar-v0.2-modernbase")
    default = to_dict(CONFIGS["tinystar"]())
    for key in ("norm_type", "attention_type", "ffn_type", "pos_encoding"):
        assert base["model_hyperparams"][key] == default[key]
    one = {"v0.3-mha": ("attention_type", "MHA"), "v0.4-mqa": ("attention_type", "MQA"),
           "v0.5-mhla": ("attention_type", "MHLA"), "v0.6-gelu": ("ffn_type", "GELU"),
           "v0.7-gqa-swa": ("attention_type", "GQA-SWA")}  # fmt: skip
    for version, (key, value) in one.items():
        name = f"tinystar-{version}"
        named = {"model_path": f"bin/{name}.tinystar", "checkpoints": {**base["checkpoints"], "path": f"bin/ck_{name}"}}
        changed = {**base["model_hyperparams"], key: value}
        assert changed != base["model_hyperparams"]
        assert read_preset(name) == {**base, **named, "model_hyperparams": changed}


@pytest.mark.slow
def test_presets_have_the_options_that_their_names_say():
    def has(name, **keys):
        config = load_preset(name).model_hyperparams
        assert {key: getattr(config, key) for key in keys} == keys

    has("strawberry-large", n_experts=1, n_ffn_experts=1)
    has("strawberry-experts", n_experts=4, a_experts=2)
    has("strawberry-silia", n_layer=6, n_embd=256, n_qkv=256, n_head=4, attention_sink=True, exclusive=True, gated=True)
    has("strawberry-v0", compaction=False)
    has("strawberry-v0-compaction", compaction=True, compaction_scope="causal")
    for mixer in ("aft", "lam", "kv"):
        has(f"palm-{mixer}", attention_type=mixer)
        assert load_preset(f"palm-{mixer}").optimizer_hyperparams.use_muon
    has("tinystar-v0.1-baseline", attention_type="MHA", ffn_type="GELU", norm_type="LayerNorm", pos_encoding="Learned")
    has("tinystar-v0.8-speedrun", qk_norm=True, ffn_type="ReLU2", n_ffn=None, logit_softcap=15, tie_embeddings=False,
        skip_scalars=True, value_embeddings=True)  # fmt: skip
    has("transformer-spans", kind="encoder-decoder", attention_type="MHA", norm_position="post", ffn_type="relu",
        pos_encoding="Sinusoidal", norm_type="LayerNorm")  # fmt: skip
    has("transformer-pairs", kind="encoder-decoder")
    has("transformer-decoder", kind="decoder", attention_type="GQA", pos_encoding="RoPE")
    assert load_preset("transformer-decoder").model_hyperparams.rope_scaling.type == "yarn"
    has("transformer-masked", kind="encoder")


# ---- that they train -----------------------------------------------------------------------------------------------

TEXT = "".join(f"the {word} sat on mat {n} and saw it.\n" for n in range(60) for word in ("cat", "owl"))


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("presets")
    (folder / "text.txt").write_text(TEXT)
    encoder = encoders.load(f"chars:{folder / 'text.txt'}")
    lines = [np.array(encoder.encode(line)) for line in TEXT.splitlines()]
    with TokenFileWriter(folder / "text.bin", encoder) as writer:
        for line in lines:
            writer.add(line)
    with TokenFileWriter(folder / "pairs.bin", encoder, kind="pairs") as writer:
        for line in lines:
            writer.add(line[:9])
            writer.add(line[9:])
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_overrides(name, folder):
    """The overrides that make a preset small and fast, on the corpus in `folder`."""
    hyper = read_preset(name)["model_hyperparams"]
    encoder = encoders.load(f"chars:{folder / 'text.txt'}")
    sizes = {key: value for key, value in SMALL.items() if key in hyper} | {"vocab_size": encoder.vocab_size + 2}
    sizes["n_head"] = 8 if hyper.get("n_experts") or hyper.get("n_kv_head") else 4
    data = "pairs.bin" if "pairs" in read_preset(name)["dataset"]["path"] else "text.bin"
    run = {"dataset.path": folder / data, "encoder_path": f"chars:{folder / 'text.txt'}", "batch_size": 3,
           "max_iters": 2, "eval_interval": 2, "log_interval": 1, "eval_iters": 2, "warmup_iters": 0, "seed": 5,
           "sample_length": 4, "device": "cpu", "dtype": "float32", "compile": "false"}  # fmt: skip
    if "rope_scaling" in hyper:
        run["model_hyperparams.rope_scaling.original_max_position"] = 16
    run |= {f"model_hyperparams.{key}": value for key, value in sizes.items()}
    return [f"--{key}={value}" for key, value in run.items()]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains_evaluates_saves_and_samples(name, corpus_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "curves", lambda *arguments: None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    run = load_preset(name)
    assert train.main(["--config", f"{name}.json", *small_overrides(name, corpus_folder)]) == 0
    lines = plot.read_metrics(Path(run.checkpoints.path, "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert all(0 < line[key] < 8 for line in lines for key in line if key.endswith("loss"))
    model, encoder, record = load_model(run.model_path)
    objective = record["run"]["objective"]
    assert objective == {"spans": "spans", "pairs": "pairs", "masked": "masked"}.get(name.split("-")[-1], "next")
    assert (lines[-1]["val_bpb"] is None) == (objective in ("spans", "masked"))
    assert getattr(model.config, "pad_id", None) == (None if objective == "next" else encoder.pad)
    output = capsys.readouterr().out
    assert "bits per byte" in output or objective in ("spans", "masked")
    assert f"\nobjective    {objective}\n" in output
    if not model.generates:
        with pytest.raises(UserError, match="is an encoder: it predicts masked tokens, not text"):
            sample.main(["--prompt", "the"])
        return
    argv = ["--source", "the cat"] if model.takes_source else ["--prompt", "the"]
    sample.main([*argv, "--length", "5", "--seed", "1", "--device", "cpu"])  # of the newest model in bin/
    out, output = capsys.readouterr()
    assert out.startswith("" if model.takes_source else "the") and out.endswith("\n")
    assert f"{Path(run.model_path)}: {model.config.arch}" in output


def test_vocab_size_of_presets_includes_the_tokens_of_their_objective():
    """8192 is what prepare.py's encoder has by default."""
    assert load_preset("transformer-spans").model_hyperparams.vocab_size == 8192 + 13
    assert load_preset("transformer-masked").model_hyperparams.vocab_size == 8192 + 1


@pytest.mark.parametrize("key", ["n_head", "n_layer", "n_embd", "n_kv_head", "vocab_size", "block_size", "n_experts",
                                 "recursions", "window"])  # fmt: skip
@pytest.mark.parametrize("arch", CONFIGS)
def test_huge_numbers_are_validated_quickly(arch, key):
    """2**62 + 1 has no small divisor: a default that searched for one would search for years."""
    began = time.process_time()
    check(CONFIGS[arch], {"arch": arch, key: 2**62 + 1})
    assert time.process_time() - began < 5
