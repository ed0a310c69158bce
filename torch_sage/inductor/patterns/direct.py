"""Attention that the model itself decided on: called or under ``sage``, or under ``exclude``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch._ops import OpOverload
from torch.fx import Graph, Node

from torch_sage import ops
from torch_sage.inductor.eligibility import EXCLUDED
from torch_sage.inductor.graph_utils import bound_arguments, call_functions
from torch_sage.ops.exact import ORIGINALS
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


def find(graph: Graph) -> Iterator[tuple[Node, Recipe | Reason]]:
    """Yield the calls of whole-attention ops with their recipe, and what is marked as excluded."""
    for node in call_functions(graph, *_CALLED):
        yield node, Recipe.of_op(bound_arguments(node))
    for node in call_functions(graph, *_EXCLUDED):
        yield node, EXCLUDED


def markers(graph: Graph) -> Iterator[tuple[Node, OpOverload[..., Any]]]:
    """Yield what is marked as excluded with the operator of torch that it stands for."""
    for node in call_functions(graph, *_EXCLUDED):
        yield node, _EXCLUDED[node.target]
