"""Whole compilations: modes, dynamic shapes, subgraphs, library modules, and layouts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_sage
from tests.inductor.graphs import ALWAYS, FOR_CPU, SDPA, captured_graphs, count, records
from tests.inductor.joint import REL_L1
from tests.numerics import relative_l1
from torch_sage.inductor.switch import options


class Block(nn.Module):
    """Attention between projections, heads split by strides as models do."""

    def __init__(self, width=64, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def assert_close(actual, expected):
    assert relative_l1(actual, expected) <= REL_L1


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 40, 64)


@pytest.fixture(params=[torch.no_grad, torch.inference_mode])
def inference(request):
    with request.param():
        yield


def test_eager_and_compiled_agree(block, x, inference):
    expected = block(x)
    compiled = torch.compile(block, fullgraph=True, options=options(ALWAYS))
    actual = compiled(x)
    assert_close(actual, expected)
    assert actual.stride() == expected.stride()
    assert torch_sage.report().rewritten == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune-no-cudagraphs", "max_autotune_gemm": False},
        {"freezing": True},
        {"cpp_wrapper": True},
    ],
    ids=["reduce-overhead", "max-autotune", "freezing", "cpp_wrapper"],
)
def test_modes(settings, block, x, no_grad):
    expected = block(x)
    compiled = torch.compile(block, fullgraph=True, options=options(ALWAYS, **settings))
    assert_close(compiled(x), expected)
    report = torch_sage.report()
    assert (report.rewritten, report.skipped) == (1, 0)


def test_dynamic_shapes_compile_once(block, no_grad):
    """Trap 12: a guard added by the rewrite would recompile at the next length."""
    compiled = torch.compile(block, fullgraph=True, dynamic=True, options=options(ALWAYS))
    for batch, length in [(2, 40), (3, 77), (2, 128)]:
        x = torch.randn(batch, length, 64)
        with torch.compiler.set_stance("fail_on_recompile" if length != 40 else "default"):
            assert_close(compiled(x), block(x))
    assert torch_sage.report().rewritten == 1


def test_both_branches_of_cond(block, x, no_grad):
    def function(x, flag):
        return torch.cond(flag, lambda x: block(x) + 1, lambda x: block(x) - 1, (x,))

    _, graphs = captured_graphs(function, x, torch.tensor(True))
    assert (count(graphs, SDPA), count(graphs, FOR_CPU)) == (2, 0)


def test_nested_compile_region_shares_one_graph(block, x, no_grad):
    @torch.compiler.nested_compile_region
    def region(x):
        return block(x)

    def function(x):
        return region(region(x))

    out, graphs = captured_graphs(function, x)
    assert_close(out, block(block(x)))
    assert (count(graphs, SDPA), count(graphs, FOR_CPU)) == (1, 0)


def test_regional_compilation_of_identical_blocks(x, no_grad):
    """compile_repeated_blocks: one graph serves every block, so one record does, too."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3))).eval()
    expected = model(x)
    for block in model:
        block.compile(fullgraph=True, options=options(ALWAYS))
    assert_close(model(x), expected)
    assert torch_sage.report().rewritten == 1


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights, no_grad):
    """Its fast path hides attention in one operator, or the weights are an output."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    x = torch.randn(2, 40, 64)

    def function(x):
        return module(x, x, x, need_weights=need_weights)

    expected, weights = function(x)
    (actual, compiled_weights), graphs = captured_graphs(function, x)
    assert_close(actual, expected)
    assert len(records(graphs)) == 1
    if need_weights:
        torch.testing.assert_close(compiled_weights, weights)
    else:
        assert count(graphs, SDPA) == 1


def test_training_mode_multihead_attention_is_rewritten_in_inference(no_grad):
    """In training mode without gradients it calls SDPA, and dropout is 0 by default."""
    module = nn.MultiheadAttention(64, 4, batch_first=True)
    x = torch.randn(2, 40, 64)
    _, graphs = captured_graphs(lambda x: module(x, x, x, need_weights=False), x)
    assert count(graphs, SDPA) == 1


def test_a_mask_computed_from_data_is_a_bool_mask(no_grad):
    """Trap 7: transformers builds the causal mask from data when it compiles."""

    def function(q, lengths):
        position = torch.arange(q.shape[2])
        keep = (position[None, :] <= position[:, None])[None, None]
        keep = keep & (position < lengths[:, None])[:, None, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=keep)

    q, lengths = torch.randn(2, 4, 40, 16), torch.tensor([40, 23])
    out, graphs = captured_graphs(function, q, lengths)
    assert_close(out, function(q, lengths))
    (node,) = [n for g in graphs for n in g.graph.nodes if n.target is SDPA]
    assert node.args[3].meta["val"].dtype == torch.bool


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "strided"])
def test_input_layouts_reach_the_op_as_they_were_traced(layout, no_grad):
    """Trap 4: without a layout tag Inductor may hand over other strides than the fake saw."""
    assert torch.Tag.needs_fixed_stride_order in SDPA.tags
    base = torch.randn(2, 4, 40, 32)
    q = {
        "bhsd": base,
        "bshd": base.transpose(1, 2).contiguous().transpose(1, 2),
        "strided": torch.randn(2, 4, 40, 64)[..., ::2],
    }[layout]

    def function(q):
        return F.scaled_dot_product_attention(q * 2, q, q) * 2

    compiled = torch.compile(function, fullgraph=True, options=options(ALWAYS))
    expected, actual = function(q), compiled(q)
    assert_close(actual, expected)
    assert actual.stride() == expected.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_and_around(dtype, block, x, no_grad):
    """Inside the graph casts are explicit; an autocast around the call must not cast again."""

    def function(x):
        with torch.autocast("cpu", dtype):
            return block(x)

    out, graphs = captured_graphs(function, x)
    assert count(graphs, SDPA) == 1
    assert out.dtype == dtype
    with torch.autocast("cpu", dtype):
        out, graphs = captured_graphs(lambda q: F.scaled_dot_product_attention(q, q, q), x[None])
    assert count(graphs, SDPA) == 1
    assert out.dtype == dtype


def test_sdpa_kernel_math_is_rewritten(no_grad):
    """Trap 14: torch computes it in separate operators, which is hand-written attention to us.

    The choice of backend leaves no mark in the graph; ``exclude`` does.
    """

    def function(q):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 40, 16)
    out, graphs = captured_graphs(function, q)
    assert_close(out, function(q))
    assert count(graphs, SDPA) == 1


def test_softmax_over_another_dimension_stays_what_torch_makes_of_it(no_grad):
    """torch 2.13 takes softmax(-2) for softmax(-1) in its own fusion (pytorch#196468).

    That is torch's defect; a rewrite of the fused node would inherit it.
    """

    def function(q):
        return (q @ q.transpose(-1, -2) / 4).softmax(-2) @ q

    _, graphs = captured_graphs(function, torch.randn(1, 2, 40, 16))
    assert count(graphs, SDPA) == 0
    codes = {r.code for record in records(graphs) for r in record.reasons}
    assert codes & {"torch_fusion", "softmax_dim"}


def test_gradients_are_right_where_only_a_part_is_trained(x):
    """Trap 6: a frozen encoder under no_grad is rewritten, the trained head is not."""
    torch.manual_seed(0)
    frozen, head = Block().eval(), Block()
    compiled = torch.compile(head, fullgraph=True, options=options(ALWAYS))
    with torch.no_grad():
        features = torch.compile(frozen, fullgraph=True, options=options(ALWAYS))(x)
    compiled(features).square().sum().backward()
    actual = [p.grad.clone() for p in head.parameters()]
    head.zero_grad()
    head(features).square().sum().backward()
    for got, parameter in zip(actual, head.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-4)
    report = torch_sage.report()
    assert (report.rewritten, dict(report.reasons)) == (1, {"training": 1})


def exact(q):
    return F.scaled_dot_product_attention(q, q, q)


def exact_by_hand(q):
    return (q @ q.transpose(-1, -2) / 4).softmax(-1) @ q


@pytest.mark.parametrize("function", [exact, exact_by_hand])
def test_exclude_compiles_to_what_torch_makes_of_it(function, no_grad):
    """The marker ops keep the passes away and are gone afterwards: Inductor fuses as always."""
    q = torch.randn(1, 2, 40, 16)
    expected = function(q)
    with torch_sage.enable(ALWAYS):
        out, graphs = captured_graphs(torch_sage.exclude(function), q, patches={})
    assert count(graphs, SDPA, torch_sage.ops.exact_sdpa, torch_sage.ops.exact_softmax) == 0
    assert [[r.code for r in record.reasons] for record in records(graphs)] == [["excluded"]]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("decomposed", [False, True])
def test_export_then_aoti_compile_is_rewritten(block, x, no_grad, tmp_path, decomposed):
    """The passes at compilation; ``apply_to_exported`` before it is tested in test_exported.py."""
    tokens = torch.export.Dim("tokens", min=2, max=512)
    program = torch.export.export(block, (x,), dynamic_shapes=({1: tokens},))
    settings = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    path = str(tmp_path / "m.pt2")
    if decomposed:
        with torch_sage.enable(ALWAYS):
            torch._inductor.aoti_compile_and_package(
                program.run_decompositions(), package_path=path, inductor_configs=settings
            )
    else:
        torch._inductor.aoti_compile_and_package(
            program, package_path=path, inductor_configs=options(ALWAYS, **settings)
        )
    assert torch_sage.report().rewritten == 1
    run = torch._inductor.aoti_load_package(path)
    for each in (x, torch.randn(2, 77, 64)):
        assert_close(run(each), block(each))
