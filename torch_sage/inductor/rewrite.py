"""Turning one match into a torch_sage op, or into the reasons why it stays."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node

from torch_sage.config import SageConfig
from torch_sage.devices import rows_of
from torch_sage.inductor.constant_masks import ConstantMasks
from torch_sage.inductor.eligibility import (
    OUTPUT_LAYOUT,
    reasons_against,
    reasons_against_packed,
)
from torch_sage.inductor.graph_utils import (
    Planned,
    Value,
    bound_arguments,
    erase_dead,
    has_strides,
    insert,
    is_tensor,
    plan,
    plan_graph,
    restride,
    tensor,
)
from torch_sage.inductor.patterns.match import Match, PackedMatch, Refusal
from torch_sage.inductor.producers.fuse import fused
from torch_sage.inductor.producers.tables import Tables
from torch_sage.inductor.records import (
    META_KEY,
    AttentionRecord,
    attach,
    describe,
    module_name,
    source_line,
)
from torch_sage.ops import hadamard
from torch_sage.ops.checks import largest_head_dim
from torch_sage.ops.reasons import Reason
from torch_sage.recipes import Recipe, choose_row, resolve_in

# Informational annotations that new nodes inherit from the node they replace.
_INHERITED_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "seq_nr")


@dataclass(frozen=True)
class Shared:
    """What the rewrites of one graph share."""

    masks: ConstantMasks = field(default_factory=ConstantMasks)
    tables: Tables = field(default_factory=Tables)
    has_python: bool = True
    """Whether the compiled graph runs in a process that has this package."""


def apply(
    graph: Graph,
    found: Match | Refusal,
    config: SageConfig,
    shared: Shared,
    against: tuple[Reason, ...] = (),
) -> bool:
    """Rewrite ``found`` if nothing is ``against`` it; attach the record either way.

    Returns:
        Whether it was rewritten.
    """
    if isinstance(found, Refusal):
        attach(found.anchor, _record(found, "", against or found.reasons))
        return False
    found = shared.masks.simplified(found)
    reasons = against or reasons_against(found, config)
    if reasons:
        attach(found.anchor, _record(found, "", reasons))
        return False
    query = tensor(found.query)
    head_dim = largest_head_dim(query, tensor(found.value))
    row = choose_row(config, rows_of(query.device), query.dtype, head_dim)
    recipe = resolve_in(row, config, query.dtype)
    whole = fused(found, config, row, recipe, shared.tables, shared.has_python)
    op = _plain(found, config.rotation, recipe) if whole is None else whole.op
    result = found.finish(op)
    anchor = found.anchor
    if result is None or not (
        has_strides(tensor(result), tensor(anchor).stride()) or not found.keeps_strides
    ):
        attach(anchor, _record(found, "", (OUTPUT_LAYOUT,)))
        return False
    name = hadamard.named(recipe.name, config.rotation)
    record = _record(found, name, (), "" if whole is None else whole.producers)
    for gone, stays in found.sizes.items():
        gone.replace_all_uses_with(stays)
        graph.erase_node(gone)
    _replace(graph, anchor, insert_before(graph, anchor, result))
    assert op.node is not None
    attach(op.node, record)
    return True


def _plain(found: Match, rotation: str, recipe: Recipe) -> Planned:
    query, key, scale = _rotated(rotation, found.query, found.key, found.scale)
    return plan(
        torch.ops.torch_sage.sdpa.default,
        query,
        key,
        found.value,
        found.attn_mask,
        found.causal,
        scale,
        output_order=found.output_order,
        **recipe.op_kwargs(),
    )


def _rotated(
    rotation: str, query: Value, key: Value, scale: float | None
) -> tuple[Value, Value, float | None]:
    """Plan what ``hadamard.rotated`` computes."""
    if rotation == "none":
        return query, key, scale

    def both(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return hadamard.rotated(rotation, q, k, scale)[:2]

    head_dim = tensor(query).shape[-1]
    planned = plan_graph(both, query, key, decompositions=select_decomp_table())
    return *planned, hadamard.scale_of_rotated(head_dim, scale)


def apply_packed(
    graph: Graph,
    found: PackedMatch | Refusal,
    config: SageConfig,
    against: tuple[Reason, ...] = (),
) -> None:
    """Rewrite packed attention if nothing is ``against`` it; attach the record either way."""
    if isinstance(found, Refusal):
        attach(found.anchor, _record(found, "", against or found.reasons))
        return
    anchor, names = found.anchor, ("query", "key", "value")
    operands = {name: tensor(x) for name, x in zip(names, found.operands, strict=False)}
    recipe, reasons = None, against
    if not against:
        recipe, reasons = reasons_against_packed(found, config)
    result = None
    if recipe is not None:
        query, key, *others = found.operands
        query, key, scale = _rotated(config.rotation, query, key, found.scale)
        op = plan(
            torch.ops.torch_sage.varlen_sdpa.default,
            query,
            key,
            *others,
            found.causal,
            scale,
            **recipe.op_kwargs(),
        )
        result = restride(op, tensor(anchor))
        reasons = () if result is not None else (OUTPUT_LAYOUT,)
    name = ""
    if recipe is not None and result is not None:
        name = hadamard.named(recipe.name, config.rotation)
    record = _describe("varlen", anchor, operands, found.causal, name, reasons)
    if result is None:
        attach(anchor, record)
        return
    _replace(graph, anchor, insert_before(graph, anchor, result))
    assert op.node is not None
    attach(op.node, record)


def restore(graph: Graph, node: Node, original: torch._ops.OpOverload[..., Any]) -> None:
    """Put torch's own operator, decomposed as in any graph, in place of one that stands for it."""
    bound = bound_arguments(node)

    def compute(*arguments: Any) -> Tensor:
        result: Tensor = original(**dict(zip(bound, arguments, strict=True)))
        return result

    result = plan_graph(compute, *bound.values(), decompositions=select_decomp_table())
    result = restride(result, tensor(node))
    if result is None:
        return  # it computes the same, only unfused
    plain = insert_before(graph, node, result)
    plain.meta[META_KEY] = node.meta.get(META_KEY, ())
    _replace(graph, node, plain)


