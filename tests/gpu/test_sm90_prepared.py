"""Prepared keys and values: every bit of what is written, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_sage
from tests.cases import DTYPES, AttentionCase, make_inputs
from tests.gpu.shared import OPS, on_gpu, same_numbers
from tests.gpu.sm90 import (
    EXPONENTIALS,
    RECIPE,
    SMOOTHING,
    VALUE_GROUP,
    VALUE_MAX,
    key_image,
    value_image,
    width_of,
)
from tests.numerics import exact_attention, relative_l1, same_bits
from torch_sage import reference
from torch_sage.reference.quantize import AMAX_FLOOR, value_shift

KEYS = (1, 7, 63, 64, 65, 127, 128, 129, 1000, 1023, 1024, 1025, 1100, 2048, 2500, 5000)
# Of an average: fp32 sums of at most 1024 terms, fewer than 64 of them one behind the other.
SUM_ERROR = 64 * torch.finfo(torch.float32).eps / 2


def make_kv(m: int, d: int, dv: int, dtype: str, layout: str) -> tuple[Tensor, Tensor]:
    """Return biased keys and values with rows that are zero, tiny or not finite."""
    case = AttentionCase(
        batch=2, heads_kv=2, seqlen_q=1, seqlen_k=m, head_dim=d, head_dim_v=dv,
        dtype=dtype, layout=layout, data="channel_bias",
    )  # fmt: skip
    inputs = on_gpu(make_inputs(case))
    k, v = inputs.key, inputs.value
    if m > 20:
        k[0, 0, 8:12] = 0
        v[0, 0, :, 0] = -0.0
        k[1, 0] *= 1e-5
        v[1, 0] *= 1e-5
        k[0, 1, m // 2, d // 2] = torch.nan
        v[0, 1, m // 3, dv // 2] = -torch.inf
        v[0, 1, m - 1, 0] = torch.nan
    return k, v


def check_key(k: Tensor, smooth: str, prepared: tuple[Tensor, ...], width: int) -> None:
    """Given the mean, codes and scales of K are the reference's bits."""
    codes, scales, mean = reference.quantize_key(
        k, prepared[2] if smooth else None, smooth=bool(smooth), granularity="token_thread"
    )
    assert same_bits(prepared[2], mean) and mean.isfinite().all()
    assert same_numbers(prepared[1].flatten(2), scales)
    found = key_image(prepared[0], width)
    assert same_bits(found[:, :, : k.shape[2], : k.shape[3]], codes)
    assert not found[:, :, k.shape[2] :].any() and not found[..., k.shape[3] :].any()


def check_value(v: Tensor, smooth: str, prepared: tuple[Tensor, ...], width: int) -> None:
    """Codes and scales of V are the reference's bits, smoothed within the rounding of the mean."""
    m = v.shape[2]
    padded = F.pad(v, (0, width - v.shape[3])).float()
    means, amax = [], []
    for part in torch.split(padded, VALUE_GROUP, dim=2):
        means.append(reference.token_mean(part) if smooth else torch.zeros_like(part[:, :, 0]))
        size = (part - means[-1][:, :, None]).abs()
        amax.append(torch.where(size.isfinite(), size, torch.inf).amax(2))
    mean, largest = torch.stack(means, 2), torch.stack(amax, 2)
    found_codes, scales, shift = value_image(prepared[3], width), prepared[4], prepared[5]
    assert torch.equal(scales.isnan(), largest.isinf())
    defined = ~scales.isnan()

    slack = SUM_ERROR * (largest + mean.abs()) if smooth else torch.zeros_like(largest)
    floored = (scales * VALUE_MAX).clamp_min(AMAX_FLOOR)
    assert ((floored - largest.clamp_min(AMAX_FLOOR)).abs() <= slack)[defined].all()
    inverse = torch.full_like(floored, VALUE_MAX) / floored

    def of_tokens(x: Tensor) -> Tensor:
        return x.repeat_interleave(VALUE_GROUP, 2)[:, :, :m]

    def code(center: Tensor) -> Tensor:
        x = (padded - of_tokens(center)) * of_tokens(inverse)
        return x.clamp(-VALUE_MAX, VALUE_MAX).to(torch.float8_e4m3fn)

    found = found_codes[:, :, :m].contiguous().view(torch.float8_e4m3fn)
    known = of_tokens(defined)
    if smooth:
        low, high = code(mean + slack).float(), code(mean - slack).float()
        assert ((low <= found.float()) & (found.float() <= high))[known].all()
    else:
        assert torch.equal(found.view(torch.uint8)[known], code(mean).view(torch.uint8)[known])
    assert not found_codes[:, :, m:].any() and not found_codes[..., v.shape[3] :].any()

    exact = value_shift(padded, torch.zeros_like(mean), found, scales, VALUE_GROUP)
    bound = SUM_ERROR * (largest + exact.abs() + mean.abs())
    assert ((shift.double() - exact).abs() <= bound)[defined].all()


