"""What is saved is whole or not there, what is read is what was written, and nothing that is read runs."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from machine import require
from torch import nn

from strawberry import model_file as model_files
from strawberry.common import UserError
from strawberry.config import check, option
from strawberry.model_file import MAX_HEADER, load_model, save_model, serialize_model, write_model
from strawberry.training import checkpoint as checkpoint_module
from strawberry.training.checkpoint import (
    _render_manifest,
    archive_run,
    find_latest,
    list_checkpoints,
    save_checkpoint,
    write_state,
)

FILES = ["model.safetensors", "state.pt", "manifest.json"]

# ---- stand-ins for a model and an encoder ----------------------------------------------------------------------------


@dataclass
class Config:
    arch: str = option("small", "the family")
    vocab_size: int = option(7, "tokens", low=1)
    n_embd: int = option(3, "channels", low=1)
    n_layer: int = option(1, "layers", low=0)


class Small(nn.Module):
    """A tied embedding, layers, and a buffer that is saved."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(nn.Linear(config.n_embd, 2, bias=False) for _ in range(config.n_layer))
        self.unembed = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.unembed.weight = self.embed.weight
        self.register_buffer("router_bias", torch.zeros(4))
        self.register_buffer("table", torch.empty(5).fill_(3.0), persistent=False)


def build(hyperparams):
    if hyperparams.get("arch") != "small":
        raise UserError(f"arch {hyperparams.get('arch')!r} is not known; there are: small")
    config, problems = check(Config, hyperparams, "model_hyperparams")
    if problems:
        raise UserError("; ".join(problems))
    return Small(config)


class Encoder:
    vocab_size = 5

    def __init__(self, data=b'{"tokens": "abc"}'):
        self.data, self.fingerprint = data, hashlib.sha256(data).hexdigest()

    def to_bytes(self):
        return self.data

    @classmethod
    def from_bytes(cls, data):
        json.loads(data)
        return cls(data)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setitem(sys.modules, "model", SimpleNamespace(build=build))
    monkeypatch.setitem(sys.modules, "encoder", SimpleNamespace(Encoder=Encoder))


def small(fill):
    model = Small(Config())
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            tensor.fill_(fill + number)
    return model


def save(root, step, val_loss=None, keep=3):
    parts = {"model.safetensors": write_model(small(step), Encoder(), {"step": step})}
    parts["state.pt"] = write_state({"position": step, "tensor": torch.full((3,), float(step))})
    return save_checkpoint(root, step, parts, val_loss, keep, {"dataset": "ab12", "config": {"lr": 0.1}})


def names(root):
    return sorted(path.name for path in Path(root).iterdir())


def content(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_found(tmp_path):
    path = save(tmp_path / "deep/er", 2000, val_loss=1.5)
    assert path == tmp_path / "deep/er/step_00002000" and names(path) == sorted(FILES)
    assert names(path.parent) == ["latest", "step_00002000"]
    assert (path.parent / "latest").read_text() == "step_00002000\n"
    manifest = json.loads((path / "manifest.json").read_text())
    for name in ("model.safetensors", "state.pt"):
        data = (path / name).read_bytes()
        assert manifest["files"][name] == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    found = find_latest(path.parent)
    assert (found.path, found.step, found.val_loss) == (path, 2000, 1.5)
    assert found.meta == {"dataset": "ab12", "config": {"lr": 0.1}}
    state = found.load_state()
    assert state["position"] == 2000 and torch.equal(state["tensor"], torch.full((3,), 2000.0))
    model = small(0)
    found.load_weights(model)
    for name, tensor in small(2000).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert load_model(path / "model.safetensors")[2] == {"step": 2000}


def test_each_file_and_directory_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename

    def note_fsync(number):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def note_rename(source, target):
        events.append(f"rename to {Path(target).name}")
        rename(source, target)

    require(os.path.exists("/proc/self/fd"), "/proc, which says which file a descriptor is")
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    save(tmp_path, 1)
    temporary = f".tmp_step_00000001_{os.getpid()}"
    assert events[:6] == [*FILES, temporary, "rename to step_00000001", tmp_path.name]


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: float("nan"), 6: 1.5}
    for step, loss in losses.items():
        save(tmp_path, step, loss, keep=2)
        newest_two = [s for s in losses if s <= step][-2:]
        known = [s for s in losses if s <= step and losses[s] is not None and losses[s] == losses[s]]
        expected = {*newest_two, min(known, key=lambda s: losses[s])}
        assert names(tmp_path) == ["latest"] + [f"step_{s:08d}" for s in sorted(expected)]
    save(tmp_path, 7, 0.5, keep=1)  # best and newest at once
    assert names(tmp_path) == ["latest", "step_00000007"]


