"""Tensor-core accumulators as measured on an H100 (hopper.md 2.4) and as algorithm.md 2.7 needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.numerics import relative_l1
from torch_sage import reference
from torch_sage.reference.accumulate import (
    accumulate_fp8_fp16,
    accumulate_fp16,
    accumulate_fp22,
    probability_shift,
    round_probabilities,
    select_accumulator,
)

SAGE2 = {"qk": "int8", "granularity": "thread", "pv": "e4m3", "smooth": "k"}


def step(start: float, products: list[float]) -> float:
    """One k=32 instruction on products p * 1, padded with zeros."""
    p = torch.zeros(1, 32)
    p[0, : len(products)] = torch.tensor(products)
    return accumulate_fp22(torch.tensor([[start]]), p, torch.ones(32, 1)).item()


@pytest.mark.parametrize(
    ("start", "products", "result"),
    [
        (1 + 2**-13, [], 1 + 2**-13),  # 13 fraction bits are kept
        (1 + 2**-14, [], 1.0),
        (-(1 + 2**-14), [], -1.0),  # toward zero, not down
        (2.0**13, [1.0], 8193.0),
        (2.0**14, [1.0], 16384.0),
        (2.0**13, [1.0] * 32, 8224.0),
        (2.0**14, [1.0] * 32, 16384.0),  # lost one by one
        (2.0**14, [-1.0] * 32, 16384.0),
        (-(2.0**14), [1.0] * 32, -16384.0),
        (0.0, [512.0] + [0.125] * 31, 515.875),
        (0.0, [4096.0] + [0.125] * 31, 4096.0),
        (0.0, [], 0.0),
    ],
)
def test_fp22_as_measured(start: float, products: list[float], result: float) -> None:
    assert step(start, products) == result


def test_fp22_passes_nan_on() -> None:
    assert step(float("nan"), [1.0]) != step(float("nan"), [1.0])


@pytest.mark.parametrize(
    ("products", "result"),
    [
        ([512.0] + [0.125] * 31, 516.0),  # 515.875, rounded to nearest
        ([448.0, 56.0, 0.25] + [0.125] * 29, 508.0),  # 507.875
        ([4096.0] + [0.125] * 31, 4096.0),
    ],
)
def test_fp8_fp16_as_measured(products: list[float], result: float) -> None:
    p = torch.tensor([products])
    zero, ones = torch.zeros(1, 1), torch.ones(p.shape[1], 1)
    assert accumulate_fp8_fp16(zero, p, ones).item() == result


def test_fp16_rounds_once_per_instruction() -> None:
    p = torch.full((1, 32), 1.0)
    v = torch.full((32, 1), 2.0**-12)
    assert accumulate_fp16(torch.ones(1, 1), p, v).item() == 1 + 8 * 2**-10
    half_steps = v / 16  # 16 of them are half of an fp16 step: a tie at each instruction
    assert accumulate_fp16(torch.ones(1, 1), p, half_steps).item() == 1.0


def attention_pv_only(seqlen: int, **options: object) -> Tensor:
    """Attention whose only error is that of the accumulator: V and scores need no rounding."""
    generator = torch.Generator().manual_seed(5)
    q = torch.zeros(1, 1, 16, 32)
    k = torch.zeros(1, 1, seqlen, 32)
    v = torch.randint(-8, 9, (1, 1, seqlen, 16), generator=generator).float() + 4
    v[..., :2, :] = 14.0
    return reference.attention(q, k, v, **SAGE2, ranges=(448.0, 14.0), **options).output


@pytest.mark.parametrize("block_k", [64, 128])
def test_two_levels_stop_the_error_from_growing(block_k: int) -> None:
    """Emu: 7e-5 (flush 64) and 1.1e-4 (128) at any length; unflushed 1.5e-3 at 2K, 6e-3 at 8K."""
    flushed, growing = [], []
    for seqlen in (512, 2048, 8192):
        options = {"block_k": block_k}
        exact = attention_pv_only(seqlen, accumulator="fp32", **options)
        flushed.append(relative_l1(attention_pv_only(seqlen, **options), exact))
        single = attention_pv_only(seqlen, two_level=False, **options)
        growing.append(relative_l1(single, exact))
    assert max(flushed) < 2.5e-4
    assert growing[0] < growing[1] < growing[2]
    assert growing[2] > 20 * flushed[2]
    assert growing[2] > 5e-3


def test_fp16_accumulator_holds_every_selected_pair() -> None:
    """64 keys, P and V at their maxima: 64512 for the published pairs, exactly, never infinity."""
    for ranges in ((448.0, 2.25), (224.0, 4.5), (112.0, 9.0)):
        p = torch.full((1, 64), ranges[0])
        v = torch.full((64, 1), ranges[1])
        assert accumulate_fp8_fp16(torch.zeros(1, 1), p, v).item() == 64512.0
    overflow = accumulate_fp8_fp16(
        torch.zeros(1, 1), torch.full((1, 64), 448.0), torch.full((64, 1), 2.5)
    )
    assert overflow.isinf().all()


def test_fp16_accumulator_costs_little() -> None:
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, 1, 96, 32, generator=generator) for _ in range(3))
    for pv, most in (("e4m3_fp16", 5e-3), ("fp16_fp16", 2e-3)):
        recipe = SAGE2 | {"pv": pv}
        exact = reference.attention(q, k, v, **recipe, accumulator="fp32").output
        half = reference.attention(q, k, v, **recipe).output
        assert 0 < relative_l1(half, exact) < most


@pytest.mark.parametrize(
    ("pv", "top", "shift"),
    [("e4m3", 448, 8.8073549), ("e4m3", 256, 8), ("e4m3", 224, 7.8073549), ("bf16", 1, 0)],
)
def test_shift_is_the_logarithm_of_the_largest_probability(
    pv: str, top: float, shift: float
) -> None:
    assert probability_shift(pv, top) == torch.tensor(shift).item()


def test_probabilities_saturate_and_keep_nan() -> None:
    p = torch.tensor([448.5, 500.0, float("nan"), 2.0**-10, 2.0**-11])
    rounded = round_probabilities(p, "e4m3")
    assert rounded[:2].tolist() == [448.0, 448.0]
    assert rounded[2].isnan()
    assert rounded[3:].tolist() == [0.0, 0.0]  # half of the least subnormal ties to zero
    assert round_probabilities(torch.tensor([0.5 / 127, 1.0]), "int8").tolist() == [0.0, 1.0]


def test_converted_products_round_as_an_h100_was_seen_to() -> None:
    """Of 9 sixteen times and of small numbers before, times 112: what its kernel returned."""
    p, v = torch.full((1, 32), 112.0), torch.zeros(32, 1)
    v[16:] = 9.0
    for small, seen in ((2**-6, 16128), (2**-5, 16128), (2**-4, 16136), (0.09375, 16144)):
        v[4] = small
        found = select_accumulator("e4m3_fp16", "fp16_converted")(torch.zeros(1, 1), p, v)
        assert found.item() == seen
