"""Operators that move elements and compute nothing, as rules from an index to the argument's.

A complex tensor counts as a real one with a last dimension of its two parts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from torch_sage.inductor.graph_utils import Planned, Value, aten, bound_arguments, same, tensor
from torch_sage.inductor.producers.index import (
    Index,
    Opaque,
    lane_numbers,
    of_lanes,
    picked,
    regrouped,
    stepped,
)
from torch_sage.ops.checks import Size


class Part(NamedTuple):
    """What some of the lanes read of one argument."""

    value: Value
    at: Index
    lanes: tuple[int, ...]


Rule = Callable[[dict[str, Any], Index, int], Index]


def source_of(value: Value) -> Value:
    """Return the tensor that a view, or an output of a split, is of."""
    source = value.args[0]
    assert isinstance(source, (Node, Planned))
    return source_of(source) if value.target is operator.getitem else source


def is_view(value: Value) -> bool:
    """Return whether ``value`` shares the memory of another tensor."""
    if value.target is operator.getitem:
        return getattr(value.args[0], "target", None) in _SPLITS
    return value.target in _VIEWS


def is_of_one(value: Value) -> bool:
    """Return whether ``value`` has elements of one other tensor, and no others."""
    return is_view(value) or value.target in _COPIES


def moves(value: Value) -> bool:
    """Return whether ``value`` has the elements of other tensors, and no others."""
    return is_of_one(value) or value.target in _CHOICES


def through(value: Value, index: Index, lanes: tuple[int, ...]) -> list[Part] | None:
    """Return what lanes of ``value`` at ``index`` are read from; None if it computes anything."""
    if is_of_one(value):
        source = source_of(value)
        return [Part(source, _index_in_source(value, source, index, len(lanes)), lanes)]
    choose = _CHOICES.get(value.target)
    return None if choose is None else list(choose(bound_arguments(value), index, lanes))  # type: ignore[arg-type]


def _index_in_source(value: Value, source: Value, index: Index, lanes: int) -> Index:
    is_complex = tensor(value).dtype.is_complex
    if value.target in _COPIES and is_complex != tensor(source).dtype.is_complex:
        raise Opaque
    if value.target in _COPIES or value.target in _OF_PARTS:
        return index
    part: Index = ()
    if is_complex:
        index, part = index[:-1], index[-1:]
    if value.target is operator.getitem:
        split, number = value.args
        bound = {**bound_arguments(split), "number": number}  # type: ignore[arg-type]
        return _SPLITS[split.target](bound, index, lanes) + part  # type: ignore[union-attr]
    return _VIEWS[value.target](bound_arguments(value), index, lanes) + part  # type: ignore[arg-type]


def _sizes(bound: dict[str, Any]) -> Sequence[Size]:
    return tensor(bound["self"]).shape


def _replaced(index: Index, dim: int, by: Index) -> Index:
    return (*index[:dim], *by, *index[dim + 1 :])


def _dim(bound: dict[str, Any], rank: int) -> int:
    dim: int = bound["dim"]
    return dim % rank


def _view(bound: dict[str, Any], index: Index, lanes: int) -> Index:
    return regrouped(index, _sizes(bound))


def _permute(bound: dict[str, Any], index: Index, lanes: int) -> Index:
    rank = len(index)
    places = {dim % rank: place for place, dim in enumerate(bound["dims"])}
    return tuple(index[places[dim]] for dim in range(rank))


def _transpose(bound: dict[str, Any], index: Index, lanes: int) -> Index:
    swapped, (a, b) = list(index), (bound["dim0"], bound["dim1"])
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return tuple(swapped)


def _unsqueeze(bound: dict[str, Any], index: Index, lanes: int) -> Index:
    return _replaced(index, _dim(bound, len(index)), ())


def _squeeze(bound: dict[str, Any], index: Index, lanes: int) -> Index:
    sizes, dims = _sizes(bound), bound["dim"]
    chosen = {dim % len(sizes) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    rest = iter(index)
    return tuple(
        () if dim in chosen and same(size, 1) else next(rest) for dim, size in enumerate(sizes)
    )


def _expand(bound: dict[str, Any], index: Index, lanes: int) -> Index:
    return broadcast(index, _sizes(bound))


def broadcast(index: Index, sizes: Sequence[Size]) -> Index:
    """Return the index in an operand of ``sizes`` that broadcasts to the indexed shape."""
    own = index[len(index) - len(sizes) :]
    return tuple(() if same(size, 1) else dim for dim, size in zip(own, sizes, strict=True))


def _slice(bound: dict[str, Any], index: Index, lanes: int) -> Index:
    dim, start = _dim(bound, len(index)), bound["start"] or 0
    size = _sizes(bound)[dim]
    if not isinstance(start, int) or (start < 0 and not isinstance(size, int)):
        raise Opaque
    start = start + size if start < 0 else start
    return _replaced(index, dim, (stepped(index[dim], start, bound["step"], size, lanes),))


def _select(bound: dict[str, Any], index: Index, lanes: int) -> Index:
    dim = _dim(bound, len(index) + 1)
    return (*index[:dim], _constant(bound["index"], _sizes(bound)[dim], lanes), *index[dim:])


def _constant(number: Any, size: Size, lanes: int) -> Any:
    if not isinstance(number, int) or (number < 0 and not isinstance(size, int)):
        raise Opaque
    return of_lanes([number + size if number < 0 else number] * lanes, size)


def _unbind(bound: dict[str, Any], index: Index, lanes: int) -> Index:
    return _select({**bound, "index": bound["number"]}, index, lanes)


def _split(bound: dict[str, Any], index: Index, lanes: int) -> Index:
    size = bound["split_size"]
    if not isinstance(size, int):
        raise Opaque
    return _slice({**bound, "start": size * bound["number"], "step": 1}, index, lanes)


def _split_with_sizes(bound: dict[str, Any], index: Index, lanes: int) -> Index:
    start = sum(bound["split_sizes"][: bound["number"]])
    return _slice({**bound, "start": start, "step": 1}, index, lanes)


def _choose(
    index: Index, lanes: tuple[int, ...], groups: dict[Any, list[int]]
) -> Iterator[tuple[Any, Index, tuple[int, ...]]]:
    for group, positions in groups.items():
        yield group, picked(index, positions), tuple(lanes[p] for p in positions)


def _cat(bound: dict[str, Any], index: Index, lanes: tuple[int, ...]) -> Iterator[Part]:
    tensors = bound["tensors"]
    dim = _dim(bound, len(index) - tensor(tensors[0]).dtype.is_complex)
    numbers, starts = lane_numbers(index[dim], len(lanes)), [0]
    groups: dict[Any, list[int]] = {}
    for part in tensors:
        size = tensor(part).shape[dim]
        if not isinstance(size, int):
            raise Opaque
        inside = [p for p, n in enumerate(numbers) if 0 <= n - starts[-1] < size]
        if inside:
            groups[len(starts) - 1] = inside
        starts.append(starts[-1] + size)
    for group, own, of_group in _choose(index, lanes, groups):
        offsets = [n - starts[group] for n in lane_numbers(own[dim], len(of_group))]
        inner = of_lanes(offsets, starts[group + 1] - starts[group])
        yield Part(tensors[group], _replaced(own, dim, (inner,)), of_group)


def _stack(bound: dict[str, Any], index: Index, lanes: tuple[int, ...]) -> Iterator[Part]:
    tensors = bound["tensors"]
    dim = _dim(bound, len(index) - tensor(tensors[0]).dtype.is_complex)
    groups: dict[Any, list[int]] = {}
    for position, number in enumerate(lane_numbers(index[dim], len(lanes))):
        groups.setdefault(number, []).append(position)
    for group, own, of_group in _choose(index, lanes, groups):
        yield Part(tensors[group], _replaced(own, dim, ()), of_group)


def _slice_scatter(bound: dict[str, Any], index: Index, lanes: tuple[int, ...]) -> Iterator[Part]:
    """Lanes inside of the slice read what was written, the others what was there before."""
    dim, start, step = _dim(bound, len(index)), bound["start"] or 0, bound["step"]
    size, written = _sizes(bound)[dim], tensor(bound["src"]).shape[dim]
    if same(size, written):
        yield Part(bound["src"], index, lanes)
        return
    if not isinstance(size, int) or not isinstance(written, int) or not isinstance(start, int):
        raise Opaque
    start = start + size if start < 0 else start
    groups: dict[Any, list[int]] = {}
    for position, number in enumerate(lane_numbers(index[dim], len(lanes))):
        is_inside = (number - start) % step == 0 and 0 <= (number - start) // step < written
        groups.setdefault(is_inside, []).append(position)
    for is_inside, own, of_group in _choose(index, lanes, groups):
        if is_inside:
            offsets = [(n - start) // step for n in lane_numbers(own[dim], len(of_group))]
            own = _replaced(own, dim, (of_lanes(offsets, written),))
        yield Part(bound["src" if is_inside else "self"], own, of_group)


def _select_scatter(bound: dict[str, Any], index: Index, lanes: tuple[int, ...]) -> Iterator[Part]:
    dim, chosen = _dim(bound, len(index)), bound["index"]
    size = _sizes(bound)[dim]
    if not isinstance(size, int) or not isinstance(chosen, int):
        raise Opaque
    groups: dict[Any, list[int]] = {}
    for position, number in enumerate(lane_numbers(index[dim], len(lanes))):
        groups.setdefault(number == chosen % size, []).append(position)
    for is_inside, own, of_group in _choose(index, lanes, groups):
        if is_inside:
            yield Part(bound["src"], _replaced(own, dim, ()), of_group)
        else:
            yield Part(bound["self"], own, of_group)


def _copy(bound: dict[str, Any], index: Index, lanes: tuple[int, ...]) -> Iterator[Part]:
    yield Part(bound["src"], broadcast(index, tensor(bound["src"]).shape), lanes)


_OF_PARTS = {aten.view_as_real.default, aten.view_as_complex.default}
_VIEWS: dict[Any, Rule] = {
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.flatten.using_ints: _view,
    aten.unflatten.int: _view,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    **dict.fromkeys(_OF_PARTS, _view),
}
_SPLITS: dict[Any, Rule] = {
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.unbind.int: _unbind,
}
# Of the same shape; a conversion to fp32 and back is what Inductor leaves out, too.
_COPIES = {
    torch.ops.prims.convert_element_type.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten._to_copy.default,
    aten.to.dtype,
}
_CHOICES: dict[Any, Callable[..., Iterator[Part]]] = {
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.copy.default: _copy,
}
