"""uvicorn's configuration for this server: signals, the access log, the check that the address is free."""

import copy
import logging
import math
import os
import re
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from strawberry.common import UserError
from strawberry.serving.security import HttpProtocol
from strawberry.serving.service import Service
from strawberry.serving.settings import Settings


class Server(uvicorn.Server):
    """Sets service.closing when a signal stops the server."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self.service.closing.set()


POLLED = re.compile(r"/(health|metrics|page/.*|v1/(models|files|disk|presets|(datasets|fine_tuning/jobs|runs)(/.*)?))")


def is_worth_logging(record: logging.LogRecord) -> bool:
    """Whether to write a line of the access log: not for successful requests that pages, clients and monitors repeat.
    uvicorn's arguments: address, method, path and query, HTTP version, status.
    """
    _, method, path, _, status = record.args
    return method != "GET" or status >= 400 or not POLLED.fullmatch(path.partition("?")[0])


def make_log_config() -> dict:
    """uvicorn's log configuration, with a filter for the access log."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["filters"] = {"worth logging": {"()": lambda: is_worth_logging}}
    config["handlers"]["access"]["filters"] = ["worth logging"]
    return config


def make_server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(app, settings.host, settings.port, http=HttpProtocol, ws="none", log_level="info",
                          log_config=make_log_config(), server_header=False,
                          timeout_graceful_shutdown=math.ceil(settings.grace))  # fmt: skip


def check_free(host: str, port: int) -> None:
    """Raises UserError if the server cannot listen at the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            if os.name != "nt":  # as the server does; on Windows this would allow an address that is in use
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); name another "
            "port, or 0 for a free one"
        ) from error
