"""Hopper's kernels beyond 32-bit offsets, on fused projections, and on very long sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import Inputs
from tests.gpu.shared import (
    BEYOND,
    OPS,
    assert_mask_strides_beyond_32_bits,
    assert_outputs_beyond_32_bits,
    assert_packed_strides_beyond_32_bits,
    assert_strides_beyond_32_bits,
    normal,
)
from tests.gpu.sm90 import ORACLE, RECIPE
from tests.numerics import assert_within_budget, exact_attention, expect, relative_l1, same_bits

ARGUMENTS: dict[str, Any] = {**RECIPE, "smooth": "kv", "exponential": "mixed"}
pytestmark = pytest.mark.usefixtures("one_at_a_time")


def test_strides_beyond_32_bits() -> None:
    assert_strides_beyond_32_bits(ARGUMENTS)


def test_packed_strides_beyond_32_bits() -> None:
    assert_packed_strides_beyond_32_bits(ARGUMENTS)


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
def test_views_of_a_fused_projection_beyond_32_bits(causal: str) -> None:
    """256k tokens of 86 heads; two of them are computed."""
    tokens, heads, d = 2**18, 86, 64
    storage = torch.empty(1, tokens, 3, heads, d, dtype=torch.bfloat16, device="cuda")
    assert storage.numel() > BEYOND
    views = [storage[:, :, i, -2:].transpose(1, 2) for i in range(3)]
    for view in views:
        view.copy_(normal(*view.shape))
    # Every 64th query row keeps the time short; those of K and V are all read.
    query = views[0][:, :, 63::64]
    dense = [x.contiguous() for x in (query, *views[1:])]
    found = OPS.sdpa(query, *views[1:], None, causal, **ARGUMENTS)
    assert same_bits(found, OPS.sdpa(*dense, None, causal, **ARGUMENTS))


def test_outputs_beyond_32_bits() -> None:
    assert_outputs_beyond_32_bits(ARGUMENTS)


def test_prepared_images_beyond_32_bits() -> None:
    heads, m, d = 257, 2**17, 128
    q, k, v = normal(1, 1, 16, d), normal(1, 1, m, d), normal(1, 1, m, d)
    alone = OPS.sdpa(q, k, v, **ARGUMENTS)
    prepared_alone = OPS.prepare_kv(k, v)
    split_alone = OPS.attention_prepared(q, *prepared_alone, m, d)
    everyone = [x.expand(1, heads, -1, -1) for x in (q, k, v)]
    whole = OPS.sdpa(*everyone, **ARGUMENTS)
    prepared = OPS.prepare_kv(*everyone[1:])
    assert prepared[0].numel() > BEYOND
    split = OPS.attention_prepared(everyone[0], *prepared, m, d)
    for head in (0, 127, 128, 255, 256):
        assert same_bits(whole[:, head], alone[:, 0])
        assert same_bits(split[:, head], split_alone[:, 0])
        for images, image in zip(prepared, prepared_alone, strict=True):
            assert same_bits(images[:, head], image[:, 0])


def test_mask_strides_beyond_32_bits() -> None:
    assert_mask_strides_beyond_32_bits(ARGUMENTS)


@pytest.mark.parametrize("causal", ["none", "top_left"])
def test_256k_tokens_are_within_budget(causal: str) -> None:
    """64 rows in the middle and the last 64, each against all keys."""
    tokens, d = 2**18, 64
    q, k, v = normal(1, 1, tokens, d), normal(1, 1, tokens, d), normal(1, 1, tokens, d)
    output, lse = OPS.sdpa_with_lse(q, k, v, None, causal, **ARGUMENTS)
    mean = OPS.prepare_kv(k, v)[2]
    oracle = {**ORACLE, "smooth": "kv", "key_mean": mean}
    keys = torch.arange(tokens, device="cuda")
    for first in (100032, tokens - 64):
        rows = torch.arange(first, first + 64, device="cuda")
        mask = keys <= rows[:, None] if causal == "top_left" else None
        block = Inputs(q[:, :, first : first + 64], k, v, mask, "none", None)
        expected = expect(*block, **oracle)
        place = (slice(None), slice(None), slice(first, first + 64))
        assert_within_budget(output[place].contiguous(), expected, lse=lse[place])


def test_a_million_tokens() -> None:
    """The accuracy that 4,096 tokens have; 64 rows at a time are compared with exact attention."""
    tokens, d = 2**20, 64
    q, k, v = normal(1, 1, tokens, d), normal(1, 1, tokens, d), normal(1, 1, tokens, d)
    output = OPS.sdpa(q, k, v, **ARGUMENTS)
    causal = OPS.sdpa(q, k, v, None, "bottom_right", **ARGUMENTS)
    last = slice(tokens - 64, None)
    for first in range(0, tokens, tokens // 8):
        rows = slice(first, first + 64)
        exact = exact_attention(q[:, :, rows], k, v).output
        assert relative_l1(output[:, :, rows], exact) <= 0.045
    exact = exact_attention(q[:, :, last], k, v, None, "bottom_right").output
    assert relative_l1(causal[:, :, last], exact) <= 0.045
