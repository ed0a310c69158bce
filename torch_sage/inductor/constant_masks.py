"""Masks that do not depend on the graph's inputs: causal ones become a flag, full ones nothing.

transformers builds the causal mask by tensor operations inside the compiled graph. Where no input
enters, evaluating those operations once is a proof of what they give; a flag instead of the mask
saves the kernel reading N * M bytes and half of the products.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from torch_sage.inductor.graph_utils import Planned, Value, aten, tensor
from torch_sage.inductor.patterns.match import Match

# 64 MiB of bool: a causal mask of 8192 tokens. Beyond it evaluation would be felt.
LARGEST = 1 << 26


class ConstantMasks:
    """Evaluates masks, each once, however many layers share it."""

    def __init__(self) -> None:
        """Start without any known value."""
        self._values: dict[Node, Any] = {}
        self._meanings: dict[tuple[Value, int, int], str | None] = {}

    def simplified(self, match: Match) -> Match:
        """Return ``match`` with a causal flag, or nothing, in place of a mask that means it."""
        lengths = (tensor(match.query).shape[-2], tensor(match.key).shape[-2])
        if match.attn_mask is None or match.causal != "none":
            return match
        if not all(isinstance(length, int) for length in lengths):
            return match
        mask = match.attn_mask
        while _called(mask) is aten.expand.default:
            mask = mask.args[0]  # type: ignore[assignment]  # expand's first argument is a tensor
        key = (mask, *lengths)
        if key not in self._meanings:
            self._meanings[key] = self._meaning(*key)
        causal = self._meanings[key]
        return match if causal is None else replace(match, attn_mask=None, causal=causal)

    def _meaning(self, mask: Value, seqlen_q: int, seqlen_k: int) -> str | None:
        """Return the ``causal`` argument that says what a mask says, or None."""
        if tensor(mask).dtype is not torch.bool or not _is_constant(mask, set()):
            return None
        with _disable_current_modes(), torch.no_grad():
            value = self._evaluate(mask)
            if value.all():
                return "none"
            if value.shape[-2:] != (seqlen_q, seqlen_k):
                return None
            for causal, diagonal in (("top_left", 0), ("bottom_right", seqlen_k - seqlen_q)):
                visible = torch.ones_like(value[(0,) * (value.dim() - 2)]).tril(diagonal)
                if bool((value == visible).all()):
                    return causal
        return None

    def _evaluate(self, value: Any) -> Any:
        if isinstance(value, Planned):
            return self._call(value)
        if value not in self._values:
            self._values[value] = self._call(value)
        return self._values[value]

    def _call(self, value: Any) -> Any:
        args, kwargs = tree_map_only((Node, Planned), self._evaluate, (value.args, value.kwargs))
        return value.target(*args, **kwargs)


def _called(value: Value) -> Any:
    return value.target if isinstance(value, Planned) or value.op == "call_function" else None


def _is_constant(value: Value, known: set[Value]) -> bool:
    """Return whether ``value`` is made of constants by deterministic operators, none too large."""
    if value in known:
        return True
    target = _called(value)
    if target is not operator.getitem and not isinstance(target, OpOverload):
        return False
    if isinstance(target, OpOverload) and not _is_function(target):
        return False
    result = value.val if isinstance(value, Planned) else value.meta.get("val")
    if isinstance(result, Tensor) and not _is_small(result):
        return False
    inputs: list[Value] = []
    tree_map_only((Node, Planned), inputs.append, (value.args, value.kwargs))
    if not all(_is_constant(each, known) for each in inputs):
        return False
    known.add(value)
    return True


def _is_function(target: OpOverload[..., Any]) -> bool:
    random = torch.Tag.nondeterministic_seeded in target.tags
    return target.namespace in ("aten", "prims") and not random and not target._schema.is_mutable


def _is_small(fake: Tensor) -> bool:
    """Return whether a tensor can be evaluated here; an expanded one is as large as its source."""
    if not all(isinstance(size, int) for size in (*fake.shape, *fake.stride())):
        return False
    device_exists = fake.device.type != "cuda" or torch.cuda.is_available()
    extents = (size for size, step in zip(fake.shape, fake.stride(), strict=True) if step)
    return device_exists and torch.Size(extents).numel() <= LARGEST
