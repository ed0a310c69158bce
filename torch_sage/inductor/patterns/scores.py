"""The way from softmax up to the matmul that made the scores."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from torch_sage.inductor.graph_utils import (
    Size,
    Value,
    aten,
    is_tensor,
    plan,
    same,
    same_shape,
    tensor,
)
from torch_sage.inductor.patterns.axes import Axes, axes_of, step_up
from torch_sage.inductor.patterns.masks import Bias, Fill, Scale, ScaleBy, Step
from torch_sage.inductor.patterns.scalars import (
    DIVIDES,
    MULTIPLIES,
    cast_source,
    constant,
    scaled,
)
from torch_sage.inductor.patterns.softmax import is_call

MATMULS = (aten.bmm.default, aten.mm.default)
ADDED_MATMULS = (aten.baddbmm.default, aten.addmm.default)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)


@dataclass
class Path:
    """What happens to the scores between their matmul and softmax."""

    matmul: Node
    transposed: bool
    """The matmul computes K Q^T."""

    steps: list[Step] = field(default_factory=list)
    """In the model's order."""

    nodes: list[Node] = field(default_factory=list)
    """All nodes that hold scores, the matmul included."""


def climb(node: Node, axes: Axes, folded: tuple[Size, Size, Size]) -> Path | Node:
    """Return the path from scores ``node`` to their matmul, or the node where it is lost.

    ``folded`` is (batch * heads, seqlen_q, seqlen_k); ``axes`` flatten ``node`` to that order.
    """
    steps: list[Step] = []
    nodes: list[Node] = []
    while True:
        nodes.append(node)
        if is_call(node, *MATMULS, *ADDED_MATMULS):
            transposed = orientation(node, axes, folded)
            if transposed is None:
                return node
            if is_call(node, *ADDED_MATMULS):
                steps += added(node, axes)
            return Path(node, transposed, steps[::-1], nodes)
        if is_call(node, aten.add.Tensor, aten.sub.Tensor):
            return join(climb_sum(node, axes, folded), steps, nodes)
        up = step_up(node, axes)
        if up is not None:
            node, axes = up
            if any(axis.dim is None for axis in axes):
                return nodes[-1]
            continue
        step = elementwise(node, axes)
        if step is None:
            return node
        node = step[0]
        steps += step[1]


def join(rest: Path | Node, steps: list[Step], nodes: list[Node]) -> Path | Node:
    """Return ``rest`` with what comes after it; both lists run towards the matmul."""
    if isinstance(rest, Path):
        rest.steps += steps[::-1]
        rest.nodes += nodes
    return rest


def climb_sum(node: Node, axes: Axes, folded: tuple[Size, Size, Size]) -> Path | Node:
    """Follow the term of a sum that leads to a matmul; the other one is a bias."""
    first, second = node.args
    sign = 1.0 if node.target is aten.add.Tensor else -1.0
    factor = constant(node.kwargs.get("alpha", 1))
    terms = [(first, second, None if factor is None else sign * factor)]
    if sign * (factor or 0) == 1:
        terms.append((second, first, 1.0))
    lost = node
    for scores, bias, weight in terms:
        if weight is None or not is_whole(scores, node) or not is_bias(bias) or bias is scores:
            continue
        assert isinstance(scores, Node)
        path = climb(scores, axes, folded)
        if isinstance(path, Path):
            if isinstance(bias, Node):
                path.steps.append(Bias(bias, weight, node, axes))
            return path
        lost = path if path in (first, second) or lost is node else lost
    return lost


def is_whole(scores: object, node: Node) -> bool:
    """Return whether ``scores`` are a tensor that ``node`` does not broadcast."""
    return (
        isinstance(scores, Node)
        and is_tensor(scores)
        and same_shape(tensor(scores).shape, tensor(node).shape)
        and tensor(scores).is_floating_point()
    )


def is_bias(bias: object) -> bool:
    """Return whether ``bias`` is a floating tensor or a zero."""
    if isinstance(bias, Node) and is_tensor(bias):
        return tensor(bias).is_floating_point()
    return constant(bias) == 0


def elementwise(node: Node, axes: Axes) -> tuple[Node, list[Step]] | None:
    """Return the scores that an elementwise ``node`` changes, and how."""
    cast = cast_source(node)
    if cast is not None:
        floats = tensor(cast).is_floating_point() and tensor(node).is_floating_point()
        return (cast, []) if floats else None
    by_constant = scaled(node)
    if by_constant is not None and is_whole(by_constant[0], node):
        return by_constant[0], [Scale(by_constant[1])]
    if is_call(node, *MULTIPLIES, *DIVIDES):
        return scaled_by_tensor(node, axes)
    if is_call(node, aten.where.self):
        keep, kept, filled = node.args
        inverted = not is_whole(kept, node) or (
            constant(filled) is None and constant(kept) is not None
        )
        scores, fill = (filled, kept) if inverted else (kept, filled)
    elif is_call(node, *FILLS):
        scores, keep, fill = node.args
        inverted = True
    else:
        return None
    if not isinstance(keep, Node) or not isinstance(scores, Node) or not is_whole(scores, node):
        return None
    if tensor(keep).dtype is not torch.bool:
        return None
    return scores, [Fill(keep, inverted, fill, node, axes)]


def scaled_by_tensor(node: Node, axes: Axes) -> tuple[Node, list[Step]] | None:
    """Return the scores that ``node`` scales by what is not a known number."""
    scores, factor = node.args
    if is_call(node, *MULTIPLIES) and not is_whole(scores, node):
        scores, factor = factor, scores
    if not isinstance(scores, Node) or not is_whole(scores, node) or not isinstance(factor, Node):
        return None
    if factor is scores:
        return None
    value: Value = factor
    if is_call(node, *DIVIDES):
        if is_tensor(factor):
            value = plan(aten.reciprocal.default, factor)
        else:
            value = plan(operator.truediv, 1.0, factor)
    return scores, [ScaleBy(value, node, axes)]


def added(node: Node, axes: Axes) -> list[Step]:
    """Return the steps of beta * input + alpha * (a @ b), the last one first."""
    beta, alpha = (constant(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
    bias = node.args[0]
    assert isinstance(bias, Node) and beta is not None and alpha is not None
    steps: list[Step] = [] if beta == 0 else [Bias(bias, beta, node, axes)]
    return steps if alpha == 1 else [*steps, Scale(alpha)]


def orientation(node: Node, axes: Axes, folded: tuple[Size, Size, Size]) -> bool | None:
    """Return whether a matmul's result is the scores transposed; None if it is not the scores."""
    rank = tensor(node).dim()
    shape = [1] * (3 - rank) + list(tensor(node).shape)
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    batch, rows, columns = folded
    order = dims(axes)
    if same_shape(shape, (batch, rows, columns)) and order == dims(axes_of(node)):
        return False
    if same_shape(shape, (batch, columns, rows)) and order == dims(axes_of(node, swapped)):
        return True
    return None


def dims(axes: Axes) -> list[int | None]:
    """Return the dimensions of axes; their sizes must not be compared, that would add guards."""
    return [axis.dim for axis in axes]


def makes_scores(node: Node, like: Node) -> bool:
    """Return whether a matmul close above ``node`` has as many elements as ``like``."""
    queue, seen = [node], {node}
    while queue and len(seen) < 40:
        current = queue.pop(0)
        if is_call(current, *MATMULS, *ADDED_MATMULS):
            if same(tensor(current).numel(), tensor(like).numel()):
                return True
            continue
        for above in current.all_input_nodes:
            if above not in seen:
                seen.add(above)
                queue.append(above)
    return False
