"""Packed attention: the operator behind ``torch.nn.attention.varlen.varlen_attn``."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch.fx import Graph, Node

from torch_sage.inductor.eligibility import LSE_USED, SCALE_UNKNOWN
from torch_sage.inductor.graph_utils import bound_arguments, is_tensor, live_nodes
from torch_sage.inductor.patterns.match import PackedMatch, Refusal
from torch_sage.inductor.patterns.refusals import VARLEN_KIND
from torch_sage.ops.reasons import Reason

# By name: torch defines it where its module is imported, which nothing else needs.
_OPERATOR = "torch_attn._varlen_attn.default"
_OPERANDS = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
_WINDOWS = {None: False, (-1, -1): False, (-1, 0): True}  # and whether they are causal
_KNOWN = {*_OPERANDS, "is_causal", "scale", "window_size", "enable_gqa", "num_splits"}


def find(graph: Graph) -> Iterator[PackedMatch | Refusal]:
    """Yield every call of the operator that is used, in graph order."""
    live = live_nodes(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target) == _OPERATOR and node in live:
            yield _understand(node, live)


def _understand(node: Node, live: set[Node]) -> PackedMatch | Refusal:
    arguments = bound_arguments(node)
    operands = {name: arguments[name] for name in ("query", "key", "value")}

    def refusal(reason: Reason) -> Refusal:
        return Refusal("varlen", node, (reason,), operands)

    users = [user for user in node.users if user in live]
    if len(users) != 1 or users[0].target is not operator.getitem or users[0].args[1] != 0:
        return refusal(LSE_USED)
    window = arguments["window_size"]
    window = None if window is None else tuple(window)
    others = [value for name, value in arguments.items() if name not in _KNOWN]
    if window not in _WINDOWS or any(value is not None for value in others):
        return refusal(VARLEN_KIND)
    if not is_tensor(arguments["cu_seq_k"]):
        return refusal(VARLEN_KIND)
    scale = arguments["scale"]
    if not isinstance(scale, (int, float, type(None))):
        return refusal(SCALE_UNKNOWN)
    # As FlashAttention aligns it.
    causal = "bottom_right" if arguments["is_causal"] or _WINDOWS[window] else "none"
    return PackedMatch(users[0], tuple(arguments[name] for name in _OPERANDS), causal, scale)
