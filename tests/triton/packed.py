"""What packed sequences must be by the Triton kernels, interpreted or on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.numerics import same_bits
from tests.varlen import Packed, one_by_one
from torch_sage.ops import gpu
from torch_sage.ops.triton_packed import UNSPECIALIZED, find_tile

# By name, as the dispatcher calls them where the library has no kernel.
WITH_LSE = gpu._kernel("varlen_sdpa_with_lse")
ALONE = gpu._kernel("sdpa_with_lse")


def recipe(granularity: str = "token_block", smooth: str = "k", pv: str = "fp16") -> dict[str, str]:
    """Return the recipe arguments of the ops."""
    return {"qk": "int8", "granularity": granularity, "pv": pv, "smooth": smooth}


def assert_one_by_one(packed: Packed, causal: str, scale: float | None, **formats: Any) -> None:
    """Require the bits that the kernels give every sequence alone."""
    expected = one_by_one(packed, causal, scale, sdpa_with_lse=ALONE, **formats)
    for got, right in zip(WITH_LSE(*packed, causal, scale, **formats), expected, strict=True):
        assert same_bits(got, right)


# A number that is always the same would be compiled in: not so in the kernels, nor here.
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _find_kernel(starts, asked, found, units, rows, count, longest, SIZE: tl.constexpr):
    at = tl.program_id(0)
    unit = tl.load(asked + at)
    sequence, tile, first, length = find_tile(
        unit, 1, units, rows, starts, count, longest, SIZE, True
    )
    tl.store(found + 4 * at, sequence)
    tl.store(found + 4 * at + 1, tile)
    tl.store(found + 4 * at + 2, first)
    tl.store(found + 4 * at + 3, length)


def find(starts: Tensor, rows: int, size: int, longest: int, asked: Tensor) -> Tensor:
    """Return the sequence of every unit ``asked`` for, its tile, its first row and its rows."""
    count = starts.shape[0] - 1
    found = torch.empty(asked.shape[0], 4, dtype=torch.int64, device=starts.device)
    units = rows // size + count
    _find_kernel[(asked.shape[0],)](starts, asked, found, units, rows, count, longest, SIZE=size)
    return found


def assert_tiles_are_found(starts: Tensor, size: int, most: int) -> None:
    """Ask for at most ``most`` units where they belong, and require what torch's search says."""
    rows, count = int(starts[-1]), starts.shape[0] - 1
    units = rows // size + count
    asked = torch.arange(units, dtype=torch.int32, device=starts.device)
    if units > most:
        asked = torch.cat([asked[:9], asked[-9:], asked[torch.randperm(units)[:most]]])
    first_units = starts[:-1] // size + torch.arange(count, device=starts.device)
    sequence = torch.searchsorted(first_units, asked.long(), right=True) - 1
    tile = torch.where(sequence < 0, units, asked - first_units[sequence])
    sequence = sequence.clamp(min=0)
    first = starts[sequence].long()
    expected = torch.stack([sequence, tile, first, starts[sequence + 1] - first], 1)
    assert torch.equal(find(starts, rows, size, rows, asked), expected)


def assert_nothing_outside_is_found(starts: Tensor, rows: int, size: int, longest: int) -> None:
    """Require rows of the tensor, and units of those that there are, whatever the starts are."""
    count = starts.shape[0] - 1
    units = rows // size + count
    asked = torch.arange(units, dtype=torch.int32, device=starts.device)
    sequence, tile, first, length = find(starts, rows, size, longest, asked).unbind(1)
    assert ((sequence >= 0) & (sequence < count)).all()
    assert ((first >= 0) & (length >= 0) & (length <= longest) & (first + length <= rows)).all()
    is_tile = tile * size < length
    last_unit = first // size + sequence + (length - 1) // size
    assert ((tile >= 0) & (last_unit < units))[is_tile].all()
