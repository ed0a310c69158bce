"""Quantizers: rules R1-R7 of algorithm.md 2.1, row groups of 2.2, smoothing of 2.3.

Every step is one exact or correctly rounded IEEE operation, so codes and scales are the same bits
on every device; only the means are free (fp32, 1e-5 relative). A scale multiplies to dequantize.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CODE_MAX = {"int8": 127, "int4": 7}
E4M3_MAX = 448.0
BF16_MAX = torch.finfo(torch.bfloat16).max

# Largest magnitudes given to P and to V before the FP8 cast. An fp16 accumulator sums 64 products
# before it is flushed, so there 64 * P * V <= 65504; of the feasible pairs (112, 9) keeps most of V
# behind an attention sink (algorithm.md 2.5: relative L1 .037, against .096 of (448, 2.25)).
E4M3_RANGES = {"e4m3": (448.0, 448.0), "e4m3_fp16": (112.0, 9.0)}

FP16_FORMATS = ("fp16", "fp16_fp16")  # they differ in the accumulator
HALF_FORMATS = ("bf16", *FP16_FORMATS)  # whose scales are 1

# Granularities "token_thread" and "token_block": Q as "token", K as "thread" or "block" in blocks
# of so many rows.
TOKEN_BLOCK = 128

# R3: an all-zero group still has a scale > 0, and scale and inverse stay normal numbers.
AMAX_FLOOR = 2.0**-100


def token_mean(x: Tensor) -> Tensor:
    """Return the fp32 mean over tokens [B, H, D] of ``x`` [B, H, N, D]; 0 if there is no token."""
    if x.shape[-2] == 0:
        return x.new_zeros((*x.shape[:-2], x.shape[-1]), dtype=torch.float32)
    return x.double().mean(-2).float()


def query_groups(seqlen: int, granularity: str, block: int, warp: int) -> tuple[Tensor, int]:
    """Return the scale index of every query row and the number of scales (table of 2.2)."""
    n = torch.arange(seqlen)
    blocks = -(-seqlen // block)
    if block % warp or warp % 8:
        raise ValueError(f"warp must divide block={block} and be a multiple of 8, got {warp}")
    if granularity == "warp":
        return n // warp, blocks * (block // warp)
    if granularity == "thread":
        return 8 * (n // warp) + n % 8, blocks * (block // warp) * 8
    if granularity in ("token_thread", "token_block"):
        granularity = "token"
    return _common_groups(n, granularity, block)


def key_groups(seqlen: int, granularity: str, block: int) -> tuple[Tensor, int]:
    """Return the scale index of every key row and the number of scales (table of 2.2)."""
    if granularity in ("token_thread", "token_block"):
        granularity, block = granularity.removeprefix("token_"), TOKEN_BLOCK
    m = torch.arange(seqlen)
    blocks = -(-seqlen // block)
    if granularity == "warp":
        return m // block, blocks
    if granularity == "thread":
        if block % 8:
            raise ValueError(f"block must be a multiple of 8, got {block}")
        return 4 * (m // block) + (m % 8) // 2, blocks * 4
    return _common_groups(m, granularity, block)


def _common_groups(rows: Tensor, granularity: str, block: int) -> tuple[Tensor, int]:
    if granularity == "tensor":
        return torch.zeros_like(rows), 1
    if granularity == "token":
        return rows, len(rows)
    if granularity == "block":
        return rows // block, -(-len(rows) // block)
    raise ValueError(
        "granularity must be one of ['token', 'thread', 'warp', 'block', 'tensor',"
        f" 'token_thread', 'token_block'], got {granularity!r}"
    )


def quantize_query(
    query: Tensor,
    *,
    qk: str = "int8",
    granularity: str = "token",
    block: int = 128,
    warp: int = 32,
) -> tuple[Tensor, Tensor]:
    """Quantize Q by R1-R5 and R7.

    Args:
        query: [B, Hq, N, D], any float dtype (fp32 if it is a smoothed query).
        qk: "int8" or "int4"; INT4 codes are returned one per byte (see ``pack_int4``).
        granularity: rows that share a scale.
        block: rows of a query tile.
        warp: rows of a query tile that belong to one warp.

    Returns:
        int8 codes [B, Hq, N, D] and fp32 scales [B, Hq, number of groups].
    """
    return _quantize_rows(
        query.float(), *query_groups(query.shape[-2], granularity, block, warp), qk
    )


def quantize_key(
    key: Tensor,
    mean: Tensor | None = None,
    *,
    smooth: bool = True,
    qk: str = "int8",
    granularity: str = "token",
    block: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize K by R1-R5 and R7, after subtracting its token mean (E1) if ``smooth``.

    Args:
        key: [B, Hkv, M, D], any float dtype.
        mean: fp32 [B, Hkv, D] to subtract instead of the token mean; only with ``smooth``.
        smooth: whether to subtract a mean.
        qk: "int8" or "int4"; INT4 codes are returned one per byte (see ``pack_int4``).
        granularity: rows that share a scale.
        block: rows of a key tile.

    Returns:
        int8 codes [B, Hkv, M, D], fp32 scales [B, Hkv, number of groups] and the fp32 mean
        [B, Hkv, D] that was subtracted (zeros without smoothing).
    """
    x, mean = _subtract_mean(key, mean, smooth)
    codes, scales = _quantize_rows(x, *key_groups(key.shape[-2], granularity, block), qk)
    return codes, scales, mean


