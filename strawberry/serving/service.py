"""The state of a running server, and its injection into routes."""

import asyncio
from typing import Annotated

from fastapi import Depends, Request

from strawberry.serving.jobs import JobService
from strawberry.serving.metrics import Metrics
from strawberry.serving.models import ModelPool
from strawberry.serving.runs import RunIndex
from strawberry.serving.settings import Settings


class Service:
    """The state of a running server: settings, metrics, models and jobs."""

    def __init__(self, settings: Settings):
        self.settings, self.metrics = settings, Metrics()
        self.large_bodies = asyncio.Semaphore(1)  # large bodies are read one at a time
        self.closing = asyncio.Event()  # set when the server is asked to stop: long responses must end
        self.job_service = JobService(settings)
        self.runs = RunIndex(settings.runs or [settings.models], settings.data, lambda: self.job_service.jobs)
        self.job_service.runs = self.runs
        self.models = ModelPool(settings, self.metrics, self.closing, self.job_service)
        self.job_service.register_gauges(self.metrics.gauge)

    async def start(self) -> None:
        await self.models.start()
        await self.job_service.start()

    async def stop(self) -> None:
        self.closing.set()
        await self.job_service.stop()
        await self.models.stop()


def get_service(request: Request) -> Service:
    return request.app.state.service


TheService = Annotated[Service, Depends(get_service)]  # the type of a handler's parameter that receives the service
