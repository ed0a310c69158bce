"""Attention that the model itself decided on: called or under ``sage``, or under ``exclude``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch._ops import OpOverload
from torch.fx import Graph, Node

from torch_sage import ops
from torch_sage.inductor.eligibility import EXCLUDED
from torch_sage.inductor.graph_utils import aten, bound_arguments, call_functions
from torch_sage.ops.exact import ORIGINALS
from torch_sage.ops.hadamard import named
from torch_sage.ops.reasons import Reason
from torch_sage.recipes import Recipe

_CALLED = (
    ops.sdpa,
    ops.sdpa_with_lse,
    ops.rotary_sdpa,
    ops.varlen_sdpa,
    ops.varlen_sdpa_with_lse,
)
_EXCLUDED = {getattr(ops, name): original for name, original in ORIGINALS.items()}


# What may lie between the product with a Hadamard matrix and attention, and the product itself.
_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.transpose.int,
    aten.permute.default,
    aten.clone.default,
    aten.unsqueeze.default,
)
_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.matmul.default)


def find(graph: Graph) -> Iterator[tuple[Node, str | Reason]]:
    """Yield the calls of whole-attention ops with their recipe, and what is marked as excluded."""
    for node in call_functions(graph, *_CALLED):
        bound = bound_arguments(node)
        rotation = "hadamard" if _is_rotated(bound["query"]) else "none"
        yield node, named(Recipe.of_op(bound).name, rotation)
    for node in call_functions(graph, *_EXCLUDED):
        yield node, EXCLUDED


def markers(graph: Graph) -> Iterator[tuple[Node, OpOverload[..., Any]]]:
    """Yield what is marked as excluded with the operator of torch that it stands for."""
    for node in call_functions(graph, *_EXCLUDED):
        yield node, _EXCLUDED[node.target]


def _is_rotated(query: Node) -> bool:
    """Return whether ``query`` is a product with ``hadamard.matrix``, which is made of no input."""
    while query.target in _VIEWS:
        query = query.all_input_nodes[0]
    if query.target not in _PRODUCTS:
        return False
    todo = [query.all_input_nodes[-1]]
    targets = set()
    while todo:
        node = todo.pop()
        if node.op != "call_function":
            return False
        targets.add(node.target)
        todo += node.all_input_nodes
    return aten.bitwise_and.Tensor in targets
