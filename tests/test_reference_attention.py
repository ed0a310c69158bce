"""The oracle's attention against torch and against what the specification promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import CASES, EMPTY_CASES, AttentionCase, make_inputs
from tests.numerics import (
    assert_same_special_values,
    assert_within_budget,
    exact_attention,
    expect,
    relative_l1,
)
from torch_sage import reference

I8F16 = {"qk": "int8", "granularity": "token", "pv": "fp16", "smooth": ""}
THREAD = {"qk": "int8", "granularity": "thread", "pv": "bf16", "smooth": "k"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def representable(b: int, h: int, n: int, d: int, seed: int) -> Tensor:
    """Return integers whose every row has maximum 127: their INT8 codes are they themselves."""
    x = torch.randint(-127, 128, (b, h, n, d), generator=generator(seed)).float()
    x[..., seed % d] = 127.0
    return x


def sdpa(q: Tensor, k: Tensor, v: Tensor, *semantics: Any) -> Tensor:
    """torch's SDPA in fp64, its causal corner and its masks."""
    mask, causal, scale = semantics
    n, m = q.shape[2], k.shape[2]
    if causal != "none":
        mask = torch.ones(n, m, dtype=torch.bool).tril(0 if causal == "top_left" else m - n)
    elif mask is not None and mask.is_floating_point():
        mask = mask.double()
    return F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask, scale=scale, enable_gqa=True
    )


