"""The attention weights that the second matmul takes: a softmax behind views and casts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.fx import Node

from torch_sage.inductor.graph_utils import Size, same, tensor
from torch_sage.inductor.patterns import refusals
from torch_sage.inductor.patterns.axes import Axes, axes_of, is_one, step_up
from torch_sage.inductor.patterns.scalars import cast_source
from torch_sage.inductor.patterns.scores import ADDED_MATMULS, MATMULS, makes_scores
from torch_sage.inductor.patterns.softmax import Softmax, is_call, match_softmax
from torch_sage.ops.reasons import Reason

NEARBY = 12
"""How many nodes above the second matmul are searched for a softmax whose result was changed."""


class Weights(NamedTuple):
    """Attention weights that a matmul multiplies with the value."""

    matmul: Node
    transposed: bool
    """The matmul computes V^T P^T."""

    softmax: Softmax
    axes: Axes
    """Of the softmax: they flatten it to [batch * heads, seqlen_q, seqlen_k]."""

    nodes: tuple[Node, ...]
    """All nodes that hold the weights."""

    modified: Reason | None
    """Why they are not simply a softmax."""


def matrix_axes(node: Node, transposed: bool) -> Axes:
    """Return the axes of a matmul's argument, the last two exchanged if ``transposed``."""
    rank = tensor(node).dim()
    return axes_of(node, [*range(rank - 2), rank - 1, rank - 2] if transposed else None)


def find_weights(matmul: Node, transposed: bool) -> Weights | None:
    """Return the attention weights that ``matmul`` takes as its first or, transposed, second."""
    node = matmul.args[1 if transposed else 0]
    assert isinstance(node, Node)
    axes = matrix_axes(node, transposed)
    nodes: list[Node] = []
    while True:
        softmax = match_softmax(node)
        if softmax is not None:
            return Weights(matmul, transposed, softmax, axes, (*nodes, *softmax.nodes), None)
        nodes.append(node)
        up, cast = step_up(node, axes), cast_source(node)
        if up is not None and all(a.dim is not None for a in up[1]):
            node, axes = up
        elif cast is not None and tensor(cast).is_floating_point():
            node = cast
        else:
            break
    return find_modified(matmul, transposed, node)


def find_modified(matmul: Node, transposed: bool, last: Node) -> Weights | None:
    """Return weights that are changed after a softmax close above ``last``."""
    near = [last]
    for node in near:
        if is_call(node, *MATMULS, *ADDED_MATMULS) or len(near) > NEARBY:
            break
        near += [above for above in node.all_input_nodes if above not in near]
    for node in near:
        softmax = match_softmax(node)
        if softmax is not None and makes_scores(softmax.scores, last):
            random = any(is_random(n) for n in near)
            reason = refusals.WEIGHTS_DROPOUT if random else refusals.WEIGHTS_MODIFIED
            return Weights(matmul, transposed, softmax, (), (), reason)
    return None


def is_random(node: Node) -> bool:
    """Return whether ``node`` draws random numbers."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def runs_over_keys(softmax: Softmax, axes: Axes, seqlen_k: Size) -> bool:
    """Return whether softmax normalizes each query's weights, whatever the layout."""
    if is_one(seqlen_k):
        return is_one(tensor(softmax.nodes[0]).shape[softmax.dim])
    return axes[-1].dim == softmax.dim and same(axes[-1].size, seqlen_k)
