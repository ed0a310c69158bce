"""Means and maxima of channels over the tokens of every sequence, in Triton.

A mean has the same bits wherever and beside whatever its sequence lies: chunks begin with it, and
no sum has an order that depends on layouts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_sage.ops import triton_packed
from torch_sage.ops.triton_packed import Packed, find_tile, span_of

_CHUNK = 256  # rows of a program
_ROWS = 32  # of a step


def padded(channels: int) -> int:
    """Return the least power of two that has room for ``channels``."""
    return 1 << (channels - 1).bit_length()


def token_mean(x: Tensor, packed: Packed | None = None) -> Tensor:
    """Return the fp32 mean over tokens [sequences, H, D] of ``x`` [B, H, N, D]; 0 without any."""
    return _statistic(x, None, packed, is_mean=True)


def finite_token_mean(query: Tensor, packed: Packed | None = None) -> Tensor:
    """Return ``token_mean`` with 0 for a channel that is not finite.

    Any vector may be subtracted from the queries; so one bad row does not poison the others.
    """
    mean = token_mean(query, packed)
    return torch.where(mean.isfinite(), mean, 0.0)


def token_amax(x: Tensor, mean: Tensor | None, packed: Packed | None = None) -> Tensor:
    """Return the maximum of ``|x - mean|`` over tokens [sequences, H, D]; NaN is the largest."""
    return _statistic(x, mean, packed, is_mean=False)


@triton.jit
def ordered_sum(x, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """Return the sum of each row of ``x`` [ROWS, 2**STEPS]: of neighbours, pair by pair.

    ``tl.sum`` adds in the order in which threads hold the numbers, which alignments decide.
    """
    for step in tl.static_range(STEPS):
        left, right = tl.split(tl.reshape(x, [ROWS, 1 << (STEPS - 1 - step), 2]))
        x = left + right
    return tl.reshape(x, [ROWS])


@triton.jit(do_not_specialize=triton_packed.UNSPECIALIZED)
def _chunk_kernel(
    x,  # [B, H, N, D], any strides
    mean,  # [sequences, H, D] fp32, subtracted from x
    partials,  # [B, H, units, D]; fp32, or the bits of numbers that are not negative
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
    IS_MEAN: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    batch, head = index // units // heads, index // units % heads
    sequence, chunk, first, length = find_tile(
        tl.program_id(0), heads, units, rows, starts, count, longest, CHUNK, PACKED
    )
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < channels
    x += batch * stride_b + head * stride_h + first * stride_n
    columns = channel.to(tl.int64)[None, :] * stride_d
    partial = tl.zeros([ROWS, BLOCK_D], tl.float32 if IS_MEAN else tl.int32)
    if HAS_MEAN:
        mean += (sequence * heads + head) * channels
        center = tl.load(mean + channel, mask=is_channel, other=0.0)[None, :]
    for start in range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, length), ROWS):
        row = start + tl.arange(0, ROWS)
        is_inside = (row < length)[:, None] & is_channel[None, :]
        at = x + row.to(tl.int64)[:, None] * stride_n + columns
        value = tl.load(at, mask=is_inside, other=0.0).to(tl.float32)
        if HAS_MEAN:
            value = tl.where(is_inside, value - center, 0.0)
        if IS_MEAN:
            partial += value
        else:
            # As integers NaN > Inf > finite: the maximum is exact and tells what is not finite.
            bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            partial = tl.maximum(partial, bits)
    if IS_MEAN:
        folded = ordered_sum(tl.trans(partial), BLOCK_D, STEPS)
    else:
        folded = tl.max(partial, axis=0)
    tl.store(partials + index * channels + channel, folded, mask=is_channel)


@triton.jit(do_not_specialize=triton_packed.UNSPECIALIZED)
def _statistic_kernel(
    partials,  # [B, H, units, D]
    result,  # [sequences, H, D]
    starts,
    heads,
    rows,
    channels,
    units,
    count,
    longest,
    PACKED: tl.constexpr,
    IS_MEAN: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    sequence, head = index // heads, index % heads
    first, length = span_of(starts, sequence, rows, longest, PACKED)
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < channels
    own = head * units + first // CHUNK + sequence if PACKED else index * units
    chunks = (length + CHUNK - 1) // CHUNK
    partial = tl.zeros([ROWS, BLOCK_D], tl.float32 if IS_MEAN else tl.int32)
    for start in range(0, chunks, ROWS):
        chunk = start + tl.arange(0, ROWS)
        at = partials + (own + chunk)[:, None] * channels + channel[None, :]
        part = tl.load(at, mask=(chunk < chunks)[:, None] & is_channel[None, :], other=0)
        partial = partial + part if IS_MEAN else tl.maximum(partial, part)
    if IS_MEAN:
        tokens = tl.full([BLOCK_D], 1.0, tl.float32) * tl.maximum(length, 1)
        folded = tl.div_rn(ordered_sum(tl.trans(partial), BLOCK_D, STEPS), tokens)
    else:
        folded = tl.max(partial, axis=0)
    tl.store(result + index * channels + channel, folded, mask=is_channel)


def constants(channels: int, *, is_mean: bool, is_packed: bool) -> dict[str, Any]:
    """Return what both kernels are compiled and launched with."""
    return {
        "PACKED": is_packed,
        "IS_MEAN": is_mean,
        "CHUNK": _CHUNK,
        "ROWS": _ROWS,
        "STEPS": _ROWS.bit_length() - 1,
        "BLOCK_D": padded(channels),
        "enable_fp_fusion": False,
        "num_warps": 4,
    }


def _statistic(x: Tensor, mean: Tensor | None, packed: Packed | None, *, is_mean: bool) -> Tensor:
    b, h, n, d = x.shape
    sequences = triton_packed.count(x, packed)
    dtype = torch.float32 if is_mean else torch.int32
    result = x.new_empty((sequences, h, d), dtype=dtype)
    units = triton_packed.units(n, _CHUNK, packed)
    partials = x.new_empty((b, h, units, d), dtype=dtype)
    where = triton_packed.arguments(packed, x)
    kind = constants(d, is_mean=is_mean, is_packed=packed is not None)
    if partials.numel() != 0:
        _chunk_kernel[(b * h * units,)](
            x,
            x if mean is None else mean,
            partials,
            where[0],
            *x.stride(),
            h,
            n,
            d,
            units,
            *where[1:],
            HAS_MEAN=mean is not None,
            **kind,
        )
    if result.numel() != 0:
        _statistic_kernel[(sequences * h,)](
            partials, result, where[0], h, n, d, units, *where[1:], **kind
        )
    return result if is_mean else result.view(torch.float32)
