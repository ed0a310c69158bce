"""Hopper's kernels compute what the oracle specifies: every case of the CPU, and random ones."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.cases import CASES, EMPTY_CASES, POISONS, AttentionCase, Poison, make_inputs, poison
from tests.gpu.shared import (
    MANY,
    OPS,
    accuracy_inputs,
    assert_heads_are_independent,
    error_of,
    on_gpu,
    random_case,
)
from tests.gpu.sm90 import EXPONENTIALS, RECIPE, SMOOTHING, assert_right, expected, is_for_sm90
from tests.numerics import output_budget_use

ALL_CASES = {
    case.id: case
    for case in (replace(c, granularity="token_thread") for c in (*CASES, *EMPTY_CASES))
    if is_for_sm90(case)
}.values()


@pytest.mark.parametrize("exponential", EXPONENTIALS)
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda c: c.id)
def test_attention_is_within_budget(case: AttentionCase, exponential: str) -> None:
    assert_right(on_gpu(make_inputs(case)), case.smooth, exponential)


@pytest.mark.parametrize("seed", range(48))
def test_random_cases_are_within_budget(seed: int) -> None:
    pick = random.Random(seed)
    for _ in range(50):
        case = random_case(
            pick,
            granularity=["token_thread"],
            smooth=SMOOTHING,
            head_dims=[64, 128, 256],
            most_queries=600,
            most_keys=[300, 2600],
        )
        exponential = pick.choice(EXPONENTIALS)
        try:
            assert_right(on_gpu(make_inputs(case)), case.smooth, exponential)
        except AssertionError as error:
            raise AssertionError(f"{case.id}, {exponential}: {error}") from error


@pytest.mark.parametrize("exponential", EXPONENTIALS)
@pytest.mark.parametrize("what", POISONS, ids=str)
@pytest.mark.parametrize(
    ("smooth", "causal"), [("", "top_left"), ("k", "none"), ("kv", "bottom_right")]
)
def test_poison_reaches_exactly_the_oracles_set(
    what: Poison, smooth: str, causal: str, exponential: str
) -> None:
    case = AttentionCase(smooth=smooth, causal=causal, seqlen_k=70)
    assert_right(on_gpu(poison(make_inputs(case), what)), smooth, exponential)


@pytest.mark.parametrize("mask", ["bool_hidden_rows", "float_hidden_rows"])
@pytest.mark.parametrize("what", POISONS, ids=str)
def test_hidden_rows_stay_zero_beside_poison(what: Poison, mask: str) -> None:
    case = AttentionCase(mask=mask, smooth="", seqlen_k=70)
    assert_right(on_gpu(poison(make_inputs(case), what)), "", "exact")


@pytest.mark.parametrize("exponential", EXPONENTIALS)
@pytest.mark.parametrize("operand", [1, 2])
@pytest.mark.parametrize("key", [0, 1023, 1024, 1800, 2199])
def test_poison_behind_a_row_does_not_reach_it(operand: int, key: int, exponential: str) -> None:
    """Rows before the poisoned scale of a causal K, or the poisoned group of V, stay finite."""
    case = AttentionCase(seqlen_q=2200, seqlen_k=2200, causal="top_left", smooth="kv")
    inputs = on_gpu(poison(make_inputs(case), Poison(operand, (0, 1, key, 3), float("nan"))))
    assert_right(inputs, "kv", exponential)
    output = OPS.sdpa(*inputs, **RECIPE, smooth="kv", exponential=exponential)
    first = key // 128 * 128 + key % 8 // 2 * 2 if operand == 1 else key // 1024 * 1024
    channel = output[0, 1, :, 3].isnan()
    assert not channel[:first].any() and channel[first:].all()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_mask_that_is_nan_or_plus_infinity_gives_nan_rows(number: float) -> None:
    inputs = make_inputs(AttentionCase(mask="float"))
    assert inputs.attn_mask is not None
    inputs.attn_mask[0, 1, 3, 5] = number
    inputs = on_gpu(inputs)
    assert_right(inputs, "k", "exact")
    output = OPS.sdpa(*inputs, **RECIPE, smooth="k")
    assert output.isnan().any(-1).nonzero().tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("exponential", EXPONENTIALS)
@pytest.mark.parametrize("causal", ["none", "masked", "top_left", "bottom_right"])
@pytest.mark.parametrize("shape", MANY)
def test_heads_do_not_depend_on_each_other(shape: str, causal: str, exponential: str) -> None:
    """Blocks do several pieces of work, one behind the other."""
    recipe = {**RECIPE, "smooth": "kv", "exponential": exponential}
    assert_heads_are_independent(recipe, shape, causal)


def test_budget_has_room_to_fail() -> None:
    """The kernel takes half of its budget, as R_low does; one of other keys takes far more."""
    case = AttentionCase(data="uneven", causal="top_left", seqlen_q=300, seqlen_k=300)
    inputs = on_gpu(make_inputs(case))
    right = expected(inputs, "k", "exact")
    recipe = {**RECIPE, "smooth": "k"}
    assert output_budget_use(OPS.sdpa(*inputs, **recipe), right) < 0.8
    later = inputs._replace(key=inputs.key.roll(1, 2))
    assert output_budget_use(OPS.sdpa(*later, **recipe), right) > 2


# Relative L1 error that the recipe promises against exact attention on the same bf16 inputs. A bias
# of K alone costs nothing; with one of V what is left is small beside the output.
@pytest.mark.parametrize("exponential", EXPONENTIALS)
@pytest.mark.parametrize("causal", ["none", "top_left"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("data", "bound"), [("normal", 0.040), ("key_bias", 0.040), ("key_and_value_bias", 0.004)]
)
def test_accuracy_at_4096_tokens(
    data: str, bound: float, head_dim: int, causal: str, exponential: str
) -> None:
    inputs = accuracy_inputs(data, head_dim, causal)
    output = OPS.sdpa(*inputs, **RECIPE, smooth="kv", exponential=exponential)
    assert error_of(output, inputs) <= bound
