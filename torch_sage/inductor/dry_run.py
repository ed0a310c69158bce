"""Asking what the passes would do to a model, without generating code for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.export import ExportedProgram
from torch.fx import GraphModule

from torch_sage.config import as_config
from torch_sage.inductor.exported import rewrite_program
from torch_sage.inductor.hooks import members
from torch_sage.inductor.passes import SagePass
from torch_sage.inductor.records import META_KEY, AttentionRecord
from torch_sage.inductor.reporting import GraphReport, Report
from torch_sage.inductor.switch import enabled_config, is_enabled, options


def explain(model: Callable[..., Any] | ExportedProgram, *args: Any, **kwargs: Any) -> Report:
    """Run ``model`` once as Inductor would compile it, without code generation, and report.

    The configuration is the one that ``model`` was compiled with if it is a ``torch.compile``
    result, else the enabled one, else the default. Gradient mode is the caller's. Functions that
    dynamo holds compiled code for are compiled again at their next call.

    Args:
        model: a module or function, compiled or not; or an exported program, which is not run: the
            report says what ``apply_to_exported`` would do, and finds what it has done.
        args: what it is called with.
        kwargs: likewise.
    """
    from torch._inductor.compile_fx import compile_fx

    if isinstance(model, ExportedProgram):
        _, found = rewrite_program(model, enabled_config() or as_config(None))
        return Report(tuple(GraphReport(tuple(records)) for records in found if records))
    patches = _options_of(model)
    if patches is None:
        patches = {} if is_enabled() else options()
    graphs: list[GraphReport] = []
    notes: dict[str, None] = {}

    def keep(graph_module: GraphModule, example_inputs: Any, **settings: Any) -> Any:
        del example_inputs
        if not settings.get("is_backward"):
            notes.update(dict.fromkeys(_notes()))
            graphs.extend(map(GraphReport, _records(graph_module)))
        return _boxed(graph_module)

    def capture(graph_module: GraphModule, example_inputs: list[Any]) -> Any:
        return compile_fx(graph_module, example_inputs, inner_compile=keep, config_patches=patches)

    eager = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", model)
    counted = {group: counts.copy() for group, counts in counters.items()}
    try:
        with (
            functorch_config.patch(enable_autograd_cache=False),
            dynamo_config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16),
        ):
            torch.compile(eager, backend=capture)(*args, **kwargs)
    finally:
        torch._dynamo.reset_code_caches()
        counters.clear()
        counters.update(counted)
    return Report(tuple(graphs), tuple(notes))


def _options_of(model: Callable[..., Any]) -> dict[str, Any] | None:
    """Return the options that a ``torch.compile`` result carries, or None."""
    asked = getattr(model, "get_compiler_config", None)
    if asked is None:
        return None
    # A compiled function keeps its context only in the closure of this method.
    context = inspect.getclosurevars(asked).nonlocals["self"]
    return getattr(innermost_backend(context.callback), "config", None)


def _notes() -> Iterator[str]:
    """Yield why the passes did not run on the graph being compiled."""
    if not inductor_config.use_joint_graph_passes:
        yield "Inductor's use_joint_graph_passes is False (mode 'lite'), so the passes do not run"
    for name in ("joint_custom_pre_pass", "joint_custom_post_pass"):
        hooks = members(getattr(inductor_config, name))
        if not any(isinstance(one, SagePass) and one.config is not None for one in hooks):
            yield f"{name} does not hold the pass: not enabled, or reassigned since"


def _records(graph_module: GraphModule) -> Iterator[tuple[AttentionRecord, ...]]:
    """Yield the records of a graph and of its subgraphs, where there are any."""
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            nodes = module.graph.nodes
            found = tuple(r for node in nodes for r in node.meta.get(META_KEY, ()))
            if found:
                yield found


def _boxed(graph_module: GraphModule) -> Callable[[list[Any]], Any]:
    """Return the graph as Inductor's calling convention has it: one list, emptied when called."""

    def run(arguments: list[Any]) -> Any:
        taken = list(arguments)
        arguments.clear()
        return graph_module(*taken)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
