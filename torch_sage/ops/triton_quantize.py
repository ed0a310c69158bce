"""Quantizers in Triton: rules R1-R7 of algorithm.md 2.1, the same bits as ``reference.quantize``.

Every launch turns off the contraction of a multiplication and an addition into one rounding (see
``launch_options``), which would change codes.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_sage.reference.quantize import TOKEN_BLOCK

LARGEST_CODE = 127
SCALE_OF_AMAX = struct.unpack("f", struct.pack("f", 1 / LARGEST_CODE))[0]
AMAX_FLOOR = 2.0**-100  # R3: keeps scale and inverse normal numbers
ROUND_TO_INTEGER = 1.5 * 2.0**23  # adding it leaves no fraction bits of a number below 2**22
INFINITY_BITS = 0x7F800000

_TILE_ROWS = 32


def launch_options(tile: int, channels: int) -> dict[str, Any]:
    """Return how to launch a program for ``tile`` rows: at most 64 elements a thread."""
    return {"enable_fp_fusion": False, "num_warps": 8 if tile * channels > 8192 else 4}


def padded(channels: int) -> int:
    """Return the least power of two that has room for ``channels``."""
    return 1 << (channels - 1).bit_length()


class Groups(NamedTuple):
    """Which rows share a scale (algorithm.md 2.2), in one closed form.

    Rows come in spans; row r of a span has the lane group ``r % 8 // lane_rows``. Scales lie span
    by span, and a last, partial block of ``block`` rows has all of its own.
    """

    block: int
    span: int
    lane_rows: int


def query_groups(granularity: str, block: int, warp: int) -> Groups:
    """Return which query rows share a scale.

    Raises:
        ValueError: if a tile of rows is not a power of two.
    """
    _require_powers(block=block, warp=warp)
    groups = {
        "token": Groups(1, 1, 8),
        "token_block": Groups(1, 1, 8),
        "thread": Groups(block, warp, 1),
        "warp": Groups(block, warp, 8),
        "block": Groups(block, block, 8),
    }
    return groups[granularity]


def key_groups(granularity: str, block: int) -> Groups:
    """Return which key rows share a scale.

    Raises:
        ValueError: if a tile of rows is not a power of two.
    """
    _require_powers(block=block)
    groups = {
        "token": Groups(1, 1, 8),
        "token_block": Groups(TOKEN_BLOCK, TOKEN_BLOCK, 8),
        "thread": Groups(block, block, 2),
        "warp": Groups(block, block, 8),
        "block": Groups(block, block, 8),
    }
    return groups[granularity]


def _require_powers(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 8 or size & (size - 1):
            raise ValueError(f"{name} must be a power of two from 8 on for Triton, got {size}")


def token_mean(x: Tensor) -> Tensor:
    """Return the fp32 mean over tokens [B, H, D] of ``x`` [B, H, N, D]; 0 if there is no token."""
    if x.shape[2] == 0:
        return x.new_zeros((*x.shape[:2], x.shape[3]), dtype=torch.float32)
    return x.mean(2, dtype=torch.float32)


def finite_token_mean(query: Tensor) -> Tensor:
    """Return ``token_mean`` with 0 for a channel that is not finite.

    Any vector may be subtracted from the queries; so one bad row does not poison the others.
    """
    mean = token_mean(query)
    return torch.where(mean.isfinite(), mean, 0.0)


@triton.jit(do_not_specialize=("heads", "rows", "tiles", "groups"))
def _rows_kernel(
    x,  # [B, H, N, D], any strides
    mean,  # [B, H, D] fp32
    codes,  # [B, H, N, D] int8
    scales,  # [B, H, groups] fp32
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    heads,
    rows,
    channels,
    tiles,
    groups,
    HAS_MEAN: tl.constexpr,
    TILE: tl.constexpr,
    SPAN: tl.constexpr,
    LANE_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LARGEST: tl.constexpr,
    SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    ROUNDER: tl.constexpr,
    INFINITY: tl.constexpr,
):
    head = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = tile * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, BLOCK_D)
    is_inside = (row < rows)[:, None] & (channel < channels)[None, :]
    base = x + (head // heads) * stride_b + (head % heads) * stride_h
    offsets = row.to(tl.int64)[:, None] * stride_n + channel.to(tl.int64)[None, :] * stride_d
    value = tl.load(base + offsets, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_MEAN:
        center = tl.load(mean + head * channels + channel, mask=channel < channels, other=0.0)
        value = tl.where(is_inside, value - center[None, :], 0.0)

    # As integers NaN > Inf > finite: the maximum is exact and propagates what is not finite.
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax_bits = tl.max(bits, axis=1)
    if SPAN > 1:
        spans: tl.constexpr = TILE // SPAN
        lanes: tl.constexpr = 8 // LANE_ROWS
        by_lane = tl.reshape(amax_bits, [spans, SPAN // 8, lanes, LANE_ROWS])
        by_lane = tl.max(tl.max(by_lane, axis=3), axis=1)
        group = tile * (spans * lanes) + tl.arange(0, spans * lanes)
        amax, scale = _scale(tl.reshape(by_lane, [spans * lanes]), SCALE, FLOOR, INFINITY)
        tl.store(scales + head * groups + group, scale, mask=group < groups)
        everywhere = tl.broadcast_to(
            tl.reshape(by_lane, [spans, 1, lanes, 1]), [spans, SPAN // 8, lanes, LANE_ROWS]
        )
        amax_bits = tl.reshape(everywhere, [TILE])
        amax, scale = _scale(amax_bits, SCALE, FLOOR, INFINITY)
    else:
        amax, scale = _scale(amax_bits, SCALE, FLOOR, INFINITY)
        tl.store(scales + head * groups + row, scale, mask=row < rows)

    inverse = tl.div_rn(tl.full([TILE], LARGEST, tl.float32), amax)
    scaled = value * inverse[:, None]
    rounded = (scaled + ROUNDER) - ROUNDER
    rounded = tl.minimum(tl.maximum(rounded, -LARGEST), LARGEST)
    is_finite = amax_bits < INFINITY
    code = tl.where(is_finite[:, None], rounded, 0.0).to(tl.int8)
    target = codes + head * rows * channels
    tl.store(target + row.to(tl.int64)[:, None] * channels + channel[None, :], code, mask=is_inside)


@triton.jit
def _scale(amax_bits, SCALE: tl.constexpr, FLOOR: tl.constexpr, INFINITY: tl.constexpr):
    amax = tl.maximum(
        tl.where(amax_bits < INFINITY, amax_bits, 0).to(tl.float32, bitcast=True), FLOOR
    )
    nan = tl.full(amax_bits.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
    return amax, tl.where(amax_bits < INFINITY, amax * SCALE, nan)


def quantize_rows(
    x: Tensor, mean: Tensor | None, groups: Groups, codes: Tensor, scales: Tensor
) -> None:
    """Quantize the rows of ``x`` [B, H, N, D] around ``mean`` [B, H, D].

    Fills int8 ``codes`` [B, H, N, D] and fp32 ``scales`` [B, H, groups], both contiguous.
    """
    b, h, n, d = x.shape
    tile = _TILE_ROWS if groups.span == 1 else groups.block
    tiles = -(-n // tile)
    block_d = padded(d)
    if b * h * tiles == 0:
        return
    _rows_kernel[(b * h * tiles,)](
        x,
        x if mean is None else mean,
        codes,
        scales,
        *x.stride(),
        h,
        n,
        d,
        tiles,
        scales.shape[2],
        HAS_MEAN=mean is not None,
        TILE=tile,
        SPAN=groups.span,
        LANE_ROWS=groups.lane_rows,
        BLOCK_D=block_d,
        LARGEST=LARGEST_CODE,
        SCALE=SCALE_OF_AMAX,
        FLOOR=AMAX_FLOOR,
        ROUNDER=ROUND_TO_INTEGER,
        INFINITY=INFINITY_BITS,
        **launch_options(tile, block_d),
    )


@triton.jit(do_not_specialize=("heads", "heads_x", "heads_vector", "rows", "tiles"))
def _dot_kernel(
    x,  # [B, Hx, N, D], any strides
    mean,  # [B, Hx, D] fp32, subtracted from x
    vector,  # [B, Hv, D] fp32
    out,  # [B, H, N] fp32
    factor,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    heads,
    heads_x,
    heads_vector,
    rows,
    channels,
    tiles,
    HAS_MEAN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, index = head // heads, head % heads
    head_x = index // (heads // heads_x)
    head_vector = index // (heads // heads_vector)
    row = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < channels
    offsets = row.to(tl.int64)[:, None] * stride_n + channel.to(tl.int64)[None, :] * stride_d
    value = tl.load(
        x + batch * stride_b + head_x * stride_h + offsets,
        mask=(row < rows)[:, None] & is_channel[None, :],
        other=0.0,
    ).to(tl.float32)
    if HAS_MEAN:
        mean += (batch * heads_x + head_x) * channels
        value -= tl.load(mean + channel, mask=is_channel, other=0.0)[None, :]
    vector += (batch * heads_vector + head_vector) * channels
    weight = tl.load(vector + channel, mask=is_channel, other=0.0)
    dot = tl.sum(value * weight[None, :], axis=1) * factor
    tl.store(out + head * rows + row, dot, mask=row < rows)


def dot_rows(x: Tensor, mean: Tensor | None, vector: Tensor, heads: int, factor: float) -> Tensor:
    """Return ``factor * (x - mean) . vector`` of every row, fp32 [B, heads, N].

    ``x`` [B, Hx, N, D] and ``mean`` [B, Hx, D], or ``vector`` [B, Hv, D], may have fewer heads;
    each then serves heads / Hx, or heads / Hv, heads of the result.
    """
    b, heads_x, n, d = x.shape
    out = x.new_empty((b, heads, n), dtype=torch.float32)
    tiles = -(-n // _TILE_ROWS)
    block_d = padded(d)
    if b * heads * tiles == 0:
        return out
    _dot_kernel[(b * heads * tiles,)](
        x,
        x if mean is None else mean,
        vector,
        out,
        factor,
        *x.stride(),
        heads,
        heads_x,
        vector.shape[1],
        n,
        d,
        tiles,
        HAS_MEAN=mean is not None,
        TILE=_TILE_ROWS,
        BLOCK_D=block_d,
        **launch_options(_TILE_ROWS, block_d),
    )
    return out
