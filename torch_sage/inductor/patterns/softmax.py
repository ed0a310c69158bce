"""Recognizing softmax: the op itself, its decompositions and the safe form of SDPA's math path."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch.fx import Node

from torch_sage.inductor.graph_utils import aten, tensor
from torch_sage.inductor.patterns.scalars import cast_source, constant, uncast


class Softmax(NamedTuple):
    """One softmax in a graph."""

    scores: Node
    """Its input."""

    dim: int
    """The normalized dimension, not negative."""

    nodes: tuple[Node, ...]
    """Every node that only this softmax needs, its result included."""


def is_call(node: Any, *targets: Any) -> bool:
    """Return whether ``node`` calls one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def match_softmax(node: Node) -> Softmax | None:
    """Return the softmax whose result is ``node``."""
    if is_call(node, aten._softmax.default, aten._safe_softmax.default, aten.softmax.int):
        scores, dim = node.args[:2]
        assert isinstance(scores, Node) and isinstance(dim, int)
        return Softmax(scores, dim % max(tensor(node).dim(), 1), (node,))
    if is_call(node, aten.where.self):
        return match_safe(node)
    if is_call(node, aten.div.Tensor):
        return match_quotient(node)
    return None


def match_quotient(node: Node) -> Softmax | None:
    """Match exp(x - max(x)) / sum(exp(x - max(x))); a missing maximum changes only overflow."""
    exp, total = node.args
    if not is_call(exp, aten.exp.default) or not is_call(total, aten.sum.dim_IntList):
        return None
    assert isinstance(exp, Node) and isinstance(total, Node)
    if total.args[0] is not exp or total.kwargs:
        return None
    dim = single_dim(total)
    if dim is None:
        return None
    shifted = exp.args[0]
    assert isinstance(shifted, Node)
    nodes = [node, total, exp]
    if is_call(shifted, aten.sub.Tensor) and not shifted.kwargs:
        scores, maximum = shifted.args
        if is_maximum(maximum, scores, dim):
            assert isinstance(scores, Node) and isinstance(maximum, Node)
            nodes += [shifted, maximum, *maximum_parts(maximum)]
            return Softmax(scores, dim, tuple(nodes))
    return Softmax(shifted, dim, tuple(nodes))


def single_dim(node: Node) -> int | None:
    """Return the one dimension that a reduction with keepdim=True reduces."""
    if len(node.args) != 3 or node.args[2] is not True:
        return None
    dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    if len(dims) != 1 or not isinstance(dims[0], int):
        return None
    return dims[0] % tensor(node).dim()


def is_maximum(node: Any, scores: Any, dim: int) -> bool:
    """Return whether ``node`` is the maximum of ``scores`` along ``dim``, kept as size 1."""
    if is_call(node, aten.amax.default):
        return node.args[0] is scores and single_dim(node) == dim
    return any(
        part.args[0] is scores and single_max_dim(part) == dim for part in maximum_parts(node)
    )


def maximum_parts(node: Any) -> tuple[Node, ...]:
    """Return the ``max.dim`` call whose values ``node`` takes."""
    if is_call(node, operator.getitem):
        source, index = node.args
        if is_call(source, aten.max.dim) and index == 0:
            assert isinstance(source, Node)
            return (source,)
    return ()


def single_max_dim(node: Node) -> int | None:
    """Return the dimension of a ``max.dim`` with keepdim=True."""
    if len(node.args) != 3 or node.args[2] is not True or not isinstance(node.args[1], int):
        return None
    scores = node.args[0]
    assert isinstance(scores, Node)
    return node.args[1] % tensor(scores).dim()


def match_safe(node: Node) -> Softmax | None:
    """Match where(every score of the row is -inf, 0, softmax(scores))."""
    fully_masked, zero, probabilities = node.args
    if constant(zero) != 0 or not isinstance(probabilities, Node):
        return None
    casts = []
    inner = probabilities
    while (below := cast_source(inner)) is not None:
        casts.append(inner)
        inner = below
    softmax = match_softmax(inner)
    chain = row_is_masked(fully_masked)
    if softmax is None or chain is None:
        return None
    *parts, scores, dim = chain
    if uncast(scores) is not uncast(softmax.scores) or dim != softmax.dim:
        return None
    # Outside Inductor the zeros are still made by a call that takes the weights for their shape.
    zeros = (zero,) if isinstance(zero, Node) and is_call(zero, aten.full_like.default) else ()
    return Softmax(softmax.scores, softmax.dim, (node, *zeros, *casts, *softmax.nodes, *parts))


def row_is_masked(node: Any) -> list[Any] | None:
    """Return the nodes of not(any(not(scores == -inf))), then the scores and the dimension."""
    nodes: list[Any] = []
    for targets in (
        (aten.logical_not.default, aten.bitwise_not.default),
        (aten.any.dim,),
        (aten.logical_not.default, aten.bitwise_not.default),
        (aten.eq.Scalar,),
    ):
        if not is_call(node, *targets):
            return None
        nodes.append(node)
        node = node.args[0]
    dim = single_dim(nodes[1])
    if dim is None or nodes[3].args[1] != float("-inf") or not isinstance(node, Node):
        return None
    return [*nodes, node, dim]
