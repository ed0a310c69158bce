"""The fused SDPA operators that torch lowers attention to, and the composite one itself."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from torch.fx import Graph, Node

from torch_sage.inductor.eligibility import LSE_USED, SCALE_UNKNOWN
from torch_sage.inductor.graph_utils import (
    Value,
    aten,
    bound_arguments,
    live_nodes,
    output_order,
    plan,
    restride,
    tensor,
)
from torch_sage.inductor.patterns.match import Match, Refusal
from torch_sage.inductor.peel import keep_mask, unpadded, unrepeated


class Form(NamedTuple):
    """How one operator spells SDPA."""

    mask: str | None
    """Name of its mask argument."""

    causal: str = "top_left"
    """What ``is_causal`` means when the lengths differ."""

    outputs: bool = True
    """Whether it returns a tuple, attention first."""

    hidden: float = -math.inf
    """What torch adds to a score that a bool mask hides."""


# FlashAttention on CUDA aligns its causal mask bottom-right; F.scaled_dot_product_attention never
# calls it with unequal lengths, but torch.nn.attention.bias.causal_lower_right does.
_FORMS: dict[str, Form] = {
    "scaled_dot_product_attention": Form("attn_mask", outputs=False),
    "_scaled_dot_product_attention_math": Form("attn_mask"),
    "_scaled_dot_product_flash_attention_for_cpu": Form("attn_mask"),
    "_scaled_dot_product_flash_attention": Form(None, causal="bottom_right"),
    "_scaled_dot_product_efficient_attention": Form("attn_bias"),
    "_scaled_dot_product_cudnn_attention": Form("attn_bias", hidden=-65504.0),
    "_scaled_dot_product_fused_attention_overrideable": Form("attn_bias"),
}


@cache
def forms() -> dict[Any, Form]:
    """Return the operators of this torch that compute SDPA."""
    return {
        getattr(aten, name).default: form for name, form in _FORMS.items() if hasattr(aten, name)
    }


def is_fused(node: Node) -> bool:
    """Return whether ``node`` calls one of the operators."""
    return node.op == "call_function" and node.target in forms()


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Yield every call of a fused SDPA operator, in graph order."""
    live = live_nodes(graph)
    for node in [n for n in graph.nodes if is_fused(n) and n in live]:
        yield _understand(node, forms()[node.target], live)


def _understand(node: Node, form: Form, live: set[Node]) -> Match | Refusal:
    arguments = bound_arguments(node)
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    operands = {"query": query, "key": key, "value": value}
    anchor = node
    if form.outputs:
        users = [user for user in node.users if user in live]
        picks = [u for u in users if u.target is operator.getitem and u.args[1] == 0]
        if len(users) != 1 or len(picks) != 1:
            return Refusal("fused", node, (LSE_USED,), operands)
        anchor = picks[0]
    scale = arguments["scale"]
    if not isinstance(scale, (int, float, type(None))):
        return Refusal("fused", node, (SCALE_UNKNOWN,), operands)
    mask = arguments[form.mask] if form.mask else None
    semantics = {
        "attn_mask": None if mask is None else keep_mask(mask, form.hidden),
        "causal": form.causal if arguments["is_causal"] else "none",
        "dropout_p": arguments["dropout_p"],
    }
    peeled = unpadded(query, key, value, anchor)
    if peeled is not None:
        if scale is None:
            scale = 1.0 / math.sqrt(tensor(query).shape[-1])
        query, key, value, anchor = peeled
    sources = (query, unrepeated(key), unrepeated(value))
    return _match(anchor, sources, keeps_strides=peeled is None, scale=scale, **semantics)


def _match(
    anchor: Node, operands: tuple[Value, ...], *, keeps_strides: bool, **semantics: Any
) -> Match:
    like = tensor(anchor)
    order = "bhsd"
    if like.dim() == 4:
        order = output_order(like)
    elif like.dim() == 3 and all(tensor(x).dim() == 3 for x in operands):
        operands = tuple(plan(aten.unsqueeze.default, x, 0) for x in operands)

    def finish(output: Value) -> Value | None:
        if like.dim() == 3:
            output = plan(aten.squeeze.dim, output, 0)
        return restride(output, like) if keeps_strides else output

    query, key, value = operands
    return Match(
        pattern="fused",
        anchor=anchor,
        query=query,
        key=key,
        value=value,
        finish=finish,
        keeps_strides=keeps_strides,
        output_order=order,
        **semantics,
    )