def test_complete_checkpoints_are_listed(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []
    for step, loss in ((1, 3.0), (20, None), (3, 1.0)):
        save(tmp_path, step, loss)
    (tmp_path / "step_00000020" / "state.pt").write_bytes(b"short")
    found = list_checkpoints(tmp_path)
    assert [(checkpoint.step, checkpoint.val_loss) for checkpoint in found] == [(3, 1.0), (1, 3.0)]
    assert found[0].saved_at == (tmp_path / "step_00000003").stat().st_mtime


@pytest.mark.parametrize("moment", ["_read_manifest", "_describe"])
def test_a_checkpoint_deleted_while_it_is_read_is_not_listed(tmp_path, monkeypatch, moment):
    """Its run may remove a checkpoint, or move it aside, at any moment."""
    for step in (1, 2):
        save(tmp_path, step, 1.0)
    function = getattr(checkpoint_module, moment)

    def remove_first(path, *rest):
        if path.name == "step_00000002":
            shutil.rmtree(path)
        return function(path, *rest)

    monkeypatch.setattr(checkpoint_module, moment, remove_first)
    assert [checkpoint.step for checkpoint in list_checkpoints(tmp_path)] == [1]


def test_broken_checkpoints_do_not_push_out_good_ones(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        (tmp_path / f"step_0000000{step}/state.pt").write_bytes(b"")
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["latest", *(f"step_0000000{s}" for s in (1, 2, 3, 4))]


def test_a_checkpoint_of_an_abandoned_step_is_neither_counted_nor_deleted(tmp_path):
    save(tmp_path, 9)
    for step in (5, 6):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == ["latest", "step_00000006", "step_00000009"]


def test_saving_a_step_again_replaces_its_checkpoint(tmp_path):
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 1, {"state.pt": write_state({"position": "again"})}, None, 1)
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert find_latest(tmp_path).load_state() == {"position": "again"}


def test_a_checkpoint_whose_replacement_was_never_written_gets_its_name_back(tmp_path):
    for step in (1, 2):
        os.rename(save(tmp_path, step), tmp_path / f".old_step_0000000{step}")
    save(tmp_path, 2)
    assert find_latest(tmp_path).step == 2
    save(tmp_path, 3)
    assert names(tmp_path) == ["latest", *(f"step_0000000{s}" for s in (1, 2, 3))]


# ---- kills -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a signal would: no handler of errors sees it."""


@pytest.mark.parametrize("stop", [Killed, ValueError])
@pytest.mark.parametrize("part", ["model.safetensors", "state.pt"])
def test_a_save_stopped_within_a_file_leaves_older_checkpoints_unchanged(tmp_path, part, stop):
    save(tmp_path, 1)
    before = content(tmp_path)

    def half(file):
        file.write(b"half a file")
        file.flush()
        raise stop("in the middle")

    parts = {"model.safetensors": write_model(small(2), Encoder(), {}), "state.pt": write_state({})}
    with pytest.raises(stop):
        save_checkpoint(tmp_path, 2, parts | {part: half}, None, 3)
    assert content(tmp_path) == before
    assert find_latest(tmp_path).step == 1


CALLS = ["os.mkdir", "os.open", "os.fsync", "os.rename", "os.replace", "shutil.rmtree"]


def forked_kill(root, count):
    """Saves steps 2 and 3 in a process that dies, with no clean-up at all, before system call number `count`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [count]

    def guarded(call):
        def function(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return call(*args, **kwargs)

        return function

    for name in CALLS:
        module, attribute = name.split(".")
        module = sys.modules[module]
        setattr(module, attribute, guarded(getattr(module, attribute)))
    for step in (2, 3):  # 2 is there already and replaced, 3 is new
        save_checkpoint(root, step, {"a": lambda file, step=step: file.write(b"new %d" % step)}, None, 1)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_after_a_kill_before_any_system_call_a_complete_checkpoint_is_found_and_the_next_save_cleans_up(tmp_path):
    steps_seen = []
    for count in range(100):
        root = tmp_path / str(count)
        for step in (1, 2):
            save_checkpoint(root, step, {"a": lambda file: file.write(b"old")}, None, 2)
        code = forked_kill(root, count)
        found = find_latest(root)
        assert (found.path / "a").read_bytes() in {2: [b"old", b"new 2"], 3: [b"new 3"]}[found.step], count
        steps_seen.append(found.step)
        save_checkpoint(root, 4, {"a": lambda file: file.write(b"last")}, None, 1)
        assert names(root) == ["latest", "step_00000004"], count
        if code == 0:
            break
    assert code == 0 and count > 15 and steps_seen == sorted(steps_seen) and set(steps_seen) == {2, 3}


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, -1),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(tmp_path, capsys, file, damage):
    save(tmp_path, 1)
    broken = save(tmp_path, 2)
    DAMAGE[damage](broken / file)
    assert find_latest(tmp_path).step == 1
    warning = capsys.readouterr().err
    assert str(broken) in warning and file in warning and warning.count("\n") == 1


def test_every_byte_of_the_manifest_counts(tmp_path, capsys):
    path = save(tmp_path, 1) / "manifest.json"
    good = path.read_bytes()
    for at in range(len(good)):
        for bit in (1, 0x20):  # 0x20 makes a capital, and a space a NUL
            path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
            with pytest.raises(UserError, match=r"manifest\.json"):
                find_latest(tmp_path)
    path.write_bytes(good)
    assert find_latest(tmp_path).step == 1


def write_manifest(path, **changes):
    """A manifest with these changes and a hash that fits them."""
    manifest = json.loads(path.read_text()) | changes
    manifest.pop("sha256")
    path.write_bytes(_render_manifest(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": {"../secret": {"size": 1, "sha256": ""}}}, "no file name"),
        ({"files": ["state.pt"]}, "damaged"),
        ({"files": {"state.pt": {}}}, "damaged"),
        ({"format": 2}, "format 2"),
        ({"step": 7}, "of step 7"),
        ({"step": "1"}, "damaged"),
        ({"meta": []}, "damaged"),
        ({"val_loss": "low"}, "damaged"),
    ],
)
def test_a_forged_manifest_is_refused(tmp_path, changes, message):
    write_manifest(save(tmp_path, 1) / "manifest.json", **changes)
    with pytest.raises(UserError, match=message):
        find_latest(tmp_path)


@pytest.mark.parametrize("data", [b"[" * 100_000, b"{}", b"[]", b"null", b'{"a":' * 50_000, b"\xff\xfe", b"NaN"])
def test_a_malicious_manifest_is_refused(tmp_path, data):
    (save(tmp_path, 1) / "manifest.json").write_bytes(data)
    with pytest.raises(UserError, match=r"manifest\.json"):
        find_latest(tmp_path)


def test_only_broken_checkpoints_are_an_error_of_one_line_that_names_each(tmp_path, capsys):
    for step, file in [(1, "state.pt"), (2, "model.safetensors")]:
        flip(save(tmp_path, step) / file, 50)
    with pytest.raises(UserError) as caught:
        find_latest(tmp_path)
    message = str(caught.value)
    assert "step_00000001: state.pt" in message and "step_00000002: model.safetensors" in message
    assert "\n" not in message and message.startswith("every checkpoint")


def test_a_directory_without_checkpoints_is_an_error(tmp_path):
    (tmp_path / "step_elsewhere").mkdir()
    (tmp_path / ".tmp_step_00000001_12").mkdir()
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=re.escape(f"no checkpoint to resume from in {root}")):
            find_latest(root)


def test_a_missing_newest_checkpoint_is_reported(tmp_path, capsys):
    save(tmp_path, 1)
    shutil.rmtree(save(tmp_path, 2))
    assert find_latest(tmp_path).step == 1
    assert "step_00000002, written last, is missing" in capsys.readouterr().err


def test_reading_a_checkpoint_changes_no_file(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".tmp_step_00000002_12").mkdir()
    (tmp_path / ".tmp_step_00000002_12/half").write_bytes(b"half")
    before = content(tmp_path)
    find_latest(tmp_path).load_state()
    assert content(tmp_path) == before


# ---- nothing runs ----------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_with_a_valid_hash_is_not_run(tmp_path):
    trap = tmp_path / "it_ran"
    writers = [lambda file: torch.save(Payload(trap), file), lambda file: file.write(pickle.dumps(Payload(trap)))]
    for step, writer in enumerate(writers):
        save_checkpoint(tmp_path / "ck", step, {"state.pt": writer, "model.safetensors": writer}, None, 9)
        found = find_latest(tmp_path / "ck")
        with pytest.raises(UserError, match="not a plain training state"):
            found.load_state()
        with pytest.raises(UserError, match="is a pickle, which can run code"):
            found.load_weights(small(0))
        with pytest.raises(UserError, match="is a pickle, which can run code"):
            load_model(found.path / "model.safetensors")
        assert not trap.exists()
    pickle.loads(pickle.dumps(Payload(trap)))
    assert trap.exists()  # it would have


# ---- no room, no right -----------------------------------------------------------------------------------------------

LIMITED = """
    import resource, sys
    import torch
    from strawberry.common import UserError
    from strawberry.training.checkpoint import find_latest, save_checkpoint, write_state
    root = sys.argv[1]
    save_checkpoint(root, 1, {"state.pt": write_state({"step": 1})}, 0.5, 1)
    for limit in (200_000, 10):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save_checkpoint(root, 2, {"state.pt": write_state({"tensor": torch.zeros(100_000)})}, 0.1, 1)
        except UserError as error:
            print(error)
        assert find_latest(root).load_state() == {"step": 1}
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_a_full_disk_is_an_error_that_names_the_path_and_keeps_older_checkpoints(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(cannot save the checkpoint \S+step_00000002: File too large.*\n){2}", done.stdout)
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_a_directory_that_cannot_be_written_is_an_error_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/ck/step_00000001: Not a directory"):
        save(tmp_path / "file/ck", 1)
    save(tmp_path / "ck", 1)
    before = content(tmp_path / "ck")

    def read_only(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match="step_00000002: Permission denied"):
        save(tmp_path / "ck", 2)
    assert content(tmp_path / "ck") == before


def test_an_earlier_run_is_archived_completely(tmp_path):
    root = tmp_path / "ck"
    assert archive_run(root) is None and not root.exists()
    save(root, 5)
    assert archive_run(root) == root / "earlier_1"
    assert find_latest(root / "earlier_1").step == 5
    save(root, 1)
    assert find_latest(root).step == 1
    assert archive_run(root) == root / "earlier_2"
    assert names(root) == ["earlier_1", "earlier_2"] and names(root / "earlier_2") == ["latest", "step_00000001"]


# ---- model files -----------------------------------------------------------------------------------------------------


def model_file(path, tensors=None, **changes):
    """A model file with changes to its tensors and metadata; None takes one out."""
    save_model(path, small(5), Encoder(), {"loss": 1.25})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size])["__metadata__"] | changes
    all_tensors = safetensors.torch.load(data) | (tensors or {})
    present = [{key: value for key, value in d.items() if value is not None} for d in (all_tensors, metadata)]
    path.write_bytes(safetensors.torch.save(*present))
    return path


