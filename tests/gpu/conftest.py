"""Fixtures of the tests on a GPU."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Not even collected on one GPU: a skip would read as a pass.
collect_ignore = [] if torch.cuda.device_count() > 1 else ["test_distributed.py"]


@pytest.fixture
def one_at_a_time() -> Iterator[None]:
    """Workers of pytest-xdist share the GPU, and some tests take up to a fifth of its memory."""
    with open(Path(tempfile.gettempdir()) / "torch_sage_large_tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()
