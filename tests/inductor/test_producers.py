"""Norms and rotations in front of attention: recognized in every spelling, refused in every twin.

What was recognized is what the planned op rotates: ``rotate`` of its arguments must be the model's
own Q and K, computed in fp64 from the same 16-bit projections, but for the rounding to 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import get_code
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_leaves

import torch_sage
from benchmarks.gpu import blocks
from tests.inductor.graphs import ALWAYS, SDPA, captured_graphs, count, records
from tests.inductor.joint import traced
from tests.inductor.ropes import (
    NORMS,
    SPELLINGS,
    B,
    D,
    H,
    N,
    angles,
    chunks,
    compact,
    doubled,
    gptj,
    llama,
    rms_norm,
    rotate_half,
)
from tests.numerics import assert_within_budget, expect, relative_l1
from torch_sage.fusion import FUSED, Faster
from torch_sage.inductor.passes import Always, PostPass
from torch_sage.ops import rotary
from torch_sage.ops.rotary import rotate
from torch_sage.recipes import SUPPORT

FUSING = ALWAYS.with_options(producers="always")
ROTARY = torch.ops.torch_sage.rotary_sdpa.default

# rotate() rounds to bf16 once; in fp32 it adds two products of at most three factors, and sums 64
# squares, of numbers that may cancel.
HALF_ULP = 2.0**-8
FP32_ERROR = 64 * 2.0**-24

Rope = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the op on CPU rotates: the arguments of every ``rotate``, that of Q, then that of K."""
    found: list[Any] = []

    def kept(*args: Any) -> Tensor:
        found.append(args)
        return rotate(*args)

    monkeypatch.setattr(rotary, "rotate", kept)
    return found


def projections(heads_kv: int = H, n: int = N, b: int = B) -> list[Tensor]:
    """Return q, k and v as projections leave them, [B, N, H, D]."""
    return [torch.randn(b, n, h, D).bfloat16() for h in (H, heads_kv, heads_kv)]


def attention(rope: Rope, **options: Any) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, *args: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(rope(q, *args), rope(k, *args), v, **options)

    return attend


def compiled(function: Callable[..., Any], *args: Any, config: Any = FUSING, **settings: Any):
    """Return what ``function`` returns compiled, and the graphs."""
    return captured_graphs(function, *args, patches=torch_sage.options(config), **settings)


def assert_rotates(rotations: list[Any], rope: Rope, *tables: Tensor) -> None:
    """Require one call of the op, whose rotations are ``rope``."""
    assert len(rotations) == 2
    for x, *rest in rotations:
        wanted = rope(x.double(), *tables)
        error = (rotate(x, *rest).double() - wanted).abs()
        assert (error <= HALF_ULP * wanted.abs() + FP32_ERROR * x.abs().max()).all()


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, rotations: list[Any]) -> None:
    rope, make_tables, pairing = SPELLINGS[name]
    args = (*projections(), *make_tables())
    output, graphs = compiled(attention(rope), *args)
    assert count(graphs, ROTARY) == 1 and count(graphs, SDPA) == 0
    assert_rotates(rotations, rope, *make_tables())
    assert {found[-1] for found in rotations} == {pairing}
    assert relative_l1(output, attention(rope)(*args)) < 0.03
    assert [record.producers for record in records(graphs)] == ["rotation"]


@pytest.mark.parametrize("name", ["llama", "chunks", "flux", "wan", "computed in the graph"])
def test_dynamic_lengths(name: str) -> None:
    rope, make_tables, _ = SPELLINGS[name]
    args = (*projections(), *make_tables())
    for x in args:
        for dim in {0: range(x.dim()), 1: range(2)}[x.dim() == 4]:
            if x.shape[dim] == N:
                torch._dynamo.mark_dynamic(x, dim)
    output, graphs = compiled(attention(rope, is_causal=True), *args)
    (call,) = [node for node in graphs[0].graph.nodes if node.target is ROTARY]
    assert not isinstance(call.meta["val"].shape[2], int)
    assert relative_l1(output, attention(rope, is_causal=True)(*args)) < 0.03


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("spelling", ["llama", "flux"])
def test_norms(spelling: str, name: str, rotations: list[Any]) -> None:
    norm, is_by_eps = NORMS[name]
    rope, make_tables, _ = SPELLINGS[spelling]

    def made(x: Tensor, weight: Tensor, *tables: Tensor) -> Tensor:
        return rope(norm(x, weight.to(x.dtype)), *tables)

    args = (*projections(), torch.rand(D).bfloat16() + 0.5, *make_tables())
    output, graphs = compiled(attention(made), *args)
    assert count(graphs, ROTARY) == 1
    for _, _, _, rstd, weight, eps, _ in rotations:
        assert (rstd is None, eps is None) == (is_by_eps, not is_by_eps)
        assert weight.shape == (H if name == "of all heads" else 1, D)
        assert eps is None or eps == pytest.approx(1e-6)  # torch may have rounded it to fp32
    assert_rotates(rotations, made, *args[3:])
    assert relative_l1(output, attention(made)(*args)) < 0.03
    assert [record.producers for record in records(graphs)] == ["norm and rotation"]


