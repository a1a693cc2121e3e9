"""`pytest` runs on the CPU, where results are exact, also where there is a GPU; `pytest --cuda` runs what needs one."""

import gc
import os
import signal

import pytest


def pytest_addoption(parser):
    parser.addoption("--cuda", action="store_true", help="run the tests that need a GPU, and only those")


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU; runs with --cuda")
    config.addinivalue_line("markers", "slow: takes seconds; left out by make test-fast")
    config.addinivalue_line("markers", "whole_gpu: fills or times the GPU, which no other test may use meanwhile")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it
    if not config.getoption("--cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # child processes inherit it


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports create millions of objects that stay: no collection of garbage looks through them, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--cuda")
    for item in items:
        if bool(item.get_closest_marker("cuda")) != wanted:
            item.add_marker(pytest.mark.skip(reason="needs a GPU" if not wanted else "runs on the CPU"))


@pytest.fixture(autouse=True)
def float32_products_in_full(request):
    """A training run on a GPU sets TF32 for its process, in which the next test may compare float32 with a CPU."""
    if request.config.getoption("--cuda"):
        import torch

        torch.set_float32_matmul_precision("highest")


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A working directory with a corpus and run.json, the config of a run of milliseconds; its curves are not drawn."""
    import runs

    from strawberry.training import plot

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "curves", lambda *arguments: None)
    (tmp_path / "text.txt").write_text(runs.ALPHABET)
    runs.write_corpus("data.bin")
    runs.write_config()
    return tmp_path
