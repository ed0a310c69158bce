"""Every test here starts disabled, with empty counters, and shares one compile cache per run."""

import pytest
import torch
from torch._dynamo.utils import counters

from torch_sage import _extension
from torch_sage.inductor import disable


@pytest.fixture(scope="session", autouse=True)
def shared_compile_cache(folder_of_run):
    """Kernels compiled by one test serve the next; nothing of an earlier run does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder_of_run / "compiled-by-inductor"))
        yield


@pytest.fixture(autouse=True)
def clean_slate():
    """Leave nothing behind: hooks, compiled code and counters."""
    disable()
    torch._dynamo.reset()
    counters.clear()
    yield
    disable()
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def no_grad():
    """Compile for inference."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="session", autouse=True)
def extension():
    """Rewriting needs the kernels; without them these tests would show nothing."""
    assert _extension.is_available(), _extension.unavailable_reason()