def assert_prepared(k: Tensor, v: Tensor, smooth: str) -> None:
    prepared = OPS.prepare_kv(k, v, smooth=smooth)
    width = width_of(k.shape[3], v.shape[3])
    check_key(k, "k" if "k" in smooth else "", prepared, width)
    check_value(v, "v" if "v" in smooth else "", prepared, width)


@pytest.mark.parametrize("smooth", SMOOTHING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d", "dv"),
    [(64, 64), (128, 128), (40, 64), (8, 128), (80, 33), (100, 128), (1, 1), (256, 256), (160, 40)],
)
def test_every_bit_is_the_references(d: int, dv: int, dtype: str, smooth: str) -> None:
    for m in KEYS:
        assert_prepared(*make_kv(m, d, dv, dtype, "bhsd"), smooth)


@pytest.mark.parametrize("layout", ["bshd", "sliced", "fused", "expanded", "last_dim_strided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_nothing(dtype: str, layout: str) -> None:
    for m, d, dv in ((77, 64, 64), (1500, 128, 96), (300, 33, 57)):
        k, v = make_kv(m, d, dv, dtype, layout)
        strided = OPS.prepare_kv(k, v)
        for a, b in zip(strided, OPS.prepare_kv(k.contiguous(), v.contiguous()), strict=True):
            assert same_numbers(a, b) if a.is_floating_point() else same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_groups_that_blocks_take_one_after_another_are_those_of_each_head(
    head_dim: int, dtype: torch.dtype
) -> None:
    """More groups than blocks at once: what one leaves in shared memory must not reach the next."""
    heads, few = 64, 4
    sizes = torch.linspace(9, 0, heads, device="cuda")[:, None, None]
    bias = sizes * torch.randn(2, 2, heads, 1, head_dim, device="cuda")
    k, v = (bias + torch.randn(2, 2, heads, 2100, head_dim, device="cuda")).to(dtype)
    at_once = OPS.prepare_kv(k, v)
    for batch in range(2):
        for first in range(0, heads, few):
            some = slice(batch, batch + 1), slice(first, first + few)
            for found, expected in zip(at_once, OPS.prepare_kv(k[some], v[some]), strict=True):
                assert same_bits(found[some], expected)


def test_means_are_near_those_of_all_tokens() -> None:
    """32 tokens of N(c, 1): four standard errors and the spread over 4,096 channels."""
    bias = 10 * torch.randn(1, 32, 1, 128, device="cuda")
    k = (torch.randn(1, 32, 4000, 128, device="cuda") + bias).bfloat16()
    mean = OPS.prepare_kv(k, k, smooth="kv")[2]
    assert (mean - bias[:, :, 0]).abs().max() < 6 / 32**0.5


@pytest.mark.parametrize("exponential", EXPONENTIALS)
@pytest.mark.parametrize("smooth", SMOOTHING)
@pytest.mark.parametrize(
    ("n", "m", "d", "dv", "causal", "mask"),
    [
        (300, 300, 64, 64, "top_left", "none"),
        (100, 2300, 128, 128, "bottom_right", "none"),
        (257, 1100, 80, 33, "none", "none"),
        (40, 129, 64, 128, "none", "float"),
        (1, 1, 1, 1, "none", "bool"),
        (70, 1200, 256, 200, "bottom_right", "none"),
    ],
)
def test_attention_is_that_of_the_whole_op(
    n: int, m: int, d: int, dv: int, causal: str, mask: str, smooth: str, exponential: str
) -> None:
    case = AttentionCase(
        batch=2, heads_q=4, heads_kv=2, seqlen_q=n, seqlen_k=m, head_dim=d, head_dim_v=dv,
        dtype="bf16", causal=causal, mask=mask, scale=-0.2 if d == 80 else None,
    )  # fmt: skip
    query, key, value, *semantics = on_gpu(make_inputs(case))
    recipe: dict[str, Any] = {"exponential": exponential, "output_order": "bshd"}
    prepared = OPS.prepare_kv(key, value, smooth=smooth)
    operands = (query, *prepared, m, dv, *semantics)
    whole = (query, key, value, *semantics)
    expected = OPS.sdpa(*whole, **RECIPE, smooth=smooth, **recipe)
    found = OPS.attention_prepared(*operands, **recipe)
    assert same_bits(found, expected) and found.stride() == expected.stride()
    found = OPS.attention_prepared_with_lse(*operands, **recipe)
    expected = OPS.sdpa_with_lse(*whole, **RECIPE, smooth=smooth, **recipe)
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("causal", ["none", "bottom_right"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_parts_merge_to_what_all_keys_give(head_dim: int, causal: str) -> None:
    """A part's sum has the errors of its probabilities, which its output was divided by."""
    n, lengths = 700, (2048, 1300, 700)
    q = torch.randn(1, 4, n, head_dim, device="cuda")
    k, v = torch.randn(2, 1, 2, sum(lengths), head_dim, device="cuda")
    k, v = 3 + k, 1 + v  # the mean of a part's keys is in its LSE
    outputs, sums, exact = [], [], []
    for keys, values in zip(k.split(lengths, 2), v.split(lengths, 2), strict=True):
        prepared = OPS.prepare_kv(keys, values)
        is_last = keys.shape[2] == n  # the others are before all queries
        operands = (q, *prepared, keys.shape[2], head_dim, None, causal if is_last else "none")
        output, lse = OPS.attention_prepared_part(*operands)
        assert same_bits(output, OPS.attention_prepared(*operands))
        outputs.append(output.double())
        sums.append(lse.double())
        exact.append(OPS.attention_prepared_with_lse(*operands)[1].double())
    weights = torch.stack(sums).softmax(0)[..., None]
    merged = (weights * torch.stack(outputs)).sum(0)
    whole = exact_attention(q, k, v, None, causal)
    at_once = OPS.sdpa(q, k, v, None, causal, **RECIPE, smooth="kv", exponential="mixed")
    error, of_whole = (relative_l1(x, whole.output) for x in (merged, at_once))
    assert error < 1.1 * of_whole
    bias = torch.stack(sums) - torch.stack(exact)
    # 1 % of a sum, most of it alike in all parts, which is what merging needs.
    assert bias.abs().max() < 0.03 and bias.std() < 0.005
    assert bias.abs().max() > 0


@pytest.mark.parametrize("what", [{"exponential": "exact"}, {"attn_mask": "bool"}])
def test_parts_with_exact_exponentials_have_the_exact_lse(what: dict[str, str]) -> None:
    q, k, v = torch.randn(3, 2, 4, 300, 64, device="cuda").unbind()
    mask = torch.rand(300, 300, device="cuda") > 0.5 if "attn_mask" in what else None
    options = {"exponential": what.get("exponential", "mixed")}
    operands = (q, *OPS.prepare_kv(k, v), 300, 64, mask)
    found, expected = (
        op(*operands, **options)
        for op in (OPS.attention_prepared_part, OPS.attention_prepared_with_lse)
    )
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


def test_functions_run_the_ops() -> None:
    q, k, v = torch.randn(3, 2, 4, 300, 64, device="cuda", dtype=torch.bfloat16).unbind()
    prepared = torch_sage.prepare_kv(k, v)
    assert isinstance(prepared, torch_sage.PreparedKV)
    whole = OPS.sdpa(q, k, v, None, "top_left", **RECIPE, smooth="kv", exponential=EXPONENTIALS[0])
    found = torch_sage.attention_prepared(q, prepared, is_causal=True)
    assert same_bits(found, whole)
    tensors = dict(zip(prepared._fields, prepared[:6], strict=False))
    one = prepared._replace(**{name: x[1:, 2:] for name, x in tensors.items()})
    assert same_bits(torch_sage.attention_prepared(q[1:, 2:], one, is_causal=True), whole[1:, 2:])


@pytest.mark.parametrize("change", [{"seqlen_k": 0}, {"batch": 0}, {"seqlen_q": 0}])
def test_nothing_to_attend_to_gives_zeros(change: dict[str, int]) -> None:
    case = AttentionCase(**change)
    query, key, value, *_ = on_gpu(make_inputs(case))
    prepared = OPS.prepare_kv(key, value)
    m, dv = key.shape[2], value.shape[3]
    output, lse = OPS.attention_prepared_with_lse(query, *prepared, m, dv)
    assert not prepared[2].isnan().any()
    assert not output.any() and (lse == -torch.inf).all()


B, HQ, HKV, N, M, D, DV = 2, 4, 2, 9, 300, 80, 40
NAMES = ("query", "key_codes", "key_scales", "key_mean", "value_codes", "value_scales")
NAMES += ("value_shift", "seqlen_k", "head_dim_v", "attn_mask", "causal", "scale")
BAD: dict[str, tuple[str, Any, str]] = {
    "query rank": ("query", lambda x: x[0], "query must be 4-D"),
    "query dtype": ("query", lambda x: x.int(), "query must have dtype float32 or bfloat16"),
    "query head_dim": ("query", lambda x: x[..., :-1], "key_mean must have shape [2, 2, 79]"),
    "query heads": ("query", lambda x: x[:, :3], "key_codes must have a number of heads that"),
    "query device": ("query", lambda x: x.cpu(), "query must be on cuda"),
    "codes rank": ("key_codes", lambda x: x[0], "key_codes must be 4-D"),
    "codes shape": ("key_codes", lambda x: x[:, :, 1:], "key_codes must have shape [2, 2, 6, 8192"),
    "codes dtype": ("key_codes", lambda x: x.view(torch.uint8), "key_codes must have dtype int8"),
    "key_scales": ("key_scales", lambda x: x[..., :3], "key_scales must have shape [2, 2, 3, 4]"),
    "key_scales dtype": ("key_scales", lambda x: x.half(), "key_scales must have dtype float32"),
    "key_mean": ("key_mean", lambda x: x[:1], "key_mean must have shape [2, 2, 80], got"),
    "key_mean device": ("key_mean", lambda x: x.cpu(), "key_mean must be on cuda"),
    "value_codes": ("value_codes", lambda x: x[..., 1:], "value_codes must have shape [2, 2,"),
    "value dtype": ("value_codes", lambda x: x.view(torch.int8), "value_codes must have dtype"),
    "value_scales": ("value_scales", lambda x: x[:, :1], "value_scales must have shape [2, 2"),
    "value_shift": ("value_shift", lambda x: x[..., 1:], "value_shift must have shape [2, 2,"),
    "seqlen_k": ("seqlen_k", lambda x: -1, "seqlen_k must not be negative"),
    "other seqlen_k": ("seqlen_k", lambda x: x + 128, "key_codes must have shape [2, 2, 8, 8192]"),
    "head_dim_v": ("head_dim_v", lambda x: 0, "head_dim_v must be at least 1, got 0"),
    "wide": ("head_dim_v", lambda x: 257, "a head_dim of at most 256 in this recipe, got 257"),
    "mask": ("attn_mask", lambda x: torch.ones(N, 7, device="cuda"), "attn_mask must broadcast to"),
    "mask dtype": (
        "attn_mask",
        lambda x: torch.ones(N, M, device="cuda", dtype=torch.int32),
        "attn_mask must have dtype bool or float32",
    ),
    "causal": ("causal", lambda x: "left", "causal must be one of"),
    "scale": ("scale", lambda x: float("nan"), "scale must be finite in float32, got nan"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    """By the kernels themselves: real tensors meet no Python check."""
    name, change, message = BAD[case]
    query, key, value = (
        torch.randn(B, h, n, d, device="cuda")
        for h, n, d in ((HQ, N, D), (HKV, M, D), (HKV, M, DV))
    )
    values = (query, *OPS.prepare_kv(key, value), M, DV, None, "none", None)
    arguments = dict(zip(NAMES, values, strict=True))
    OPS.attention_prepared(**arguments)
    arguments[name] = change(arguments[name])
    for op in (OPS.attention_prepared, OPS.attention_prepared_with_lse):
        with pytest.raises(ValueError) as caught:
            op(**arguments)
        assert message in str(caught.value)


def test_bad_keys_and_recipes_are_named() -> None:
    k = torch.randn(1, 2, 8, 64, device="cuda")
    bad = [
        ({"smooth": "q"}, "smooth must be one of"),
        ({"value": k[:, :, 1:]}, "value must have"),
        ({"value": k.half()}, "value must have"),
        ({"value": k.cpu()}, "value must be on cuda"),
        ({"key": k.cpu()}, "key must be on cuda"),
        ({"key": torch.randn(1, 2, 8, 257, device="cuda")}, "head_dim between 1 and 256"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError) as caught:
            OPS.prepare_kv(**{"key": k, "value": k, **change})
        assert message in str(caught.value)
    prepared = OPS.prepare_kv(k, k)
    for recipe in ({"exponential": "fast"}, {"output_order": "hbsd"}):
        (name,) = recipe
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            OPS.attention_prepared(k, *prepared, 8, 64, **recipe)
    for name, args in (("query", (k.cpu(), k, k)), ("key", (k, k.cpu(), k))):
        with pytest.raises(ValueError, match=f"{name} must be on cuda"):
            OPS.sdpa(*args, **RECIPE, smooth="kv")
    for recipe in ({"granularity": "token"}, {"qk": "int4"}, {"smooth": "qk"}):
        (name,) = recipe
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            OPS.sdpa(k, k, k, **{**RECIPE, "smooth": "kv", **recipe})
