"""Without the packages of serving and of its clients nothing here is collected; in CI the imports then fail."""

from importlib.util import find_spec

import forks
import pytest
from machine import is_ci

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "openai")
collect_ignore_glob = [] if is_ci() or all(map(find_spec, PACKAGES)) else ["test_*.py"]


@pytest.fixture(scope="module")
def forked_training(request):
    """Jobs of servers in this process run train.py in a fork that need not import torch, and are polled more often.
    The tests that wait for jobs are slow: without them there is no process to fork."""
    from strawberry.serving import jobs
    from strawberry.serving.job_commands import JOB_KINDS

    waits = any(item.get_closest_marker("slow") for item in request.session.items if item.path == request.path)
    kind, fork = JOB_KINDS["ftjob"], forks.start(with_model=True)[1:] if waits else []

    def training_command(store, job):
        command = kind.command(store, job)
        return command and command._replace(argv=[*fork, *command.argv])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(JOB_KINDS, "ftjob", kind._replace(command=training_command))
        patch.setattr(jobs, "POLL_SECONDS", 0.05)
        yield
