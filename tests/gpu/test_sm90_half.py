"""Hopper's accurate recipe, P and V in bf16, computes what the oracle specifies, and as exactly."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import torch_sage
from tests.cases import CASES, EMPTY_CASES, POISONS, AttentionCase, Poison, make_inputs, poison
from tests.gpu.shared import (
    MANY,
    OPS,
    accuracy_inputs,
    assert_graph_replays_new_inputs,
    assert_heads_are_independent,
    assert_same_bits_on_any_stream,
    assert_strides_beyond_32_bits,
    error_of,
    on_gpu,
    random_case,
    same_numbers,
)
from tests.gpu.sm90 import (
    HALF,
    HALF_SMOOTHING,
    assert_half_right,
    expected,
    half_value_image,
    is_for_sm90,
    width_of,
)
from tests.gpu.test_sm90_prepared import KEYS, check_key, make_kv
from tests.numerics import output_budget_use, same_bits
from tests.rotary import ROTARY_CASES, RotaryCase, arguments, rotated
from torch_sage import SageConfig, reference
from torch_sage.recipes import SUPPORT, resolve_in

ROW = "cuda.sm90.half"
ALL_CASES = {
    case.id: case
    for case in (replace(c, granularity="token_thread") for c in (*CASES, *EMPTY_CASES))
    if is_for_sm90(case, ROW)
}.values()
PREPARE = {"smooth": "k", "pv": "bf16"}


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda c: c.id)
def test_attention_is_within_budget(case: AttentionCase) -> None:
    assert_half_right(on_gpu(make_inputs(case)), case.smooth)


@pytest.mark.parametrize("seed", range(12))
def test_random_cases_are_within_budget(seed: int) -> None:
    pick = random.Random(1000 + seed)
    for _ in range(50):
        case = random_case(
            pick,
            granularity=["token_thread"],
            smooth=HALF_SMOOTHING,
            head_dims=[64, SUPPORT[ROW].max_head_dim],
            most_queries=600,
            most_keys=[300, 2600],
        )
        try:
            assert_half_right(on_gpu(make_inputs(case)), case.smooth)
        except AssertionError as error:
            raise AssertionError(f"{case.id}: {error}") from error


@pytest.mark.parametrize("what", POISONS, ids=str)
@pytest.mark.parametrize(("smooth", "causal"), [("", "top_left"), ("k", "bottom_right")])
def test_poison_reaches_exactly_the_oracles_set(what: Poison, smooth: str, causal: str) -> None:
    case = AttentionCase(smooth=smooth, causal=causal, seqlen_k=70)
    assert_half_right(on_gpu(poison(make_inputs(case), what)), smooth)


@pytest.mark.parametrize("mask", ["bool_hidden_rows", "float_hidden_rows"])
@pytest.mark.parametrize("what", POISONS, ids=str)
def test_hidden_rows_stay_zero_beside_poison(what: Poison, mask: str) -> None:
    case = AttentionCase(mask=mask, smooth="", seqlen_k=70)
    assert_half_right(on_gpu(poison(make_inputs(case), what)), "")


@pytest.mark.parametrize("key", [0, 1023, 1024, 1800, 2199])
def test_poison_behind_a_row_does_not_reach_it(key: int) -> None:
    """Causal rows before the group of V that it is in stay finite."""
    case = AttentionCase(seqlen_q=2200, seqlen_k=2200, causal="top_left", smooth="k")
    inputs = on_gpu(poison(make_inputs(case), Poison(2, (0, 1, key, 3), float("inf"))))
    assert_half_right(inputs, "k")
    channel = OPS.sdpa(*inputs, **HALF, smooth="k")[0, 1, :, 3].isnan()
    first = key // 1024 * 1024
    assert not channel[:first].any() and channel[first:].all()


@pytest.mark.parametrize("causal", ["none", "masked", "top_left", "bottom_right"])
@pytest.mark.parametrize("shape", [name for name in MANY if name != "wider"])
def test_heads_do_not_depend_on_each_other(shape: str, causal: str) -> None:
    assert_heads_are_independent({**HALF, "smooth": "k"}, shape, causal)


def test_budget_has_room_to_fail() -> None:
    case = AttentionCase(data="uneven", causal="top_left", seqlen_q=300, seqlen_k=300)
    inputs = on_gpu(make_inputs(case))
    right = expected(inputs, "k", "exact", "bf16")
    assert output_budget_use(OPS.sdpa(*inputs, **HALF, smooth="k"), right) < 0.8
    later = inputs._replace(key=inputs.key.roll(1, 2))
    assert output_budget_use(OPS.sdpa(*later, **HALF, smooth="k"), right) > 2


# Relative L1 error against exact attention on the same bf16 inputs, as for the fast recipe.
@pytest.mark.parametrize("causal", ["none", "top_left"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("data", "bound"), [("normal", 0.016), ("key_bias", 0.016), ("key_and_value_bias", 0.0017)]
)
def test_accuracy_at_4096_tokens(data: str, bound: float, head_dim: int, causal: str) -> None:
    inputs = accuracy_inputs(data, head_dim, causal)
    assert error_of(OPS.sdpa(*inputs, **HALF, smooth="k"), inputs) <= bound


@pytest.mark.parametrize("smooth", HALF_SMOOTHING)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (40, 64), (100, 33), (1, 1)])
def test_every_bit_is_the_references(d: int, dv: int, dtype: str, smooth: str) -> None:
    for m in KEYS:
        k, v = make_kv(m, d, dv, dtype, "bhsd")
        prepared, width = OPS.prepare_kv(k, v, smooth=smooth, pv="bf16"), width_of(d, dv)
        check_key(k, smooth, prepared, width)
        codes, scales, _ = reference.quantize_value(v, pv="bf16", group=1024)
        found = half_value_image(prepared[3], width)
        assert same_bits(found[:, :, :m, :dv], codes)
        assert not found[:, :, m:].any() and not found[..., dv:].any()
        assert same_numbers(prepared[4][..., :dv], scales)
        assert (prepared[4][..., dv:] == 1).all() and not prepared[5].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("m", "d", "causal"), [(300, 64, "top_left"), (2300, 128, "none")])
def test_prepared_attention_is_that_of_the_whole_op(
    m: int, d: int, causal: str, masked: bool
) -> None:
    q, k, v = torch.randn(3, 2, 4, m, d, device="cuda", dtype=torch.bfloat16).unbind()
    mask = torch.rand(m, m, device="cuda") > 0.5 if masked else None
    semantics = (mask, "none" if masked else causal)
    whole = OPS.sdpa_with_lse(q, k, v, *semantics, **HALF, smooth="k")
    operands = (q, *OPS.prepare_kv(k, v, **PREPARE), m, d, *semantics)
    for op in (OPS.attention_prepared_with_lse, OPS.attention_prepared_part):
        found = op(*operands, exponential="exact")
        assert all(same_bits(a, b) for a, b in zip(found, whole, strict=True))
    assert same_bits(OPS.attention_prepared(*operands, exponential="exact"), whole[0])
    with pytest.raises(ValueError, match="exponential must be one of"):
        OPS.attention_prepared(*operands, exponential="mixed")


def test_functions_run_the_recipe() -> None:
    q, k, v = torch.randn(3, 2, 4, 300, 64, device="cuda", dtype=torch.bfloat16).unbind()
    config = SageConfig.preset("accurate").with_options(dispatch="always")
    whole = OPS.sdpa(q, k, v, None, "top_left", **HALF, smooth="k")
    with torch.no_grad():
        found = torch_sage.scaled_dot_product_attention(q, k, v, is_causal=True, config=config)
    assert same_bits(found, whole)
    prepared = torch_sage.prepare_kv(k, v, config)
    for given in (None, config):
        found = torch_sage.attention_prepared(q, prepared, is_causal=True, config=given)
        assert same_bits(found, whole)


def test_wider_heads_get_their_16_bits_from_mma_sync() -> None:
    q, k, v = torch.randn(3, 2, 4, 300, 200, device="cuda", dtype=torch.bfloat16).unbind()
    config = SageConfig.preset("accurate").with_options(dispatch="always")
    with torch.no_grad():
        found = torch_sage.scaled_dot_product_attention(q, k, v, config=config)
    recipe = resolve_in("cuda.sm89", config, torch.bfloat16)
    assert recipe.pv == "bf16"
    assert same_bits(found, OPS.sdpa(q, k, v, **recipe.op_kwargs()))


@pytest.mark.parametrize(
    "case", [case for case in ROTARY_CASES if case.norm != "eps"], ids=lambda c: c.id
)
def test_rotated_operands_have_the_bits_of_those_that_were(case: RotaryCase) -> None:
    """Sums of squares are added in another order: tests/gpu/test_sm90_rotary.py has those."""
    base = AttentionCase(
        batch=2, heads_q=4, heads_kv=2, seqlen_q=150, seqlen_k=260, dtype="bf16",
        head_dim=128, head_dim_v=128,
    )  # fmt: skip
    inputs = on_gpu(make_inputs(base))
    recipe: dict[str, Any] = {**HALF, "smooth": "k"}
    output = OPS.rotary_sdpa(*arguments(case, inputs), pairing=case.pairing, **recipe)
    assert same_numbers(output, OPS.sdpa(*rotated(case, inputs), **recipe))


@pytest.mark.parametrize("causal", ["none", "top_left"])
def test_two_runs_are_the_same_bits_on_any_stream(causal: str) -> None:
    assert_same_bits_on_any_stream({**HALF, "smooth": "k"}, causal, 64)


def test_cuda_graph_replays_new_inputs() -> None:
    def run(*args: Any) -> tuple[torch.Tensor, ...]:
        result: tuple[torch.Tensor, ...] = OPS.sdpa_with_lse(*args, **HALF, smooth="k")
        return result

    assert_graph_replays_new_inputs(run, None, "top_left")


@pytest.mark.usefixtures("one_at_a_time")
def test_strides_beyond_32_bits() -> None:
    assert_strides_beyond_32_bits({**HALF, "smooth": "k"})


def test_what_the_recipe_lacks_is_named() -> None:
    k = torch.randn(1, 2, 8, 64, device="cuda")
    wide = torch.randn(1, 2, 8, 129, device="cuda")
    for change, message in (
        ({"smooth": "kv"}, "smooth must be one of"),
        ({"exponential": "mixed"}, "exponential must be one of"),
        ({"pv": "fp16"}, "pv must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.sdpa(k, k, k, **{**HALF, "smooth": "k", **change})
    with pytest.raises(ValueError, match="a head_dim of at most 128 in this recipe, got 129"):
        OPS.sdpa(wide, wide, wide, **HALF, smooth="k")
