"""Where packed sequences lie, as Triton's kernels find out: the host never knows.

The rows of all sequences are numbered in units of a kernel's tile, so that sequence i has those
from starts[i] / size + i on, of which it needs all or all but one: nobody has to add up lengths.
A batch is the case of as many units for each entry as it has tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

_LANES = tl.constexpr(128)  # sequences that a step of the search asks for


class Packed(NamedTuple):
    """Sequences one after the other in the rows of tensors [1, heads, rows, channels]."""

    starts: Tensor
    """[count + 1] int32, contiguous: sequence i has the rows from element i to element i + 1."""

    longest: int
    """Rows of a sequence that count."""


# Arguments of kernels that are different in every call.
UNSPECIALIZED = ("heads", "rows", "units", "count", "longest")


def count(x: Tensor, packed: Packed | None) -> int:
    """Return how many sequences the rows of ``x`` [B, H, N, D] belong to."""
    return x.shape[0] if packed is None else packed.starts.shape[0] - 1


def units(rows: int, size: int, packed: Packed | None) -> int:
    """Return how many units of ``size`` rows a head has."""
    return -(-rows // size) if packed is None else rows // size + packed.starts.shape[0] - 1


def arguments(packed: Packed | None, unused: Tensor) -> tuple[Any, ...]:
    """Return what a kernel takes as starts, count and longest."""
    if packed is None:
        return unused, 0, 0
    return packed.starts, packed.starts.shape[0] - 1, packed.longest


@triton.jit
def span_of(starts, sequence, rows, longest, PACKED: tl.constexpr):
    """Return the first row and the number of rows, inside the tensor whatever ``starts`` holds."""
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(starts + sequence), 0), rows)
        end = tl.minimum(tl.maximum(tl.load(starts + sequence + 1), first), rows)
        return first.to(tl.int64), tl.minimum(end - first, longest)
    else:
        return tl.full([], 0, tl.int64), rows


@triton.jit
def find_tile(
    index, heads, units, rows, starts, count, longest, SIZE: tl.constexpr, PACKED: tl.constexpr
):
    """Return what unit ``index`` of all heads works for.

    That is a sequence, a tile of SIZE rows in it, and the sequence's first row and rows. A unit
    that nobody needs has a tile behind its sequence.
    """
    if PACKED:
        unit = index % units
        sequence = _find_sequence(starts, count, unit, rows, SIZE)
        first, length = span_of(starts, sequence, rows, longest, True)
        tile = unit - (first // SIZE + sequence).to(tl.int32)
        return sequence, tl.where(tile < 0, units, tile), first, length
    else:
        return index // units // heads, index % units, tl.full([], 0, tl.int64), rows


@triton.jit
def _find_sequence(starts, count, unit, rows, SIZE: tl.constexpr):
    low = 0
    rest = count
    while rest > 1:
        step = (rest + _LANES - 1) // _LANES
        offset = tl.arange(0, _LANES) * step
        is_inside = offset < rest
        start = tl.load(starts + low + offset, mask=is_inside, other=0)
        start = tl.minimum(tl.maximum(start, 0), rows)
        is_before = is_inside & (start // SIZE + low + offset <= unit)
        low += tl.maximum(tl.sum(is_before.to(tl.int32)) - 1, 0) * step
        rest = tl.minimum(step, count - low)
    return low
