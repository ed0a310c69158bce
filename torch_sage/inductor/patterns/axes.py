"""Where the axes of a tensor come from when one walks up through views and permutations.

Attention is spelled with folded batches, einsum's size-1 axes, cancelling permutations and
repeated heads. All of them keep one invariant that this file tracks: flattening the tensor's axes
*in a known order* gives the elements of the operand below in row-major order. Axes of size 1 carry
no elements and are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_sage.inductor.graph_utils import Size, Value, aten, plan, product, same, tensor

COPIES = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
PERMUTES = (aten.permute.default, aten.transpose.int, aten.t.default)
SHAPE_OPS = (*COPIES, *RESHAPES, *PERMUTES, aten.expand.default)


class Axis(NamedTuple):
    """One axis of a tensor that has more than one element."""

    dim: int | None
    """The dimension of the tensor, or None where the tensor is broadcast along this axis."""

    size: Size


class Extent(NamedTuple):
    """A size of the attention problem, also as an argument for a new call."""

    size: Size
    arg: Any


Axes = tuple[Axis, ...]


def is_one(size: Size) -> bool:
    """Return whether ``size`` is known to be 1."""
    return same(size, 1)


def axes_of(value: Value, order: Sequence[int] | None = None) -> Axes:
    """Return the axes of ``value`` in ``order`` (row-major by default)."""
    shape = tensor(value).shape
    dims = range(len(shape)) if order is None else order
    return tuple(Axis(d, shape[d]) for d in dims if not is_one(shape[d]))


def step_up(node: Node, axes: Axes) -> tuple[Node, Axes] | None:
    """Follow ``axes`` of ``node`` to its input, or return None where that is not a shape change."""
    if node.op != "call_function" or node.target not in SHAPE_OPS:
        return None
    source = node.args[0]
    if not isinstance(source, Node):
        return None
    if node.target in COPIES:
        return source, axes
    if node.target in PERMUTES:
        dims = permutation(node)
        return source, tuple(a if a.dim is None else Axis(dims[a.dim], a.size) for a in axes)
    if node.target is aten.expand.default:
        expanded = expand_axes(node, source, axes)
    else:
        expanded = reshape_axes(source, axes)
    return None if expanded is None else (source, expanded)


def permutation(node: Node) -> list[int]:
    """Return the dims of a permute, transpose or t call, as permute takes them."""
    dims = list(range(tensor(node).dim()))
    if node.target is aten.permute.default:
        order: Any = node.args[1]
        return [dim % len(dims) for dim in order]
    if node.target is aten.t.default:
        return dims[::-1]
    a, b = node.args[1:]
    assert isinstance(a, int) and isinstance(b, int)
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def expand_axes(node: Node, source: Node, axes: Axes) -> Axes | None:
    """Follow axes through an expand; broadcast ones lose their dim."""
    before, after = tensor(source).shape, tensor(node).shape
    leading = len(after) - len(before)
    result = []
    for axis in axes:
        if axis.dim is None or axis.dim < leading:
            result.append(Axis(None, axis.size))
        elif same(before[axis.dim - leading], axis.size):
            result.append(Axis(axis.dim - leading, axis.size))
        elif is_one(before[axis.dim - leading]):
            result.append(Axis(None, axis.size))
        else:
            return None
    return tuple(result)


def reshape_axes(source: Node, axes: Axes) -> Axes | None:
    """Follow axes through a reshape, which may merge and split only axes that stay in order."""
    real = [a.dim for a in axes if a.dim is not None]
    if len(real) == len(axes) and real == sorted(real):
        return axes_of(source)
    below = tuple(sorted((a for a in axes if a.dim is not None), key=lambda a: a.dim or 0))
    above = axes_of(source)
    groups = align(below, [a.size for a in above])
    if groups is None:
        return None
    result = list(axes)
    for group in groups:
        start = next(p for p, a in enumerate(result) if a is group.axes[0])
        stop = start + len(group.axes)
        if any(a is not b for a, b in zip(result[start:], group.axes, strict=False)):
            return None
        result[start:stop] = [above[t] for t in group.targets]
    return tuple(result)


class Group(NamedTuple):
    """Axes of a tensor and target dimensions that hold the same elements."""

    axes: Axes
    targets: tuple[int, ...]


def align(axes: Axes, target: Sequence[Size]) -> list[Group] | None:
    """Split ``axes`` and the dims of ``target`` into the shortest runs of equal size.

    Returns None if the sizes do not fit or symbolic sizes leave that open.
    """
    remaining = [d for d, extent in enumerate(target) if not is_one(extent)]
    queue = list(axes)
    groups = []
    while queue or remaining:
        if not queue or not remaining:
            return None
        left, right = [queue.pop(0)], [remaining.pop(0)]
        a, b = left[0].size, target[right[0]]
        while not same(a, b):
            if remaining and divides(b, a):
                right.append(remaining.pop(0))
                b = b * target[right[-1]]
            elif queue and divides(a, b):
                left.append(queue.pop(0))
                a = a * left[-1].size
            elif remaining and known_less(b, a):
                right.append(remaining.pop(0))
                b = b * target[right[-1]]
            elif queue and known_less(a, b):
                left.append(queue.pop(0))
                a = a * left[-1].size
            else:
                return None
        groups.append(Group(tuple(left), tuple(right)))
    return groups


def divides(a: Any, b: Any) -> bool:
    """Return whether ``a`` is known to divide ``b``."""
    return (not isinstance(a, int) or a != 0) and bool(statically_known_true(b % a == 0))


def known_less(a: Any, b: Any) -> bool:
    """Return whether ``a`` is known to be smaller than ``b``."""
    return bool(statically_known_true(a < b))


def permuted(value: Value, order: Sequence[int]) -> Value:
    """Plan a permutation, or return ``value`` if ``order`` changes nothing."""
    if list(order) == list(range(len(order))):
        return value
    if isinstance(value, Node) and value.target in PERMUTES:
        inner = permutation(value)
        source = value.args[0]
        assert isinstance(source, Node)
        return permuted(source, [inner[d] for d in order])
    return plan(aten.permute.default, value, list(order))


def ordered(value: Value, axes: Axes) -> Value:
    """Plan the permutation that puts ``axes`` of ``value`` last, in their order."""
    real = [a.dim for a in axes if a.dim is not None]
    ones = [d for d in range(tensor(value).dim()) if d not in real]
    return permuted(value, [*ones, *real])


def merges(value: Value, run: Sequence[int]) -> bool:
    """Return whether a view can merge the neighbouring dims ``run`` of ``value``."""
    shape, stride = tensor(value).shape, tensor(value).stride()
    return all(same(stride[a], stride[b] * shape[b]) for a, b in itertools.pairwise(run))


def viewed(value: Value, extents: Sequence[Extent]) -> Value:
    """Plan a view with the given sizes, or return ``value`` if it has them."""
    shape = tensor(value).shape
    if len(shape) == len(extents) and all(
        same(a, b.size) for a, b in zip(shape, extents, strict=True)
    ):
        return value
    return plan(aten.view.default, value, [e.arg for e in extents])


ONE = Extent(1, 1)


def times(extents: Sequence[Extent]) -> Extent:
    """Return the product of extents."""
    size: Any = 1
    for extent in extents:
        size = size * extent.size
    return Extent(size, product([e.arg for e in extents]))
