"""Hand-written attention: matmul, softmax, matmul with what models put between them.

The walk starts at the second matmul and goes up by meaning, not by a literal tree: any views,
casts, scales and masks in any order and spelling. It stops at the first thing it cannot prove.

Two documented differences to the graph it replaces. A row whose every key is masked with -inf gives
0 as in SDPA, where a plain softmax gives NaN (torch's own fusion does the same). Attention that the
model computes in separate operators on purpose, such as SDPA's math backend, is rewritten, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from torch_sage.inductor.graph_utils import (
    Size,
    Value,
    aten,
    call_functions,
    live_nodes,
    plan,
    product,
    same,
    same_shape,
    size,
    tensor,
    val,
)
from torch_sage.inductor.patterns import refusals
from torch_sage.inductor.patterns.axes import Extent
from torch_sage.inductor.patterns.masks import Mask, Scale
from torch_sage.inductor.patterns.match import Match, Refusal
from torch_sage.inductor.patterns.operands import (
    Operand,
    Source,
    arrange_key_value,
    arrange_query,
    batch_and_heads,
    sources,
)
from torch_sage.inductor.patterns.refusals import Unsupported
from torch_sage.inductor.patterns.scores import (
    ADDED_MATMULS,
    MATMULS,
    Path,
    climb,
    makes_scores,
)
from torch_sage.inductor.patterns.softmax import is_call
from torch_sage.inductor.patterns.weights import Weights, find_weights, matrix_axes, runs_over_keys
from torch_sage.ops.reasons import Reason

NAME = "manual"


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Yield hand-written attention in graph order; each one may be rewritten before the next."""
    for node in call_functions(graph, *MATMULS):
        for transposed in (False, True):
            weights = find_weights(node, transposed)
            if weights is None:
                continue
            try:
                match = understand(graph, weights)
            except Unsupported as refused:
                yield Refusal(NAME, node, (refused.reason,))
                break
            if match is not None:
                yield match
                break


def understand(graph: Graph, weights: Weights) -> Match | None:
    """Return the attention that ends in ``weights.matmul``; None if it is something else.

    Raises:
        Unsupported: if it looks like attention but must stay.
    """
    if weights.modified is not None:
        raise Unsupported(weights.modified)
    matmul, softmax, axes = weights.matmul, weights.softmax, weights.axes
    shape = tensor(matmul.args[1 if weights.transposed else 0]).shape  # type: ignore[arg-type]
    seqlen_q, seqlen_k = shape[-2:] if not weights.transposed else (shape[-1], shape[-2])
    folded = (shape[0] if len(shape) == 3 else 1, seqlen_q, seqlen_k)
    if not runs_over_keys(softmax, axes, seqlen_k):
        if makes_scores(softmax.scores, softmax.nodes[0]):
            raise Unsupported(refusals.SOFTMAX_DIM)
        return None
    path = climb(softmax.scores, axes, folded)
    if isinstance(path, Node):
        if makes_scores(path, softmax.nodes[0]):
            raise Unsupported(lost_at(path))
        return None
    match = build(weights, path, folded)
    return replace(match, sizes=equal_sizes(graph, {*weights.nodes, *path.nodes}, matmul))


def lost_at(node: Node) -> Reason:
    """Return the reason for scores that cannot be followed beyond ``node``."""
    if node.target in (*MATMULS, *ADDED_MATMULS):
        return refusals.MASK_LAYOUT
    code, message = refusals.SCORE_OP
    return Reason(code, f"{message[:-1]}, got {node.target}.")


def equal_sizes(graph: Graph, inside: set[Node], matmul: Node) -> dict[Node, Node]:
    """Return equal nodes for symbolic sizes of ``inside``, which nothing else outside may use."""
    outside = {user for node in inside for user in node.users} - inside - {matmul}
    if not outside or outside.isdisjoint(live := live_nodes(graph)):
        return {}
    found = {}
    for user in outside & live:
        is_size = is_call(user, aten.sym_size.int)
        equal = earlier_size(graph, user, inside) if is_size else None
        if equal is None:
            raise Unsupported(refusals.WEIGHTS_USED)
        found[user] = equal
    return found


def earlier_size(graph: Graph, wanted: Node, inside: set[Node]) -> Node | None:
    """Return a node before ``wanted`` that is the same symbolic number but not of ``inside``."""
    node: Node
    for node in graph.nodes:
        if node is wanted:
            break
        is_size = isinstance(node.meta.get("val"), torch.SymInt)
        if is_size and same(val(node), val(wanted)) and inside.isdisjoint(node.all_input_nodes):
            return node
    return None