def assert_exact(case: AttentionCase) -> None:
    """On representable operands nothing is rounded, so R64 must be fp64 SDPA itself."""
    inputs = make_inputs(case)
    q = representable(case.batch, case.heads_q, case.seqlen_q, case.head_dim, 1)
    k = representable(case.batch, case.heads_kv, case.seqlen_k, case.head_dim, 2)
    v = inputs.value.half()
    scale = (inputs.scale if inputs.scale is not None else 0.3) / 127**2
    semantics = (inputs.attn_mask, inputs.causal, scale)
    recipe = I8F16 | {"granularity": case.granularity}
    actual = reference.attention(q, k, v, *semantics, **recipe, precision="exact")
    expected = sdpa(q, k, v, *semantics)
    torch.testing.assert_close(actual.output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        actual.lse, exact_attention(q, k, v, *semantics).lse, rtol=1e-12, atol=1e-12
    )
    low = reference.attention(q, k, v, *semantics, **recipe).output
    # Rounding P to fp16 errs by 2**-11 relative, in the numerator and in the row sum, and by half
    # of the subnormal step 2**-24 where P is tiny; fp32 logits carry 2**-23 of the largest bias.
    mask = inputs.attn_mask
    bias = 0.0 if mask is None or mask.dtype == torch.bool else mask[mask.isfinite()].abs().max()
    relative = 2**-10 + 2**-20 + 2**-22 * bias
    tiny = 2**-24 * v.float().abs().sum(2, keepdim=True)
    bound = relative * sdpa(q, k, v.abs(), *semantics)
    bound += tiny.repeat_interleave(case.heads_q // case.heads_kv, dim=1)
    assert ((low - expected).abs() <= bound).all()


SEMANTIC_CASES = [c for c in CASES if c.data == "normal" and c.layout == "bhsd"]


@pytest.mark.parametrize("case", SEMANTIC_CASES, ids=lambda c: c.id)
def test_exact_on_operands_that_need_no_rounding(case: AttentionCase) -> None:
    assert_exact(case)


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
def test_tails_of_every_length(causal: str) -> None:
    for length in range(131):
        shape = {"seqlen_k": length, "head_dim": 8, "head_dim_v": 3, "heads_q": 1, "heads_kv": 1}
        if length:
            assert_exact(AttentionCase(seqlen_q=length, causal=causal, **shape))
        assert_exact(AttentionCase(seqlen_q=9, causal=causal, **shape))


@pytest.mark.parametrize("case", [*CASES, *EMPTY_CASES], ids=lambda c: c.id)
def test_recipe_stays_within_its_own_budget(case: AttentionCase) -> None:
    """R_low uses half of the budget by definition; NaN, infinities and cosine are the test."""
    inputs = make_inputs(case)
    expected = expect(*inputs, **case.recipe)
    assert_within_budget(expected.naive.output, expected, lse=expected.naive.lse)


@pytest.mark.parametrize("smooth", ["", "k", "v", "kv"])
@pytest.mark.parametrize(("n", "m"), [(5, 0), (1, 1), (7, 3)])
def test_rows_that_attend_to_nothing_are_zero(n: int, m: int, smooth: str) -> None:
    q, k, v = normal(1, 2, n, 8), normal(1, 2, m, 8, seed=1), normal(1, 2, m, 8, seed=2) + 1
    for precision in ("recipe", "exact"):
        recipe = THREAD | {"smooth": smooth, "precision": precision}
        result = reference.attention(q, k, v, causal="bottom_right", **recipe)
        hidden = max(n - m, 0)
        assert torch.equal(result.output[:, :, :hidden], torch.zeros_like(q[:, :, :hidden]))
        assert result.lse[:, :, :hidden].isneginf().all()
        assert (result.output[:, :, hidden:] != 0).all()
        assert result.lse[:, :, hidden:].isfinite().all()


def test_mask_of_finfo_min_in_a_whole_row_is_uniform() -> None:
    """transformers masks padding with finfo.min; times log2(e) that would overflow to -inf."""
    q, k, v = (normal(1, 1, 6, 8, seed=s) for s in range(3))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        mask = torch.zeros(6, 6, dtype=dtype)
        mask[2] = torch.finfo(dtype).min
        expected = F.scaled_dot_product_attention(q, k, v, mask.float())
        for precision in ("recipe", "exact"):
            actual = reference.attention(q, k, v, mask, **THREAD, precision=precision).output
            torch.testing.assert_close(
                actual[0, 0, 2].float(), expected[0, 0, 2], rtol=0.02, atol=0.02
            )


def test_float_bias_is_multiplied_by_log2e_exactly_once() -> None:
    """SageAttention's Triton kernel adds natural-log biases to base-2 logits: weaker by .693."""
    q, k, v = (normal(1, 2, 70, 32, seed=s) for s in range(3))
    bias = 3 * normal(2, 70, 70, seed=3)
    expected = F.scaled_dot_product_attention(q, k, v, bias)
    right = relative_l1(reference.attention(q, k, v, bias, **THREAD).output, expected)
    weak = relative_l1(reference.attention(q, k, v, bias * 0.693, **THREAD).output, expected)
    assert right < 0.02  # the gate of `i8f16`
    assert weak > 10 * right


def test_query_head_reads_its_own_kv_head() -> None:
    q, k, v = normal(2, 6, 20, 16), normal(2, 2, 30, 16, seed=1), normal(2, 2, 30, 16, seed=2)
    grouped = reference.attention(q, k, v, **THREAD)
    for head in range(6):
        one = slice(head, head + 1), slice(head // 3, head // 3 + 1)
        single = reference.attention(q[:, one[0]], k[:, one[1]], v[:, one[1]], **THREAD)
        torch.testing.assert_close(grouped.output[:, one[0]], single.output, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grouped.lse[:, one[0]], single.lse)


def poisoned_rows(result: reference.AttentionOutput) -> list[list[int]]:
    return result.output.isnan().any(-1).nonzero().tolist()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["recipe", "exact"])
def test_poisoned_query_row_takes_its_group(number: float, precision: str) -> None:
    """The set that algorithm.md 3.3 states: row 5 poisons 5, 13, 21, 29 for W = 32."""
    q, k, v = normal(1, 2, 64, 16), normal(1, 1, 40, 16, seed=1), normal(1, 1, 40, 4, seed=2)
    q[0, 1, 5, 2] = number
    result = reference.attention(q, k, v, **THREAD, precision=precision)
    assert poisoned_rows(result) == [[0, 1, row] for row in (5, 13, 21, 29)]
    assert result.lse.isnan().nonzero().tolist() == [[0, 1, row] for row in (5, 13, 21, 29)]
    token = reference.attention(q, k, v, **THREAD | {"granularity": "token"}, precision=precision)
    assert poisoned_rows(token) == [[0, 1, 5]]


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
@pytest.mark.parametrize("precision", ["recipe", "exact"])
def test_poisoned_key_takes_the_head_if_smoothed_else_who_sees_its_group(
    number: float, precision: str
) -> None:
    q, k, v = normal(2, 4, 64, 16), normal(2, 2, 64, 16, seed=1), normal(2, 2, 64, 4, seed=2)
    k[1, 0, 43, 0] = number
    smoothed = reference.attention(q, k, v, causal="top_left", **THREAD, precision=precision)
    assert poisoned_rows(smoothed) == [[1, head, row] for head in (0, 1) for row in range(64)]
    recipe = THREAD | {"smooth": "", "precision": precision}
    plain = reference.attention(q, k, v, causal="top_left", **recipe)
    first = 2  # the group of row 43 holds every row with m % 8 in (2, 3)
    assert poisoned_rows(plain) == [[1, head, row] for head in (0, 1) for row in range(first, 64)]
    token = reference.attention(q, k, v, causal="top_left", **recipe | {"granularity": "token"})
    assert poisoned_rows(token) == [[1, head, row] for head in (0, 1) for row in range(43, 64)]


@pytest.mark.parametrize("smooth", ["", "v"])
@pytest.mark.parametrize("precision", ["recipe", "exact"])
@pytest.mark.parametrize("pv", ["bf16", "fp16", "fp16_fp16", "e4m3", "e4m3_fp16", "int8"])
def test_poisoned_value_takes_its_channel_of_rows_that_attend(
    pv: str, precision: str, smooth: str
) -> None:
    q, k, v = normal(1, 4, 9, 8), normal(1, 2, 9, 8, seed=1), normal(1, 2, 9, 5, seed=2)
    v[0, 1, 8, 3] = float("inf")
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[4] = False
    recipe = THREAD | {"pv": pv, "smooth": smooth, "precision": precision}
    result = reference.attention(q, k, v, mask, **recipe)
    rows = [row for row in range(9) if row != 4]
    expected = [[0, head, row, 3] for head in (2, 3) for row in rows]
    assert result.output.isnan().nonzero().tolist() == expected
    assert torch.equal(result.output[:, :, 4], torch.zeros_like(result.output[:, :, 4]))
    assert result.lse.isfinite().sum() == 4 * 8


@pytest.mark.parametrize("precision", ["recipe", "exact"])
def test_hidden_rows_and_keys_are_not_poisoned_by_scores(precision: str) -> None:
    q, k, v = normal(1, 1, 5, 8), normal(1, 1, 5, 8, seed=1), normal(1, 1, 5, 8, seed=2)
    q[0, 0, 1], k[0, 0, 3] = float("nan"), float("nan")
    visible = torch.ones(5, 5, dtype=torch.bool)
    visible[1] = False
    visible[:, 3] = False
    hidden = torch.zeros(5, 5).masked_fill(~visible, -torch.inf)
    recipe = I8F16 | {"precision": precision}
    for mask in (visible, hidden):
        result = reference.attention(q, k, v, mask, **recipe)
        assert result.output.isfinite().all()
        assert result.lse.isneginf().nonzero().tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["recipe", "exact"])
