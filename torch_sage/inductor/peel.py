"""Looking through what torch wraps around attention's operands: masks as floats, padding, repeats.

Each function returns the operand itself when there is nothing to peel; the op takes that, too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from torch_sage.inductor.graph_utils import (
    Value,
    aten,
    bound_arguments,
    plan,
    same,
    same_shape,
    tensor,
)

# aten ops that only re-describe their first argument; a chain of them to the output is visible.
_VIEWS = frozenset(
    {
        aten.view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.slice.Tensor,
        aten.alias.default,
    }
)


def keep_mask(mask: Node, hidden: float = -math.inf) -> Value:
    """Return the bool mask behind ``where(keep, 0, hidden)``, or ``mask`` itself.

    torch turns a bool mask into this float one before the fused operator. A bool mask is a quarter
    of the bytes to read. A finite ``hidden`` that torch did not put there must stay: a row that
    only has such entries attends to all keys, not to none.
    """
    if _calls(mask, aten.expand.default):
        inner, shape = _arguments(mask)
        peeled = keep_mask(inner, hidden)
        return mask if peeled is inner else plan(aten.expand.default, peeled, shape)
    if not _calls(mask, aten.where.self):
        return mask
    keep, zero, lowest = _arguments(mask)
    if not isinstance(keep, Node) or tensor(keep).dtype is not torch.bool:
        return mask
    return keep if _constant(zero) == 0 and _constant(lowest) in (hidden, -math.inf) else mask


def unrepeated(operand: Node) -> Node:
    """Return K or V before its heads were repeated for the query's, or ``operand`` itself.

    ``repeat_interleave`` and ``expand`` + ``reshape`` both trace to unsqueeze(2), expand, clone,
    view. The op groups heads itself and then quantizes each K/V head once.
    """
    if not (_calls(operand, aten.view.default) or _calls(operand, aten._unsafe_view.default)):
        return operand
    (expand, *_) = _arguments(operand)
    if _calls(expand, aten.clone.default):
        (expand, *_) = _arguments(expand)
    if not _calls(expand, aten.expand.default):
        return operand
    (unsqueeze, *_) = _arguments(expand)
    if not _calls(unsqueeze, aten.unsqueeze.default):
        return operand
    source, dim = _arguments(unsqueeze)
    if dim != 2 or tensor(source).dim() != 4:
        return operand
    batch, heads, length, head_dim = tensor(source).shape
    repeats = tensor(expand).shape[2]
    repeated = (batch, heads, repeats, length, head_dim)
    flat = (batch, heads * repeats, length, head_dim)
    is_repeat = same_shape(tensor(expand).shape, repeated)
    return source if is_repeat and same_shape(tensor(operand).shape, flat) else operand


def unpadded(
    query: Node, key: Node, value: Node, output: Node
) -> tuple[Node, Node, Node, Node] | None:
    """Return q, k, v before head_dim was padded with zeros and the slice that undoes it after.

    CUDA kernels pad head_dim to a multiple of 8 outside the operator; ours pads inside. The slice
    has gaps in its strides, which are only kept where the caller of the graph could see them.
    """
    sources = [_before_padding(operand) for operand in (query, key, value)]
    users = list(output.users)
    if None in sources or len(users) != 1 or not _calls(users[0], aten.slice.Tensor):
        return None
    q, k, v = (source for source in sources if source is not None)
    cut = bound_arguments(users[0])
    is_inverse = (
        cut["dim"] in (-1, 3)
        and cut["start"] in (0, None)
        and cut["step"] == 1
        and same(tensor(users[0]).shape[-1], tensor(v).shape[-1])
    )
    return None if not is_inverse or _visible(users[0]) else (q, k, v, users[0])


def _before_padding(operand: Node) -> Node | None:
    """Return what was padded with zeros at the end of its last dimension only, if it was."""
    if not _calls(operand, aten.constant_pad_nd.default):
        return None
    bound = bound_arguments(operand)
    source, pad = bound["self"], bound["pad"]
    return source if len(pad) == 2 and pad[0] == 0 and bound["value"] == 0 else None


def _arguments(node: Any) -> tuple[Any, ...]:
    return tuple(node.args)


def _calls(node: object, target: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def _constant(node: Any) -> float | None:
    """Return the number that a 0-d tensor node was made from, before or after constant folding."""
    number = None
    if _calls(node, aten.scalar_tensor.default):
        number = node.args[0]
    elif _calls(node, aten.full.default):
        number = node.args[1]
    return number if isinstance(number, (int, float)) else None


def _visible(node: Node) -> bool:
    return any(
        user.op == "output" or (user.target in _VIEWS and _visible(user)) for user in node.users
    )
