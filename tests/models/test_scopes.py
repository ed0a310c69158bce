"""Opting in and out by module, on code of real libraries: the traced graph says it."""

from collections import Counter

import pytest
import torch

import torch_sage
from tests.models.check import CONFIG, graph_breaks
from tests.models.zoo import DIFFUSERS, TORCH_NN, TRANSFORMERS

# Eager attention of transformers is no call of SDPA, so there is nothing to opt in by.
CASES = [c for c in (*TRANSFORMERS, *DIFFUSERS, *TORCH_NN) if c.implementation != "eager"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scopes_decide_in_the_graph(case):
    """Each attention becomes the op of its scope, and no scope breaks the graph.

    Two stories. Dynamo could not trace Tensor.unflatten, which diffusers' processors call and which
    calls super(), from inside a scope. Nor could it trace the closures in which torch checks the
    padding mask of nn.MultiheadAttention; without a scope it looks into neither.
    """
    model, inputs = case.build()
    model.eval().requires_grad_(False)
    targets = Counter()

    def count(graph_module, example_inputs):
        targets.update(str(node.target) for node in graph_module.graph.nodes)
        return graph_module

    def compile_and_call():
        torch.compile(model, backend=count)(**inputs)

    def graphs_and_kinds_of_breaks():
        # A deprecation warning inside diffusers breaks the graph once more per attempt to trace it.
        graphs, breaks = graph_breaks(compile_and_call)
        return graphs, set(breaks)

    plain = graphs_and_kinds_of_breaks()
    for mark, op in (
        (torch_sage.sage(CONFIG), "torch_sage.sdpa.default"),
        (torch_sage.exclude, "torch_sage.exact_sdpa.default"),
    ):
        mark(model)
        targets.clear()
        assert graphs_and_kinds_of_breaks() == plain
        assert targets[op] == case.attentions, targets
        torch_sage.reset_(model)