def test_nan_and_plus_infinity_in_a_float_mask_give_nan_rows(number: float, precision: str) -> None:
    q, k, v = (normal(1, 1, 5, 8, seed=s) for s in range(3))
    mask = torch.zeros(5, 5)
    mask[2, 1] = number
    result = reference.attention(q, k, v, mask, **I8F16, precision=precision)
    assert poisoned_rows(result) == [[0, 0, 2]]


def test_wherever_torch_is_not_finite_the_oracle_is_nan() -> None:
    """2.10.3 on every single poisoned element, both of torch's CPU backends, causal and not."""
    backends = torch.nn.attention.SDPBackend
    for operand in range(3):
        for number in (float("nan"), float("inf"), float("-inf")):
            tensors = [normal(1, 2, 20, 8, seed=s) for s in range(3)]
            tensors[operand][0, 1, 7, 2] = number
            for causal in ("none", "top_left"):
                everywhere = torch.ones(1, 2, 20, 8, dtype=torch.bool)
                for backend in (backends.MATH, backends.FLASH_ATTENTION):
                    with torch.nn.attention.sdpa_kernel(backend):
                        theirs = F.scaled_dot_product_attention(
                            *tensors, is_causal=causal != "none"
                        )
                    everywhere &= ~theirs.isfinite()
                ours = reference.attention(*tensors, causal=causal, **THREAD).output
                assert (ours.isnan() | ~everywhere).all()
                assert not ours.isinf().any()


