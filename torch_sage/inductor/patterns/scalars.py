"""Reading constants and conversions out of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from torch_sage.inductor.graph_utils import aten, is_tensor, tensor
from torch_sage.inductor.patterns.axes import SHAPE_OPS

MULTIPLIES = (aten.mul.Tensor, aten.mul.Scalar)
DIVIDES = (aten.div.Tensor, aten.div.Scalar)


def cast_source(node: Node) -> Node | None:
    """Return what ``node`` converts to another dtype, or None if it does anything else."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    if node.target in (torch.ops.prims.convert_element_type.default, aten.to.dtype):
        return node.args[0]
    if node.target is aten._to_copy.default and set(node.kwargs) <= {"dtype", "layout", "device"}:
        stays = node.kwargs.get("device") in (None, tensor(node.args[0]).device)
        return node.args[0] if stays else None
    return None


def uncast(node: Node) -> Node:
    """Return ``node`` before all its dtype conversions."""
    while (source := cast_source(node)) is not None:
        node = source
    return node


def constant(value: Any) -> float | None:
    """Return the one number that all elements of ``value`` are, or None if that is not known."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    if not isinstance(value, Node):
        return None
    if value.op == "get_attr":
        return attribute(value)
    if value.op != "call_function":
        return None
    if value.target in (aten.full.default, aten.full_like.default):
        return constant(value.args[1])
    if value.target is aten.scalar_tensor.default:
        return constant(value.args[0])
    if value.target in (aten.zeros.default, aten.zeros_like.default):
        return 0.0
    if value.target in SHAPE_OPS:
        return constant(value.args[0])
    source = cast_source(value)
    inner = None if source is None else constant(source)
    if inner is None or not tensor(value).is_floating_point():
        return None
    return float(torch.tensor(inner, dtype=torch.float64).to(tensor(value).dtype))


def attribute(node: Node) -> float | None:
    """Return the value of a one-element tensor constant, which is part of the graph's cache key."""
    owner: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        owner = getattr(owner, name, None)
    if type(owner) is not Tensor or owner.numel() != 1:
        return None
    return float(owner)


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a number or a tensor of rank 0 or one element without axes."""
    if isinstance(value, Node) and is_tensor(value):
        return all(s == 1 for s in tensor(value).shape if isinstance(s, int)) and all(
            isinstance(s, int) for s in tensor(value).shape
        )
    return isinstance(value, (int, float, Node))


def scaled(node: Node) -> tuple[Node, float] | None:
    """Return (x, c) if ``node`` is ``x * c`` or ``x / c`` with a known finite constant c."""
    if node.op != "call_function" or node.target not in (*MULTIPLIES, *DIVIDES):
        return None
    if set(node.kwargs) or len(node.args) != 2:
        return None
    a, b = node.args
    if node.target in MULTIPLIES and constant(a) is not None:
        a, b = b, a
    factor = constant(b)
    if factor is None or not isinstance(a, Node) or not is_number(b):
        return None
    if node.target in DIVIDES:
        factor = 1.0 / factor if factor else float("inf")
    if not is_tensor(a) or abs(factor) in (0.0, float("inf")) or factor != factor:
        return None
    return a, factor
