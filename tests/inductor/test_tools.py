"""torch's own tools on rewritten models: FLOP counter, profiler, mark_dynamic."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import torch_sage
from tests.inductor.graphs import ALWAYS
from tests.inductor.joint import REL_L1
from tests.numerics import relative_l1


class Attend(nn.Module):
    """Self-attention of four heads."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Attend().eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(2, 40, 64)


def exported(model, x):
    return torch_sage.apply_to_exported(torch.export.export(model, (x,)), ALWAYS).module()


def compiled(model, x):
    return torch.compile(model, fullgraph=True, options=torch_sage.options(ALWAYS))


def test_flops_of_a_rewritten_program_are_those_of_the_model(model, x):
    """On CPU torch counts its math backend only; the other kernel is not in its table."""
    with FlopCounterMode(display=False) as expected, sdpa_kernel(SDPBackend.MATH):
        model(x)
    run = exported(model, x)
    with FlopCounterMode(display=False) as counted:
        run(x)
    by_op = {str(op): flops for op, flops in counted.get_flop_counts()["Global"].items()}
    assert by_op["torch_sage.sdpa"] == 4 * 2 * 4 * 40 * 40 * 16
    assert counted.get_total_flops() == expected.get_total_flops()


@pytest.mark.parametrize("rewrite", [exported, compiled])
def test_profiler_names_the_op(model, x, rewrite):
    run = rewrite(model, x)
    run(x)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        run(x)
    (event,) = (event for event in trace.key_averages() if event.key.startswith("torch_sage::"))
    assert (event.key, event.count) == ("torch_sage::sdpa", 1)


def test_marked_dimension_is_compiled_once(model):
    run = compiled(model, None)
    for tokens in (40, 7, 300):
        x = torch.randn(2, tokens, 64)
        torch._dynamo.mark_dynamic(x, 1, min=2, max=512)
        assert relative_l1(run(x), model(x)) <= REL_L1
    assert counters["stats"]["unique_graphs"] == 1
    (graph,) = torch_sage.report().graphs
    assert graph.compiled == 1
    assert graph.records[0].rewritten
