"""What smoothing took from the scores, in Triton: the product of each row and one vector."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_sage.ops import triton_packed
from torch_sage.ops.triton_packed import Packed, find_tile
from torch_sage.ops.triton_quantize import TILE_ROWS, launch_options
from torch_sage.ops.triton_statistics import ordered_sum, padded


@triton.jit(do_not_specialize=(*triton_packed.UNSPECIALIZED, "heads_x", "heads_vector"))
def _dot_kernel(
    x,  # [B, Hx, N, D], any strides
    mean,  # [sequences, Hx, D] fp32, subtracted from x
    vector,  # [sequences, Hv, D] fp32
    out,  # [B, H, N] fp32
    starts,
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
    units,
    count,
    longest,
    PACKED: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
):
    head = (tl.program_id(0) // units).to(tl.int64)
    batch, index = head // heads, head % heads
    sequence, tile, first, length = find_tile(
        tl.program_id(0), heads, units, rows, starts, count, longest, TILE, PACKED
    )
    head_x = index // (heads // heads_x)
    head_vector = index // (heads // heads_vector)
    row = tile * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < channels
    x += batch * stride_b + head_x * stride_h + first * stride_n
    offsets = row.to(tl.int64)[:, None] * stride_n + channel.to(tl.int64)[None, :] * stride_d
    is_inside = (row < length)[:, None] & is_channel[None, :]
    value = tl.load(x + offsets, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_MEAN:
        mean += (sequence * heads_x + head_x) * channels
        value -= tl.load(mean + channel, mask=is_channel, other=0.0)[None, :]
    vector += (sequence * heads_vector + head_vector) * channels
    weight = tl.load(vector + channel, mask=is_channel, other=0.0)
    dot = ordered_sum(value * weight[None, :], TILE, STEPS) * factor
    tl.store(out + head * rows + first + row, dot, mask=row < length)


def dot_rows(
    x: Tensor,
    mean: Tensor | None,
    vector: Tensor,
    heads: int,
    factor: float,
    packed: Packed | None = None,
) -> Tensor:
    """Return ``factor * (x - mean) . vector`` of every row, fp32 [B, heads, N].

    ``x`` [B, Hx, N, D] and ``mean`` [sequences, Hx, D], or ``vector`` [sequences, Hv, D], may have
    fewer heads; each then serves heads / Hx, or heads / Hv, heads of the result.
    """
    b, heads_x, n, d = x.shape
    out = x.new_empty((b, heads, n), dtype=torch.float32)
    units = triton_packed.units(n, TILE_ROWS, packed)
    block_d = padded(d)
    if b * heads * units == 0:
        return out
    starts, *lengths = triton_packed.arguments(packed, x)
    _dot_kernel[(b * heads * units,)](
        x,
        x if mean is None else mean,
        vector,
        out,
        starts,
        factor,
        *x.stride(),
        heads,
        heads_x,
        vector.shape[1],
        n,
        d,
        units,
        *lengths,
        PACKED=packed is not None,
        HAS_MEAN=mean is not None,
        TILE=TILE_ROWS,
        BLOCK_D=block_d,
        STEPS=block_d.bit_length() - 1,
        **launch_options(TILE_ROWS, block_d),
    )
    return out
