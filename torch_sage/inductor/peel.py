"""Looking through what torch wraps around attention's operands: masks as floats, padding, repeats.

Each function returns the operand itself when there is nothing to peel; the op takes that, too.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from torch_sage.inductor.graph_utils import Value, aten, plan, same, same_shape, tensor

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
        inner = keep_mask(mask.args[0], hidden)
        return mask if inner is mask.args[0] else plan(aten.expand.default, inner, mask.args[1])
    if not _calls(mask, aten.where.self):
        return mask
    keep, zero, lowest = mask.args
    is_keep = tensor(keep).dtype is torch.bool and _constant(zero) == 0
    return keep if is_keep and _constant(lowest) in (hidden, -math.inf) else mask


def unrepeated(operand: Node) -> Value:
    """Return K or V before its heads were repeated for the query's, or ``operand`` itself.

    ``repeat_interleave`` and ``expand`` + ``reshape`` both trace to unsqueeze(2), expand, clone,
    view. The op groups heads itself and then quantizes each K/V head once.
    """
    steps = (aten.view.default, aten.clone.default, aten.expand.default, aten.unsqueeze.default)
    chain = [operand]
    for target in steps:
        if not _calls(chain[-1], target) and target is aten.clone.default:
            continue
        if not _calls(chain[-1], target):
            return operand
        chain.append(chain[-1].args[0])
    view, expand, unsqueeze, source = operand, chain[-3], chain[-2], chain[-1]
    if unsqueeze.args[1] != 2 or tensor(source).dim() != 4:
        return operand
    batch, heads, length, dim = tensor(source).shape
    repeats = tensor(expand).shape[2]
    repeated = (batch, heads, repeats, length, dim)
    flat = (batch, heads * repeats, length, dim)
    if same_shape(tensor(expand).shape, repeated) and same_shape(tensor(view).shape, flat):
        return source
    return operand


def unpadded(
    query: Node, key: Node, value: Node, output: Node
) -> tuple[Node, Node, Node, Node] | None:
    """Return q, k, v before head_dim was padded with zeros and the slice that undoes it after.

    CUDA kernels pad head_dim to a multiple of 8 outside the operator; ours pads inside. The slice
    has gaps in its strides, which are only kept where the caller of the graph could see them.
    """
    padded = (query, key, value)
    if not all(_calls(x, aten.constant_pad_nd.default) for x in padded):
        return None
    if any(len(x.args[1]) != 2 or x.args[1][0] != 0 or _pad_value(x) != 0 for x in padded):
        return None
    users = list(output.users)
    if len(users) != 1 or not _calls(users[0], aten.slice.Tensor):
        return None
    cut = users[0]
    sources = tuple(x.args[0] for x in padded)
    _, dim, start, end = (*cut.args, 0, None, None)[:4]
    head_dim = tensor(sources[2]).shape[-1]
    if dim not in (-1, 3) or start not in (0, None) or end is None or _visible(cut):
        return None
    return (*sources, cut) if same(tensor(cut).shape[-1], head_dim) else None


def _calls(node: object, target: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target is target


def _constant(node: object) -> float | None:
    """Return the number that a 0-d tensor node was made from, before or after constant folding."""
    if _calls(node, aten.scalar_tensor.default):
        number = node.args[0]
    elif _calls(node, aten.full.default):
        number = node.args[1]
    else:
        return None
    return number if isinstance(number, (int, float)) else None


def _pad_value(node: Node) -> object:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0)


def _visible(node: Node) -> bool:
    return any(
        user.op == "output" or (user.target in _VIEWS and _visible(user)) for user in node.users
    )
