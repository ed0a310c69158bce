"""The FP8 peers' quantizer, which they come without: one scale per tensor, in two kernels.

The first finds the largest magnitude of each part of Q, K and V, the second reduces those, scales
and rounds to E4M3. Fewer kernels need a scale that is known beforehand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3_MAX = tl.constexpr(448.0)
BLOCK = 8192
PARTS = 512  # blocks of the device, about four per multiprocessor: a power of two, for tl.arange


class Operands(NamedTuple):
    """E4M3 tensors in the memory order of what was quantized, and what to multiply them by."""

    query: Tensor
    key: Tensor
    value: Tensor
    descale: Tensor
    """[3] fp32, of query, key and value."""
    scale: Tensor
    """[3] fp32, the inverse."""


@triton.jit
def _largest(q, k, v, partial, size, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    part, which = tl.program_id(0), tl.program_id(1)
    x = q
    if which == 1:
        x = k
    if which == 2:
        x = v
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(part * BLOCK, size, PARTS * BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(here))
    tl.store(partial + which * PARTS + part, tl.max(largest, 0))


@triton.jit
def _cast(q, k, v, partial, codes, scales, size, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    part, which = tl.program_id(0), tl.program_id(1)
    x = q
    if which == 1:
        x = k
    if which == 2:
        x = v
    largest = tl.max(tl.load(partial + which * PARTS + tl.arange(0, PARTS)), 0)
    scale = E4M3_MAX / tl.maximum(largest, 1e-12)
    if part == 0:
        tl.store(scales + which, 1.0 / scale)
        tl.store(scales + 3 + which, scale)
    out = codes + which.to(tl.int64) * size
    for start in range(part * BLOCK, size, PARTS * BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
        tl.store(out + at, (here * scale).to(tl.float8e4nv), mask=at < size)


def quantize(query: Tensor, key: Tensor, value: Tensor) -> Operands:
    """Return the operands of an FP8 kernel; all three tensors have one shape and no gaps."""
    size = query.numel()
    partial = query.new_empty((3, PARTS), dtype=torch.float32)
    scales = query.new_empty((2, 3), dtype=torch.float32)
    codes = query.new_empty((3, *query.shape), dtype=torch.float8_e4m3fn)
    tensors = (query, key, value)
    _largest[(PARTS, 3)](*tensors, partial, size, BLOCK=BLOCK, PARTS=PARTS, num_warps=8)
    _cast[(PARTS, 3)](*tensors, partial, codes, scales, size, BLOCK=BLOCK, PARTS=PARTS, num_warps=8)
    return Operands(*codes, *scales)
