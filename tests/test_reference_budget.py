"""The budget itself: it passes another correct rounding and fails on every injected fault.

Faults are injected through the inputs of the oracle: a K scale swapped with its neighbour's is K
with two blocks multiplied by the ratio of their scales, here a power of two, so codes stay as are.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cases import AttentionCase, Inputs, make_inputs
from tests.numerics import (
    Expected,
    assert_cosine,
    assert_same_special_values,
    assert_within_budget,
    budget_use,
    expect,
    output_budget_use,
)
from torch_sage import reference

RECIPE = {"qk": "int8", "granularity": "block", "pv": "e4m3", "smooth": ""}
UNEVEN = AttentionCase(
    data="uneven", seqlen_q=200, seqlen_k=321, granularity="block", smooth="", causal="bottom_right"
)


def low(inputs: Inputs, **changes: object) -> Tensor:
    return reference.attention(*inputs, **{**RECIPE, **changes}).output


def use(actual: Tensor, expected: Expected) -> float:
    return output_budget_use(actual, expected)


@pytest.mark.parametrize("seed", range(6))
def test_another_correct_rounding_passes(seed: int) -> None:
    """Another tile, another accumulator and another row sum: at most .77 in algorithm.md's Emu."""
    case = AttentionCase(seqlen_q=200, seqlen_k=321 + seed, granularity="block", smooth="")
    inputs = make_inputs(case)
    expected = expect(*inputs, **RECIPE)
    others = ({"tile": 128}, {"tile": 321}, {"accumulator": "fp32"}, {"two_level": False})
    for change in others:
        assert use(low(inputs, **change), expected) < 0.95


def test_swapped_key_scales_fail() -> None:
    """Blocks of K differ 2 to 8 times in magnitude; swapping two neighbouring scales shows."""
    case = AttentionCase(seqlen_q=200, seqlen_k=320, granularity="block", smooth="")
    q, k, v, *rest = make_inputs(case)
    magnitude = 2.0 ** torch.tensor([0, 2, 1, 3, 1]).repeat_interleave(64)[:, None]
    swapped = 2.0 ** torch.tensor([2, 0, 1, 3, 1]).repeat_interleave(64)[:, None]
    expected = expect(q, k * magnitude, v, *rest, **RECIPE)
    right, wrong = (low(Inputs(q, k * m, v, *rest)) for m in (magnitude, swapped))
    assert use(right, expected) <= 0.5
    assert use(wrong, expected) > 4.4


@pytest.mark.parametrize("offset", [-1, 1])
def test_causal_mask_off_by_one_fails(offset: int) -> None:
    inputs = make_inputs(UNEVEN)
    n, m = UNEVEN.seqlen_q, UNEVEN.seqlen_k
    expected = expect(*inputs, **RECIPE)
    shifted = torch.ones(n, m, dtype=torch.bool).tril(m - n + offset)
    wrong = low(inputs._replace(attn_mask=shifted, causal="none"))
    assert use(wrong, expected) > 4.4
    with pytest.raises(AssertionError, match=r"budget|cosine"):
        assert_within_budget(wrong, expected)


def test_swapped_value_scales_fail() -> None:
    """Channels of V differ 2 to 16 times; two swapped scales swap the magnitudes of the output."""
    inputs = make_inputs(UNEVEN)
    expected = expect(*inputs, **RECIPE)
    output = low(inputs)
    scales = reference.quantize_value(inputs.value, pv="e4m3")[1]
    ratio = scales[..., [1, 0]] / scales[..., :2]
    wrong = output.clone()
    wrong[..., :2] *= ratio[..., None, :]
    assert use(wrong, expected) > 4.4


def test_blocks_have_their_own_budget() -> None:
    """An error that hides below one global maximum fails in the block where values are small."""
    q, k, v, *rest = make_inputs(AttentionCase(seqlen_q=128, causal="top_left", seqlen_k=128))
    v[:, :, :8] *= 100  # the first rows of a causal output own its maximum
    inputs = Inputs(q, k, v, *rest)
    expected = expect(*inputs, **RECIPE)
    output = low(inputs)
    error = 2 * (output - expected.oracle.output)[:, :, :64].abs().max()
    wrong = output.clone()
    wrong[0, 0, 100] += error
    assert use(output, expected) <= 0.5
    assert use(wrong, expected) > 1
    as_one = budget_use(
        wrong.flatten(2)[:, :, None, :],
        expected.oracle.output.flatten(2)[:, :, None, :],
        expected.naive.output.flatten(2)[:, :, None, :],
    )
    assert as_one <= 1.1


def test_special_values_must_be_at_the_same_places() -> None:
    oracle = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 1e6], dtype=torch.float64)
    assert_same_special_values(oracle.half(), oracle)  # 1e6 is infinity in fp16, on both sides
    for index, number in ((0, torch.nan), (1, 1.0), (2, -torch.inf), (3, torch.nan), (4, 1.0)):
        wrong = oracle.half()
        wrong[index] = number
        with pytest.raises(AssertionError, match="wrong places"):
            assert_same_special_values(wrong, oracle)


def test_cosine_is_taken_per_head() -> None:
    oracle = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    oracle[:, 0] *= 1000
    wrong = oracle.clone()
    wrong[:, 1] = wrong[:, 1].flip(-1)
    assert_cosine(oracle.float(), oracle)
    with pytest.raises(AssertionError, match="cosine"):
        assert_cosine(wrong.float(), oracle)
    zero = torch.zeros(1, 1, 8, 8)
    assert_cosine(zero, zero.double())
    with pytest.raises(AssertionError, match="cosine"):
        assert_cosine(zero, zero.double() + 1)


def test_wrong_lse_fails() -> None:
    inputs = make_inputs(AttentionCase())
    expected = expect(*inputs, **RECIPE)
    output, lse = expected.naive
    assert_within_budget(output, expected, lse=lse)
    with pytest.raises(AssertionError, match="lse error"):
        assert_within_budget(output, expected, lse=lse + 1e-3)
