"""export.py: transformers computes the same, or the model is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from exports import EXPORTS, GPT2, SIZES, greedy

import encoder as encoders
import export
from model import CONFIGS, build
from strawberry.common import UserError
from strawberry.config import to_dict
from strawberry.huggingface.layouts import choose_class, make_layout
from strawberry.huggingface.tokenizer import make_tokenizer, read_vocabulary, to_oniguruma
from strawberry.model_file import save_model
from strawberry.run_config import CONFIG_FOLDER, load_run


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_transformers_computes_the_same(exchanged, name):
    model, encoder = exchanged.models[name], exchanged.encoders["trained"]
    cls, dtype, logits, text, specials = exchanged.exports[name]
    with torch.no_grad():
        ours = model(exchanged.idx)[0]
    assert (cls, dtype) == (EXPORTS[name][0], "torch.float32")
    assert ours.std() > 0.5
    torch.testing.assert_close(logits, ours, rtol=0, atol=1e-4)
    assert torch.equal(text, greedy(model, exchanged.idx[:1, :20], 8))  # through the cache
    assert specials == [encoder.eot, encoder.pad]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trained", "pairs", "p50k", "o200k", "characters"])
def test_tokens_are_the_same(exchanged, name):
    encoder, found, strings = (exchanged.encoders[name], exchanged.tokens[f"tokens/{name}"],
                               exchanged.strings[f"tokens/{name}"])  # fmt: skip
    assert len(strings) == 1000 and "" in strings
    for text, ids, back in zip(strings, found["ids"], found["texts"], strict=True):
        assert ids == encoder.encode(text) and back == text, ascii(text)
    assert found["specials"] == [encoder.eot, encoder.pad, encoder.decode([encoder.eot])]
    assert found["parsed"] == [encoder.pad]  # where special tokens are asked for


# ---- which class -----------------------------------------------------------------------------------------------------

PRESETS = {"v0.1-baseline": "GPT2LMHeadModel", "v0.2-modernbase": "LlamaForCausalLM", "v0.3-mha": "LlamaForCausalLM",
           "v0.4-mqa": "LlamaForCausalLM", "v0.5-mhla": "DeepseekV2ForCausalLM", "v0.6-gelu": "ArceeForCausalLM",
           "v0.7-gqa-swa": "MistralForCausalLM"}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_a_class(preset):
    run = load_run(["--config", str(CONFIG_FOLDER / f"tinystar-{preset}.json")], CONFIGS)
    assert choose_class(run.model_hyperparams).architecture == PRESETS[preset]


REFUSED = [
    ({"logit_softcap": 15.0}, ["logit_softcap = 15.0: no class of transformers caps the", "train a model with null"]),
    ({"skip_scalars": True}, ["skip_scalars = true: no class"]),
    ({"value_embeddings": True}, ["value_embeddings = true: no class"]),
    ({"n_ffn_experts": 2}, ["n_ffn_experts = 2: no class", "train a model with 1"]),
    ({"pos_encoding": "Sinusoidal"}, ['pos_encoding = "Sinusoidal": transformers has no such class', '"RoPE"']),
    ({"pos_encoding": "None"}, ['pos_encoding = "None": transformers has no such class']),
    ({"attention_type": "MHLA-SWA"}, ['attention_type = "MHLA-SWA": transformers has no such class']),
    ({"attention_type": "GQA-SWA", "ffn_type": "GELU"}, ['= "GELU": ', 'MistralForCausalLM, has "SwiGLU"']),
    ({"norm_type": "LayerNorm", "ffn_type": "ReLU2"}, ["transformers has no such class"]),
    ({"norm_type": "LayerNorm", "n_qkv": 64}, ['norm_type = "LayerNorm": ', 'LlamaForCausalLM, has "RMSNorm"']),
    ({**GPT2, "n_qkv": 64}, ["n_qkv = 64: ", "GPT2LMHeadModel, has 32"]),
    ({**GPT2, "attention_type": "MHA-SWA"}, ['attention_type = "MHA-SWA"', '"MHA" or "GQA" or "MQA"']),
    ({"attention_type": "MHLA", "rope_scaling": {"type": "yarn", "factor": 2, "original_max_position": 16}},
     ['rope_scaling.type = "yarn"', 'DeepseekV2ForCausalLM, has "none" or "linear" or "ntk"']),
    ({"n_embd": 30, "n_qkv": 32}, ["n_embd = 30: transformers wants a multiple of n_head, which is 4", "with 32"]),
    ({"skip_scalars": True, "logit_softcap": 2.0}, ["2 problems", "skip_scalars", "logit_softcap"]),
    ({"arch": "palm"}, ['arch = "palm": transformers has no class that computes it; export a tinystar']),
]  # fmt: skip


@pytest.mark.parametrize("options,parts", REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_a_model_without_a_class_is_refused_by_name(options, parts):
    sizes = {key: value for key, value in SIZES.items() if key != "arch"}
    model = build({"arch": "tinystar"} | sizes | options)
    with pytest.raises(UserError) as refusal:
        make_layout(model)
    assert all(part in str(refusal.value) for part in parts), refusal.value


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """model.tinystar in the working directory."""
    monkeypatch.chdir(tmp_path)
    encoder = encoders.from_characters(set("abc\n"))
    model = build({"arch": "tinystar", "vocab_size": 6, "block_size": 8, "n_layer": 1, "n_embd": 16})
    save_model("model.tinystar", model, encoder, {})
    return model


def test_files_of_other_programs_stay(saved):
    Path("hf").mkdir()
    export.main(["model.tinystar", "hf"])
    first = {path.name: path.read_bytes() for path in Path("hf").iterdir()}
    export.main(["model.tinystar", "hf"])  # its own files are replaced
    assert {path.name: path.read_bytes() for path in Path("hf").iterdir()} == first
    assert first.keys() == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
                            "tokenizer_config.json"}  # fmt: skip
    foreign = json.loads(first["config.json"])
    del foreign["exported_by"]
    Path("hf/config.json").write_text(json.dumps(foreign))
    Path("hf/model.safetensors").unlink()
    with pytest.raises(UserError, match=r"FOLDER: hf/config.json is there and is not a file of export.py"):
        export.main(["model.tinystar", "hf"])
    assert not Path("hf/model.safetensors").exists()


def test_a_refusal_names_the_file_and_writes_nothing(saved):
    model = build(to_dict(saved.config) | {"skip_scalars": True})
    save_model("skips.tinystar", model, encoders.from_characters(set("abc\n")), {})
    with pytest.raises(UserError, match="skips.tinystar: skip_scalars = true"):
        export.main(["skips.tinystar", "hf"])
    saved.norm.weight.data[0] = torch.nan
    save_model("nan.tinystar", saved, encoders.from_characters(set("abc\n")), {})
    with pytest.raises(UserError, match="nan.tinystar: the model predicts NaN"):
        export.main(["nan.tinystar", "hf"])
    assert not Path("hf").exists()


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_tokenizers_that_cannot_be_written():
    with pytest.raises(UserError, match='special token "the": .* ordinary token of the same spelling'):
        make_tokenizer(encoders.train(["the cat the hat"], 262, ["the"]))
    with pytest.raises(UserError, match="a lone surrogate is no Unicode text"):
        make_tokenizer(encoders.from_characters({"a", "\ud800"}))


@pytest.mark.parametrize("pattern,expected", [
    (r"\p{N}{1,3}+|x", r"(?>\p{N}{1,3})|x"), (r"[a{2}+\]$]{2}+$", r"(?>[a{2}+\]$]{2})\z"), (r"\$|a++$", r"\$|a++\z"),
    (r"\p{N}{1,3}| ?\s+", r"\p{N}{1,3}| ?\s+"),
])  # fmt: skip
def test_patterns_are_translated(pattern, expected):
    assert to_oniguruma(pattern) == expected


def test_the_vocabulary_is_read_back(tmp_path):
    for encoder in (encoders.train(["the cat, the hat"], 261), encoders.from_characters(set("abc中"))):
        (tmp_path / "tokenizer.json").write_text(json.dumps(make_tokenizer(encoder)), "utf-8")
        ordinary = range(encoder.vocab_size - 2)
        assert read_vocabulary(tmp_path) == {i: encoder.token_bytes(i) for i in ordinary}
    vocab = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    assert vocab == {"a": 0, "b": 1, "c": 2, "中": 3}
    shutil.rmtree(tmp_path)
    assert read_vocabulary(tmp_path) is None
