"""The model files in the folder --models, and the pool of loaded models (least recently used are evicted)."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import torch
from fastapi.concurrency import run_in_threadpool

from strawberry import machine
from strawberry.common import nearest, show
from strawberry.device import choose_device
from strawberry.inference.loading import MODEL_SUFFIXES
from strawberry.serving.engine import Engine, log
from strawberry.serving.errors import ApiError
from strawberry.serving.jobs import JobService
from strawberry.serving.metrics import Metrics
from strawberry.serving.model_files import DamagedFile, ModelFile, file_stamp, read_model_file
from strawberry.serving.settings import Settings


class ModelPool:
    """The model files of the folder, and the engines of the loaded ones."""

    def __init__(self, settings: Settings, metrics: Metrics, closing: asyncio.Event, job_service: JobService):
        self.settings, self.metrics, self.closing, self.job_service = settings, metrics, closing, job_service
        self.files: dict[str, ModelFile | DamagedFile] = {}  # by name
        self.scanning = threading.Lock()
        self.loaded: dict[str, Engine] = {}  # in order of last use
        self.limit = (
            self.settings.memory * 2**30 or device_memory(choose_device(self.settings.device, "--device {}").type) / 2
        )  # bytes
        gauge = metrics.gauge
        gauge("models_loaded", "models in memory", lambda: len(self.loaded))
        gauge("models_bytes", "memory that they take", lambda: self.bytes)
        gauge("queue", "completions that wait for a row", lambda: sum(e.queued for e in self.loaded.values()))
        gauge("rows_busy", "texts that are being made", lambda: sum(len(e.running) for e in self.loaded.values()))

    async def start(self) -> None:
        self.stop_task = asyncio.create_task(self.stop_before_deadline())
        found = await self.list_files()
        log.info("%s: %s", self.settings.models, ", ".join(found) or "no models yet")

    async def stop_before_deadline(self) -> None:
        """Stop all engines shortly before the server must stop, so that unfinished requests get an error response."""
        await self.closing.wait()
        await asyncio.sleep(max(0.0, self.settings.grace - 0.5))
        for engine in self.loaded.values():
            engine.stop()

    async def stop(self) -> None:
        self.stop_task.cancel()
        for engine in self.loaded.values():
            engine.stop()
        for engine in self.loaded.values():
            await asyncio.to_thread(engine.thread.join, 5)

    async def list_files(self) -> dict[str, ModelFile]:
        """The current model files, by name."""
        return await asyncio.to_thread(self.scan)

    def scan(self) -> dict[str, ModelFile]:
        with self.scanning:
            found = {}
            with suppress(FileNotFoundError), os.scandir(self.settings.models) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    with suppress(OSError):
                        if Path(entry.name).suffix in MODEL_SUFFIXES and entry.is_file():
                            found[entry.name] = self.read_entry(entry)
            self.files = found
            return {name: file for name, file in found.items() if isinstance(file, ModelFile)}

    def read_entry(self, entry: os.DirEntry) -> ModelFile | DamagedFile:
        stamp, known = file_stamp(entry.stat()), self.files.get(entry.name)
        if known is not None and stamp == known.stamp:
            return known
        found = read_model_file(entry.name, Path(entry.path), stamp)
        if isinstance(found, DamagedFile):
            log.warning("%s cannot be served: %s", entry.path, found.reason)
        return found

    async def find(self, name: str) -> ModelFile:
        """The model of that name: a file in the folder or a run's checkpoint. The suffix may be omitted if it is
        unambiguous. Raises ApiError if there is no such model or its file is damaged.
        """
        await self.list_files()
        found = self.files.get(name) or await asyncio.to_thread(self.find_checkpoint, name)
        if found is None:
            candidates = self.names_with_stem(name)
            if len(candidates) > 1:
                raise ApiError(404, f"model = {show(name)}: may be {' or '.join(map(show, candidates))}; write the "
                               "suffix too", "model", "model_not_found")  # fmt: skip
            found = self.files[candidates[0]] if candidates else None
        if found is None:
            raise self.not_found(name)
        if isinstance(found, DamagedFile):
            raise found.error()
        return found

    def find_checkpoint(self, name: str) -> ModelFile | DamagedFile | None:
        path = self.job_service.find_checkpoint(name)
        with suppress(OSError):  # removed since it was found
            return path and read_model_file(name, path, file_stamp(path.stat()))
        return None

    def names_with_stem(self, name: str) -> list[str]:
        """The files with this name, apart from the suffix."""
        return [file for file in self.files if Path(file).stem == name]

    def not_found(self, name: str) -> ApiError:
        there = [file.name for file in self.files.values() if isinstance(file, ModelFile)]
        return ApiError(404, f"model = {show(name)}: there is no such model{nearest(name, there)}; /v1/models lists "
                        "them", "model", "model_not_found")  # fmt: skip

    async def delete(self, name: str) -> None:
        """Delete a model's file and evict it from memory. Raises ApiError or RequestError if it is not in the folder,
        is generating, or an unfinished job writes or reads it.
        """
        await self.list_files()
        found = self.files.get(name)
        if found is None and self.job_service.find_checkpoint(name) is not None:
            raise ApiError(400, f"model = {show(name)}: is a checkpoint of a run, and goes when its run is deleted",
                           "model")  # fmt: skip
        if found is None and (candidates := self.names_with_stem(name)):
            raise ApiError(404, f"model = {show(name)}: a model is deleted by its whole name, such as "
                           f"{show(candidates[0])}", "model", "model_not_found")  # fmt: skip
        if found is None:
            raise self.not_found(name)
        if isinstance(found, DamagedFile):  # it may be a file of another kind that is not the server's
            raise ApiError(409, f"model = {show(name)}: is damaged, or is no model file, and the server deletes models "
                           f"only: {found.reason}; remove it on disk", "model", "model_damaged")  # fmt: skip
        engine = self.loaded.get(name)
        if engine is not None and engine.busy:
            raise ApiError(409, f"the model {name} is generating; try again when it has ended", "model", "model_in_use")
        await run_in_threadpool(self.job_service.jobs.remove_model, name)
        if (engine := self.loaded.pop(name, None)) is not None:
            engine.retire()

    async def find_latest(self) -> str:
        """The name of the newest model, as sample.py selects it. Raises ApiError if there is none."""
        files = {name: file for name, file in (await self.list_files()).items() if file.generates}
        if not files:
            raise ApiError(404, "there is no model yet; train one", "model", "model_not_found")
        return max(files, key=lambda name: (files[name].stamp[0], name))

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Engine]:
        """A context manager: the loaded engine of a model, which is not evicted meanwhile. Raises ApiError."""
        file = await self.find(name)
        name = file.name
        if not file.generates:
            raise ApiError(400, f"model = {show(name)}: this {file.hyperparams['arch']} is an encoder: it predicts "
                           "masked tokens, not text", "model")  # fmt: skip
        engine = self.loaded.pop(name, None)
        if engine is not None and (engine.stamp != file.stamp or engine.ended):
            engine.retire()
            engine = None
        if engine is None:
            engine = Engine(file, self.settings, self.metrics, self.make_room(file.stamp[1]))
        self.loaded[name] = engine
        engine.users += 1
        try:
            await asyncio.shield(engine.ready)
            self.evict(0)  # the model's size is known now
            yield engine
        finally:
            engine.users -= 1
            if engine.retired:
                engine.wake()

    def evict(self, size: int) -> list[Engine]:
        """Remove idle engines, least recently used first, until `size` more bytes fit. Busy engines stay. Returns the
        removed ones.
        """
        gone = []
        for name, engine in list(self.loaded.items()):
            if self.bytes + size <= self.limit:
                break
            if not engine.busy:
                gone.append(self.loaded.pop(name))
                engine.retire()
        return gone

    def make_room(self, size: int) -> list[Engine]:
        gone = self.evict(size)
        if self.loaded and self.bytes + size > self.limit:
            raise ApiError(503, "the memory for models (--memory) is taken by others that are busy; come again",
                           "model", headers={"Retry-After": "5"})  # fmt: skip
        return gone

    @property
    def bytes(self) -> int:
        return sum(engine.bytes for engine in self.loaded.values())


def device_memory(device: str) -> int:
    """Bytes of the device's total memory."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return machine.memory()[1]