def test_a_model_file_restores_model_encoder_and_record(tmp_path):
    path, model = tmp_path / "new/air ü.strawberry", small(5)
    before = torch.get_rng_state()
    save_model(path, model, Encoder(), {"loss": 1.25, "steps": [1, 2]})
    again, encoder, record = load_model(path)
    assert torch.equal(before, torch.get_rng_state())
    assert record == {"loss": 1.25, "steps": [1, 2]} and encoder.fingerprint == Encoder().fingerprint
    assert again.config == model.config and not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.unembed.weight is again.embed.weight
    assert torch.equal(again.table, torch.full((5,), 3.0))  # not saved, computed again
    assert sorted(safetensors.torch.load_file(path)) == ["blocks.0.weight", "embed.weight", "router_bias"]
    assert names(path.parent) == [path.name]
    assert model_files.read_about(path) == (vars(model.config), record)
    assert model_files.read_encoder(path).fingerprint == encoder.fingerprint


def test_models_of_every_family_are_restored(tmp_path, monkeypatch):
    monkeypatch.undo()  # of the stand-ins
    import encoder
    import model

    (tmp_path / "text").write_text("some text")
    characters = encoder.load(f"chars:{tmp_path / 'text'}")
    for arch in model.MODELS:
        sizes = {"vocab_size": 32, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}
        original = model.build({"arch": arch} | sizes).eval()
        save_model(tmp_path / arch, original, characters, {})
        again, its_encoder, _ = load_model(tmp_path / arch)
        assert its_encoder.fingerprint == characters.fingerprint
        tokens = torch.randint(0, 32, (2, 32))
        source = tokens.flip(1) if original.takes_source else None
        assert torch.equal(original(tokens, source=source)[0], again(tokens, source=source)[0]), arch


