"""Masks: everything that is added to scores or replaces them, as one attn_mask.

Steps are composed in the order in which the model applies them, so a mask may come before or after
a scale, and several masks become one. ``-inf`` fills give a bool mask. A finite fill such as
``finfo.min`` stays a number: a fully masked row then keeps torch's nearly uniform weights.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import Node

from torch_sage.inductor.graph_utils import (
    Value,
    aten,
    is_tensor,
    plan,
    same_shape,
    tensor,
)
from torch_sage.inductor.patterns import refusals
from torch_sage.inductor.patterns.axes import (
    SHAPE_OPS,
    Axes,
    is_one,
)
from torch_sage.inductor.patterns.layout import Target, broadcast
from torch_sage.inductor.patterns.refusals import Unsupported
from torch_sage.inductor.patterns.scalars import constant
from torch_sage.inductor.patterns.softmax import is_call

INFINITY = float("inf")
LARGEST_FILL = -1e4
"""Fills above this may be outweighed by real scores; -1e4 is the smallest that fp16 models use."""


@dataclass(frozen=True)
class Scale:
    """scores * factor."""

    factor: float


@dataclass(frozen=True)
class ScaleBy:
    """scores * factor, which is a tensor or a symbolic number."""

    factor: Value
    at: Node
    axes: Axes


@dataclass(frozen=True)
class Bias:
    """scores + factor * bias."""

    bias: Node
    factor: float
    at: Node
    axes: Axes


@dataclass(frozen=True)
class Fill:
    """where(keep, scores, fill); ``keep`` is inverted if ``inverted``."""

    keep: Node
    inverted: bool
    fill: Any
    at: Node
    axes: Axes


Step = Scale | ScaleBy | Bias | Fill


@dataclass
class Mask:
    """What the steps so far do to scaled scores: where(keep, scores + bias, -inf)."""

    scale: float = 1.0
    factors: tuple[Value, ...] = ()
    """What scales the query, because it is not one known number."""
    keep: Value | None = None
    bias: Value | None = None

    def apply(self, step: Step, target: Target) -> None:
        """Compose one more step."""
        if isinstance(step, Scale):
            self._scale(step.factor)
        elif isinstance(step, ScaleBy):
            self._scale_by(step, target)
        elif isinstance(step, Bias):
            self._add(step, target)
        else:
            self._fill(step, target)

    def _scale(self, factor: float) -> None:
        if self.keep is not None and not factor > 0:
            raise Unsupported(refusals.SCORE_SCALE)
        self.scale *= factor
        if self.bias is not None:
            self.bias = plan(aten.mul.Tensor, self.bias, factor)

    def _scale_by(self, step: ScaleBy, target: Target) -> None:
        factor = step.factor
        if is_tensor(factor) and tensor(factor).dim() > 0:
            factor = broadcast(factor, step.at, step.axes, target)
            if not is_one(tensor(factor).shape[-1]):
                raise Unsupported(refusals.SCORE_SCALE)
        # The sign of the factor is not known, and a negative one would turn -inf into +inf.
        if self.keep is not None:
            raise Unsupported(refusals.SCORE_SCALE)
        self.factors += (factor,)
        if self.bias is not None:
            self.bias = plan(aten.mul.Tensor, self.bias, factor)

    def _add(self, step: Bias, target: Target) -> None:
        if constant(step.bias) == 0:
            return
        keep = bool_mask(step.bias) if step.factor > 0 else None
        if keep is not None:
            self._keep(broadcast(keep, step.at, step.axes, target))
            return
        bias = broadcast(step.bias, step.at, step.axes, target)
        if step.factor != 1:
            bias = plan(aten.mul.Tensor, bias, step.factor)
        self.bias = bias if self.bias is None else plan(aten.add.Tensor, self.bias, bias)

    def _fill(self, step: Fill, target: Target) -> None:
        fill = constant(step.fill)
        if fill is None or not fill <= LARGEST_FILL:
            raise Unsupported(refusals.MASK_FILL)
        keep: Value = inverse(step.keep) if step.inverted else step.keep
        keep = broadcast(keep, step.at, step.axes, target)
        if fill == -INFINITY:
            self._keep(keep)
            return
        dtype = tensor(step.at).dtype
        bias = number(0.0, dtype, keep) if self.bias is None else self.bias
        self.bias = plan(aten.where.self, keep, bias, number(fill, dtype, keep))

    def _keep(self, keep: Value) -> None:
        self.keep = keep if self.keep is None else plan(aten.logical_and.default, self.keep, keep)

    def value(self) -> Value | None:
        """Return the one mask for the op."""
        if self.keep is None or self.bias is None:
            return self.bias if self.keep is None else self.keep
        lowest = number(-INFINITY, tensor(self.bias).dtype, self.bias)
        return plan(aten.where.self, self.keep, self.bias, lowest)


def number(fill: float, dtype: torch.dtype, like: Value) -> Value:
    """Plan a tensor of rank 0 beside ``like``."""
    with detect_fake_mode(tensor(like)) or nullcontext():
        return plan(aten.full.default, [], fill, dtype=dtype, device=tensor(like).device)


def inverse(mask: Node) -> Value:
    """Plan ``not mask``, or return what ``mask`` negates."""
    if is_call(mask, aten.logical_not.default, aten.bitwise_not.default):
        source = mask.args[0]
        assert isinstance(source, Node)
        if tensor(source).dtype is torch.bool:
            return source
    return plan(aten.logical_not.default, mask)


def bool_mask(bias: Node) -> Value | None:
    """Return the bool mask behind where(keep, 0, -inf), through views, or None."""
    if is_call(bias, *SHAPE_OPS):
        source = bias.args[0]
        inner = bool_mask(source) if isinstance(source, Node) else None
        target: Any = bias.target
        return None if inner is None else plan(target, inner, *bias.args[1:], **bias.kwargs)
    if not is_call(bias, aten.where.self):
        return None
    keep, kept, hidden = bias.args
    if not isinstance(keep, Node) or not same_shape(tensor(keep).shape, tensor(bias).shape):
        return None
    if (constant(kept), constant(hidden)) == (0.0, -INFINITY):
        return keep
    if (constant(kept), constant(hidden)) == (-INFINITY, 0.0):
        return inverse(keep)
    return None
