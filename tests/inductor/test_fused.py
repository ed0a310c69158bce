"""The fused SDPA operators: every form is rewritten, every negative twin stays with its reason.

Forms of CUDA are traced on CPU tensors: their shape functions do not mind, and the rewritten graph
then runs here. Tolerances: the default CPU recipe is within rel-L1 0.02 of exact attention on
N(0, 1) data (issue 2, section 4).
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.inductor.graphs import (
    ALWAYS,
    FOR_CPU,
    SDPA,
    captured_graphs,
    count,
    reasons,
    records,
    structure,
)
from tests.inductor.joint import REL_L1
from tests.numerics import relative_l1
from torch_sage.inductor.passes import Always, PostPass, PrePass
from torch_sage.recipes import SUPPORT

aten = torch.ops.aten
BHSD, BSHD = (0, 1, 2, 3), (0, 2, 1, 3)


def rewritten(function, *args, tracing_mode="fake"):
    """Trace ``function``, run the joint passes, return the graph module."""
    gm = make_fx(function, tracing_mode=tracing_mode)(*args)
    for stage in (PrePass, PostPass):
        stage(Always(ALWAYS))(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


def call(gm):
    """Return the one torch_sage node of a graph."""
    (node,) = [n for n in gm.graph.nodes if n.target is SDPA]
    return node


def assert_close(actual, expected):
    assert relative_l1(actual, expected) <= REL_L1


def randn(*shape, order=BHSD, dtype=torch.float32):
    """Return a tensor whose dimensions lie in memory in ``order``."""
    inverse = [order.index(d) for d in range(len(order))]
    return torch.randn([shape[d] for d in order], dtype=dtype).permute(inverse)


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


FORMS = {
    "for_cpu": lambda q, k, v, m: aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=m
    )[0],
    "for_cpu_keywords": lambda q, k, v, m: aten._scaled_dot_product_flash_attention_for_cpu(
        value=v, key=k, query=q, attn_mask=m, dropout_p=0.0, is_causal=False, scale=None
    )[0],
    "flash": lambda q, k, v, m: aten._scaled_dot_product_flash_attention(q, k, v)[0],
    "efficient": lambda q, k, v, m: aten._scaled_dot_product_efficient_attention(q, k, v, m, False)[
        0
    ],
    "efficient_keywords": lambda q, k, v, m: aten._scaled_dot_product_efficient_attention(
        attn_bias=m, compute_log_sumexp=False, query=q, key=k, value=v, scale=None
    )[0],
    "cudnn": lambda q, k, v, m: aten._scaled_dot_product_cudnn_attention(q, k, v, m, False)[0],
    "overrideable": lambda q, k, v, m: aten._scaled_dot_product_fused_attention_overrideable(
        q, k, v, m
    )[0],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_mask", [False, True])
def test_each_operator_is_rewritten(form, has_mask):
    if has_mask and form == "flash":
        has_mask = False  # it takes none
    q, k, v = randn(2, 4, 24, 16), randn(2, 4, 40, 16), randn(2, 4, 40, 16)
    mask = torch.randn(2, 1, 24, 40) if has_mask else None
    gm = rewritten(FORMS[form], q, k, v, mask)
    assert [n.op for n in gm.graph.nodes if n.op == "call_function"] == ["call_function"]
    assert call(gm).args[3] is (None if mask is None else list(gm.graph.nodes)[3])
    assert_close(gm(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_the_composite_operator_is_rewritten():
    """Inductor never sees it in its joint graph, but a graph from export may keep it."""
    q = randn(1, 2, 24, 16)
    gm = make_fx(lambda q: q + 1, tracing_mode="fake")(q)
    (add,) = gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    (x,) = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_before(add):
        node = gm.graph.call_function(
            aten.scaled_dot_product_attention.default, (), {"query": x, "key": x, "value": x}
        )
    node.meta["val"] = x.meta["val"]
    add.replace_all_uses_with(node)
    gm.graph.erase_node(add)
    PostPass(Always(ALWAYS))(gm.graph)
    gm.recompile()
    assert call(gm)
    assert_close(gm(q), F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize(("form", "causal"), [("for_cpu", "top_left"), ("flash", "bottom_right")])
def test_causal_alignment_is_the_operators_own(form, causal):
    operator = {
        "for_cpu": aten._scaled_dot_product_flash_attention_for_cpu,
        "flash": aten._scaled_dot_product_flash_attention,
    }[form]
    q, k = randn(1, 2, 24, 16), randn(1, 2, 40, 16)
    gm = rewritten(lambda q, k: operator(q, k, k, 0.0, True)[0], q, k)
    assert call(gm).args[4] == causal


@pytest.mark.parametrize("hidden", [-math.inf, -65504.0, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("form", ["for_cpu", "cudnn"])
def test_bool_masks_are_peeled_only_when_torch_made_them_float(form, hidden):
    """A finite mask value written by the user means something else in a row that it fills."""

    def function(q, keep):
        lowest = torch.full((), hidden)
        mask = torch.where(keep, torch.full((), 0.0), lowest).expand(2, 4, 24, 24)
        return FORMS[form](q, q, q, mask)

    q, keep = randn(2, 4, 24, 16), torch.rand(2, 1, 24, 24) > 0.3
    gm = rewritten(function, q, keep)
    mask = call(gm).args[3].meta["val"]
    peels = hidden == -math.inf or (form == "cudnn" and hidden == -65504.0)
    assert mask.dtype == (torch.bool if peels else torch.float32)
    assert_close(gm(q, keep), F.scaled_dot_product_attention(q, q, q, attn_mask=keep))


@pytest.mark.parametrize("repeat", ["expand", "interleave"])
def test_repeated_heads_are_peeled(repeat):
    def function(q, k):
        if repeat == "interleave":
            k = k.repeat_interleave(3, dim=1)
        else:
            k = k.unsqueeze(2).expand(2, 2, 3, 40, 16).reshape(2, 6, 40, 16)
        return F.scaled_dot_product_attention(q, k, k)

    q, k = randn(2, 6, 24, 16), randn(2, 2, 40, 16)
    gm = rewritten(function, q, k)
    assert call(gm).args[1].op == "placeholder"
    expected = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    assert_close(gm(q, k), expected)


@pytest.mark.parametrize("dim", [0, 2])
def test_other_repeats_are_left_to_the_graph(dim):
    """Heads that repeat in another order (0, 1, 0, 1) are not grouped query attention."""

    def function(q, k):
        shape = (2, 3, 2, 40, 16) if dim == 2 else (3, 2, 2, 40, 16)
        unsqueezed = k[:, None] if dim == 2 else k[None]
        k = unsqueezed.expand(shape).reshape(-1, 6 if dim == 2 else 2, 40, 16)
        return F.scaled_dot_product_attention(q, k, k)

    k = randn(2, 2, 40, 16)
    q = randn(2, 6, 24, 16) if dim == 2 else randn(6, 2, 24, 16)
    gm = rewritten(function, q, k)
    assert call(gm).args[1].op == "call_function"
    repeated = k.repeat(1, 3, 1, 1) if dim == 2 else k.repeat(3, 1, 1, 1)
    assert_close(gm(q, k), F.scaled_dot_product_attention(q, repeated, repeated))


def padded_attention(q, k, v, pad=(0, 4)):
    """What torch makes of head_dim 60 on CUDA."""
    q, k, v = (F.pad(x, pad) for x in (q, k, v))
    scale = 1 / math.sqrt(60)
    return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0][..., :60]


def test_padding_is_peeled_where_nobody_sees_the_strides():
    q = randn(1, 2, 24, 60)
    gm = rewritten(lambda q: padded_attention(q, q, q) + 1, q)
    assert call(gm).args[0].op == "placeholder"
    assert_close(gm(q) - 1, F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize("reason", ["visible", "one-sided"])
def test_padding_stays(reason):
    pad = (0, 4) if reason == "visible" else (2, 2)
    q = randn(1, 2, 24, 60)
    gm = rewritten(lambda q: padded_attention(q, q, q, pad).transpose(1, 2), q)
    assert call(gm).args[0].target is aten.constant_pad_nd.default
    exact = make_fx(lambda q: padded_attention(q, q, q, pad).transpose(1, 2), tracing_mode="fake")
    (out,) = exact(q).graph.output_node().all_input_nodes
    assert gm(q).stride() == out.meta["val"].stride()


@pytest.mark.parametrize("order", [BHSD, BSHD, (1, 0, 2, 3), (0, 1, 3, 2)])
def test_output_strides_are_preserved(order):
    """Trap 5: whatever follows the node was traced for the strides of torch's own operator."""
    q = randn(2, 4, 24, 16, order=order)

    def function(q):
        return F.scaled_dot_product_attention(q, q, q)

    expected = function(q)
    gm = rewritten(function, q)
    actual = gm(q)
    assert call(gm)
    assert actual.stride() == expected.stride()
    assert_close(actual, expected)


