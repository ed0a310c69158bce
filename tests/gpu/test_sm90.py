"""Hopper's kernels compute what the oracle specifies: every case of the CPU, and random ones."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.cases import (
    CASES,
    DTYPES,
    EMPTY_CASES,
    POISONS,
    AttentionCase,
    Inputs,
    Poison,
    make_inputs,
    poison,
)
from tests.gpu.sm90 import (
    EXPONENTIALS,
    OPS,
    RECIPE,
    SMOOTHING,
    assert_right,
    expected,
    is_for_sm90,
    on_gpu,
)
from tests.numerics import exact_attention, output_budget_use, relative_l1, same_bits

ALL_CASES = {
    case.id: case
    for case in (replace(c, granularity="token_thread") for c in (*CASES, *EMPTY_CASES))
    if is_for_sm90(case)
}.values()


@pytest.mark.parametrize("exponential", EXPONENTIALS)
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda c: c.id)
def test_attention_is_within_budget(case: AttentionCase, exponential: str) -> None:
    assert_right(on_gpu(make_inputs(case)), case.smooth, exponential)


def random_case(pick: random.Random) -> AttentionCase:
    heads_kv = pick.choice([1, 2])
    causal = pick.choice(["none", "top_left", "bottom_right"])
    masks = ["none", "bool", "key_padding", "bool_hidden_rows", "float", "float_inf", "alibi"]
    return AttentionCase(
        batch=pick.choice([1, 2]),
        heads_q=heads_kv * pick.choice([1, 2, 3]),
        heads_kv=heads_kv,
        seqlen_q=pick.randint(1, 600),
        seqlen_k=pick.choice([pick.randint(1, 300), pick.randint(1, 2600)]),
        head_dim=pick.choice([64, 128, pick.randint(1, 128)]),
        head_dim_v=pick.choice([64, 128, pick.randint(1, 128)]),
        dtype=pick.choice(sorted(DTYPES)),
        causal=causal,
        mask=pick.choice(masks) if causal == "none" else "none",
        scale=pick.choice([None, None, 0.05, -0.1]),
        granularity="token_thread",
        smooth=pick.choice(SMOOTHING),
        data=pick.choice(["normal", "normal", "channel_bias", "uneven", "outlier_row"]),
        layout=pick.choice(["bhsd", "bshd", "sliced", "fused", "expanded"]),
    )


@pytest.mark.parametrize("seed", range(48))
def test_random_cases_are_within_budget(seed: int) -> None:
    pick = random.Random(seed)
    for _ in range(50):
        case, exponential = random_case(pick), pick.choice(EXPONENTIALS)
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


# More pieces of work (192 rows of a head) than an H100 has multiprocessors, so that blocks do
# several, one behind the other: query rows, keys and both head dimensions.
MANY = {
    "short": (150, 130, 64, 64),
    "groups": (400, 2100, 64, 64),
    "wide": (400, 1100, 128, 100),
    "hidden": (1500, 300, 64, 64),
}


@pytest.mark.parametrize("exponential", EXPONENTIALS)
@pytest.mark.parametrize("causal", ["none", "masked", "top_left", "bottom_right"])
@pytest.mark.parametrize("shape", MANY)
def test_heads_do_not_depend_on_each_other(shape: str, causal: str, exponential: str) -> None:
    """The bits of a head are those of a call with that head alone."""
    batch, heads_kv, group = 4, 48, 2
    n, m, d, dv = MANY[shape]

    def normal(heads: int, tokens: int, channels: int) -> Tensor:
        return torch.randn(batch, heads, tokens, channels, device="cuda").bfloat16()

    q, k, v = normal(heads_kv * group, n, d), normal(heads_kv, m, d), normal(heads_kv, m, dv)
    mask = torch.rand(n, m, device="cuda") > 0.4 if causal == "masked" else None
    semantics = (mask, "none" if causal == "masked" else causal)
    recipe = {**RECIPE, "smooth": "kv", "exponential": exponential}
    output = OPS.sdpa(q, k, v, *semantics, **recipe)
    with_lse = OPS.sdpa_with_lse(q, k, v, *semantics, **recipe)
    for b, h in ((0, 0), (1, 17), (3, heads_kv - 2), (3, heads_kv - 1)):
        kv, heads = (slice(b, b + 1), slice(h, h + 1)), slice(group * h, group * (h + 1))
        one = (slice(b, b + 1), heads)
        alone = (q[one], k[kv], v[kv], *semantics)
        assert same_bits(output[one], OPS.sdpa(*alone, **recipe))
        for whole, part in zip(with_lse, OPS.sdpa_with_lse(*alone, **recipe), strict=True):
            assert same_bits(whole[one], part)


def test_budget_has_room_to_fail() -> None:
    """The kernel takes half of its budget, as R_low does; one of other keys takes far more."""
    case = AttentionCase(data="uneven", causal="top_left", seqlen_q=300, seqlen_k=300)
    inputs = on_gpu(make_inputs(case))
    right = expected(inputs, "k", "exact")
    recipe = {**RECIPE, "smooth": "k"}
    assert output_budget_use(OPS.sdpa(*inputs, **recipe), right) < 0.8
    later = inputs._replace(key=inputs.key.roll(1, 2))
    assert output_budget_use(OPS.sdpa(*later, **recipe), right) > 2


def accuracy_inputs(data: str, head_dim: int, causal: str) -> Inputs:
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    q, k, v = normal(3, 1, 8, 4096, head_dim)
    if data != "normal":
        k = k + 5 * normal(8, 1, head_dim)
    if data == "key_and_value_bias":
        v = v + 5 * normal(8, 1, head_dim)
    return Inputs(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, causal, None)


# Relative L1 error that the recipe promises against exact attention on the same bf16 inputs. A bias
# of K alone costs nothing; with one of V what is left is small beside the output.
@pytest.mark.parametrize("exponential", EXPONENTIALS)
@pytest.mark.parametrize("causal", ["none", "top_left"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("data", "bound"), [("normal", 0.040), ("key_bias", 0.040), ("key_and_value_bias", 0.004)]
)
def test_accuracy_at_4096_tokens(
    data: str, bound: float, head_dim: int, causal: str, exponential: str
) -> None:
    inputs = accuracy_inputs(data, head_dim, causal)
    output = OPS.sdpa(*inputs, **RECIPE, smooth="kv", exponential=exponential)
    exact = []
    for head in range(inputs.query.shape[1]):  # one at a time: workers share the GPU's memory
        q, k, v = (x[:, head : head + 1] for x in inputs[:3])
        exact.append(exact_attention(q, k, v, None, causal).output)
    assert relative_l1(output, torch.cat(exact, dim=1)) <= bound
