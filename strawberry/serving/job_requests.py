"""Create jobs from clients' requests: recipes of datasets, configurations of runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import encoder as encoders
from model import CONFIGS
from strawberry import model_file as model_files
from strawberry.common import UserError, nearest, show
from strawberry.config import MAX_CONFIG_BYTES, check, merge_configs, path_names, read_json, to_dict
from strawberry.data import assemble
from strawberry.run_config import CONFIG_FOLDER, Run, make_run, update_old_keys
from strawberry.serving.id_directory import RequestError, new_id
from strawberry.serving.job import Job
from strawberry.serving.job_store import JobStore

# JSON keys that a client may not set: paths, keys that describe a path, and the accounts of the server's owner
SERVER_KEYS = {*path_names(Run), "dataset.load_from_file", "checkpoints.create_checkpoints", "log_to"}
# OpenAI's hyperparameters that train.py does not have → values that have no effect, which some clients send
NO_EFFECT = {"n_epochs": ("auto", 1), "learning_rate_multiplier": ("auto", 1)}


class TrainingRequest(NamedTuple):
    """A request for a training run. `key` is the hash of the Idempotency-Key or None, `body` the hash of the body."""

    model: str
    training_file: str
    hyperparameters: dict
    suffix: str | None = None
    seed: int | None = None
    metadata: dict | None = None
    key: str | None = None
    body: str | None = None


def is_public_encoder(encoder: str) -> bool:
    """Whether the encoder is built in or public, and not the name of a model or dataset on this server."""
    return encoder == "chars" or bool(re.fullmatch(r"tiktoken:[a-z0-9_]{1,40}", encoder))


def nest_keys(hyperparameters: dict) -> dict:
    """Convert {"a.b": 1} and {"a": {"b": 1}} to the latter. Raises RequestError if a key is given in both forms."""
    raw: dict = {}
    for name, value in hyperparameters.items():
        if name in NO_EFFECT:
            check_no_effect(name, value)
            continue
        *sections, last = name.split(".")
        target = raw
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise RequestError(
                    400, f"hyperparameters.{name}: {section} is a value, not a section", "hyperparameters"
                )
        if last in target and not (isinstance(value, dict) and isinstance(target[last], dict)):
            raise RequestError(400, f"hyperparameters.{name}: given twice; keep one", "hyperparameters")
        target[last] = {**target[last], **value} if last in target else value
    return raw


def check_no_effect(name: str, value) -> None:
    """Raises RequestError unless the value of this NO_EFFECT key has no effect."""
    if value is not None and (isinstance(value, bool) or value not in NO_EFFECT[name]):
        instead = {"n_epochs": "max_iters says how long a run trains", "learning_rate_multiplier": "set learning_rate"}
        values = " or ".join(map(show, NO_EFFECT[name]))
        raise RequestError(
            400,
            f"hyperparameters.{name} = {show(value)}: is not supported; {instead[name]}; leave it out, "
            f"or send {values}, which changes nothing",
            f"hyperparameters.{name}",
        )


def iterate_keys(raw: dict, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all values."""
    for name, value in raw.items():
        yield from iterate_keys(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [prefix + name]


def check_keys(raw: dict) -> None:
    """Raises RequestError for a key that the server sets, nested or dotted."""
    names = set(iterate_keys(raw))
    for name in sorted(names & SERVER_KEYS):
        told = "sends metrics elsewhere" if name == "log_to" else "names a path or belongs to one"
        told += ", which the server chooses; leave it out"
        raise RequestError(400, f"hyperparameters.{name}: {told}", f"hyperparameters.{name}")


def create_dataset_job(jobs: JobStore, recipe: assemble.Recipe, name: str = "") -> Job:
    """The dataset job of a recipe of file ids. If a job with the same content and options exists, returns that, and
    queues it again if it failed or was cancelled. Raises RequestError.
    """
    raw = to_dict(recipe)
    with jobs.lock, client_errors(jobs):
        files = [jobs.uploads.get(file, "files") for file in recipe.files]
        _, problems = check(assemble.Recipe, raw)
        if problems:
            raise RequestError(400, "; ".join(problems), problems[0].partition(" = ")[0])
        given = recipe.encoder
        if given is not None and not is_public_encoder(given):
            given = jobs.load_encoder(given).fingerprint
        content = {**raw, "encoder": given, "files": [[file["sha256"], file["suffix"]] for file in files]}
        digest = hashlib.sha256(json.dumps([assemble.VERSION, content], sort_keys=True).encode()).hexdigest()
        job = jobs.jobs.get(f"ds-{digest[:24]}")
        if job is None:
            return jobs.new("ds", {"recipe": raw, "name": name, "hash": digest}, f"ds-{digest[:24]}")
        if job.status in ("failed", "cancelled"):  # a retry may succeed, for example after a full disk
            job.set(status="queued", error=None, request={**job.request, "recipe": raw})
        return job


@contextlib.contextmanager
def client_errors(jobs: JobStore) -> Iterator[None]:
    """Convert UserError to RequestError, without the server's paths in the message."""
    try:
        yield
    except RequestError:
        raise
    except UserError as error:
        raise RequestError(400, jobs.names.rewrite(str(error))) from error


def create_training_job(jobs: JobStore, asked: TrainingRequest) -> Job:
    """A new training job, or the existing one with the same Idempotency-Key. Raises RequestError."""
    with jobs.lock, client_errors(jobs):
        if asked.key in jobs.keys:
            job = jobs.jobs[jobs.keys[asked.key]]
            if job.about["body"] != asked.body:
                told = "this Idempotency-Key came with another request before; take another one"
                raise RequestError(409, told, "Idempotency-Key", "idempotency_key_reused")
            return job
        base, raw = find_starting_point(jobs, asked.model)
        check_training_file(jobs, asked.training_file)
        chosen = nest_keys(asked.hyperparameters)
        check_keys(chosen)
        raw = merge_configs(raw, chosen)
        if asked.seed is not None:
            raw["seed"] = asked.seed
        run = make_run(raw, CONFIGS)
        raw["seed"] = secrets.randbits(31) if run.seed == "auto" else run.seed
        if len(json.dumps(raw)) > MAX_CONFIG_BYTES // 2:
            raise RequestError(
                400,
                f"hyperparameters are longer than {MAX_CONFIG_BYTES // 2:,} bytes as JSON",
                "hyperparameters",
            )
        made_of = find_or_create_dataset(jobs, asked, run, base, chosen)
        request = {
            "model": asked.model,
            "training_file": asked.training_file,
            "dataset": made_of.id,
            "base": base,
            "raw": raw,
            "chosen": chosen,
            "metadata": asked.metadata,
            "suffix": asked.suffix,
            "vocab_size": chosen.get("model_hyperparams", {}).get("vocab_size"),
        }
        name = new_id("ftjob")
        model = make_model_name(asked.model, asked.suffix, name, run.model_hyperparams.arch)
        job = jobs.new(
            "ftjob",
            request,
            name,
            status="validating_files",
            model=model,
            key=asked.key,
            body=asked.body,
            max_iters=run.max_iters,
            seed=raw["seed"],
        )
        job.log_event("created")
        for message in run.warnings():
            job.log_event(message, "warn")
        return job


def check_training_file(jobs: JobStore, name: str) -> None:
    """Raises RequestError (404) if there is no dataset or file with this id."""
    if name.startswith("ds-"):
        jobs.get("ds", name, "training_file")
    else:
        jobs.uploads.get(name, "training_file")


def find_starting_point(jobs: JobStore, name: str) -> tuple[str | None, dict]:
    """(name of the model file or None, configuration) of the preset or model called `name`. Raises RequestError (404).
    """
    known, stem = find_presets(), name.removesuffix(".json")
    if stem in known:
        raw = json.loads(json.dumps(read_json(known[stem])))
        for name in ("$schema", "seed"):  # a preset's seed belongs to its published run
            raw.pop(name, None)
        return None, drop_server_keys(raw)
    try:
        path = jobs.find_model_file(name)
    except RequestError as error:
        told = f"there is no preset and no model {show(name)}{nearest(name, [*known, *jobs.list_models()])}"
        told = f"{told}; presets are {', '.join(known)}"
        raise RequestError(404, told, "model", "model_not_found") from error
    hyperparams, record = model_files.read_about(path)
    raw = record["run"] if isinstance(record.get("run"), dict) else {}
    update_old_keys(raw)  # a model file may have keys of an earlier version, which is not the client's error
    raw = drop_server_keys({name: value for name, value in raw.items() if name != "seed"})
    if raw.get("lr_decay_iters") == raw.get("max_iters"):
        raw.pop("lr_decay_iters", None)  # it was not set: see Run.__post_init__
    return name, raw | {"model_hyperparams": hyperparams}


def find_or_create_dataset(
    jobs: JobStore, asked: TrainingRequest, run: Run, base: str | None, chosen: dict
) -> Job:
    """The dataset that `training_file` names, or one of that single file, encoded with the base model's encoder. Raises
    RequestError.
    """
    division = chosen.get("dataset", {}).get("data_division")
    if not asked.training_file.startswith("ds-"):
        vocab_size = chosen.get("model_hyperparams", {}).get("vocab_size") if base is None else None
        share = round(1 - run.dataset.data_division, 9)
        return create_dataset_job(
            jobs,
            assemble.Recipe(files=[asked.training_file], encoder=base, vocab_size=vocab_size, validation_share=share),
        )
    made_of = jobs.get("ds", asked.training_file, "training_file")
    if division is not None:
        key, told = "hyperparameters.dataset.data_division", "the dataset's validation_share says what validates"
        raise RequestError(400, f"{key}: {told}; leave it out", key)
    if made_of.status in ("failed", "cancelled"):
        told = f"training_file = {made_of.id}: that dataset has {made_of.status}; assemble it anew"
        raise RequestError(400, told, "training_file")
    if base and made_of.status == "succeeded":
        own = model_files.read_encoder(jobs.find_model_file(base)).fingerprint
        if encoders.load(made_of.folder / assemble.ENCODER).fingerprint != own:
            raise RequestError(
                400,
                f"training_file = {made_of.id}: was not encoded as the model {base} needs it; "
                f'assemble it with "encoder": {show(base)}',
                "training_file",
            )
    return made_of


def drop_server_keys(raw: dict, prefix: str = "") -> dict:
    """A configuration without the keys that the server sets."""
    return {
        name: drop_server_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else value
        for name, value in raw.items()
        if f"{prefix}{name}" not in SERVER_KEYS
    }


def find_presets() -> dict[str, Path]:
    """The configurations in config/, by name."""
    return {path.stem: path for path in sorted(CONFIG_FOLDER.glob("*.json")) if path.name != "schema.json"}


def make_model_name(base: str, suffix: str | None, job: str, arch: str) -> str:
    """The file name of a run's model: ft-tiny-mine-0a1b2c3d.strawberry"""
    for ending in (*CONFIGS, "json", "safetensors"):
        base = base.removesuffix(f".{ending}")
    base = re.sub(r"[^A-Za-z0-9._-]", "-", re.sub(r"^ft-(.*)-[0-9a-f]{8}$", r"\1", base))[:40]
    return "-".join(part for part in ("ft", base, suffix, job[-8:]) if part) + f".{arch}"
