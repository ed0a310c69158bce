"""What torch's own ``fuse_attention`` recognizes is recognized: its patterns as inputs."""

import pytest
import torch
from torch._inductor.fx_passes.fuse_attention import _get_sfdp_patterns

from tests.inductor.graphs import SDPA
from tests.inductor.joint import REL_L1, Exactly, run_pass, traced
from tests.numerics import relative_l1

# Half-precision patterns round scores of up to 8 to 11 bits before exp, in another order than we.
HALF_ERROR = 2.0**-6


def patterns():
    """Return (function, its example inputs, its numbers) by name."""
    found = {}
    for name, pattern in _get_sfdp_patterns(torch.device("cpu")):
        if "inference" in name:
            keys = ("search_fn", "example_inputs", "scalar_workaround")
            found[name] = tuple(pattern[key] for key in keys)
    return found


PATTERNS = patterns()


def random_like(example):
    """Return random data of a pattern's example, at most 4 of its batch."""
    example = example.detach()[:4] if example.dim() else example.detach()
    if example.dtype == torch.bool:
        keep = torch.rand(example.shape) > 0.3
        keep[..., 0] = True
        return keep
    if example.dim() == 0:
        return torch.full_like(example, 2.0)
    return torch.empty_like(example).normal_()


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern(name):
    torch.manual_seed(0)
    function, examples, numbers = PATTERNS[name]
    args = [random_like(example) for example in examples]
    args[0] /= args[0].shape[-1] ** 0.5  # some have no scale; REL_L1 holds for N(0, 1) scores

    def call(*tensors):
        result = function(*tensors, **numbers)
        return result[0] if isinstance(result, (tuple, list)) else result

    with torch.no_grad():
        gm = traced(call, *args)
        assert len(run_pass(gm)) == 1
        expected = call(*args)
        tolerance = 1e-5 if expected.dtype == torch.float32 else HALF_ERROR
        assert relative_l1(Exactly(gm).run(*args), expected) <= tolerance
        assert relative_l1(gm(*args), expected) <= REL_L1 + tolerance


def test_there_are_patterns():
    """An empty list would pass."""
    assert len(PATTERNS) >= 20
    assert SDPA is torch.ops.torch_sage.sdpa.default
