"""Environment variables that libraries read when they are loaded. Values that the user has set are kept.

GOMP_SPINCOUNT limits how long OpenMP's idle threads spin while they wait for work: two programs on the same cores would
wait for each other's idle threads.

TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR are where torch.compile and Triton look for what an earlier run compiled.
Their defaults are two directories, one below /tmp, which many systems empty at each start.
TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD lets them keep graphs that contain autograd functions, as ours do.
"""

import os


def set_defaults() -> None:
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "1000"
    os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")
    if directory := find_cache_directory():
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(directory, "torchinductor"))
        os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(directory, "triton"))


def find_cache_directory() -> str | None:
    """XDG_CACHE_HOME/strawberry or ~/.cache/strawberry; None if it could not be written."""
    path = existing = os.path.join(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "strawberry")
    while not os.path.lexists(existing) and existing != os.path.dirname(existing):
        existing = os.path.dirname(existing)
    return path if os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK) else None
