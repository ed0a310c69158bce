"""Graphs as Inductor's code generation gets them, by running everything before it."""

import torch
from torch._functorch import config as functorch_config
from torch.fx import GraphModule

from torch_sage import SageConfig
from torch_sage.inductor import options
from torch_sage.inductor.records import META_KEY

ALWAYS = SageConfig(dispatch="always")
SDPA = torch.ops.torch_sage.sdpa.default
FOR_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def captured_graphs(function, *args, patches=None, dynamic=None, **kwargs):
    """Return (what the function returned, all its graphs after the joint passes).

    ``patches`` are Inductor options; by default those of ``options(ALWAYS)``.
    """
    from torch._inductor.compile_fx import compile_fx

    graphs = []
    patches = options(ALWAYS) if patches is None else patches

    def keep(graph_module, example_inputs, **settings):
        graphs.append(graph_module)

        def run(arguments):
            taken = list(arguments)
            arguments.clear()
            return graph_module(*taken)

        run._boxed_call = True
        return run

    def backend(graph_module, example_inputs):
        return compile_fx(graph_module, example_inputs, inner_compile=keep, config_patches=patches)

    torch._dynamo.reset()
    with functorch_config.patch(enable_autograd_cache=False):
        compiled = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)
        return compiled(*args, **kwargs), graphs


def nodes(graphs):
    """Return the nodes of the graphs and of their subgraphs."""
    return [
        node
        for graph in graphs
        for module in graph.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
    ]


def count(graphs, *targets):
    """Return how many nodes call one of ``targets``."""
    return sum(node.op == "call_function" and node.target in targets for node in nodes(graphs))


def records(graphs):
    """Return the records that the passes left in the graphs."""
    return [record for node in nodes(graphs) for record in node.meta.get(META_KEY, ())]


def reasons(graphs):
    """Return the reason codes of every record."""
    return [[str(reason.code) for reason in record.reasons] for record in records(graphs)]


def structure(graph):
    """Return a graph as data: what every node calls, on what, with names normalized."""
    names = {node: index for index, node in enumerate(graph.nodes)}

    def plain(value):
        return torch.fx.node.map_arg(value, lambda node: f"%{names[node]}")

    return [
        (node.op, str(node.target), plain(node.args), plain(node.kwargs)) for node in graph.nodes
    ]