def insert_before(graph: Graph, anchor: Node, result: object) -> Node:
    """Insert a planned value before ``anchor``; new nodes inherit its informational meta."""
    before = anchor.prev
    with graph.inserting_before(anchor):
        node = insert(graph, result)
    assert isinstance(node, Node)
    inherited = {key: anchor.meta[key] for key in _INHERITED_META if key in anchor.meta}
    created = before.next
    while created is not anchor:
        created.meta = {**inherited, **created.meta}
        created = created.next
    return node


def _replace(graph: Graph, anchor: Node, node: Node) -> None:
    anchor.replace_all_uses_with(node)
    erase_dead(graph, anchor)


def _target(anchor: Node) -> str:
    """Return the name of the operator, which may be behind the pick of its first output."""
    if anchor.target is operator.getitem:
        anchor = anchor.all_input_nodes[0]
    return str(anchor.target)


def note(node: Node, outcome: str | Reason) -> None:
    """Attach the record of attention that the model itself decided on: a recipe's name, or why."""
    bound = bound_arguments(node)
    operands = {name: tensor(arg) for name, arg in bound.items() if is_tensor(arg)}
    recipe, reasons = ("", (outcome,)) if isinstance(outcome, Reason) else (outcome, ())
    attach(node, _describe("direct", node, operands, bound.get("causal", ""), recipe, reasons))


def _record(
    found: Match | Refusal, recipe: str, reasons: tuple[Reason, ...], producers: str = ""
) -> AttentionRecord:
    if isinstance(found, Refusal):
        values, causal = found.operands, ""
    else:
        names = ("query", "key", "value", "attn_mask")
        values, causal = {name: getattr(found, name) for name in names}, found.causal
    operands = {name: tensor(value) for name, value in values.items() if value is not None}
    return _describe(found.pattern, found.anchor, operands, causal, recipe, reasons, producers)


def _describe(
    pattern: str,
    anchor: Node,
    operands: Mapping[str, Tensor],
    causal: str,
    recipe: str,
    reasons: tuple[Reason, ...],
    producers: str = "",
) -> AttentionRecord:
    query = operands.get("query")
    return AttentionRecord(
        pattern=pattern,
        target=_target(anchor),
        module=module_name(anchor),
        source=source_line(anchor),
        query=describe(query),
        key=describe(operands.get("key")),
        value=describe(operands.get("value")),
        attn_mask=describe(operands.get("attn_mask")),
        causal=causal,
        device="" if query is None else str(query.device),
        recipe=recipe,
        producers=producers,
        reasons=reasons,
    )