@pytest.mark.parametrize("smooth", ["", "v"])
@pytest.mark.parametrize("precision", ["recipe", "exact"])
def test_output_saturates_instead_of_overflowing_by_rounding(precision: str, smooth: str) -> None:
    """65504 becomes 65536 in bf16, infinity in an fp16 output; a convex combination cannot be."""
    q, k = (normal(1, 1, 70, 8, seed=s).half() for s in range(2))
    v = torch.full((1, 1, 70, 8), 65504.0).half()
    recipe = THREAD | {"smooth": smooth, "precision": precision}
    result = reference.attention(q, k, v, **recipe)
    assert (result.output == 65504).all()


def test_lse_correction_is_fp32() -> None:
    """A 16-bit Q . mean was wrong by up to .33 where |Q . mean| is 1.5e3, breaking ring merges."""
    q, k, v = normal(1, 2, 100, 128) + 2, normal(1, 2, 90, 128, seed=1), normal(1, 2, 90, 8, seed=3)
    common = 600 * normal(1, 2, 1, 128, seed=2)
    errors = []
    for keys in (k, k + common):
        exact = exact_attention(q, keys, v).lse
        smoothed = reference.attention(q, keys, v, **THREAD | {"granularity": "token"}).lse
        errors.append((smoothed - exact).abs().max().item())
    shift = exact.abs().max().item()
    assert shift > 1.5e3
    # Only the fp32 rounding of K + common, of its mean and of the sum may be added.
    assert errors[1] < 2 * errors[0] + 4 * 2**-23 * shift * 128**0.5


@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize("recipe", [THREAD, THREAD | {"qk": "int4", "smooth": "qk", "pv": "e4m3"}])
def test_shards_merge_by_lse_as_well_as_unsplit(shards: int, recipe: dict[str, str]) -> None:
    """Each shard has its own mean; only a right LSE makes the merged result as good as unsplit."""
    q, v = normal(1, 2, 128, 64), normal(1, 2, 512, 64, seed=3)
    k = normal(1, 2, 512, 64, seed=1) + 4 * normal(1, 2, 1, 64, seed=2)
    exact = exact_attention(q, k, v).output
    run = {**recipe, "accumulator": "fp32"}
    pieces = [
        reference.attention(q, ks, vs, **run)
        for ks, vs in zip(k.chunk(shards, 2), v.chunk(shards, 2), strict=True)
    ]
    weights = torch.stack([p.lse for p in pieces]).softmax(0)[..., None]
    merged = (torch.stack([p.output for p in pieces]) * weights).sum(0)
    unsplit = relative_l1(reference.attention(q, k, v, **run).output, exact)
    assert relative_l1(merged, exact) < 1.25 * unsplit  # Emu: equal; 25 % is this sample's noise
    if recipe["qk"] == "int8":  # INT4 alone is as wrong as the missing weights are
        unweighted = torch.stack([p.output for p in pieces]).mean(0)
        assert relative_l1(unweighted, exact) > 2 * unsplit


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
def test_packed_sequences_are_independent(causal: str) -> None:
    lengths_q, lengths_k = [5, 0, 70, 3, 1], [9, 4, 64, 0, 130]
    q, k = normal(79, 4, 16), normal(207, 2, 16, seed=1) + 3
    v = normal(207, 2, 8, seed=2)
    starts_q, starts_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    packed = reference.varlen_attention(q, k, v, starts_q, starts_k, causal=causal, **THREAD)
    assert packed.output.shape == (79, 4, 8)
    assert packed.lse.shape == (4, 79)
    rows = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    exact = [
        exact_attention(*(x.transpose(0, 1)[None] for x in row), causal=causal) for row in rows
    ]
    output = torch.cat([x.output[0].transpose(0, 1) for x in exact])
    assert relative_l1(packed.output, output) < 0.02
    lse = torch.cat([x.lse[0] for x in exact], -1)
    assert_same_special_values(packed.lse, lse)
    assert (packed.output[75:78] == 0).all()  # the queries whose sequence has no key


def test_other_smoothing_mean_shifts_only_codes() -> None:
    q, k, v = (normal(1, 1, 60, 32, seed=s) for s in range(3))
    own = reference.attention(q, k, v, **THREAD)
    other = reference.attention(q, k, v, **THREAD, key_mean=normal(1, 1, 32, seed=4) / 8)
    assert not torch.equal(own.output, other.output)
    exact = exact_attention(q, k, v)
    assert relative_l1(other.output, exact.output) < 0.02
    assert (other.lse - exact.lse).abs().max() < 0.02


