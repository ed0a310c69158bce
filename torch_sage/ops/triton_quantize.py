"""Quantizers in Triton: rules R1-R7 of algorithm.md 2.1, the same bits as ``reference.quantize``.

Every launch turns off the contraction of a multiplication and an addition into one rounding (see
``launch_options``), which would change codes.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from torch_sage.ops import triton_packed
from torch_sage.ops.triton_packed import Packed, find_tile
from torch_sage.ops.triton_statistics import padded
from torch_sage.reference.quantize import TOKEN_BLOCK

LARGEST_CODE = 127
SCALE_OF_AMAX = struct.unpack("f", struct.pack("f", 1 / LARGEST_CODE))[0]
AMAX_FLOOR = 2.0**-100  # R3: keeps scale and inverse normal numbers
ROUND_TO_INTEGER = 1.5 * 2.0**23  # adding it leaves no fraction bits of a number below 2**22
INFINITY_BITS = 0x7F800000

TILE_ROWS = 32  # of a program where no rows share a scale


def launch_options(tile: int, channels: int) -> dict[str, Any]:
    """Return how to launch a program for ``tile`` rows: at most 64 elements a thread."""
    return {"enable_fp_fusion": False, "num_warps": 8 if tile * channels > 8192 else 4}


class Groups(NamedTuple):
    """Which rows share a scale (algorithm.md 2.2), in one closed form.

    Rows come in spans; row r of a span has the lane group ``r % 8 // lane_rows``. Scales lie span
    by span, and a last, partial block of ``block`` rows has all of its own.
    """

    block: int
    span: int
    lane_rows: int

    @property
    def per_block(self) -> int:
        """Scales of a block."""
        return self.block // self.span * (8 // self.lane_rows)

    def number(self, rows: int, packed: Packed | None) -> int:
        """Return how many scales a head has."""
        return triton_packed.units(rows, self.block, packed) * self.per_block


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


@triton.jit
def first_scale(
    first,
    sequence,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    LANE_ROWS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Return where the scales of a sequence begin among those of its head."""
    if PACKED:
        return (first // BLOCK + sequence) * (BLOCK // SPAN * (8 // LANE_ROWS))
    else:
        return first  # 0


@triton.jit(do_not_specialize=(*triton_packed.UNSPECIALIZED, "groups"))
def _rows_kernel(
    x,  # [B, H, N, D], any strides
    mean,  # [sequences, H, D] fp32
    codes,  # [B, H, N, D] int8
    scales,  # [B, H, groups] fp32
    starts,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    heads,
    rows,
    channels,
    units,
    count,
    longest,
    groups,
    PACKED: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
    LANE_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LARGEST: tl.constexpr,
    SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    ROUNDER: tl.constexpr,
    INFINITY: tl.constexpr,
):
    head = (tl.program_id(0) // units).to(tl.int64)
    batch, index = head // heads, head % heads
    sequence, tile, first, length = find_tile(
        tl.program_id(0), heads, units, rows, starts, count, longest, TILE, PACKED
    )
    row = tile * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, BLOCK_D)
    is_inside = (row < length)[:, None] & (channel < channels)[None, :]
    x += batch * stride_b + index * stride_h + first * stride_n
    offsets = row.to(tl.int64)[:, None] * stride_n + channel.to(tl.int64)[None, :] * stride_d
    value = tl.load(x + offsets, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_MEAN:
        mean += (sequence * heads + index) * channels
        center = tl.load(mean + channel, mask=channel < channels, other=0.0)
        value = tl.where(is_inside, value - center[None, :], 0.0)

    # As integers NaN > Inf > finite: the maximum is exact and propagates what is not finite.
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax_bits = tl.max(bits, axis=1)
    spans: tl.constexpr = TILE // SPAN
    lanes: tl.constexpr = 8 // LANE_ROWS
    own = first_scale(first, sequence, BLOCK, SPAN, LANE_ROWS, PACKED)
    scales += head * groups
    if SPAN > 1:
        by_lane = tl.reshape(amax_bits, [spans, SPAN // 8, lanes, LANE_ROWS])
        by_lane = tl.max(tl.max(by_lane, axis=3), axis=1)
        group = own + tile * (spans * lanes) + tl.arange(0, spans * lanes)
        amax, scale = _scale(tl.reshape(by_lane, [spans * lanes]), SCALE, FLOOR, INFINITY)
        tl.store(scales + group, scale, mask=group < groups)
        everywhere = tl.broadcast_to(
            tl.reshape(by_lane, [spans, 1, lanes, 1]), [spans, SPAN // 8, lanes, LANE_ROWS]
        )
        amax_bits = tl.reshape(everywhere, [TILE])
        amax, scale = _scale(amax_bits, SCALE, FLOOR, INFINITY)
    else:
        amax, scale = _scale(amax_bits, SCALE, FLOOR, INFINITY)
        tl.store(scales + own + row, scale, mask=row < length)

    inverse = tl.div_rn(tl.full([TILE], LARGEST, tl.float32), amax)
    scaled = value * inverse[:, None]
    rounded = (scaled + ROUNDER) - ROUNDER
    rounded = tl.minimum(tl.maximum(rounded, -LARGEST), LARGEST)
    is_finite = amax_bits < INFINITY
    code = tl.where(is_finite[:, None], rounded, 0.0).to(tl.int8)
    codes += (head * rows + first) * channels
    tl.store(codes + row.to(tl.int64)[:, None] * channels + channel[None, :], code, mask=is_inside)


@triton.jit
def _scale(amax_bits, SCALE: tl.constexpr, FLOOR: tl.constexpr, INFINITY: tl.constexpr):
    amax = tl.maximum(
        tl.where(amax_bits < INFINITY, amax_bits, 0).to(tl.float32, bitcast=True), FLOOR
    )
    nan = tl.full(amax_bits.shape, 0x7FC00000, tl.int32).to(tl.float32, bitcast=True)
    return amax, tl.where(amax_bits < INFINITY, amax * SCALE, nan)


def quantize_rows(
    x: Tensor,
    mean: Tensor | None,
    groups: Groups,
    codes: Tensor,
    scales: Tensor,
    packed: Packed | None = None,
) -> None:
    """Quantize the rows of ``x`` [B, H, N, D] around ``mean`` [sequences, H, D].

    Fills int8 ``codes`` [B, H, N, D] and fp32 ``scales`` [B, H, groups], both contiguous.
    """
    b, h, n, d = x.shape
    tile = TILE_ROWS if groups.span == 1 else groups.block
    units = triton_packed.units(n, tile, packed)
    block_d = padded(d)
    if b * h * units == 0:
        return
    starts, *lengths = triton_packed.arguments(packed, x)
    _rows_kernel[(b * h * units,)](
        x,
        x if mean is None else mean,
        codes,
        scales,
        starts,
        *x.stride(),
        h,
        n,
        d,
        units,
        *lengths,
        scales.shape[2],
        PACKED=packed is not None,
        HAS_MEAN=mean is not None,
        TILE=tile,
        BLOCK=groups.block,
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
