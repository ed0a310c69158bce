"""Scales of V per group of keys, late maxima, the linear mantissa: each by a second definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.numerics import assert_within_budget, exact_attention, expect, relative_l1, same_bits
from torch_sage import reference
from torch_sage.reference.accumulate import linear_probabilities
from torch_sage.reference.grouped import WARP_ROWS, _move
from torch_sage.reference.quantize import value_shift

RECIPE: dict[str, Any] = {
    "qk": "int8",
    "granularity": "token_thread",
    "pv": "e4m3_fp16",
    "value_group": 96,
    "ranges": (64.0, 0.25),
    "tile": 32,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qkv(n: int, m: int, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    return normal(1, 4, n, d, seed=1), normal(1, 2, m, d, seed=2), normal(1, 2, m, d, seed=3)


def test_token_thread_is_token_for_q_and_thread_in_blocks_of_128_for_k() -> None:
    assert torch.equal(reference.query_groups(300, "token_thread", 128, 32)[0], torch.arange(300))
    groups, count = reference.key_groups(300, "token_thread", 64)
    assert groups.tolist() == [4 * (m // 128) + m % 8 // 2 for m in range(300)] and count == 12


def test_token_block_is_token_for_q_and_blocks_of_128_for_k() -> None:
    assert torch.equal(reference.query_groups(300, "token_block", 128, 32)[0], torch.arange(300))
    groups, count = reference.key_groups(300, "token_block", 64)
    assert groups.tolist() == [m // 128 for m in range(300)] and count == 3


@pytest.mark.parametrize("smooth", [False, True])
def test_each_group_of_values_is_quantized_alone(smooth: bool) -> None:
    v = normal(2, 3, 250, 5) * 2.0 ** torch.arange(250).div(100, rounding_mode="floor")[:, None]
    v[0, 1, 120, 3] = torch.inf
    options: dict[str, Any] = {"smooth": smooth, "pv": "e4m3_fp16", "value_max": 0.25}
    codes, scales, means = reference.quantize_value(v, **options, group=100)
    for i, part in enumerate(torch.split(v, 100, dim=2)):
        expected = reference.quantize_value(part, **options)
        assert torch.equal(codes[:, :, 100 * i : 100 * (i + 1)].float(), expected[0].float())
        assert same_bits(scales[:, :, i], expected[1]) and same_bits(means[:, :, i], expected[2])
    assert scales[0, 1, :, 3].isnan().tolist() == [False, True, False]
    again = reference.quantize_value(v, means if smooth else None, **options, group=100)
    assert same_bits(again[1], scales)


@pytest.mark.parametrize("smooth", ["", "v"])
@pytest.mark.parametrize("precision", ["exact", "recipe"])
def test_shift_makes_the_mean_of_a_group_exact(smooth: str, precision: str) -> None:
    """Equal probabilities: the output is the mean of V, whatever the codes have lost."""
    q, k, v = qkv(5, 150)
    v = v + 3
    output = reference.attention(0 * q, k, v, **RECIPE, smooth=smooth, precision=precision).output
    mean = v.double().mean(2, keepdim=True).repeat_interleave(2, dim=1)
    largest = v.abs().max()
    tolerance = torch.finfo(torch.float32).eps * largest
    if precision == "recipe":
        # Sums of 64 * code stay below 2**11, where fp16 has steps of 1; three instructions a group.
        tolerance += 2 * 3 * 0.5 * (largest / 0.25) / (64 * 150)
    assert (output - mean).abs().max() <= tolerance


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
def test_exact_precision_is_attention_on_what_the_codes_stand_for(causal: str) -> None:
    q, k, v = qkv(70, 250)
    v = v + torch.arange(250)[:, None] / 50  # group means differ
    codes, scales, mean = reference.quantize_value(
        v, smooth=True, pv="e4m3_fp16", value_max=0.25, group=96
    )
    shift = value_shift(v, mean, codes, scales, 96)
    group = torch.arange(250) // 96
    values = codes.double() * scales.double()[:, :, group] + shift[:, :, group]
    k_codes, k_scales, k_mean = reference.quantize_key(k, granularity="token_thread")
    row_of, _ = reference.key_groups(250, "token_thread", 128)
    keys = k_codes.double() * k_scales.double()[..., row_of, None]
    q_codes, q_scales = reference.quantize_query(q)
    queries = q_codes.double() * q_scales.double()[..., None]
    found = reference.attention(
        q, k, v, None, causal, -0.3, **RECIPE, smooth="kv", precision="exact"
    )
    exact = exact_attention(queries, keys, values, None, causal, -0.3)
    assert (found.output - exact.output).abs().max() < 1e-12
    # Softmax does not see the mean of K; the lse gets it back with the unquantized query.
    key_mean = k_mean.double().repeat_interleave(2, dim=1)[..., None, :]
    lse = exact.lse - 0.3 * (q.double() * key_mean).sum(-1)
    assert (found.lse - lse)[lse.isfinite()].abs().max() < 1e-12
    assert torch.equal(found.lse.isfinite(), lse.isfinite())


@pytest.mark.parametrize("exponential", ["exact", "mixed"])
def test_recipe_is_near_what_it_means(exponential: str) -> None:
    """Also where the maxima follow at once, which is another sample of rounding."""
    q, k, v = qkv(40, 200)
    options = {**RECIPE, "smooth": "kv", "exponential": exponential}
    expected = expect(q, k, v, None, "bottom_right", **options, lag=1.75)
    found = reference.attention(q, k, v, None, "bottom_right", **options)
    assert_within_budget(found.output, expected, lse=found.lse)


def test_linear_mantissa_costs_a_little() -> None:
    q, k, v = qkv(40, 200)
    options = {**RECIPE, "smooth": "kv"}
    meant = reference.attention(q, k, v, **options, precision="exact").output
    exact, mixed = (
        relative_l1(reference.attention(q, k, v, **options, exponential=e).output, meant)
        for e in ("exact", "mixed")
    )
    assert 0.01 < exact < mixed < 0.05


def test_linear_mantissa_by_its_definition() -> None:
    x = torch.linspace(-12, 7.75, 5000)
    found = linear_probabilities(x)
    for value, score in zip(found.tolist(), x.tolist(), strict=True):
        power = score + 2.0**-11
        whole = math.floor(power)
        expected = 2.0**whole * (1 + math.floor(8 * (power - whole)) / 8)
        if power < -6:  # E4M3 is linear itself there, with a step of 2**-9
            expected = max(math.floor(8 * (power + 7)), 0) * 2.0**-9
        assert value == expected
    normal_part = x >= -6
    relative = (found / x.exp2() - 1)[normal_part]
    assert -0.084 < relative.min() and relative.max() < 0.062
    a_little_less_than_6 = torch.tensor([6 - 1e-4, 6 - 1e-3])
    assert linear_probabilities(a_little_less_than_6).tolist() == [64, 60]
    special = linear_probabilities(torch.tensor([-torch.inf, torch.nan, 100.0]))
    assert special[0] == 0 and special[1].isnan() and special[2] == 448


def test_maxima_move_by_warps_and_late() -> None:
    reference_max = torch.zeros(1, 1, 3 * WARP_ROWS - 5)
    top = torch.zeros_like(reference_max)
    top[..., 3] = 1.75  # not more than the lag
    top[..., WARP_ROWS + 1], top[..., WARP_ROWS + 2], top[..., WARP_ROWS + 3] = 2.0, 1.0, -4.0
    moved = _move(reference_max, top, 1.75)
    assert moved.nonzero()[:, -1].tolist() == [WARP_ROWS + 1, WARP_ROWS + 2]
    assert torch.equal(moved[..., WARP_ROWS + 1 : WARP_ROWS + 3], torch.tensor([[[2.0, 1.0]]]))
    hidden = torch.full_like(reference_max, -torch.inf)
    assert same_bits(_move(hidden, hidden, 1.75), hidden)


@pytest.mark.parametrize("precision", ["exact", "recipe"])
def test_values_that_are_not_finite_poison_rows_that_reach_their_group(precision: str) -> None:
    q, k, v = qkv(250, 250)
    v[0, 0, 100, 5] = torch.nan
    options = {**RECIPE, "smooth": "kv", "precision": precision}
    poisoned = reference.attention(q, k, v, None, "top_left", **options).output.isnan()
    assert not poisoned[:, 2:].any() and not poisoned[:, :, :96].any()
    assert poisoned[:, :2, 96:].nonzero()[:, -1].unique().tolist() == [5]
    assert poisoned[:, :2, 96:, 5].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_group": 0}, "value_group must be at least 1, got 0"),
        ({"pv": "e4m3"}, "pv must be one of ['e4m3_fp16', 'bf16'] with value_group=96, got 'e4m3'"),
        ({"pv": "bf16", "exponential": "mixed"}, "exponential must be one of ['exact'] with pv='b"),
        ({"pv": "bf16", "accumulator": "fp16"}, "accumulator must be 'fp32'"),
        ({"exponential": "fast"}, "exponential must be one of ['exact', 'mixed'] with pv='"),
        (
            {"value_group": None, "exponential": "mixed"},
            "exponential must be one of ['exact'] with pv='e4m3_fp16' and value_group=None, got 'm",
        ),
        ({"accumulator": "fp32"}, "accumulator must be 'fp16'"),
        ({"two_level": False}, "accumulator must be 'fp16'"),
        ({"sum_rounded": False}, "accumulator must be 'fp16'"),
    ],
)  # fmt: skip
def test_what_groups_do_not_go_with_is_refused(change: dict[str, Any], message: str) -> None:
    q, k, v = qkv(2, 3)
    with pytest.raises(ValueError) as caught:
        reference.attention(q, k, v, **{**RECIPE, "smooth": "", **change})
    assert message in str(caught.value)
