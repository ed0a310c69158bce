"""The oracle's quantizers against rules R1-R7, spelled out with exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tests.numerics import same_bits
from torch_sage import reference

QUIET_NAN = 0x7FC00000
GRANULARITIES = ("tensor", "token", "block", "warp", "thread")


def fp32(x: Fraction) -> Fraction:
    """Round a positive rational to the nearest fp32, ties to even; normal results only."""
    exponent = math.floor(math.log2(x))
    exponent += (Fraction(2) ** (exponent + 1) <= x) - (Fraction(2) ** exponent > x)
    unit = Fraction(2) ** (exponent - 23)
    return round(x / unit) * unit


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("qk", "code_max", "bits"), [("int8", 127, 0x3C010204), ("int4", 7, 0x3E124925)]
)
def test_codes_and_scales_follow_the_rules_exactly(qk: str, code_max: int, bits: int) -> None:
    x = normal(1, 1, 40, 16) * torch.logspace(-20, 20, 40)[:, None]
    codes, scales = reference.quantize_query(x, qk=qk)
    constant = Fraction(torch.tensor(bits, dtype=torch.int32).view(torch.float32).item())
    for row in range(40):
        amax = Fraction(x[0, 0, row].abs().max().item())
        assert Fraction(scales[0, 0, row].item()) == fp32(amax * constant)
        inverse = fp32(code_max / amax)
        for value, code in zip(x[0, 0, row].tolist(), codes[0, 0, row].tolist(), strict=True):
            magnitude = round(fp32(abs(Fraction(value)) * inverse))  # Python rounds ties to even
            assert code == math.copysign(min(magnitude, code_max), value)


def test_inverse_is_one_correctly_rounded_division() -> None:
    """``127 / tensor`` in torch is reciprocal() * 127, rounded twice: it differs in these rows.

    The same trap waits for every kernel as ``x / scale``, as a fast division and as one FMA.
    """
    x = normal(1, 1, 4096, 64, seed=1).bfloat16().float()
    codes, _ = reference.quantize_query(x)
    amax = x.abs().amax(-1, keepdim=True)
    twice = (x * (amax.reciprocal() * 127)).round().to(torch.int8)
    divided = (x / (amax / 127)).round().to(torch.int8)
    once = (x.double() * (127 / amax.double()).float()).float().round().to(torch.int8)
    assert torch.equal(codes, once)
    assert not torch.equal(codes, twice)
    assert not torch.equal(codes, divided)


def test_ties_round_to_even_and_ranges_are_symmetric() -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 126.5]).view(1, 1, 1, 8)
    codes, scales = reference.quantize_query(x)
    assert codes.flatten().tolist() == [127, 0, 2, 2, 0, -2, -127, 126]
    assert scales.item() == 1.0


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), -float("nan")])
def test_group_that_is_not_finite_has_nan_scale_and_zero_codes(number: float) -> None:
    x = normal(1, 1, 64, 8)
    x[0, 0, 21, 3] = number
    codes, scales = reference.quantize_query(x, granularity="thread")
    poisoned = [5, 13, 21, 29]  # 8 * 0 + 21 % 8: rows 5, 13, 21, 29 of warp 0
    assert scales.isnan().nonzero()[:, -1].tolist() == [5]
    assert scales[0, 0, 5].view(torch.int32).item() == QUIET_NAN
    assert (codes[0, 0, poisoned] == 0).all()
    clean = [r for r in range(64) if r not in poisoned]
    assert (codes[0, 0, clean] != 0).any(-1).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zero_groups_have_positive_scales(granularity: str) -> None:
    codes, scales, _ = reference.quantize_key(torch.zeros(1, 2, 70, 8), granularity=granularity)
    assert (codes == 0).all()
    assert (scales > torch.finfo(torch.float32).tiny).all()


def test_subnormal_and_huge_groups_stay_in_range() -> None:
    x = torch.tensor([[1e-45, 0.0], [2.0**-100, -(2.0**-101)], [3e38, -1.0]])
    codes, scales = reference.quantize_query(x.view(1, 1, 3, 2))
    assert codes[0, 0].tolist() == [[0, 0], [127, -64], [127, 0]]
    assert scales.isfinite().all()


def test_query_groups_are_those_of_the_tensor_core_fragment() -> None:
    """Query group (w, i) is {W w + i + 8 r}, as algorithm.md 2.2 spells it out."""
    for warp in (16, 32):
        index, groups = reference.query_groups(300, "thread", 128, warp)
        assert groups == 3 * (128 // warp) * 8
        for w in range(300 // warp):
            for i in range(8):
                rows = [warp * w + i + 8 * r for r in range(warp // 8)]
                members = (index == 8 * w + i).nonzero().flatten().tolist()
                assert members == [row for row in rows if row < 300]


def test_key_groups_are_those_of_the_tensor_core_fragment() -> None:
    """Key group (t, j) is {BK t + 8 r + 2 j, BK t + 8 r + 2 j + 1}."""
    for block in (64, 128):
        index, groups = reference.key_groups(300, "thread", block)
        assert groups == -(-300 // block) * 4
        for t in range(-(-300 // block)):
            for j in range(4):
                firsts = [block * t + 8 * r + 2 * j for r in range(block // 8)]
                expected = [m for first in firsts for m in (first, first + 1) if m < 300]
                assert (index == 4 * t + j).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("seqlen", [0, 1, 63, 64, 65, 127, 128, 129, 200])
def test_scale_shapes_follow_the_table(granularity: str, seqlen: int) -> None:
    blocks_q, blocks_k = -(-seqlen // 128), -(-seqlen // 64)
    x = normal(2, 3, seqlen, 8)
    _, q_scales = reference.quantize_query(x, granularity=granularity)
    _, k_scales, _ = reference.quantize_key(x, granularity=granularity)
    expected = {
        "tensor": (1, 1),
        "token": (seqlen, seqlen),
        "block": (blocks_q, blocks_k),
        "warp": (blocks_q * 4, blocks_k),
        "thread": (blocks_q * 32, blocks_k * 4),
    }[granularity]
    assert (q_scales.shape, k_scales.shape) == ((2, 3, expected[0]), (2, 3, expected[1]))
    assert (q_scales > 0).all()
    assert (k_scales > 0).all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_each_scale_is_the_maximum_of_its_own_rows(granularity: str) -> None:
    x = normal(1, 1, 200, 8)
    index, _ = reference.query_groups(200, granularity, 128, 32)
    _, scales = reference.quantize_query(x, granularity=granularity)
    for group in index.unique().tolist():
        single, expected = reference.quantize_query(x[:, :, index == group], granularity="tensor")
        assert torch.equal(scales[..., group], expected[..., 0])
        assert single.abs().max() == 127


def test_key_mean_is_subtracted_in_fp32() -> None:
    key = (normal(1, 1, 50, 8) + 100).bfloat16()
    _, _, mean = reference.quantize_key(key)
    codes, scales, given = reference.quantize_key(key, mean)
    smoothed, smoothed_scales = reference.quantize_query(key.float() - mean[..., None, :])
    assert torch.equal(codes, smoothed)
    assert torch.equal(scales, smoothed_scales)
    assert torch.equal(given, mean)
    torch.testing.assert_close(mean.double(), key.double().mean(-2), rtol=1e-6, atol=0)
    assert not torch.equal(mean, mean.bfloat16().float())


def test_mean_without_smoothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="mean must be None without smoothing"):
        reference.quantize_key(normal(1, 1, 4, 8), torch.zeros(1, 1, 8), smooth=False)
    _, _, mean = reference.quantize_key(normal(1, 1, 4, 8), smooth=False)
    assert (mean == 0).all()


@pytest.mark.parametrize("pv", ["e4m3", "e4m3_fp16"])
def test_e4m3_value_is_the_nearest_code(pv: str) -> None:
    """Every positive E4M3 value is a candidate; ties go to the even code."""
    top = {"e4m3": 448.0, "e4m3_fp16": 9.0}[pv]
    value = normal(1, 1, 333, 6) * torch.logspace(-3, 3, 6)
    value[..., 4] *= torch.logspace(-4, 0, 333)  # down to E4M3 subnormals
    codes, scales, _ = reference.quantize_value(value, pv=pv)
    table = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    amax = value.abs().amax(-2, keepdim=True)
    scaled = (value * (torch.full_like(amax, top) / amax)).double().abs()[..., None]
    distance = (scaled - table).abs()
    ties = distance == distance.amin(-1, keepdim=True)
    even = torch.arange(127) % 2 == 0
    chosen = torch.where(ties & (even | (ties.sum(-1, keepdim=True) == 1)), 1, 0).argmax(-1)
    assert torch.equal(codes.double().abs(), table[chosen])
    assert torch.equal(codes.double().abs().amax(-2), torch.full((1, 1, 6), top).double())
    assert torch.equal(scales, amax[..., 0, :] * torch.tensor(1 / top))


@pytest.mark.parametrize("pv", ["bf16", "fp16", "fp16_fp16", "e4m3", "e4m3_fp16", "int8"])
def test_value_channels_are_poisoned_one_by_one(pv: str) -> None:
    value = normal(1, 2, 9, 5)
    value[0, 1, 4, 2] = float("inf")
    value[0, 0, 8, 0] = float("nan")
    codes, scales, _ = reference.quantize_value(value, pv=pv)
    assert scales.isnan().nonzero().tolist() == [[0, 0, 0], [0, 1, 2]]
    assert (codes[0, 0, :, 0].float() == 0).all()
    assert (codes[0, 1, :, 2].float() == 0).all()
    assert codes.float().isfinite().all()


def test_half_values_are_rounded_once_with_scale_one() -> None:
    value = normal(1, 1, 9, 5)
    codes, scales, mean = reference.quantize_value(value, pv="bf16", smooth=True)
    assert torch.equal(codes, (value - mean[..., None, :]).bfloat16())
    assert torch.equal(scales, torch.ones(1, 1, 5))
    assert torch.equal(reference.quantize_value(value.half(), pv="fp16")[0], value.half())


def test_half_values_beyond_their_format() -> None:
    """bf16 loses nothing by saturating; fp16 would hide an overflow, so it poisons the channel."""
    value = torch.tensor([3.4e38, 1e5, 1.0]).view(1, 1, 1, 3)
    codes, scales, _ = reference.quantize_value(value, pv="bf16")
    assert codes.flatten()[0].item() == torch.finfo(torch.bfloat16).max
    assert torch.equal(scales, torch.ones(1, 1, 3))
    codes, scales, _ = reference.quantize_value(value, pv="fp16")
    assert scales.flatten().isnan().tolist() == [True, True, False]
    assert codes.flatten().tolist() == [0.0, 0.0, 1.0]


def test_zero_and_constant_value_channels_stay_finite() -> None:
    """SageAttention's V scale has no floor: a zero channel gave 0 * inf = NaN (ROCm/aiter#4289)."""
    for pv in ("bf16", "fp16", "e4m3", "e4m3_fp16", "int8"):
        for value in (torch.zeros(1, 1, 7, 3), torch.full((1, 1, 7, 3), 2.5)):
            codes, scales, mean = reference.quantize_value(value, pv=pv, smooth=True)
            assert torch.equal(codes.float(), torch.zeros(1, 1, 7, 3))
            assert (scales > 0).all()
            assert torch.equal(mean, value[:, :, 0])


