"""Laying out what broadcasts to the scores as the op wants it: [batch, heads, tokens, tokens]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from torch_sage.inductor.graph_utils import Value, aten, plan, same, size, tensor
from torch_sage.inductor.patterns import refusals
from torch_sage.inductor.patterns.axes import (
    ONE,
    Axes,
    Axis,
    Extent,
    align,
    is_one,
    merges,
    ordered,
    viewed,
)
from torch_sage.inductor.patterns.refusals import Unsupported

Target = Sequence[Extent]


def broadcast(mask: Value, at: Node, axes: Axes, target: Target) -> Value:
    """Plan ``mask``, which broadcasts to the scores ``at``, in the four dims of ``target``.

    A dim that the mask is constant along has size 1 in the result, unless it is folded together
    with one along which it is not.
    """
    missing = tensor(at).dim() - tensor(mask).dim()
    if missing > 0:
        mask = plan(aten.view.default, mask, [1] * missing + shape_args(mask))
    groups = align(axes, [t.size for t in target])
    if groups is None:
        raise Unsupported(refusals.MASK_LAYOUT)
    result: list[Extent] = [ONE] * len(target)
    runs: list[Axes] = []
    grown = shape_args(mask)
    for group in groups:
        along = [is_along(mask, axis) for axis in group.axes]
        if not any(along):
            continue
        runs.append(group.axes)
        for axis, present in zip(group.axes, along, strict=True):
            if not present:
                if not isinstance(axis.size, int) or axis.dim is None:
                    raise Unsupported(refusals.MASK_LAYOUT)
                grown[axis.dim] = axis.size
        for dim in group.targets:
            result[dim] = target[dim]
    if grown != shape_args(mask):
        mask = plan(aten.expand.default, mask, grown)
    mask = ordered(mask, tuple(axis for run in runs for axis in run))
    position = tensor(mask).dim() - sum(map(len, runs))
    for run in runs:
        if not merges(mask, range(position, position + len(run))):
            mask = plan(aten.clone.default, mask, memory_format=torch.contiguous_format)
        position += len(run)
    return viewed(mask, result)


def is_along(mask: Value, axis: Axis) -> bool:
    """Return whether ``mask`` varies along ``axis`` of the scores; else it has size 1 there."""
    assert axis.dim is not None
    extent = tensor(mask).shape[axis.dim]
    if is_one(extent):
        return False
    if not same(extent, axis.size):
        raise Unsupported(refusals.MASK_LAYOUT)
    return True


def shape_args(value: Value) -> list[Any]:
    """Return the shape of ``value`` as an operator argument."""
    return [size(value, dim) for dim in range(tensor(value).dim())]
