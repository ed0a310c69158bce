"""Where an element is read: indices as digits, so that views need no arithmetic on sizes.

An operand of attention is followed back for all its channels at once, its *lanes*. An index has one
tuple of digits per dimension, most significant first, as a number in mixed radix: of batch "b",
head "h", token "n", or of no variable at all; each lane adds its own offset. Splitting and merging
dimensions regroups digits; only sizes are compared, and no guard is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch_sage.inductor.graph_utils import same
from torch_sage.ops.checks import Size


class Opaque(Exception):
    """The graph does something that these rules do not see through."""


@dataclass(frozen=True, eq=False)
class Digit:
    """``variable + offset of the lane``, below ``extent``."""

    variable: str
    offsets: tuple[int, ...]
    extent: Size


Dim = tuple[Digit, ...]
Index = tuple[Dim, ...]


def of_lanes(offsets: Sequence[int], extent: Size) -> Dim:
    """Return the index of a dimension whose lanes read elements ``offsets``."""
    return () if same(extent, 1) else (Digit("", tuple(offsets), extent),)


def of_variable(name: str, extent: Size, lanes: int) -> Dim:
    """Return the index of a dimension that a variable runs over."""
    return () if same(extent, 1) else (Digit(name, (0,) * lanes, extent),)


def picked(index: Index, positions: Sequence[int]) -> Index:
    """Return the index of some of the lanes."""
    return tuple(
        tuple(replace(d, offsets=tuple(d.offsets[p] for p in positions)) for d in dim)
        for dim in index
    )


def lane_numbers(dim: Dim, lanes: int) -> tuple[int, ...]:
    """Return what each lane reads of a dimension without variables."""
    numbers = (0,) * lanes
    for digit in dim:
        if digit.variable or not isinstance(digit.extent, int):
            raise Opaque
        extent = digit.extent
        numbers = tuple(n * extent + o for n, o in zip(numbers, digit.offsets, strict=True))
    return numbers


def merged(dim: Dim) -> Dim:
    """Return ``dim`` with neighbouring digits without a variable as one."""
    result: list[Digit] = []
    for digit in dim:
        last = result[-1] if result else None
        if last is None or last.variable or digit.variable:
            result.append(digit)
            continue
        numbers = lane_numbers((last, digit), len(digit.offsets))
        result[-1] = Digit("", numbers, last.extent * digit.extent)
    return tuple(result)


def regrouped(index: Index, shape: Sequence[Size]) -> Index:
    """Return the same element's index in a tensor of the same elements and another shape."""
    digits = [digit for dim in index for digit in dim]
    result: list[Dim] = []
    for size in reversed(shape):
        dim: list[Digit] = []
        while not same(size, 1):
            if not digits:
                raise Opaque
            digit = digits.pop()
            if same(size % digit.extent, 0):
                dim.insert(0, digit)
                size = 1 if same(size, digit.extent) else size // digit.extent
                continue
            high, low = _split(digit, size)
            digits.append(high)
            dim.insert(0, low)
            size = 1
        result.insert(0, merged(tuple(dim)))
    if digits:
        raise Opaque
    return tuple(result)


def _split(digit: Digit, size: Size) -> tuple[Digit, Digit]:
    """Return the quotient and the remainder by ``size``."""
    known = isinstance(size, int) and isinstance(digit.extent, int)
    if digit.variable or not known or digit.extent % size:
        raise Opaque
    return (
        Digit("", tuple(o // size for o in digit.offsets), digit.extent // size),
        Digit("", tuple(o % size for o in digit.offsets), size),
    )


def stepped(dim: Dim, start: int, step: int, size: Size, lanes: int) -> Dim:
    """Return the index ``start + step * index`` in a dimension of ``size``."""
    if all(not digit.variable for digit in dim):
        return of_lanes([start + step * n for n in lane_numbers(dim, lanes)], size)
    if step != 1:
        raise Opaque
    below: Size = 1
    for digit in dim[1:]:
        below = below * digit.extent
    if start == 0 and same(size, below * dim[0].extent):
        return dim
    if not same(size % below, 0) or not isinstance(below, int) or start % below:
        raise Opaque
    offsets = tuple(o + start // below for o in dim[0].offsets)
    return (replace(dim[0], offsets=offsets, extent=size // below), *dim[1:])


def same_form(a: Index, b: Index) -> bool:
    """Return whether two indices differ by the offsets of their lanes alone."""
    return len(a) == len(b) and all(
        len(x) == len(y)
        and all(
            d.variable == e.variable and same(d.extent, e.extent) for d, e in zip(x, y, strict=True)
        )
        for x, y in zip(a, b, strict=True)
    )


def offsets_of(index: Index, position: int) -> tuple[int, ...]:
    """Return all offsets of one lane."""
    return tuple(digit.offsets[position] for dim in index for digit in dim)


def is_uniform(index: Index) -> bool:
    """Return whether all lanes read the same element."""
    return all(len({*digit.offsets}) <= 1 for dim in index for digit in dim)


def gathered(lanes: Sequence[tuple[Index, int]]) -> Index:
    """Return one index whose lanes read what (index, lane) pairs do; all of one form."""
    form = lanes[0][0]
    others = {id(index): index for index, _ in lanes}.values()
    if not all(same_form(form, index) for index in others):
        raise Opaque
    return tuple(
        tuple(
            replace(digit, offsets=tuple(index[d][i].offsets[lane] for index, lane in lanes))
            for i, digit in enumerate(dim)
        )
        for d, dim in enumerate(form)
    )