def test_query_smoothing_takes_the_mean_of_valid_rows_of_each_tile() -> None:
    query = normal(1, 2, 200, 4) + 5
    smoothed, mean = reference.smooth_query(query, 128)
    torch.testing.assert_close(mean[:, :, 130], query[:, :, 128:].mean(2))
    torch.testing.assert_close(mean[:, :, 0], query[:, :, :128].mean(2))
    assert torch.equal(smoothed, query - mean)


def test_int4_packing_is_two_nibbles_low_channel_first() -> None:
    codes = torch.tensor([-7, 7, 0, -1, 1, 5], dtype=torch.int8)
    packed = reference.pack_int4(codes)
    assert packed.tolist() == [0x79, 0xF0, 0x51]
    everything = torch.cartesian_prod(*[torch.arange(-7, 8, dtype=torch.int8)] * 2)
    assert torch.equal(reference.unpack_int4(reference.pack_int4(everything)), everything)
    with pytest.raises(ValueError, match="codes must have an even head_dim, got 5"):
        reference.pack_int4(codes[:5])


def test_quantizers_accept_empty_tensors() -> None:
    for shape in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4)):
        codes, scales, mean = reference.quantize_key(torch.empty(shape), granularity="thread")
        assert codes.shape == shape
        assert scales.shape == (*shape[:2], 4 if shape[2] else 0)
        assert torch.equal(mean, torch.zeros(shape[0], shape[1], shape[3]))


def test_strides_and_dtypes_do_not_change_codes() -> None:
    x = normal(2, 3, 70, 16).bfloat16()
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(reference.quantize_key(x), reference.quantize_key(strided), strict=True):
        assert same_bits(a, b)
    for a, b in zip(reference.quantize_key(x), reference.quantize_key(x.float()), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qk": "int5"}, "qk must be one of"),
        ({"granularity": "row"}, "granularity must be one of"),
        ({"warp": 48}, "warp must divide block=128"),
    ],
)
def test_bad_arguments_name_what_was_expected(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference.quantize_query(normal(1, 1, 4, 8), **arguments)