class Projected(nn.Module):
    """One projection for Q, K and V, or one each, in the ways that models part them."""

    def __init__(self, way: str, heads_kv: int = H) -> None:
        super().__init__()
        self.way, self.heads_kv = way, heads_kv
        self.all = nn.Linear(96, (H + 2 * heads_kv) * D)
        self.each = nn.ModuleList(nn.Linear(96, h * D) for h in (H, heads_kv, heads_kv))

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return q, k, v as [B, H, N, D]."""
        b, n, _ = x.shape
        if self.way == "each":
            return tuple(f(x).view(b, n, -1, D).transpose(1, 2) for f in self.each)
        whole = self.all(x)
        if self.way == "split":
            sizes = [h * D for h in (H, self.heads_kv, self.heads_kv)]
            return tuple(
                part.unflatten(-1, (-1, D)).transpose(1, 2) for part in whole.split(sizes, -1)
            )
        if self.way == "heads":
            whole = whole.view(b, n, -1, D).transpose(1, 2)
            return whole.split([H, self.heads_kv, self.heads_kv], 1)
        if self.way == "unbind":
            return whole.view(b, n, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        return tuple(x.view(b, n, H, D).transpose(1, 2) for x in whole.chunk(3, -1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        gqa = self.heads_kv != H
        q, k = (chunks(y, cos, sin) for y in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)


@pytest.mark.parametrize(
    ("way", "heads_kv"),
    [("each", H), ("each", 2), ("each", 1), ("split", 2), ("split", 1), ("heads", 2),
     ("unbind", H), ("chunk", H)],
)  # fmt: skip
def test_projections(way: str, heads_kv: int) -> None:
    """Q and K are read where the projection wrote them: nothing is copied, and nothing repeated."""
    model = Projected(way, heads_kv).bfloat16().eval()
    args = (torch.randn(B, N, 96).bfloat16(), *compact())
    output, graphs = compiled(model, *args)
    assert count(graphs, ROTARY) == 1
    (call,) = [n for n in graphs[0].graph.nodes if n.target is ROTARY]
    q, k, _ = (operand.meta["val"] for operand in call.args[:3])
    assert q.shape == (B, H, N, D) and k.shape == (B, heads_kv, N, D)
    assert q.stride() == k.stride() or way in ("each", "split", "heads")
    copies = [torch.ops.aten.clone.default, torch.ops.aten.cat.default]
    assert not {n.target for n in call.args[0].all_input_nodes} & {*copies}
    assert relative_l1(output, model(*args)) < 0.03


def test_layers_share_their_tables() -> None:
    """Q and K of all layers take one table of cosines and one of sines, put together once."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Projected("each") for _ in range(3))
            self.back = nn.Linear(H * D, 96)

        def forward(self, x: Tensor, *tables: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + self.back(layer(x, *tables).transpose(1, 2).flatten(2))
            return x

    args = (torch.randn(B, N, 96).bfloat16(), *compact())
    _, graphs = compiled(Layers().bfloat16().eval(), *args)
    found = [n for n in graphs[0].graph.nodes if n.target is ROTARY]
    assert len(found) == 3
    assert len({(n.args[3], n.args[4], n.args[8], n.args[9]) for n in found}) == 1
    assert count(graphs, torch.ops.aten.cat.default) == 2


# Twins that are no such rotation, or of which something else is needed: attention is rewritten, and
# Q and K are made as before.


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, : D // 4], sin[:, : D // 4]
    return torch.cat([chunks(x[..., : D // 2], cos, sin), x[..., D // 2 :]], -1)


def mirrored(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs i and D - 1 - i."""
    turned = torch.cat([-x[..., D // 2 :].flip(-1), x[..., : D // 2].flip(-1)], -1)
    return (x * cos + turned * sin).to(x.dtype)


def quarters(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As vision models: rows rotate in one half of the channels, columns in the other."""
    cos, sin = cos[:, : D // 4], sin[:, : D // 4]
    return torch.cat([chunks(part, cos, sin) for part in x.chunk(2, -1)], -1)


def one_sine_too_much(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos + rotate_half(x) * sin * sin).to(x.dtype)


def only_first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos + F.pad(-x[..., D // 2 :], (0, D // 2)) * sin).to(x.dtype)


def shifted(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos + rotate_half(x) * sin + 1).to(x.dtype)


def scaled(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return llama(x, cos, sin) * 0.5


def of_other_tokens(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos + rotate_half(x.roll(1, 2)) * sin).to(x.dtype)


def of_other_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos + rotate_half(torch.cat([x[:, 1:], x[:, :1]], 1)) * sin).to(x.dtype)


def layer_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return llama(F.layer_norm(x, x.shape[-1:]), cos, sin)


def weighted_after(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (llama(x, cos, sin) * cos[0]).to(x.dtype)


def normed_by_channel(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """By tokens: another factor for every channel."""
    return llama(x / x.float().norm(dim=2, keepdim=True), cos, sin).to(x.dtype)


def fp32_weight(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return llama((x.float() * sin[3]).to(x.dtype), cos, sin)


def twice(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return llama(llama(x, cos, sin), cos, sin)


def gated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return llama(x * x.sigmoid(), cos, sin)


def permuted_output(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours rotate, and come out as halves."""
    x1, x2 = x[..., 0::2], x[..., 1::2]
    c, s = cos[:, : D // 2], sin[:, : D // 2]
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1).to(x.dtype)


TWINS = [
    partial, mirrored, quarters, one_sine_too_much, only_first, shifted, scaled, of_other_tokens,
    of_other_heads, layer_norm, weighted_after, normed_by_channel, fp32_weight, twice, gated,
    permuted_output,
]  # fmt: skip


def assert_not_fused(function: Callable[..., Any], *args: Any, **settings: Any) -> None:
    output, graphs = compiled(function, *args, **settings)
    assert count(graphs, ROTARY) == 0 and count(graphs, SDPA) == 1
    assert [record.producers for record in records(graphs)] == [""]
    plain, _ = compiled(function, *args, config=ALWAYS, **settings)
    for a, b in zip(tree_leaves(output), tree_leaves(plain), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rope", TWINS, ids=lambda f: f.__name__)
def test_twins_stay(rope: Rope) -> None:
    assert_not_fused(attention(rope), *projections(), *doubled())


def test_q_and_k_of_different_pairings_stay() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = llama(q, cos, sin), gptj(k, cos, sin)
        return F.scaled_dot_product_attention(q, k, v)

    assert_not_fused(attend, *projections(), *doubled())


@pytest.mark.parametrize("which", [0, 1])
def test_one_rotation_alone_stays(which: int) -> None:
    def attend(*args: Tensor) -> Tensor:
        qkv = [x.transpose(1, 2) for x in args[:3]]
        qkv[which] = llama(qkv[which], *args[3:])
        return F.scaled_dot_product_attention(*qkv)

    assert_not_fused(attend, *projections(), *doubled())


def test_rotated_keys_that_are_cached_stay() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, *t: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k = llama(k, *t)
        return F.scaled_dot_product_attention(llama(q, *t), k, v), k

    assert_not_fused(attend, *projections(), *doubled())


def test_normed_queries_that_are_used_again_stay() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, w: Tensor, *t: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q = rms_norm(q, w)
        return F.scaled_dot_product_attention(llama(q, *t), llama(k, *t), v), q * 2

    assert_not_fused(attend, *projections(), torch.rand(D).bfloat16(), *doubled())


def test_what_is_projected_may_be_used_again() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, *t: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        output = F.scaled_dot_product_attention(llama(q, *t), llama(k, *t), v)
        return output, k.sum(), q * 2

    _, graphs = compiled(attend, *projections(), *doubled())
    assert count(graphs, ROTARY) == 1


def test_past_keys_stay() -> None:
    """New keys are rotated and put behind those of a cache."""

    def attend(q: Tensor, k: Tensor, v: Tensor, past: Tensor, *t: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = torch.cat([past, llama(k, *t)], 2), torch.cat([past, v], 2)
        return F.scaled_dot_product_attention(llama(q, *t), k, v)

    assert_not_fused(attend, *projections(), torch.randn(B, H, 9, D).bfloat16(), *doubled())


@pytest.mark.parametrize("change", ["fp32", "head_dim", "wide value"])
def test_operands_that_the_op_refuses_stay(change: str) -> None:
    q, k, v = projections()
    if change == "fp32":
        q, k, v = q.float(), k.float(), v.float()
    elif change == "head_dim":
        q, k = q[..., : D // 2], k[..., : D // 2]
    else:
        v = torch.cat([v, v], -1)
    at = angles(d=q.shape[-1])
    assert_not_fused(attention(chunks), q, k, v, at.cos(), at.sin())


def test_measured_fuses_nothing_here() -> None:
    """On CPU the op is a composition, which saves nothing."""
    args = (*projections(), *doubled())
    for producers in ("measured", "never"):
        config = ALWAYS.with_options(producers=producers)
        _, graphs = compiled(attention(llama), *args, config=config)
        assert count(graphs, ROTARY) == 0 and count(graphs, SDPA) == 1


# The elements of Q and K of projections().
ELEMENTS = 2 * B * H * N * D


@pytest.mark.parametrize(
    ("rule", "is_fused"),
    [
        (Faster("halves", "", D, 1, ELEMENTS, ELEMENTS), True),
        (Faster("halves", "", D, 1, ELEMENTS + 1, 1e9), False),
        (Faster("halves", "", D, 1, 0, ELEMENTS - 1), False),
        (Faster("halves", "", D, 2, 0, 1e9), False),
        (Faster("halves", "", 2 * D, 1, 0, 1e9), False),
        (Faster("halves", "eps", D, 1, 0, 1e9), False),
        (Faster("neighbours", "", D, 1, 0, 1e9), False),
    ],
)
def test_measured_follows_the_rule(
    rule: Faster, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FUSED, "cpu", (Faster("halves", "rstd", D, 1, 0, 1e9), rule))
    _, graphs = compiled(attention(llama), *projections(), *doubled(), config=ALWAYS)
    assert count(graphs, ROTARY) == is_fused


def test_programs_for_c_plus_plus_have_no_op_in_python() -> None:
    class Model(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return attention(llama)(*args)

    args = (*projections(), *doubled())
    program = torch_sage.apply_to_exported(torch.export.export(Model(), args), FUSING)
    targets = [node.target for node in program.graph.nodes]
    assert ROTARY not in targets and targets.count(SDPA) == 1
    for is_package in (False, True):
        gm = traced(attention(llama), *args)
        with V.set_aot_compilation(is_package):
            PostPass(Always(FUSING))(gm.graph)
        assert count([gm], ROTARY) == (not is_package)


def test_a_call_of_the_op_is_in_the_report() -> None:
    q, k, v = (x.transpose(1, 2) for x in projections())
    tables = tuple(t[None] for t in doubled())

    def attend(*args: Tensor) -> Tensor:
        return ROTARY(*args[:5], None, None, None, *args[3:5], None, None, None)

    report = torch_sage.explain(attend, q, k, v, *tables)
    assert [record.pattern for record in report.records] == ["direct"]


@pytest.mark.parametrize("name", blocks.BLOCKS)
def test_layers_generate_fewer_kernels(name: str) -> None:
    """A kernel less each for Q and K; Inductor's code is generated, not compiled."""
    layer, inputs = blocks.build(name, 64, "cpu", tiny=True)
    kernels, outputs = {}, {}
    for config in (ALWAYS, FUSING):
        outputs[config], _ = compiled(layer, *inputs, config=config)
        torch._dynamo.reset()
        with torch._inductor.config.patch(force_disable_caches=True):
            codes = get_code(torch.compile(layer, options=torch_sage.options(config)), *inputs)
        kernels[config] = sum(len(re.findall(r"^(?:cpp|triton)_\w+ = ", c, re.M)) for c in codes)
        assert sum("torch.ops.torch_sage.rotary_sdpa" in c for c in codes) == (config is FUSING)
    assert 0 < kernels[FUSING] <= kernels[ALWAYS] - 2
    assert relative_l1(outputs[FUSING], outputs[ALWAYS]) < 0.01
    outcome = "with rotation" if name == "llama" else "with norm and rotation"
    assert outcome in str(torch_sage.report()) and outcome in torch_sage.report().to_html()


def test_output_is_within_the_budget_of_the_oracle(rotations: list[Any]) -> None:
    args = (*projections(), torch.rand(D).bfloat16() + 0.5, *doubled())

    def made(x: Tensor, weight: Tensor, *tables: Tensor) -> Tensor:
        return llama(rms_norm(x, weight), *tables)

    output, _ = compiled(attention(made), *args)
    q, k = (rotate(*found) for found in rotations)
    recipe = SUPPORT["cpu"].default.op_kwargs()
    assert_within_budget(output, expect(q, k, args[2].transpose(1, 2), **recipe))
