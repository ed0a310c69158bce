"""What the Triton kernels are compared with, interpreted or on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.cases import CASES, EMPTY_CASES, AttentionCase, Inputs
from tests.numerics import Expected, expect
from torch_sage.ops import triton_attention, triton_statistics
from torch_sage.ops.triton_statistics import padded
from torch_sage.recipes import SUPPORT

GRANULARITIES = SUPPORT["cuda"].granularity
# Two of three cases with a scale per token take the kernels' default, which the CPU does not have.
ALL_CASES = [
    replace(c, granularity="token_block") if c.granularity == "token" and i % 3 else c
    for i, c in enumerate((*CASES, *EMPTY_CASES))
    if c.granularity in GRANULARITIES
]


def recipe(case: AttentionCase, pv: str) -> dict[str, str]:
    """Return the recipe arguments of a case with P and V in ``pv``."""
    return {**case.recipe, "pv": pv}


def arguments(case: AttentionCase, inputs: Inputs, pv: str) -> dict[str, Any]:
    """Return the arguments of the op ``sdpa``, all of them and by name."""
    recipe_of_op = {**recipe(case, pv), "exponential": "exact", "output_order": "bhsd"}
    return {**inputs._asdict(), **recipe_of_op}


def expected(case: AttentionCase, inputs: Inputs, pv: str, device: str) -> Expected:
    """Return the references, with the means that the kernels compute on ``device``.

    Only means are free (algorithm.md 2.1).
    """
    means: dict[str, Any] = {}
    if "q" in case.smooth:
        mean = triton_statistics.finite_token_mean(inputs.query.to(device))
        means["query_mean"] = mean.cpu()
    if "k" in case.smooth:
        means["key_mean"] = triton_statistics.token_mean(inputs.key.to(device)).cpu()
    if "v" in case.smooth:
        means["value_mean"] = triton_statistics.token_mean(inputs.value.to(device)).cpu()
    channels = padded(case.head_dim), padded(case.head_dim_v)
    tile = triton_attention.tile_for(*channels, torch.device(device, 0))
    return expect(*inputs, **recipe(case, pv), **means, tile=tile.keys)
