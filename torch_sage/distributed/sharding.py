"""DTensor sharding rules: the ops run shard by shard where batch or heads are sharded.

Attention of one batch entry and one head needs no other, so a mesh dimension may shard the batch of
all operands, or the heads of all of them; everything else is gathered first. With grouped heads the
key's must divide evenly, or query heads would part from theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import TensorMeta
from torch.distributed.tensor._op_schema import _rebuild_tensor_from_dtensor_meta
from torch.distributed.tensor.experimental import register_sharding

from torch_sage.ops.schemas import DEFINITIONS, VARLEN

BATCH, HEADS = 0, 1
Placements = list[Placement | None]
Rule = tuple[Placements, Placements]

_CPU_SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def register() -> None:
    """Give every op its rule."""
    ours = [getattr(torch.ops.torch_sage, name).default for name in DEFINITIONS]
    for op in ours:
        _register(op)
    if _traces_on_cpu():
        _trace_on_device_of_mesh(frozenset(ours))


def register_cpu_sdpa_sharding() -> None:
    """Let torch's own SDPA on CPU take DTensors, as it does on GPUs; compiled, it becomes ours.

    torch has no rule for its CPU kernel up to 2.13: ``F.scaled_dot_product_attention`` of DTensors
    on CPU is an error, or half a minute's search for one among decompositions. A rule that is there
    already stays. The backward pass has none. A mask must be replicated.
    """
    if _CPU_SDPA not in _propagator().op_strategy_funcs:
        _register(_CPU_SDPA)


def _register(op: torch._ops.OpOverload[..., Any]) -> None:
    register_sharding(op)(_rule(op))
    propagator = _propagator()
    propagator.op_strategy_funcs[op] = _keep_groups(propagator.op_strategy_funcs[op])
    # What DTensor remembers of an op's results it looks up by tensors and integers only; dtypes and
    # sizes of codes and scales, and strides, depend on the recipe, which comes in strings.
    keywords = [argument.name for argument in op._schema.arguments if argument.kwarg_only]
    schemas = propagator.op_to_schema_info
    schemas[op] = replace(schemas[op], static_kwargkey=keywords)


def _traces_on_cpu() -> bool:
    """Return whether torch makes the fakes of sharding propagation on CPU, whatever the mesh is.

    2.11 does; 2.13 makes them on the device of the mesh.
    """
    mesh = SimpleNamespace(device_type="meta")
    meta = TensorMeta(torch.Size([1]), (1,), torch.int8)
    fake: Any = _rebuild_tensor_from_dtensor_meta(SimpleNamespace(mesh=mesh, tensor_meta=meta))
    return bool(fake.device.type == "cpu")


def _trace_on_device_of_mesh(ops: frozenset[Any]) -> None:
    """Make the fakes of ``ops`` where their DTensors are: which recipes there are depends on it."""
    propagator = _propagator()
    propagate = propagator._propagate_tensor_meta_non_cached

    def propagate_there(schema: Any) -> Any:
        if schema.op not in ops:
            return propagate(schema)
        with torch.device(schema.args_spec[0].mesh.device_type):
            return propagate(schema)

    propagator._propagate_tensor_meta_non_cached = propagate_there


def _propagator() -> Any:
    return DTensor._op_dispatcher.sharding_propagator


def _rule(op: torch._ops.OpOverload[..., Any]) -> Callable[..., list[Rule]]:
    """Return the function that lists an op's acceptable placements for DTensor."""
    names = [argument.name for argument in op._schema.arguments]
    results = len(op._schema.returns)
    is_packed = op._schema.name.removeprefix("torch_sage::") in VARLEN

    def placements(*args: Any, **kwargs: Any) -> list[Rule]:
        rules: list[Rule] = []
        for axis in (None, HEADS) if is_packed else (None, BATCH, HEADS):
            fixed = {name: _placement(name, arg, axis) for name, arg in kwargs.items()}
            if not all(_lies_as(kwargs[name], wanted) for name, wanted in fixed.items()):
                continue
            operands = [_placement(name, arg, axis) for name, arg in zip(names, args, strict=False)]
            output: Placement = Replicate() if axis is None else Shard(axis)
            outputs: Placements = [output] * results
            if is_packed and axis is not None and results > 1:
                outputs[1] = Shard(axis - 1)  # the LSE has no tokens before its heads
            rules.append((outputs, [*operands, *fixed.values()]))
        if not rules:
            raise NotImplementedError("attn_mask must be replicated for SDPA on CPU, got a shard")
        return rules

    return placements


def _lies_as(arg: Any, wanted: Placement | None) -> bool:
    """Return whether a keyword argument lies as it must: DTensor moves positional ones only."""
    return wanted is None or (
        isinstance(wanted, Replicate) and all(p.is_replicate() for p in arg.placements)
    )


def _keep_groups(strategy: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``strategy`` without the ways to shard that part query heads from their key's.

    Rules speak of one mesh dimension; how many shards there are shows when they are combined.
    """

    def filtered(schema: Any) -> Any:
        found = strategy(schema)
        found.strategies = [way for way in found.strategies if _keeps_groups(way.input_specs)]
        return found

    return filtered


def _keeps_groups(operands: Sequence[Any]) -> bool:
    heads = {spec.tensor_meta.shape[HEADS] for spec in operands[:2]}  # query and key, if any
    if len(heads) == 1:
        return True
    spec = operands[1]
    shards = [
        size
        for size, placement in zip(spec.mesh.shape, spec.placements, strict=True)
        if placement.is_shard(HEADS)
    ]
    return bool(spec.tensor_meta.shape[HEADS] % math.prod(shards) == 0)


def _placement(name: str, arg: Any, axis: int | None) -> Placement | None:
    """Return where an operand must lie if ``axis`` is sharded; None for what is no tensor."""
    if not hasattr(arg, "placements"):
        return None
    if axis is None or name.startswith("cu_seqlens"):
        return Replicate()
    if name == "attn_mask":
        own = axis - (4 - len(arg.shape))  # a mask broadcasts from its last dimension on
    elif name.endswith(("_cos", "_sin")):
        own = axis if axis == BATCH else -1  # heads share the tables
    elif name.endswith("_weight"):
        own = axis - HEADS  # and batch entries the weights
    elif name.endswith("_rstd"):
        own = axis
    else:
        return Shard(axis)
    return Shard(own) if own >= 0 and arg.shape[own] != 1 else Replicate()
