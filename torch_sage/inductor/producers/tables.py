"""Tables, weights and factors in the shapes that the op takes, made of what the graph has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_sage.inductor.graph_utils import Value, aten, plan, size, tensor
from torch_sage.inductor.producers.index import Opaque, gathered
from torch_sage.inductor.producers.terms import Read

LANE = "lane"


class Half(NamedTuple):
    """What the first, or the second, channels of all pairs are multiplied by."""

    sign: int
    read: Read

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for equal numbers."""
        digits = (digit for dim in self.read.at for digit in dim)
        return (self.sign, self.read.value, *(digit.offsets for digit in digits))


def laid_out(read: Read, order: Sequence[str]) -> Value:
    """Return what is read as a tensor with the dimensions ``order``, of size 1 where it has none.

    Raises:
        Opaque: if no view has them.
    """
    value, index = read
    if tensor(value).dtype.is_complex:
        value = plan(aten.view_as_real.default, value)
    labels: list[str] = []
    for place in reversed(range(len(index))):
        dim = index[place]
        if not dim:
            value = plan(aten.select.int, value, place, 0)
        elif len(dim) > 1:
            value = _parted(value, place, [digit.extent for digit in dim])
        for inner, digit in reversed([*enumerate(dim)]):
            if digit.variable:
                if any(digit.offsets):
                    raise Opaque
                labels.insert(0, digit.variable)
            elif len({*digit.offsets}) == 1:
                value = plan(aten.select.int, value, place + inner, digit.offsets[0])
            else:
                value = _sliced(value, place + inner, digit.offsets)
                labels.insert(0, LANE)
    if len({*labels}) != len(labels) or not {*labels} <= {*order}:
        raise Opaque
    return _ordered(value, labels, order)


def _parted(value: Value, place: int, extents: Sequence[object]) -> Value:
    sizes = [size(value, dim) for dim in range(tensor(value).dim())]
    if not all(isinstance(extent, int) for extent in extents):
        raise Opaque
    return plan(aten.view.default, value, [*sizes[:place], *extents, *sizes[place + 1 :]])


def _sliced(value: Value, place: int, offsets: Sequence[int]) -> Value:
    step = offsets[1] - offsets[0]
    if step < 1 or [*offsets] != [*range(offsets[0], offsets[-1] + 1, step)]:
        raise Opaque
    if step == 1 and len(offsets) == tensor(value).shape[place]:
        return value
    return plan(aten.slice.Tensor, value, place, offsets[0], offsets[-1] + 1, step)


def _ordered(value: Value, labels: Sequence[str], order: Sequence[str]) -> Value:
    present = [name for name in order if name in labels]
    if present != [*labels]:
        value = plan(aten.permute.default, value, [labels.index(name) for name in present])
    for place, name in enumerate(order):
        if name not in labels:
            value = plan(aten.unsqueeze.default, value, place)
    return value


class Tables:
    """The tables of one graph, each made once: Q and K, and all layers, share them."""

    def __init__(self) -> None:
        """Start with none."""
        self._made: dict[tuple[object, ...], Value] = {}

    def table(self, first: Half, second: Half, pairing: str) -> Value:
        """Return the entries of all channels, [1 or B, N, D] in fp32."""
        key = (pairing, first.key, second.key)
        if key not in self._made:
            self._made[key] = _dense(_in_fp32(_joined(first, second, pairing)))
        return self._made[key]


def _table(half: Half) -> Value:
    table = laid_out(half.read, ("b", "n", LANE))
    return table if half.sign == 1 else plan(aten.neg.default, table)


def _joined(first: Half, second: Half, pairing: str) -> Value:
    """Return a table of all channels: a view if the graph has it, else put together."""
    count = len(next(digit for dim in first.read.at for digit in dim).offsets)
    lanes = [(half.read.at, lane) for half in (first, second) for lane in range(count)]
    if pairing == "neighbours":
        lanes = [lanes[half * count + lane] for lane in range(count) for half in (0, 1)]
    if first.sign == second.sign and first.read.value is second.read.value:
        try:
            return _table(Half(first.sign, Read(first.read.value, gathered(lanes))))
        except Opaque:
            pass  # it has the entries in another order
    halves = [_table(half) for half in (first, second)]
    if pairing == "halves":
        return plan(aten.cat.default, halves, -1)
    stacked = plan(aten.cat.default, [plan(aten.unsqueeze.default, t, -1) for t in halves], -1)
    return plan(aten.view.default, stacked, [size(stacked, 0), size(stacked, 1), 2 * count])


def _in_fp32(value: Value) -> Value:
    if tensor(value).dtype is torch.float32:
        return value
    return plan(torch.ops.prims.convert_element_type.default, value, torch.float32)


def _dense(table: Value) -> Value:
    """Return ``table`` with rows without gaps, as the kernels read them."""
    if tensor(table).stride(-1) == 1:
        return table
    return plan(aten.clone.default, table, memory_format=torch.contiguous_format)


def laid_out_rstd(read: Read) -> Value:
    """Return the factor of every row, [B, H or 1, N] in fp32."""
    return _in_fp32(laid_out(read, "bhn"))


def laid_out_weight(read: Read) -> Value:
    """Return the factor of every channel, [H or 1, D] in the dtype that it has."""
    return _dense(laid_out(read, ("h", LANE)))
