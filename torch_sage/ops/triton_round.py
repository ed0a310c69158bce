"""V rounded to 16 bits in Triton, the same bits as ``reference.quantize``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_sage.ops import triton_packed
from torch_sage.ops.triton_packed import Packed, find_tile
from torch_sage.ops.triton_quantize import TILE_ROWS, launch_options
from torch_sage.ops.triton_statistics import padded, token_amax


@triton.jit(do_not_specialize=triton_packed.UNSPECIALIZED)
def _round_kernel(
    x,  # [B, H, N, D], any strides
    mean,  # [sequences, H, D] fp32
    scales,  # [sequences, H, D] fp32
    codes,  # [B, H, N, D] bfloat16 or float16
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
    PACKED: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LARGEST: tl.constexpr,
):
    head = (tl.program_id(0) // units).to(tl.int64)
    batch, index = head // heads, head % heads
    sequence, tile, first, length = find_tile(
        tl.program_id(0), heads, units, rows, starts, count, longest, TILE, PACKED
    )
    row = tile * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < channels
    is_inside = (row < length)[:, None] & is_channel[None, :]
    x += batch * stride_b + index * stride_h + first * stride_n
    offsets = row.to(tl.int64)[:, None] * stride_n + channel.to(tl.int64)[None, :] * stride_d
    value = tl.load(x + offsets, mask=is_inside, other=0.0).to(tl.float32)
    of_head = (sequence * heads + index) * channels + channel
    if HAS_MEAN:
        value -= tl.load(mean + of_head, mask=is_channel, other=0.0)[None, :]
    scale = tl.load(scales + of_head, mask=is_channel, other=1.0)
    value = tl.minimum(tl.maximum(value, -LARGEST), LARGEST)
    value = tl.where((scale == scale)[None, :], value, 0.0)
    if codes.dtype.element_ty == tl.bfloat16:
        # Rounded to nearest, ties to even, as a GPU does; Triton's interpreter would cut off.
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & -0x10000).to(tl.float32, bitcast=True)
    codes += (head * rows + first) * channels
    at = codes + row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(at, value.to(codes.dtype.element_ty), mask=is_inside)


def round_rows(
    x: Tensor, mean: Tensor | None, codes: Tensor, scales: Tensor, packed: Packed | None = None
) -> None:
    """Round ``x - mean`` to the 16 bits of ``codes`` [B, H, N, D], which is contiguous.

    Fills ``codes`` and fp32 ``scales`` [sequences, H, D] with 1, or NaN for a channel that is not
    finite, whose codes are 0.
    """
    b, h, n, d = x.shape
    amax = token_amax(x, mean, packed)
    # bfloat16 has the range of fp32; what fp16 rounds to infinity poisons its channel.
    is_finite = (amax.half() if codes.dtype == torch.float16 else amax).isfinite()
    scales.copy_(torch.where(is_finite, 1.0, torch.nan))
    units = triton_packed.units(n, TILE_ROWS, packed)
    block_d = padded(d)
    if b * h * units == 0:
        return
    starts, *lengths = triton_packed.arguments(packed, x)
    _round_kernel[(b * h * units,)](
        x,
        x if mean is None else mean,
        scales,
        codes,
        starts,
        *x.stride(),
        h,
        n,
        d,
        units,
        *lengths,
        PACKED=packed is not None,
        HAS_MEAN=mean is not None,
        TILE=TILE_ROWS,
        BLOCK_D=block_d,
        LARGEST=torch.finfo(codes.dtype).max,
        **launch_options(TILE_ROWS, block_d),
    )