def test_strides_no_copy_has_are_a_reason():
    q = randn(1, 2, 24, 16)
    gm = make_fx(lambda q: F.scaled_dot_product_attention(q, q, q), tracing_mode="fake")(q)
    (pick,) = gm.graph.output_node().all_input_nodes
    with pick.meta["val"].fake_mode:
        pick.meta["val"] = torch.empty_strided((1, 2, 24, 16), (2048, 1024, 32, 1))
    before = structure(gm.graph)
    PostPass(Always(ALWAYS))(gm.graph)
    assert structure(gm.graph) == before
    assert reasons([gm]) == [["output_layout"]]


# Each negative twin: what is traced, on what, and the only reasons that may stand against it.
NEGATIVE = {
    "dropout": (
        lambda q: aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.5)[0],
        ["dropout"],
    ),
    "lse": (
        lambda q: aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[1],
        ["lse_used"],
    ),
    "lse_too": (
        lambda q: aten._scaled_dot_product_flash_attention_for_cpu(q, q, q),
        ["lse_used"],
    ),
    "head_dim": (
        lambda q: aten._scaled_dot_product_flash_attention_for_cpu(*[q.repeat(1, 1, 1, 17)] * 3)[0],
        ["head_dim"],
    ),
    "fp64": (
        lambda q: aten._scaled_dot_product_flash_attention_for_cpu(*[q.double()] * 3)[0],
        ["dtype_unsupported"],
    ),
    "mask_and_causal": (
        lambda q: aten._scaled_dot_product_flash_attention_for_cpu(
            q, q, q, 0.0, True, attn_mask=q[:, :1] @ q[:, :1].mT
        )[0],
        ["invalid_input"],
    ),
    "value_longer_than_key": (
        lambda q: aten._scaled_dot_product_flash_attention_for_cpu(q, q[:, :, 1:], q)[0],
        ["invalid_input"],
    ),
}


