"""nn.TransformerEncoderLayer's fast path, one operator, becomes the same layer around our op."""

import pytest
import torch
from torch import nn

from tests.inductor.graphs import SDPA, captured_graphs, count
from tests.inductor.joint import (
    REL_L1,
    assert_same,
    keep_mask,
    reasons,
    records,
    run_pass,
    shape,
    traced,
)
from tests.numerics import relative_l1

BATCH, TOKENS, WIDTH, HEADS = 2, 24, 64, 4
LAYER = torch.ops.aten._transformer_encoder_layer_fwd.default
NATIVE = torch.ops.aten._native_multi_head_attention.default


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def layer(**arguments):
    """Return an encoder layer whose attention is sharp enough to matter."""
    made = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, batch_first=True, **arguments).eval()
    made.self_attn.in_proj_weight.mul_(3)
    made.self_attn.in_proj_bias.normal_()
    return made


def fast_path(module, mask=None, mask_type=None):
    """Return the call that ``module`` makes when nothing stands in the way."""
    attention = module.self_attn
    arguments = (
        *(WIDTH, HEADS, attention.in_proj_weight, attention.in_proj_bias),
        *(attention.out_proj.weight, attention.out_proj.bias),
        *(module.activation_relu_or_gelu == 2, module.norm_first, module.norm1.eps),
        *(module.norm1.weight, module.norm1.bias, module.norm2.weight, module.norm2.bias),
        *(module.linear1.weight, module.linear1.bias),
        *(module.linear2.weight, module.linear2.bias),
    )
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]

    def call(src, mask, *tensors):
        feed = iter(tensors)
        rest = (next(feed) if isinstance(x, torch.Tensor) else x for x in arguments)
        return LAYER(src, *rest, mask, mask_type)

    return call, (torch.randn(BATCH, TOKENS, WIDTH), mask, *tensors)


def rewritten(function, args, dynamic=False):
    """Require one rewrite that leaves no opaque operator; return its node."""
    gm = traced(function, *args, dynamic=dynamic)
    (node,) = run_pass(gm)
    assert not [n for n in gm.graph.nodes if n.target in (LAYER, NATIVE)]
    assert_same(gm, function, args)
    return node


def hidden(*dims):
    return ~keep_mask(*dims)


# (mask, its type, shape of the op's mask); in the operator True and every number but 0 hides.
MASKS = {
    "none": (lambda: None, None, None),
    "tokens": (lambda: hidden(TOKENS, TOKENS), 0, (1, 1, TOKENS, TOKENS)),
    "padding": (lambda: hidden(BATCH, TOKENS), 1, (BATCH, 1, 1, TOKENS)),
    "both": (lambda: hidden(BATCH, HEADS, TOKENS, TOKENS), 2, (BATCH, HEADS, TOKENS, TOKENS)),
    "number": (lambda: hidden(BATCH, TOKENS).float() * -5, 1, (BATCH, 1, 1, TOKENS)),
}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_layer(mask, norm_first, activation):
    make, kind, expected = MASKS[mask]
    module = layer(norm_first=norm_first, activation=activation)
    node = rewritten(*fast_path(module, make(), kind))
    found = node.args[3]
    if expected is None:
        assert found is None
    else:
        assert shape(found) == expected
        assert found.meta["val"].dtype is torch.bool


@pytest.mark.parametrize("mask", ["none", "padding"])
def test_layer_with_dynamic_shapes(mask):
    make, kind, _ = MASKS[mask]
    rewritten(*fast_path(layer(), make(), kind), dynamic=True)


def test_layer_in_16_bit():
    call, (src, *rest) = fast_path(layer().bfloat16())
    rewritten(call, (src.bfloat16(), *rest))


def test_module_with_padding():
    """Through dynamo: the module makes its bool mask a float one, and we make it bool again."""
    module = layer()
    x, padding = torch.randn(BATCH, TOKENS, WIDTH), hidden(BATCH, TOKENS)
    expected = module(x, src_key_padding_mask=padding)
    actual, graphs = captured_graphs(module, x, src_key_padding_mask=padding)
    assert count(graphs, SDPA) == 1
    assert count(graphs, LAYER) == 0
    assert relative_l1(actual, expected) <= REL_L1


def test_stack_of_layers():
    module = nn.TransformerEncoder(layer(), 3, enable_nested_tensor=False).eval()
    _, graphs = captured_graphs(module, torch.randn(BATCH, TOKENS, WIDTH))
    assert count(graphs, SDPA) == 3
    assert {r.pattern for r in records(graphs)} == {"encoder_layer"}


def test_ineligible_layer_stays():
    """Heads of 512 dims are more than the kernels take: the operator stays, with the reason."""
    module = nn.TransformerEncoderLayer(1024, 2, 32, batch_first=True).eval()
    _, graphs = captured_graphs(module, torch.randn(1, 8, 1024))
    assert count(graphs, LAYER) == 1
    assert count(graphs, SDPA) == 0
    assert set(reasons(graphs)[0]) == {"head_dim"}


def native(module, mask=None, mask_type=None, need_weights=False, results=1):
    weights = (module.in_proj_weight, module.in_proj_bias)
    projection = (module.out_proj.weight, module.out_proj.bias)

    def call(query, key, value, mask, *tensors):
        found = NATIVE(
            query, key, value, WIDTH, HEADS, *tensors, mask, need_weights, True, mask_type
        )
        return found[0] if results == 1 else found

    return call, (mask, *weights, *projection)


def tokens():
    return torch.randn(BATCH, TOKENS, WIDTH)


@pytest.mark.parametrize("mask", ["none", "tokens", "padding", "both"])
def test_native_self_attention(mask):
    make, kind, _ = MASKS[mask]
    call, rest = native(layer().self_attn, make(), kind)
    rewritten(lambda x, *rest: call(x, x, x, *rest), (tokens(), *rest))


def test_native_cross_attention():
    call, rest = native(layer().self_attn)
    rewritten(lambda x, y, *rest: call(x, y, y, *rest), (tokens(), tokens(), *rest))


def test_native_attention_whose_weights_are_used():
    call, rest = native(layer().self_attn, need_weights=True, results=2)
    gm = traced(lambda x, *rest: call(x, x, x, *rest), tokens(), *rest)
    assert run_pass(gm) == []
    assert reasons([gm]) == [["weights_used"]]


def test_query_that_sees_nothing():
    """The operator gives NaN there, scaled_dot_product_attention and we the projected 0."""
    call, rest = native(layer().self_attn, torch.ones(BATCH, TOKENS, dtype=torch.bool), 1)
    x = tokens()
    gm = traced(lambda x, *rest: call(x, x, x, *rest), x, *rest)
    run_pass(gm)
    assert call(x, x, x, *rest).isnan().all()
    torch.testing.assert_close(gm(x, *rest), rest[-1].expand_as(x))
