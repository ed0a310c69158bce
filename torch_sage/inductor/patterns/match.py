"""What a pattern hands to the rewriter: attention that it understood, or why it did not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from torch_sage.inductor.graph_utils import Value
from torch_sage.ops.reasons import Reason


@dataclass(frozen=True)
class Match:
    """A part of the graph that computes attention, in the terms of ``torch_sage::sdpa``."""

    pattern: str
    """Name of the pattern, for the report."""

    anchor: Node
    """The node whose value is replaced; everything planned here may be inserted before it."""

    query: Value
    """[batch, heads, seqlen_q, head_dim], any strides."""

    key: Value
    """[batch, heads_kv, seqlen_k, head_dim], any strides."""

    value: Value
    """[batch, heads_kv, seqlen_k, head_dim_v], any strides."""

    finish: Callable[[Value], Value | None]
    """Turns the attention output (in ``output_order``) into the anchor's exact shape, dtype and
    strides; None where no copy has those strides."""

    attn_mask: Value | None = None
    """Bool (True = keep) or float, 4-D, broadcastable to [batch, heads, seqlen_q, seqlen_k]."""

    causal: str = "none"
    """As in the op."""

    scale: float | None = None
    """As in the op; None is 1 / sqrt(head_dim)."""

    dropout_p: float = 0.0
    """Dropout of the attention weights; anything but 0 is refused by ``why_not``."""

    keeps_strides: bool = True
    """Whether the anchor's strides matter to anything after it."""

    output_order: str = "bhsd"
    """The memory order in which ``finish`` wants the attention output."""

    operator: Node | None = None
    """The node that computed attention where the anchor only copies its result, for the report."""

    sizes: dict[Node, Node] = field(default_factory=dict)
    """Symbolic sizes read off tensors that disappear, and equal ones that stay."""


@dataclass(frozen=True)
class PackedMatch:
    """A call of packed attention, in the terms of ``torch_sage::varlen_sdpa``."""

    anchor: Node
    """The node of the output, whose value is replaced."""

    operands: tuple[Any, ...]
    """The op's seven arguments that are tensors and lengths."""

    causal: str
    scale: float | None


@dataclass(frozen=True)
class Refusal:
    """A part of the graph that looks like attention and stays as it is."""

    pattern: str
    anchor: Node
    reasons: tuple[Reason, ...]
    operands: Mapping[str, Value] = field(default_factory=dict)
    """What is known of query, key, value and attn_mask, for the report."""
