"""Fixtures for every test: one seed, and a compiler backend that keeps what it was given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from torch_sage import _extension, devices
from torch_sage.ops import gpu

# What a build for all GPUs says: the capabilities that run each family of kernels.
BUILT = {
    "sm80": ("8.0", "8.6", "8.7", "8.9", "9.0", "12.0", "12.1"),
    "sm89": ("8.9", "9.0", "12.0", "12.1"),
    "sm90": ("9.0",),
}


def pytest_configure() -> None:
    """Share the cores among the workers of pytest-xdist: threads that wait for one spin.

    On two busy cores the oracle's many small tensors take ten times as long by two threads as by
    one. Nor does every process that compiles need processes of its own for it.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(scope="session")
def folder_of_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that is new in this run, and the same one for all of its workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Judge as on a GPU of compute capability 9.0 whose kernels the library has."""
    monkeypatch.setattr(_extension, "cuda_gpus", lambda: BUILT)
    monkeypatch.setattr(devices, "capability", lambda index: (9, 0))
    gpu._lack.cache_clear()
    yield
    gpu._lack.cache_clear()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers, whichever ran before."""
    torch.manual_seed(0)


class Recorder:
    """A backend for ``torch.compile`` that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.Graph] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[object]) -> object:
        self.graphs.append(module.graph)
        return module.forward

    def nodes(self, target: object) -> list[torch.fx.Node]:
        """Return the nodes of every graph that call ``target``."""
        return [node for graph in self.graphs for node in graph.nodes if node.target is target]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """A fresh recorder, without compiled code of other tests."""
    torch._dynamo.reset()
    yield Recorder()
    torch._dynamo.reset()
