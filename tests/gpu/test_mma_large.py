"""The mma.sync kernels beyond 32-bit offsets, and on long sequences."""

from __future__ import annotations

import pytest
import torch

from tests.cases import Inputs
from tests.gpu.mma import Member, expected
from tests.gpu.shared import (
    BEYOND,
    OPS,
    assert_mask_strides_beyond_32_bits,
    assert_outputs_beyond_32_bits,
    assert_packed_strides_beyond_32_bits,
    assert_strides_beyond_32_bits,
    normal,
)
from tests.numerics import assert_within_budget, same_bits

pytestmark = pytest.mark.usefixtures("one_at_a_time")

# Every way to read operands: codes or values in place, keys beside their codes for the mean of Q.
RECIPES = {
    "in place": Member("int8", "bf16").recipe(smooth="k"),
    "copied": Member("int8", "fp16_fp16").recipe("tensor", "kv"),
    "codes": Member("int8", "e4m3_fp16").recipe(smooth="kv"),
    "query mean": Member("int4", "e4m3").recipe(smooth="qkv"),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@every_recipe
def test_strides_beyond_32_bits(recipe: dict[str, str]) -> None:
    assert_strides_beyond_32_bits(recipe)


@every_recipe
def test_packed_strides_beyond_32_bits(recipe: dict[str, str]) -> None:
    assert_packed_strides_beyond_32_bits(recipe)


@every_recipe
def test_outputs_beyond_32_bits(recipe: dict[str, str]) -> None:
    assert_outputs_beyond_32_bits(recipe)


def test_mask_strides_beyond_32_bits() -> None:
    assert_mask_strides_beyond_32_bits(RECIPES["in place"])


@every_recipe
def test_workspaces_beyond_32_bits(recipe: dict[str, str]) -> None:
    heads, m, d = 257, 2**17, 128
    q, k, v = normal(1, 1, 16, d), normal(1, 1, m, d), normal(1, 1, m, d)
    assert heads * m * d > BEYOND
    alone = OPS.sdpa(q, k, v, **recipe)
    whole = OPS.sdpa(*(x.expand(1, heads, -1, -1) for x in (q, k, v)), **recipe)
    for head in (0, 127, 128, 255, 256):
        assert same_bits(whole[:, head], alone[:, 0])


@pytest.mark.parametrize("causal", ["none", "top_left"])
@every_recipe
def test_128k_tokens_are_within_budget(recipe: dict[str, str], causal: str) -> None:
    """128 rows in the middle and the last 128, each against all keys."""
    tokens, d = 2**17, 64
    recipe = {**recipe, "granularity": "thread"}  # no scale of other rows
    q, k, v = normal(1, 1, tokens, d), normal(1, 1, tokens, d), normal(1, 1, tokens, d)
    output, lse = OPS.sdpa_with_lse(q, k, v, None, causal, **recipe)
    keys = torch.arange(tokens, device="cuda")
    for first in (128 * 500, tokens - 128):
        rows = torch.arange(first, first + 128, device="cuda")
        mask = keys <= rows[:, None] if causal == "top_left" else None
        place = (slice(None), slice(None), slice(first, first + 128))
        block = Inputs(q[place], k, v, mask, "none", None)
        assert_within_budget(output[place].contiguous(), expected(block, recipe), lse=lse[place])
