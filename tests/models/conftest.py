"""Inference with cached kernels: equal layers of different models compile once."""

import pytest
import torch
from torch._dynamo.utils import counters

from torch_sage import _extension


@pytest.fixture(scope="session", autouse=True)
def shared_compile_cache(folder_of_run):
    """Kernels compiled by one test serve the next; nothing of an earlier run does."""
    assert _extension.is_available(), _extension.unavailable_reason()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder_of_run / "compiled-by-models"))
        yield


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    counters.clear()
