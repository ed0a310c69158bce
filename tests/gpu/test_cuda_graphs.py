"""Compiled functions that replay CUDA graphs: memory over many calls, and inputs read anew."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_sage
from tests.gpu.shared import OPS, qkv
from tests.numerics import same_bits
from torch_sage import SageConfig
from torch_sage.devices import rows_of
from torch_sage.recipes import SUPPORT, Recipe

CALLS = 1000
LENGTHS = (256, 300)


def config_of(recipe: Recipe) -> SageConfig:
    """Return the configuration that asks for ``recipe`` alone."""
    return SageConfig(
        qk=recipe.qk,
        granularity=recipe.granularity,
        pv=recipe.pv,
        smooth_q="q" in recipe.smooth,
        smooth_k="k" in recipe.smooth,
        smooth_v="v" in recipe.smooth,
        exponential=recipe.exponential,
        dispatch="always",
        on_unsupported="error",
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("row", rows_of(torch.device("cuda", 0)))
def test_replays_hold_their_memory_and_read_new_inputs(row: str, dynamic: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    recipe = SUPPORT[row].default
    torch._dynamo.reset()
    options = torch_sage.options(config_of(recipe), mode="reduce-overhead")
    fast = torch.compile(attend, dynamic=dynamic, options=options)
    inputs = [qkv(1, 4, n, 64) for n in LENGTHS]
    with torch.no_grad():
        for x in inputs:
            for _ in range(3):  # to compile, to warm up, to record
                fast(*x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for i in range(CALLS):
            fast(*inputs[i % len(inputs)])
        torch.cuda.synchronize()
        assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
        for _ in range(3):
            for x in inputs:
                for tensor in x:
                    tensor.copy_(torch.randn_like(tensor))
                found = fast(*x).clone()
                assert same_bits(found, OPS.sdpa(*x, None, "top_left", **recipe.op_kwargs()) * 2)
    report = torch_sage.report()
    assert report.rewritten > 0 and recipe.name in str(report)