def quantize_value(
    value: Tensor,
    mean: Tensor | None = None,
    *,
    smooth: bool = False,
    pv: str = "bf16",
    value_max: float | None = None,
    group: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize V per channel, after subtracting its token mean (E4) if ``smooth``.

    "bf16", "fp16" and "fp16_fp16" round to nearest even with scale 1; "e4m3" and "e4m3_fp16"
    follow R6; "int8" follows R1-R5. A channel that is not finite gets codes 0 and scale NaN (R2).

    Args:
        value: [B, Hkv, M, Dv], any float dtype.
        mean: fp32 to subtract instead of the token mean, shaped like the scales; only with
            ``smooth``.
        smooth: whether to subtract a mean.
        pv: format of the codes.
        value_max: magnitude that the largest |V| of a channel gets in E4M3 (V_r), an E4M3 value;
            the default is that of ``E4M3_RANGES``.
        group: tokens that share a scale and a mean per channel, all by default.

    Returns:
        Codes [B, Hkv, M, Dv] in the format's dtype and natural order, fp32 scales [B, Hkv, Dv], or
        [B, Hkv, groups, Dv] if ``group`` is given, and fp32 of the same shape, the mean that was
        subtracted (zeros without smoothing).
    """
    if group is not None:
        options: dict[str, Any] = {"smooth": smooth, "pv": pv, "value_max": value_max}
        tokens = torch.split(value, group, dim=-2)
        given = [None] * len(tokens) if mean is None else mean.unbind(-2)
        parts = [quantize_value(*part, **options) for part in zip(tokens, given, strict=True)]
        all_codes = torch.cat([part[0] for part in parts], dim=-2)
        all_scales, means = (torch.stack([part[i] for part in parts], dim=-2) for i in (1, 2))
        return all_codes, all_scales, means
    x, mean = _subtract_mean(value, mean, smooth)
    channels = torch.arange(x.shape[-1], device=x.device)
    amax = _amax(x.abs().view(torch.int32).mT, channels, len(channels))
    if pv in E4M3_RANGES:
        top = E4M3_RANGES[pv][1] if value_max is None else value_max
        scales, inverse = _scale_and_inverse(amax, top)
        codes = (x * inverse[..., None, :]).clamp(-E4M3_MAX, E4M3_MAX)
        dtype = torch.float8_e4m3fn
    elif pv == "int8":
        scales, inverse = _scale_and_inverse(amax, 127.0)
        codes = (x * inverse[..., None, :]).round().clamp(-127, 127)
        dtype = torch.int8
    elif pv == "bf16":
        scales = torch.where(amax.isfinite(), 1.0, torch.nan)
        codes = x.clamp(-BF16_MAX, BF16_MAX)
        dtype = torch.bfloat16
    elif pv in FP16_FORMATS:
        scales = torch.where(amax.half().isfinite(), 1.0, torch.nan)
        codes = x
        dtype = torch.float16
    else:
        valid = ["bf16", *FP16_FORMATS, *E4M3_RANGES, "int8"]
        raise ValueError(f"pv must be one of {valid}, got {pv!r}")
    poisoned = scales[..., None, :].isnan()
    return torch.where(poisoned, 0.0, codes).to(dtype), scales, mean


def value_shift(value: Tensor, mean: Tensor, codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """Return what V has more than codes times scales, on average: fp64 [B, Hkv, groups, Dv].

    That is the mean that was subtracted, and the mean error of the codes.
    """
    tokens, their_codes = (torch.split(x, group, dim=-2) for x in (value, codes))
    shifts = []
    for x, c, s, m in zip(tokens, their_codes, scales.unbind(-2), mean.unbind(-2), strict=True):
        centered = (x.float() - m[..., None, :]).double()
        error = centered - c.double() * s.double()[..., None, :]
        shifts.append(m.double() + error.mean(-2))
    return torch.stack(shifts, dim=-2)


def smooth_query(query: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Return Q minus the mean of each tile of ``block`` rows (E2), and that mean of every row.

    Both are fp32 [B, Hq, N, D]; only valid rows take part in the mean of the last tile. Any vector
    may be subtracted (E3), so a channel whose mean is not finite keeps its values: one bad row does
    not poison the others of its tile.
    """
    tiles = torch.split(query.float(), block, dim=-2)
    mean = [t.double().mean(-2, keepdim=True).float().expand_as(t) for t in tiles if t.numel()]
    means = torch.cat(mean, dim=-2) if mean else query.float()
    means = torch.where(means.isfinite(), means, 0.0)
    return query.float() - means, means


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes in [-7, 7] two to a byte, the lower channel in the lower nibble (2.11)."""
    if codes.shape[-1] % 2:
        raise ValueError(f"codes must have an even head_dim, got {codes.shape[-1]}")
    low, high = codes[..., 0::2].to(torch.uint8) & 15, codes[..., 1::2].to(torch.uint8) & 15
    return low | (high << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo ``pack_int4``."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int8)
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def _subtract_mean(x: Tensor, mean: Tensor | None, smooth: bool) -> tuple[Tensor, Tensor]:
    """R1: fl(fp32(x) - mean) with an fp32 mean that is never rounded to 16 bits."""
    if not smooth:
        if mean is not None:
            raise ValueError("mean must be None without smoothing, got a tensor")
        return x.float(), torch.zeros_like(token_mean(x))
    mean = token_mean(x) if mean is None else mean
    return x.float() - mean[..., None, :], mean


def _quantize_rows(x: Tensor, group_of_row: Tensor, groups: int, qk: str) -> tuple[Tensor, Tensor]:
    """Quantize fp32 ``x`` [B, H, N, D] with one scale per group of rows."""
    if qk not in CODE_MAX:
        raise ValueError(f"qk must be one of {list(CODE_MAX)}, got {qk!r}")
    code_max = CODE_MAX[qk]
    group_of_row = group_of_row.to(x.device)
    amax = _amax(x.abs().view(torch.int32), group_of_row, groups)
    scales, inverse = _scale_and_inverse(amax, code_max)
    rounded = (x * inverse[..., group_of_row, None]).round().clamp(-code_max, code_max)
    poisoned = scales[..., group_of_row, None].isnan()
    return torch.where(poisoned, 0.0, rounded).to(torch.int8), scales


def _amax(bits: Tensor, group_of_row: Tensor, groups: int) -> Tensor:
    """R2: fp32 [B, H, groups] maximum of the magnitudes with these bit patterns; 0 if empty.

    As integers, NaN > Inf > finite, so the maximum is exact, order-free and propagates NaN.
    """
    zero = bits.new_zeros((*bits.shape[:-2], groups))
    if bits.numel() == 0:
        return zero.view(torch.float32)
    rows = bits.amax(-1)
    index = group_of_row.expand_as(rows)
    return zero.scatter_reduce(-1, index, rows, "amax").view(torch.float32)


def _scale_and_inverse(amax: Tensor, code_max: float) -> tuple[Tensor, Tensor]:
    """R3-R5: scale and its separately rounded inverse; NaN scale where amax is not finite."""
    floored = amax.clamp_min(AMAX_FLOOR)
    scale = floored * torch.tensor(1.0 / code_max, dtype=torch.float32)
    # Not `code_max / floored`: torch evaluates that as reciprocal() * code_max, rounding twice.
    inverse = torch.full_like(floored, code_max) / floored
    return torch.where(amax.isfinite(), scale, torch.nan), inverse