@pytest.mark.parametrize("pv", ["bf16", "e4m3"])
def test_rounded_row_sum_reproduces_constant_values_exactly(pv: str) -> None:
    """With the sum of rounded P the weights sum to 1; with that of P they do not (2.6)."""
    q, k = normal(1, 1, 80, 32), normal(1, 1, 90, 32, seed=1)
    v = torch.full((1, 1, 90, 4), 1.75)
    run = THREAD | {"pv": pv, "accumulator": "fp32"}
    rounded = reference.attention(q, k, v, **run, sum_rounded=True).output
    unrounded = reference.attention(q, k, v, **run, sum_rounded=False).output
    assert (rounded - 1.75).abs().max() < 1.75 * 2**-20
    assert (unrounded - 1.75).abs().max() > 1.75 * 2**-14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "low"}, "precision must be one of"),
        ({"causal": "lower"}, "causal must be one of"),
        ({"smooth": "vk"}, "smooth must be letters of 'qkv'"),
        ({"pv": "e5m2"}, "pv must be one of"),
        ({"accumulator": "fp22"}, "accumulator must be one of"),
        ({"attn_mask": torch.ones(3, 3), "causal": "top_left"}, "attn_mask must be None with"),
        ({"key": torch.zeros(1, 2, 3, 9)}, "key must have shape"),
        ({"value": torch.zeros(1, 2, 4, 8)}, "value must have shape"),
        ({"key": torch.zeros(1, 3, 3, 8), "value": torch.zeros(1, 3, 3, 8)}, "divisor of 2 heads"),
        ({"key": torch.zeros(1, 0, 3, 8), "value": torch.zeros(1, 0, 3, 8)}, "divisor of 2 heads"),
    ],
)
def test_bad_arguments_name_what_was_expected(change: dict[str, Any], message: str) -> None:
    arguments = {name: torch.zeros(1, 2, 3, 8) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=message):
        reference.attention(**{**arguments, **THREAD, **change})


@pytest.mark.parametrize(
    ("starts_q", "starts_k", "message"),
    [
        ([0, 3], [0, 2, 4], "cu_seqlens_k must have 2 elements"),
        ([0, 2], [0, 4], "cu_seqlens_q must ascend from 0 to 3"),
        ([0, 2, 1, 3], [0, 1, 2, 4], "cu_seqlens_q must ascend"),
    ],
)
def test_bad_offsets_name_what_was_expected(
    starts_q: list[int], starts_k: list[int], message: str
) -> None:
    packed = (torch.zeros(3, 2, 8), torch.zeros(4, 2, 8), torch.zeros(4, 2, 8))
    with pytest.raises(ValueError, match=message):
        reference.varlen_attention(
            *packed, torch.tensor(starts_q), torch.tensor(starts_k), **THREAD
        )


@pytest.mark.parametrize("precision", ["exact", "recipe"])
def test_a_given_query_mean_is_used(precision: str) -> None:
    """Its own mean gives the same bits; another one other codes, and hardly another result."""
    q, k, v, *_ = make_inputs(AttentionCase(heads_q=4, data="channel_bias"))
    recipe = {"qk": "int8", "granularity": "token", "pv": "bf16", "smooth": "qk"}
    recipe |= {"precision": precision}
    own = reference.attention(q, k, v, **recipe, smooth_block=q.shape[2])
    given = reference.attention(q, k, v, **recipe, query_mean=q.double().mean(2).float())
    assert torch.equal(own.output, given.output) and torch.equal(own.lse, given.lse)
    other = reference.attention(q, k, v, **recipe, query_mean=torch.zeros(1, 4, q.shape[3]))
    assert not torch.equal(other.output, own.output)
    assert relative_l1(other.output, own.output) < 0.02


@pytest.mark.parametrize("precision", ["recipe", "exact"])
def test_blocks_of_query_rows_may_be_given_their_means(precision: str) -> None:
    q, k, v = normal(1, 2, 40, 16), normal(1, 1, 50, 16, seed=1), normal(1, 1, 50, 8, seed=2)
    recipe = THREAD | {"smooth": "q", "precision": precision, "smooth_block": 32}
    means = torch.stack([x.double().mean(2).float() for x in q.split(32, dim=2)], dim=2)
    own, given = (reference.attention(q, k, v, **recipe, query_mean=m) for m in (None, means))
    assert torch.equal(own.output, given.output) and torch.equal(own.lse, given.lse)
