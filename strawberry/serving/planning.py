"""What a run will be before it starts: the presets and the schema of their keys, and what a run will cost."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import torch
from fastapi.concurrency import run_in_threadpool

from model import CONFIGS, MODELS
from optimizer import HIDDEN
from strawberry.config import check, option, to_dict
from strawberry.run_config import CONFIG_FOLDER, make_run
from strawberry.serving.id_directory import RequestError
from strawberry.serving.job_requests import (
    SERVER_KEYS,
    check_keys,
    client_errors,
    find_presets,
    find_starting_point,
    merge_configs,
    nest_keys,
)
from strawberry.serving.runs import RunIndex, without_paths
from strawberry.serving.service import TheService
from strawberry.serving.training import Shallow
from strawberry.training.memory import STATE_BYTES, TRANSIENT_COPIES, saved_for_backward

MAX_BLOCKS = 1024  # passes through a block, of a model whose cost is estimated
MAX_CLASS_RATIO = 8  # between the FLOPs per token of a run and of one that it is compared with


@dataclass
class StartingPoint:
    """Every key of a preset or a model, dotted, but for paths."""

    id: str
    values: dict[str, Any]
    object: str = "starting_point"


@dataclass
class Presets:
    data: list[StartingPoint]
    config_schema: dict[str, Any]  # config/schema.json
    server_keys: list[str]  # that the server sets
    object: str = "list"


@dataclass
class EstimateRequest:
    model: str = option("tiny", "a preset of config/, or a model, which is trained further")
    hyperparameters: Annotated[dict | None, Shallow] = option(
        None, "keys that differ from it, nested or dotted", must="an object, { … }"
    )
    vocab_size: int | None = option(None, "of the dataset's encoder, where the keys name none", low=1, high=2**24)
    required: ClassVar = ("model",)

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from ()


@dataclass
class KnownSpeed:
    """A run whose speed tells that of another."""

    run: str
    name: str
    device: str | None
    is_alike: bool  # whether it has the same model and the same batch


@dataclass
class Estimate:
    """Bytes are of float32 weights, gradients, the optimizer's state and, for each row, activations. `seconds` and
    `seconds_per_step` are null where no run here is like it.
    """

    parameters: int
    parameters_without_embeddings: int
    flops_per_token: float
    tokens_per_step: int
    tokens: int
    flops: float
    memory: int
    memory_parts: dict[str, int]
    seconds_per_step: float | None
    seconds: float | None
    known_from: KnownSpeed | None
    warnings: list[str]
    values: dict[str, Any]
    object: str = "estimate"


async def list_presets(service: TheService) -> Presets:
    """The presets of config/ with all their values, and the JSON schema of every key."""

    def read() -> dict:
        found = [read_starting_point(service.runs, name) for name in find_presets()]
        schema = json.loads((CONFIG_FOLDER / "schema.json").read_text("utf-8"))
        return {"object": "list", "data": found, "config_schema": schema, "server_keys": sorted(SERVER_KEYS)}

    return await run_in_threadpool(read)


async def retrieve_starting_point(name: str, service: TheService) -> StartingPoint:
    """All values with which a preset, or a model that is trained further, starts."""

    with client_errors(service.job_service.jobs):
        return await run_in_threadpool(read_starting_point, service.runs, name)


def read_starting_point(index: RunIndex, name: str) -> StartingPoint:
    values = without_paths(index.resolve_starting_point(name))
    if values["lr_decay_iters"] == values["max_iters"]:
        values["lr_decay_iters"] = None  # it follows max_iters
    return StartingPoint(name, values)


async def estimate_run(body: EstimateRequest, service: TheService) -> Estimate:
    """What a run would cost, without starting it. The same checks as of a run, and the same errors."""
    async with service.large_bodies:  # one at a time: building a model takes a moment
        return await run_in_threadpool(estimate, body, service)


def estimate(body: EstimateRequest, service: TheService) -> dict:
    jobs = service.job_service.jobs
    with client_errors(jobs):
        base, raw = find_starting_point(jobs, body.model)
        chosen = nest_keys(body.hyperparameters or {})
        check_keys(chosen)
        raw = merge_configs(raw, chosen)
        if base is None and body.vocab_size and "vocab_size" not in chosen.get("model_hyperparams", {}):
            raw.setdefault("model_hyperparams", {})["vocab_size"] = body.vocab_size
        run = make_run(raw, CONFIGS)
        hyper = run.model_hyperparams
        if hyper.n_layer * max(getattr(hyper, "r_layer", 1), 1) > MAX_BLOCKS:
            told = f"a model of more than {MAX_BLOCKS} passes through blocks is not estimated; train.py --check does it"
            raise RequestError(400, f"n_layer = {hyper.n_layer}: {told}", "hyperparameters.model_hyperparams.n_layer")
        size = measure_model(json.dumps(to_dict(hyper), sort_keys=True), run.optimizer_hyperparams.use_muon)
    rows = run.batch_size if isinstance(run.batch_size, int) else 1
    tokens_per_step = rows * run.gradient_accumulation_steps * hyper.block_size
    parts = {"weights": 4 * size.total, "gradients": 4 * size.total, "optimizer": size.optimizer,
             "activations": rows * size.row}  # fmt: skip
    known, seconds = find_known_speed(service.runs, size, tokens_per_step)
    return {
        "object": "estimate", "parameters": size.total, "parameters_without_embeddings": size.inner,
        "flops_per_token": size.flops, "tokens_per_step": tokens_per_step,
        "tokens": tokens_per_step * run.max_iters, "flops": size.flops * tokens_per_step * run.max_iters,
        "memory": sum(parts.values()), "memory_parts": parts, "known_from": known, "seconds_per_step": seconds,
        "seconds": seconds and seconds * run.max_iters, "warnings": list(run.warnings()),
        "values": without_paths(to_dict(run)),
    }  # fmt: skip


@dataclass(frozen=True)
class ModelSize:
    """Numbers of a model: parameters in total and without embeddings, FLOPs per token of a training step, bytes of the
    optimizer's state, bytes that one row keeps for the backward pass.
    """

    total: int
    inner: int
    flops: float
    optimizer: int
    row: int


@lru_cache(64)
def measure_model(hyperparams: str, use_muon: bool) -> ModelSize:
    """Build the model on the meta device, which takes no memory, and count."""
    raw = json.loads(hyperparams)
    hyper, _ = check(CONFIGS[raw["arch"]], raw)
    with torch.device("meta"):
        model = MODELS[hyper.arch](hyper)
    T = hyper.block_size
    idx = torch.empty(1, T, dtype=torch.int64, device="meta")
    kept = saved_for_backward(model, lambda: model(idx, idx, source=idx if model.takes_source else None))
    row = sum(kept) + TRANSIENT_COPIES * max(kept, default=0)
    roles = model.roles()
    named = dict(model.named_parameters())
    in_muon = sum(p.numel() for name, p in named.items() if use_muon and p.ndim == 2 and roles[name] in HIDDEN)
    total = model.num_params(non_embedding=False)
    optimizer = STATE_BYTES["muon"] * in_muon + STATE_BYTES["adamw"] * (total - in_muon)
    return ModelSize(total, model.num_params(), model.flops_per_token(T), optimizer, row)


def find_known_speed(index: RunIndex, size: ModelSize, tokens_per_step: int) -> tuple[dict | None, float | None]:
    """(the run most like it, seconds of a step by the FLOPs of that run in a second); nothing where none is alike."""
    best, nearest = None, math.inf
    for run in index.all():
        flops, speed, per_step = (run.about.get("flops_per_token"), run.latest.get("tokens_per_s"),
                                  run.about.get("tokens_per_step"))  # fmt: skip
        if not flops or not speed or not per_step:
            continue
        distance = abs(math.log(flops / size.flops)) + 0.1 * abs(math.log(per_step / tokens_per_step))
        if distance < nearest and max(flops / size.flops, size.flops / flops) < MAX_CLASS_RATIO:
            best, nearest = run, distance
    if best is None:
        return None, None
    rate = best.latest["tokens_per_s"] * best.about["flops_per_token"]
    alike = nearest < 1e-6
    known = {"run": best.id, "name": best.name, "device": best.about.get("device"), "is_alike": alike}
    return known, size.flops * tokens_per_step / rate