def test_bfloat16_is_loaded_as_float32_and_float64_is_refused(tmp_path):
    path = model_file(tmp_path / "m", {"blocks.0.weight": torch.full((2, 3), 0.5, dtype=torch.bfloat16)})
    assert torch.equal(load_model(path)[0].blocks[0].weight, torch.full((2, 3), 0.5))
    path = model_file(tmp_path / "m", {"blocks.0.weight": torch.zeros(2, 3, dtype=torch.float64)})
    with pytest.raises(UserError, match=r"blocks\.0\.weight is torch\.float64"):
        load_model(path)


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({"router_bias": None}, {}, "router_bias is missing"),
        ({"ghost": torch.zeros(1)}, {}, "a tensor ghost"),
        ({"embed.weight": torch.zeros(3, 7)}, {}, r"embed\.weight has shape \(3, 7\), not \(7, 3\)"),
        ({}, {"format": "pt"}, "format 'pt'"),
        ({}, {"version": "99"}, "version '99'"),
        ({}, {"encoder": None}, "no encoder"),
        ({}, {"record": None}, "no record"),
        ({}, {"record": "[" * 100_000}, "record is no JSON"),
        ({}, {"model_hyperparams": "[]"}, "model_hyperparams is no JSON object"),
        ({}, {"model_hyperparams": '{"arch": "mamba"}'}, "arch 'mamba' is not known; there are: small"),
        ({}, {"model_hyperparams": '{"arch": "small", "n_embd": -1}'}, "n_embd"),
        ({}, {"model_hyperparams": '{"arch": "small", "n_layer": 1000000000}'}, "holds 3 tensors"),
        ({}, {"model_hyperparams": '{"arch": "small", "n_layer": 2}'}, r"blocks\.1\.weight is missing"),
        ({}, {"model_hyperparams": '{"arch": "small", "vocab_size": 4000000000}'}, r"embed\.weight has shape|no model"),
        ({}, {"model_hyperparams": '{"arch": "small", "n_embd": 4611686018427387904}'}, "no model can be made"),
        ({}, {"encoder_fingerprint": "00"}, "fingerprint 00"),
        ({}, {"model_hyperparams": '{"arch": "small", "vocab_size": 4}'}, "has 5 tokens, its model's vocab_size is 4"),
    ],
)
def test_a_model_file_that_does_not_fit_is_refused(tmp_path, tensors, changes, message):
    path = model_file(tmp_path / "m", tensors, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def with_header(header, payload=b"\0" * 64, size=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if size is None else size).to_bytes(8, "little") + header + payload


F32 = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        b"hello, this is plain text",
        with_header({"w": F32}, size=2**63),
        with_header({"w": F32}, size=10**6),
        with_header({"w": F32}, size=5),
        with_header(b" " * 100),
        with_header(b'{"a":' * 100_000),
        with_header({"w": F32 | {"shape": [2**62, 4]}}),
        with_header({"w": F32 | {"shape": [5, 4]}}),
        with_header({"w": F32 | {"data_offsets": [0, 2**40]}}),
        with_header({"w": F32 | {"data_offsets": [64, 0]}}),
        with_header({"w": F32 | {"data_offsets": [-64, 0]}}),
        with_header({"w": F32, "v": F32}),
        with_header({"w": F32}, payload=b"\0" * 63),
        with_header({"w": F32}, payload=b"\0" * 65),
        with_header({"w": F32 | {"dtype": "PICKLE"}}),
        with_header({"w": F32}),
    ],
)
def test_false_headers_are_refused_in_one_line(tmp_path, data):
    path = tmp_path / "m"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_header_of_any_size_is_read(tmp_path):
    """Sizes whose bytes are those that a pickle begins with are among them: 128 = 0x80 and 19280 = "PK"."""
    path, model, sizes = tmp_path / "m", small(5), set()

    def header(padding):
        return int.from_bytes(serialize_model(model, Encoder(), {"padding": "x" * padding})[:8], "little")

    for padding in [*range(0, 256, 8), 10_000 + 19_280 - header(10_000)]:
        record = {"padding": "x" * padding}
        path.write_bytes(serialize_model(model, Encoder(), record))
        sizes.add(path.read_bytes()[:2])
        assert load_model(path)[2] == record
    assert b"PK" in sizes and any(size[0] == 0x80 for size in sizes)


def test_a_header_longer_than_its_file_or_than_any_is_not_read(tmp_path):
    path = tmp_path / "m"
    for size, limit in [(10**6, 500), (2**63, 500), (MAX_HEADER + 1, 10**9)]:
        with open(path, "wb") as file:
            file.write(with_header({"w": F32}, size=size))
            file.truncate(limit)
        with pytest.raises(UserError, match=f"header claims {size} bytes; the file has {limit}, .*; copy it anew"):
            load_model(path)


def test_a_model_file_that_is_missing_or_a_directory_is_an_error(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=re.escape(f"no model file {path}")):
            load_model(path)
    (tmp_path / "tiny.palm").touch()
    with pytest.raises(UserError, match=re.escape("tny.palm (did you mean 'tiny.palm'?)")):
        load_model(tmp_path / "tny.palm")


def test_a_model_file_is_replaced_atomically(tmp_path, monkeypatch):
    path = tmp_path / "m"
    save_model(path, small(1), Encoder(), {})
    before = path.read_bytes()

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=re.escape(f"{path}: No space left on device")):
        save_model(path, small(2), Encoder(), {})
    assert content(tmp_path) == {"m": before}