def build(weights: Weights, path: Path, folded: tuple[Size, Size, Size]) -> Match:
    """Return the match, with operands in the best split of the folded batch."""
    matmul = weights.matmul
    left, right = path.matmul.args[-2:]
    query, key = (right, left) if path.transposed else (left, right)
    value = matmul.args[0 if weights.transposed else 1]
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    dtype = tensor(matmul).dtype
    q = sources(query, matrix_axes(query, path.transposed), dtype, unscale=True)
    k = sources(key, matrix_axes(key, not path.transposed), dtype, unscale=True)
    v = sources(value, matrix_axes(value, weights.transposed), dtype, unscale=False)
    masked = [Source(s.at, s.axes, 1.0) for s in path.steps if not isinstance(s, Scale)]
    tokens_q = matrix_extents(query, path.transposed)
    tokens_k = matrix_extents(key, not path.transposed)
    dims_v = matrix_extents(value, weights.transposed)
    refused = refusals.MASK_LAYOUT
    for split in batch_and_heads((k, v, q), masked):
        arranged_q = arrange_query(q, (*split, *tokens_q))
        arranged_kv = arrange_key_value(k, v, (*split, *tokens_k), (*split, *dims_v))
        if arranged_q is None or arranged_kv is None:
            continue
        mask = Mask()
        try:
            for step in path.steps:
                mask.apply(step, (*split, tokens_q[0], tokens_k[0]))
        except Unsupported as unsupported:
            refused = unsupported.reason
            continue
        return assemble(weights, arranged_q, *arranged_kv, mask)
    raise Unsupported(refused)


def matrix_extents(node: Node, transposed: bool) -> tuple[Extent, Extent]:
    """Return rows and columns of a matmul's argument."""
    shape = tensor(node).shape
    rows, columns = (Extent(shape[d], size(node, d)) for d in (-2, -1))
    return (columns, rows) if transposed else (rows, columns)


def assemble(weights: Weights, q: Operand, k: Operand, v: Operand, mask: Mask) -> Match:
    """Return the match of arranged operands, in one dtype."""
    matmul = weights.matmul
    query = q.value
    for factor in mask.factors:
        query = converted(plan(aten.mul.Tensor, query, factor), tensor(query).dtype)
    operands = (query, k.value, v.value)
    dtype = tensor(matmul).dtype
    for operand in operands:
        dtype = torch.promote_types(dtype, tensor(operand).dtype)
    query, key, value = (converted(operand, dtype) for operand in operands)
    copy = token_major_copy(weights, query, value)

    def finish(output: Value) -> Value:
        if copy is None:
            result = folded(output, weights)
        else:
            result = plan(aten.permute.default, output, [0, 2, 1, 3])
        return converted(result, tensor(matmul).dtype)

    return Match(
        pattern=NAME,
        anchor=matmul if copy is None else copy,
        query=query,
        key=key,
        value=value,
        finish=finish,
        attn_mask=mask.value(),
        scale=mask.scale * q.factor * k.factor,
        output_order="bhsd" if copy is None else "bshd",
        operator=matmul,
    )


def folded(output: Value, weights: Weights) -> Value:
    """Plan the attention output in the shape of the matmul that it replaces."""
    rank = tensor(weights.matmul).dim()
    shape = [size(output, d) for d in range(4)]
    batch = [product(shape[:2])] if rank == 3 else []
    result = plan(aten.view.default, output, [*batch, *shape[2:]])
    if weights.transposed:
        order = [*range(rank - 2), rank - 1, rank - 2]
        result = plan(aten.permute.default, result, order)
        result = plan(aten.clone.default, result, memory_format=torch.contiguous_format)
    return result


def token_major_copy(weights: Weights, query: Value, value: Value) -> Node | None:
    """Return the copy to [batch, tokens, heads, head_dim] if that is all the result is used for.

    Nearly every model makes it before its output projection; the op can write that order itself.
    """
    node, shape = weights.matmul, [*tensor(query).shape[:3], tensor(value).shape[3]]
    for target in (aten.view.default, aten.permute.default, aten.clone.default):
        if weights.transposed or len(node.users) != 1 or not is_call(*node.users, target):
            return None
        node = next(iter(node.users))
        if target is aten.view.default and not same_shape(tensor(node).shape, shape):
            return None
        if target is aten.permute.default and node.args[1] != [0, 2, 1, 3]:
            return None
    return node if node.kwargs.get("memory_format") is torch.contiguous_format else None


def converted(value: Value, dtype: torch.dtype) -> Value:
    """Plan a conversion if it changes anything."""
    if tensor(value).dtype == dtype:
        return value
    return plan(torch.ops.prims.convert_element_type.default, value, dtype)
