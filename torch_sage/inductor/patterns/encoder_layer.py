"""Operators that hide attention in C++: nn.TransformerEncoderLayer's and nn.MultiheadAttention's.

Their fast paths (eval, no gradient) reach Inductor as one aten operator. It is replaced by the same
computation in aten with our attention inside, if that attention is eligible. In their masks
everything but 0 hides a key, whatever the dtype; a query that may see no key gives 0 here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node

from torch_sage.inductor.graph_utils import (
    Value,
    aten,
    bound_arguments,
    call_functions,
    live_nodes,
    plan,
    plan_graph,
    restride,
    size,
    tensor,
)
from torch_sage.inductor.patterns import refusals
from torch_sage.inductor.patterns.masks import bool_mask, inverse
from torch_sage.inductor.patterns.match import Match, Refusal

ENCODER_LAYER = "encoder_layer"
NATIVE_MHA = "native_multi_head_attention"


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Yield encoder layers and native multi-head attention in graph order."""
    layer, native = (
        aten._transformer_encoder_layer_fwd.default,
        aten._native_multi_head_attention.default,
    )
    for node in call_functions(graph, layer, native):
        yield from match_layer(node) if node.target is layer else match_native(graph, node)


def match_layer(node: Node) -> Iterator[Match]:
    """Yield the attention of an encoder layer; finishing it computes the rest of the layer."""
    a = bound_arguments(node)
    src = a["src"]
    if tensor(src).dim() != 3 or tensor(src).is_nested:
        return
    norms = (a["norm_weight_1"], a["norm_bias_1"]), (a["norm_weight_2"], a["norm_bias_2"])
    x = src
    if a["norm_first"]:
        x = planned(normalize, src, *norms[0], a["eps"])
    query, key, value = planned(project_self, x, a["qkv_weight"], a["qkv_bias"], a["num_heads"])

    def finish(output: Value) -> Value | None:
        result = planned(
            rest_of_layer,
            output,
            src,
            a["proj_weight"],
            a["proj_bias"],
            *norms[0],
            *norms[1],
            a["ffn_weight_1"],
            a["ffn_bias_1"],
            a["ffn_weight_2"],
            a["ffn_bias_2"],
            a["eps"],
            a["use_gelu"],
            a["norm_first"],
        )
        return restride(result, tensor(node))

    mask = keep_mask(a["mask"], a["mask_type"])
    yield Match(ENCODER_LAYER, node, query, key, value, finish, attn_mask=mask, output_order="bshd")


def match_native(graph: Graph, node: Node) -> Iterator[Match | Refusal]:
    """Yield nn.MultiheadAttention's operator, whose second result are the weights."""
    a = bound_arguments(node)
    inputs = [a[name] for name in ("query", "key", "value")]
    if any(tensor(x).dim() != 3 or tensor(x).is_nested for x in inputs):
        return
    results = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if 0 not in results:
        return
    anchor = results[0]
    if 1 in results and results[1] in live_nodes(graph):
        yield Refusal(NATIVE_MHA, anchor, (refusals.WEIGHTS_USED,))
        return
    projection = a["qkv_weight"], a["qkv_bias"], a["num_head"]
    if inputs[0] is inputs[1] is inputs[2]:
        query, key, value = planned(project_self, inputs[0], *projection)
    else:
        query, key, value = planned(project_each, *inputs, *projection)

    def finish(output: Value) -> Value | None:
        result = planned(project_out, output, a["proj_weight"], a["proj_bias"])
        return restride(result, tensor(anchor))

    mask = keep_mask(a["mask"], a["mask_type"])
    yield Match(NATIVE_MHA, anchor, query, key, value, finish, attn_mask=mask, output_order="bshd")


def planned(function: Any, *args: Any) -> Any:
    """Plan what ``function`` computes in the operators that Inductor's joint graph has."""
    return plan_graph(function, *args, decompositions=select_decomp_table())


def keep_mask(mask: Node | None, mask_type: int | None) -> Value | None:
    """Return the mask with True for visible keys, in 4-D.

    ``mask_type`` 0 is [seqlen_q, seqlen_k], 1 is key padding [batch, seqlen_k], 2 is 4-D.
    """
    if mask is None:
        return None
    keep: Value | None = bool_mask(mask)
    if keep is None:
        hides = tensor(mask).dtype is torch.bool
        keep = inverse(mask) if hides else plan(aten.eq.Scalar, mask, 0)
    if tensor(keep).dim() == 4:
        return keep
    rows, columns = size(keep, 0), size(keep, 1)
    shape = [rows, 1, 1, columns] if mask_type == 1 else [1, 1, rows, columns]
    return plan(aten.view.default, keep, shape)


def normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalize the last dimension."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Return [batch, tokens, heads * head_dim] as [batch, heads, tokens, head_dim]."""
    batch, tokens, width = x.shape
    return x.view(batch, tokens, num_heads, width // num_heads).transpose(1, 2)


def project_self(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Return q, k, v of self-attention from one matmul."""
    parts = F.linear(x, weight, bias).chunk(3, dim=-1)
    return tuple(split_heads(part, num_heads) for part in parts)


def project_each(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor, num_heads: int
) -> tuple[Tensor, ...]:
    """Return q, k, v of cross-attention."""
    parts = zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
    return tuple(split_heads(F.linear(*part), num_heads) for part in parts)


def project_out(output: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Join the heads and project them."""
    return F.linear(output.transpose(1, 2).flatten(2), weight, bias)


def rest_of_layer(
    output: Tensor,
    src: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    eps: float,
    use_gelu: bool,
    norm_first: bool,
) -> Tensor:
    """Return the layer's result, given the output of its attention."""
    x = src + project_out(output, proj_weight, proj_bias)
    if not norm_first:
        x = normalize(x, norm_weight_1, norm_bias_1, eps)
    hidden = normalize(x, norm_weight_2, norm_bias_2, eps) if norm_first else x
    activation = F.gelu if use_gelu else F.relu
    hidden = activation(F.linear(hidden, ffn_weight_1, ffn_bias_1))
    x = x + F.linear(hidden, ffn_weight_2, ffn_bias_2)
    return x if norm_first else normalize(x, norm_weight_2, norm_bias_2, eps)