@pytest.mark.parametrize("name", NEGATIVE)
def test_negative_twins_stay_identical_and_say_why(name):
    function, codes = NEGATIVE[name]
    q = randn(2, 4, 24, 16)
    untouched = make_fx(function, tracing_mode="fake")(q)
    gm = rewritten(function, q)
    assert structure(gm.graph) == structure(untouched.graph)
    assert [sorted(set(codes)) for codes in reasons([gm])] == [codes]


def test_another_device_is_a_reason():
    """Graph surgery needs no GPU; a device without kernels is left alone."""
    with FakeTensorMode():
        q = torch.empty(2, 4, 32, 64, device="cuda", dtype=torch.float16)
        gm = make_fx(lambda q: aten._scaled_dot_product_flash_attention(q, q, q)[0])(q)
    before = structure(gm.graph)
    PostPass(Always(ALWAYS))(gm.graph)
    assert structure(gm.graph) == before
    assert reasons([gm]) == [["device_unsupported"]]


def test_the_recipe_is_that_of_the_gpu(hopper):
    with FakeTensorMode():
        q = torch.empty(2, 4, 32, 64, device="cuda", dtype=torch.float16)
        gm = make_fx(lambda q: aten._scaled_dot_product_flash_attention(q, q, q)[0])(q)
    PostPass(Always(ALWAYS))(gm.graph)
    default = SUPPORT["cuda.sm90"].default
    kwargs = call(gm).kwargs
    assert {name: kwargs[name] for name in default.op_kwargs()} == default.op_kwargs()
    assert [record.recipe for record in records([gm])] == [default.name]


def test_below_the_crossover_sdpa_stays():
    q = randn(1, 1, 8, 16)
    gm = make_fx(lambda q: F.scaled_dot_product_attention(q, q, q), tracing_mode="fake")(q)
    PostPass(Always(ALWAYS.with_options(dispatch="measured")))(gm.graph)
    assert count([gm], FOR_CPU) == 1
    assert reasons([gm]) == [["below_crossover"]]


def test_symbolic_sizes_add_no_guard():
    """Trap 12: a rewrite may not narrow the shapes that the graph serves."""
    q, k = randn(2, 4, 24, 16), randn(2, 2, 40, 16)
    mask = torch.rand(2, 1, 24, 40) > 0.5

    def function(q, k, mask):
        k = k.repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    gm = make_fx(function, tracing_mode="symbolic")(q, k, mask)
    guards = list(gm.shape_env.guards)
    for stage in (PrePass, PostPass):
        stage(Always(ALWAYS))(gm.graph)
    gm.recompile()
    assert call(gm)
    assert gm.shape_env.guards == guards
    longer = (randn(3, 4, 50, 16), randn(3, 2, 70, 16), torch.rand(3, 1, 50, 70) > 0.5)
    assert_close(gm(*longer), function(*longer))


def test_training_graphs_stay_identical():
    """Trap 6: under grad the graph is differentiated, and quantized attention has no gradient."""

    def function(q, k):
        return F.scaled_dot_product_attention(q, k, k)

    q, k = randn(1, 2, 24, 16).requires_grad_(), randn(1, 2, 40, 16)
    with torch.enable_grad():
        plain_out, plain = captured_graphs(function, q, k, patches={})
        (plain_grad,) = torch.autograd.grad(plain_out.sum(), q)
        out, graphs = captured_graphs(function, q, k)
        (grad,) = torch.autograd.grad(out.sum(), q)
    assert count(graphs, SDPA) == 0
    assert [structure(g.graph) for g in graphs] == [structure(g.graph) for g in plain]
    assert torch.equal(out, plain_out)
    assert torch.equal(grad, plain_grad)
    assert ["training"] in reasons(graphs)


def test_annotations_decide_nothing():
    """Trap 2: no cache key holds node.meta, so graphs that differ only there must end alike."""
    q = randn(1, 2, 24, 16)
    gm = make_fx(lambda q: F.scaled_dot_product_attention(q, q, q), tracing_mode="fake")(q)
    for node in gm.graph.nodes:
        node.meta.update(custom={"torch_sage": "off"}, nn_module_stack={"a": ("b", None)})
        node.meta.pop("stack_trace", None)
    PostPass(Always(ALWAYS))(gm.graph)
    assert count([gm], SDPA) == 1
