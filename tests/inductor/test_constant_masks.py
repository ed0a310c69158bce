"""Masks that no input enters: what they say is proved by evaluating them, and only then."""

import pytest
import torch
import torch.nn.functional as F

from tests.inductor.graphs import ALWAYS, SDPA, captured_graphs
from tests.inductor.test_fused import assert_close, call, rewritten
from torch_sage.inductor import constant_masks, options


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def compiled_call(function, *args):
    out, graphs = captured_graphs(function, *args, patches=options(ALWAYS))
    (node,) = [n for g in graphs for n in g.graph.nodes if n.target is SDPA]
    assert_close(out, function(*args))
    return node.args[3], node.args[4]


def positions(n, m):
    return torch.arange(n)[:, None], torch.arange(m)[None, :]


MASKS = {
    "top_left": (lambda n, m: positions(n, m)[1] <= positions(n, m)[0], "top_left"),
    "bottom_right": (lambda n, m: positions(n, m)[1] <= positions(n, m)[0] + m - n, "bottom_right"),
    "tril": (lambda n, m: torch.ones(n, m, dtype=torch.bool).tril(), "top_left"),
    "all": (lambda n, m: torch.ones(n, m, dtype=torch.bool) & (positions(n, m)[0] >= 0), "none"),
    "combined": (
        lambda n, m: (torch.ones(1, 1, n, m, dtype=torch.bool).tril() & True).expand(2, 4, n, m),
        "top_left",
    ),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("lengths", [(40, 40), (24, 40)])
def test_constant_masks_become_flags(name, lengths):
    make, causal = MASKS[name]
    n, m = lengths
    q, k = torch.randn(2, 4, n, 16), torch.randn(2, 4, m, 16)

    def function(q, k):
        return F.scaled_dot_product_attention(q, k, k, attn_mask=make(n, m))

    mask, flag = compiled_call(function, q, k)
    assert mask is None
    if n == m and causal == "bottom_right":
        causal = "top_left"  # the same thing
    assert flag == causal


NOT_CAUSAL = {
    "sliding": lambda n: (
        (positions(n, n)[1] <= positions(n, n)[0]) & (positions(n, n)[1] > positions(n, n)[0] - 8)
    ),
    "strict": lambda n: positions(n, n)[1] < positions(n, n)[0],
    "one_more": lambda n: positions(n, n)[1] <= positions(n, n)[0] + 1,
    "one_head_differs": lambda n: torch.stack(
        [torch.ones(n, n).tril() > 0, torch.ones(n, n) > 0]
    ).repeat(2, 1, 1)[None],
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_other_constant_masks_stay(name):
    q = torch.randn(2, 4, 40, 16)

    def function(q):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=NOT_CAUSAL[name](40))

    mask, flag = compiled_call(function, q)
    assert mask.meta["val"].dtype == torch.bool
    assert flag == "none"


def test_a_mask_that_an_input_enters_stays():
    """It may be causal for this input; the graph serves others."""
    q, keep = torch.randn(1, 2, 40, 16), torch.ones(40, 40, dtype=torch.bool).tril()

    def function(q, keep):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=keep & (torch.arange(40) >= 0))

    mask, flag = compiled_call(function, q, keep)
    assert (mask.op, flag) == ("call_function", "none")


def test_random_masks_and_symbolic_lengths_stay():
    q = torch.randn(1, 2, 40, 16)

    def random(q):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=torch.rand(40, 40) >= 0.0)

    def causal(q):
        n = q.shape[2]
        keep = torch.arange(n)[:, None] >= torch.arange(n)[None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=keep)

    for function, mode in ((random, "fake"), (causal, "symbolic")):
        node = call(rewritten(function, q, tracing_mode=mode))
        assert node.args[3] is not None
        assert node.args[4] == "none"


def test_a_mask_too_large_to_evaluate_stays(monkeypatch):
    monkeypatch.setattr(constant_masks, "LARGEST", 40 * 40 - 1)
    q = torch.randn(1, 2, 40, 16)

    def function(q):
        keep = torch.arange(40)[:, None] >= torch.arange(40)[None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=keep)

    mask, _ = compiled_call(function, q)
    assert mask is not None
