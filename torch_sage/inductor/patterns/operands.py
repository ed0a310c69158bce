"""Operands of the two matmuls: from what bmm is given back to [batch, heads, tokens, head_dim].

``bmm`` sees folded, copied, transposed, pre-scaled and repeated tensors. Walking up undoes that, so
that attention reads the model's own q, k, v: no copies, and K/V heads without their repetition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.fx import Node

from torch_sage.inductor.graph_utils import Value, aten, plan, same, size, tensor
from torch_sage.inductor.patterns.axes import (
    ONE,
    Axes,
    Axis,
    Extent,
    align,
    is_one,
    merges,
    ordered,
    step_up,
    times,
    viewed,
)
from torch_sage.inductor.patterns.scalars import cast_source, scaled

BATCH, HEADS = 0, 1


class Source(NamedTuple):
    """A tensor with the elements of a matmul operand, up to a factor."""

    node: Node
    axes: Axes
    factor: float


class Operand(NamedTuple):
    """An operand as attention takes it."""

    value: Value
    heads: Extent
    factor: float


def sources(node: Node, axes: Axes, dtype: torch.dtype, *, unscale: bool) -> list[Source]:
    """Return the operand ``node`` and what it is made from, nearest first.

    Casts from ``dtype`` are undone: upcasting 16-bit operands for a matmul changes no element.
    """
    factor = 1.0
    found = [Source(node, axes, factor)]
    while True:
        step = step_up(node, axes)
        cast, product = cast_source(node), scaled(node)
        if step is not None:
            node, axes = step
        elif cast is not None and tensor(cast).dtype == dtype and widens(cast, node):
            node = cast
        elif unscale and product is not None and keeps_shape(product[0], node):
            node, factor = product[0], factor * product[1]
        else:
            return found
        found.append(Source(node, axes, factor))


def widens(narrow: Node, wide: Node) -> bool:
    """Return whether every value of the first dtype is one of the second."""
    a, b = tensor(narrow).dtype, tensor(wide).dtype
    return b.is_floating_point and torch.promote_types(a, b) == b


def keeps_shape(source: Node, node: Node) -> bool:
    """Return whether an elementwise ``node`` has the dtype and rank of ``source``."""
    a, b = tensor(source), tensor(node)
    return a.dtype == b.dtype and a.dim() == b.dim()


def arrange(source: Source, target: Sequence[Extent], *, group_heads: bool) -> Operand | None:
    """Return ``source`` in the four dims of ``target`` without a copy, or None.

    With ``group_heads`` a head that is repeated for several query heads is kept once.
    """
    groups = align(source.axes, [t.size for t in target])
    if groups is None:
        return None
    shape: list[Extent] = [ONE] * 4
    grown: list[Extent] = list(target)
    for group in groups:
        real = [a for a in group.axes if a.dim is not None]
        repeated = len(real) < len(group.axes)
        if not merges(source.node, [a.dim for a in real if a.dim is not None]):
            return None
        if not repeated:
            for dim in group.targets:
                shape[dim] = target[dim]
        elif group_heads and group.targets == (HEADS,) and is_suffix_repeat(group.axes, len(real)):
            shape[HEADS] = times([extent(source.node, a) for a in real])
            grown[HEADS] = shape[HEADS]
        elif real or max(group.targets) > HEADS:
            return None
    value = viewed(ordered(source.node, source.axes), shape)
    if not all(same(a.size, b.size) for a, b in zip(shape, grown, strict=True)):
        value = plan(aten.expand.default, value, [e.arg for e in grown])
    return Operand(value, grown[HEADS], source.factor)


def is_suffix_repeat(axes: Axes, real: int) -> bool:
    """Return whether only the innermost axes are broadcast: heads 0 0 0 1 1 1, not 0 1 0 1 0 1."""
    return all(axis.dim is not None for axis in axes[:real])


def extent(node: Node, axis: Axis) -> Extent:
    """Return the size of an axis that ``node`` really has."""
    assert axis.dim is not None
    return Extent(axis.size, size(node, axis.dim))


def arrange_query(found: list[Source], target: Sequence[Extent]) -> Operand | None:
    """Return the query from its furthest source that needs no copy."""
    options = (arrange(source, target, group_heads=False) for source in reversed(found))
    return next((o for o in options if o is not None), None)


def arrange_key_value(
    keys: list[Source], values: list[Source], key: Sequence[Extent], value: Sequence[Extent]
) -> tuple[Operand, Operand] | None:
    """Return K and V with as few heads as both allow, from the furthest sources."""
    for key_source in reversed(keys):
        k = arrange(key_source, key, group_heads=True)
        if k is None:
            continue
        for value_source in reversed(values):
            v = arrange(value_source, value, group_heads=True)
            if v is not None and same(k.heads.size, v.heads.size):
                return k, v
    return None


def batch_and_heads(
    operands: Sequence[list[Source]], scores: Sequence[Source]
) -> Iterator[tuple[Extent, Extent]]:
    """Yield ways to split the folded batch into batch and heads, the most natural first.

    ``operands`` are the sources of K, V and Q, ``scores`` the scores where they are masked.
    """
    found = [leading(source) for group in (*operands, scores) for source in group]
    leads = [lead for lead in found if lead is not None]
    yield from ((lead[0], lead[1]) for lead in leads if len(lead) == 2)
    repeats = (repeated_heads(source, operands[0][0]) for source in operands[0])
    yield from (split for split in repeats if split is not None)
    yield from ((times(lead[:-1]), lead[-1]) for lead in leads if len(lead) > 2)
    yield from ((times(lead), ONE) for lead in leads)
    yield ONE, ONE


def leading(source: Source) -> list[Extent] | None:
    """Return the dims before a matrix in the last two, if none is permuted or broadcast."""
    rank = tensor(source.node).dim()
    indices = [a.dim for a in source.axes if a.dim is not None]
    lead = [i for i in indices if i < rank - 2]
    if rank < 3 or len(indices) < len(source.axes) or indices[: len(lead)] != sorted(lead):
        return None
    return [Extent(tensor(source.node).shape[d], size(source.node, d)) for d in range(rank - 2)]


def repeated_heads(source: Source, matmul: Source) -> tuple[Extent, Extent] | None:
    """Return (batch, heads) if ``source`` repeats its innermost leading axis, as in GQA."""
    matrix = sum(not is_one(s) for s in tensor(matmul.node).shape[-2:])
    axes = source.axes[: len(source.axes) - matrix]
    count = len(axes)
    while count and axes[count - 1].dim is None:
        count -= 1
    if not 0 < count < len(axes):
        return None
    extents = []
    for axis in axes:
        if axis.dim is not None:
            extents.append(extent(source.node, axis))
        elif isinstance(axis.size, int):
            extents.append(Extent(axis.size, axis.size))
        else:
            return None
    return times(extents[: count - 1]), times(extents[count - 1 :])
