"""What a running server knows, and how a route is given it."""

import asyncio
from typing import Annotated

from fastapi import Depends, Request

from strawberry.serving.jobs import JobService
from strawberry.serving.metrics import Metrics
from strawberry.serving.models import ModelPool
from strawberry.serving.settings import Settings


class Service:
    """What a running server knows: its settings, its metrics, its models and its jobs."""

    def __init__(self, settings: Settings):
        self.settings, self.metrics = settings, Metrics()
        self.large_bodies = asyncio.Semaphore(1)  # large bodies are read one after the other
        self.closing = asyncio.Event()  # set when the server has been told to stop: long answers are to end
        self.job_service = JobService(settings)
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


TheService = Annotated[Service, Depends(get_service)]  # a handler that has such a parameter is given it
