"""Planning ``rotary_sdpa`` for a match whose Q and K are rotations that nothing else needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from torch_sage.config import SageConfig
from torch_sage.fusion import FUSED, is_faster
from torch_sage.inductor.graph_utils import Planned, is_tensor, plan, tensor
from torch_sage.inductor.patterns.match import Match
from torch_sage.inductor.producers.index import Opaque
from torch_sage.inductor.producers.rotation import Rotation, recognized
from torch_sage.inductor.producers.tables import Tables
from torch_sage.ops.checks import rotary_problems, rotation_problems
from torch_sage.recipes import ROTARY, Recipe


class Fused(NamedTuple):
    """A planned call, and what it does besides attention, for the report."""

    op: Planned
    producers: str


def fused(
    found: Match, config: SageConfig, row: str, recipe: Recipe, tables: Tables, has_python: bool
) -> Fused | None:
    """Return the call that norms and rotates Q and K itself, if that is possible and wanted.

    Args:
        found: attention that is rewritten in any case.
        config: whether it is wanted.
        row: of the recipe table, that runs ``recipe``.
        recipe: what to run.
        tables: those that this graph has made so far.
        has_python: whether the op may be the one for CPU, which is written in Python.
    """
    if row not in ROTARY or (row == "cpu" and not has_python):
        return None
    is_measured = config.producers == "measured"
    if config.producers == "never" or (is_measured and not FUSED[row]):
        return None
    if config.rotation != "none":
        return None  # H comes between the rotary embedding and the codes
    rotations = [recognized(operand) for operand in (found.query, found.key)]
    of_query, of_key = rotations
    if of_query is None or of_key is None or of_query.pairing != of_key.pairing:
        return None
    query, key = tensor(found.query), tensor(found.key)
    if is_measured and not is_faster(row, query, key, of_query.pairing, _norm(of_query, of_key)):
        return None
    if not _frees(found, (of_query, of_key)):
        return None
    try:
        given = [_arguments(rotation, tables) for rotation in (of_query, of_key)]
    except Opaque:
        return None
    if any(rotary_problems(key, tensor(found.value), of_query.pairing)):
        return None
    for name, rotation, arguments in zip(("query", "key"), (of_query, of_key), given, strict=True):
        fakes: list[Any] = [tensor(a) if is_tensor(a) else a for a in arguments]
        x = tensor(rotation.x)
        if x.dtype != query.dtype or any(rotation_problems(name, x, *fakes)):
            return None
    op = plan(
        torch.ops.torch_sage.rotary_sdpa.default,
        of_query.x,
        of_key.x,
        found.value,
        *given[0],
        *given[1],
        found.attn_mask,
        found.causal,
        found.scale,
        pairing=of_query.pairing,
        output_order=found.output_order,
        **recipe.op_kwargs(),
    )
    return Fused(op, _described(of_query, of_key))


def _arguments(rotation: Rotation, tables: Tables) -> tuple[Any, ...]:
    cos, sin = (tables.table(*t, rotation.pairing) for t in (rotation.cos, rotation.sin))
    return cos, sin, rotation.rstd, rotation.weight, rotation.eps


def _norm(*rotations: Rotation) -> str:
    """Return how Q and K are normed, in the terms of the rule."""
    names = {
        "eps" if r.eps is not None else "rstd" if r.rstd is not None else "" for r in rotations
    }
    return names.pop() if len(names) == 1 else "different"


def _described(*rotations: Rotation) -> str:
    is_normed = any(
        r.eps is not None or r.rstd is not None or r.weight is not None for r in rotations
    )
    return "norm and rotation" if is_normed else "rotation"


def _frees(found: Match, rotations: tuple[Rotation, ...]) -> bool:
    """Return whether nothing else needs what the call computes itself."""
    kept = {node for rotation in rotations for node in rotation.kept}
    gone = _unused_without(found.anchor, kept)
    needed = set(_ancestors(kept))
    return all(
        node in gone or node in needed for rotation in rotations for node in rotation.replaced
    )


def _unused_without(anchor: Node, kept: set[Node]) -> set[Node]:
    """Return what only ``anchor`` needs, itself included."""
    gone, todo = {anchor}, [*anchor.all_input_nodes]
    while todo:
        node = todo.pop()
        if node in gone or node in kept or node.op != "call_function":
            continue
        if all(user in gone or _is_dead(user) for user in node.users):
            gone.add(node)
            todo += node.all_input_nodes
    return gone


def _is_dead(node: Node) -> bool:
    return not node.users and node.op == "call_function" and not node.is_impure()


def _ancestors(nodes: set[Node]) -> Iterator[Node]:
    seen, todo = set(nodes), [*nodes]
    while todo:
        node = todo.pop()
        yield node
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                todo.append(used)
