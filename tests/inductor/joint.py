"""Attention written by hand: tracing it, running the pass on it, judging the result.

Two comparisons with the function itself. With exact attention in place of the op, the graph must
agree to rounding: that checks what was understood (scale, mask, layout). With the op itself it must
be within the default CPU recipe's error, rel-L1 0.02 on N(0, 1) data (issue 2, section 4).
"""

import torch
import torch.nn.functional as F
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.inductor.graphs import ALWAYS, SDPA, reasons, records, structure
from tests.numerics import exact_attention, relative_l1
from torch_sage.inductor.passes import Always, PrePass

# The default CPU recipe on N(0, 1) data: issue 2, section 4.
REL_L1 = 0.02

# Both sides round in the same dtype but in another order: scores, weights and output each once,
# and exp turns an absolute error of a score (up to 8 here) into a relative one of a weight.
ROUNDINGS = 16

MATMULS = (torch.ops.aten.bmm.default, torch.ops.aten.mm.default, torch.ops.aten.baddbmm.default)

B, H, N, M, D = 2, 4, 24, 40, 16


class Exactly(Interpreter):
    """Runs a graph with exact attention in place of the op."""

    def call_function(self, target, args, kwargs):
        if target is not SDPA:
            return super().call_function(target, args, kwargs)
        output = exact_attention(*args).output.to(args[0].dtype)
        if kwargs["output_order"] == "bshd":
            return output.transpose(1, 2).contiguous().transpose(1, 2)
        return output.contiguous()


def traced(function, *args, dynamic=False):
    """Return the graph that Inductor's joint passes would start from."""
    mode = "symbolic" if dynamic else "fake"
    return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode=mode)(*args)


def run_pass(gm):
    """Run the pass on ``gm`` and return the torch_sage nodes."""
    PrePass(Always(ALWAYS))(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return [node for node in gm.graph.nodes if node.target is SDPA]


def assert_same(gm, function, args):
    """Require both comparisons of the module docstring, and the function's own strides."""
    expected = function(*args)
    exact = Exactly(gm).run(*args)
    rounding = ROUNDINGS * torch.finfo(expected.dtype).eps * expected.abs().max()
    assert (exact - expected).abs().max() <= rounding
    actual = gm(*args)
    assert actual.dtype == expected.dtype
    assert actual.stride() == expected.stride()
    assert relative_l1(actual, expected) <= REL_L1


def rewritten(function, *args, dynamic=False, pattern="manual"):
    """Require one rewrite that leaves no matmul of attention and keeps the meaning.

    Returns:
        The torch_sage node.
    """
    gm = traced(function, *args, dynamic=dynamic)
    (node,) = run_pass(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert not [n for n in gm.graph.nodes if n.target in MATMULS]
    assert [record.pattern for record in records([gm])] == [pattern]
    assert_same(gm, function, args)
    return node


def refused(function, *args, dynamic=False):
    """Require that the graph stays byte-identical; return the reason codes of its records."""
    gm = traced(function, *args, dynamic=dynamic)
    before = structure(gm.graph)
    assert run_pass(gm) == []
    assert structure(gm.graph) == before
    return reasons([gm])


def shape(node):
    return tuple(node.meta["val"].shape)


def qkv(dtype=torch.float32, kv_heads=H, batch=B):
    """Return q, k, v as [batch, heads, tokens, head_dim].

    The query is halved, so that forms without a scale stay near the N(0, 1) scores of REL_L1.
    """
    shapes = ((batch, H, N, D), (batch, kv_heads, M, D), (batch, kv_heads, M, D))
    q, k, v = (torch.randn(s, dtype=dtype) for s in shapes)
    return q / 2, k, v


def token_major():
    """Return q, k, v as [batch, tokens, heads, head_dim]."""
    return tuple(x.transpose(1, 2).contiguous() for x in qkv())


def folded():
    """Return q, k, v as [batch * heads, tokens, head_dim]."""
    return tuple(x.flatten(0, 1) for x in qkv())


def keep_mask(*dims):
    """Return a bool mask that leaves every row its first key."""
    keep = torch.rand(dims) > 0.3
    keep[..., 0] = True
    return keep


def mT(x):
    return x.transpose(-2, -1)


def attend(scores, v):
    return scores.softmax(-1) @ v


def merge(x):
    """Return [batch, heads, tokens, head_dim] as a projection takes it."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def math_sdpa(q, k, v, **arguments):
    """Run SDPA's math backend, which reaches Inductor as separate operators."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **arguments)


def softmax32(scores):
    return F.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)
