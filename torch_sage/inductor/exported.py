"""The passes on an exported program: attention becomes torch_sage ops before anything is compiled.

An exported graph is not the joint graph that Inductor has: operators may write into their inputs,
autocast regions are calls of subgraphs, and hand-written attention is in composite operators. A
program with any of that is decomposed first, all but its SDPA; any other keeps its operators.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import ExportGraphSignature
from torch.fx import Graph, GraphModule, Node

from torch_sage.config import SageConfig, as_config
from torch_sage.inductor import rewrite
from torch_sage.inductor.graph_utils import aten, call_functions, erase_assertions
from torch_sage.inductor.passes import publish
from torch_sage.inductor.patterns import direct, fused, manual, varlen
from torch_sage.inductor.records import META_KEY, AttentionRecord

_SDPA = aten.scaled_dot_product_attention.default
_SECOND_MATMULS = frozenset(
    {aten.matmul.default, aten.einsum.default, aten.bmm.default, aten.baddbmm.default}
)


def apply_to_exported(
    program: ExportedProgram, config: SageConfig | str | None = None
) -> ExportedProgram:
    """Return ``program`` with its attention computed by torch_sage ops, for inference.

    What ``sage`` and ``exclude`` decided when the program was exported stays, and what is excluded
    stays marked for passes that run later. A program that writes into tensors, has autocast regions
    or hand-written attention comes back decomposed (``run_decompositions``, all but SDPA). The
    report of the process lists its attention; ``explain(program)`` does so at any time.

    Args:
        program: the result of ``torch.export.export`` or ``load``, decomposed or not; not changed.
        config: configuration, name of a preset, or None for the default.

    Raises:
        TypeError: if ``program`` is no ExportedProgram.
        ValueError: if ``program`` computes gradients.
    """
    rewritten, records = rewrite_program(program, as_config(config))
    for of_graph in records:
        publish(of_graph)
    return rewritten


def rewrite_program(
    program: ExportedProgram, config: SageConfig
) -> tuple[ExportedProgram, list[list[AttentionRecord]]]:
    """Return the rewritten program and the records of each of its graphs."""
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program must be an ExportedProgram, got {type(program)}")
    if program.graph_signature.backward_signature is not None:
        raise ValueError("program must be for inference, got one that computes gradients")
    if any(map(_must_be_decomposed, _graphs(program.graph_module))):
        table = torch.export.default_decompositions()
        table.pop(_SDPA, None)  # type: ignore[no-untyped-call]  # torch's
        program = program.run_decompositions(table)
    module = copy.deepcopy(program.graph_module)
    # fx renames what is named like a Python builtin, such as the argument "input" of a module.
    for original, copied in zip(program.graph.nodes, module.graph.nodes, strict=True):
        copied.name = original.name
    signature = copy.deepcopy(program.graph_signature)
    calls = copy.deepcopy(program.module_call_graph)
    with torch.no_grad(), torch._C._DisableAutocast():
        with module._set_replace_hook(lambda old, new, user: _rename(signature, calls, old, new)):
            records = [_rewrite(graph, config) for graph in _graphs(module)]
    module.recompile()
    rewritten = ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=calls,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    return rewritten, records


def _graphs(module: GraphModule) -> Iterator[Graph]:
    """Yield the graph and those of its control flow."""
    for each in module.modules():
        if isinstance(each, GraphModule):
            yield each.graph


def _must_be_decomposed(graph: Graph) -> bool:
    """Return whether the patterns would miss attention here, or not know what it reads."""
    leads_to_matmul: set[Node] = set()
    for node in reversed(graph.nodes):
        target = node.target
        if isinstance(target, OpOverload) and target._schema.is_mutable:
            return True
        if target is torch.ops.higher_order.wrap_with_autocast:
            return True
        leads_on = any(user in leads_to_matmul for user in node.users)
        if target is aten.softmax.int and leads_on:
            return True
        if leads_on or target in _SECOND_MATMULS:
            leads_to_matmul.add(node)
    return False


def _rewrite(graph: Graph, config: SageConfig) -> list[AttentionRecord]:
    """Rewrite what is eligible and return what became of each attention node."""
    erase_assertions(graph)
    for node, outcome in direct.find(graph):
        rewrite.note(node, outcome)
    shared = rewrite.Shared(has_python=False)  # the program may be compiled for C++
    theirs = set(graph.nodes)
    for pattern in (manual, fused):
        for found in pattern.find(graph):
            rewrite.apply(graph, found, config, shared)
    for packed in varlen.find(graph):
        rewrite.apply_packed(graph, packed, config)
    for node in set(call_functions(graph, aten.view.default)) - theirs:
        node.target = aten.reshape.default  # export has no guard on the strides of inputs
    return [record for node in graph.nodes for record in node.meta.pop(META_KEY, ())]


def _rename(
    signature: ExportGraphSignature, calls: Iterable[ModuleCallEntry], old: Node, new: str
) -> None:
    """Let what the program says about its outputs, and about modules' calls, name the new node."""
    arguments = [spec.arg for spec in signature.output_specs]
    for entry in calls:
        if entry.signature is not None:
            arguments += [*entry.signature.inputs, *entry.signature.outputs]
    for argument in arguments:
        if argument.name == old.name:
            argument.name = new
