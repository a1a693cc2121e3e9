"""The metrics of /metrics, in Prometheus' text format."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import Scope

BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The collectors of /metrics, in Prometheus' text format."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"namespace": "strawberry", "registry": self.registry}
        self.requests = Counter("requests", "requests answered", ["method", "route", "status"], **own)
        timed = own | {"buckets": BUCKETS}
        self.seconds = Histogram("request_seconds", "time until an answer is complete", ["route"], **timed)
        self.first = Histogram("first_token_seconds", "time until a text's first token", **timed)
        self.step = Histogram("step_seconds", "time for a token of each row", **timed)
        self.tokens = Counter("tokens", "tokens read and made", ["kind"], **own)
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind)

    def gauge(self, name: str, doc: str, value: Callable[[], float]) -> None:
        """Register a gauge whose value is computed at each scrape."""
        Gauge(name, doc, namespace="strawberry", registry=self.registry).set_function(value)

    @contextmanager
    def request(self, scope: Scope) -> Iterator[list[int]]:
        """Count a request and its duration. The caller appends the response's status to the list."""
        start, statuses = time.perf_counter(), []
        try:
            yield statuses
        except Exception:
            statuses.append(500)  # the response's status unless it has already started
            raise
        finally:
            route = getattr(scope.get("route"), "path", "none")  # the pattern, which limits the number of labels
            method, status = scope["method"] if route != "none" else "any", statuses[0] if statuses else 499
            self.requests.labels(method, route, status).inc()
            self.seconds.labels(route).observe(time.perf_counter() - start)
