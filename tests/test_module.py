"""Opt-in and opt-out by module, in eager code, compiled, region by region, and exported."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_sage import SageConfig, _extension, apply_, exclude, ops, reset_, sage
from torch_sage.inductor import enable

pytestmark = pytest.mark.skipif(not _extension.is_available(), reason="extension not built")

ALWAYS = SageConfig(dispatch="always")
OTHER = SageConfig(dispatch="always", smooth_q=False, smooth_k=False)


class Block(nn.Module):
    """Self-attention; "by hand" spells it out."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        if self.by_hand:
            output = torch.softmax(q @ k.transpose(-2, -1) * 0.25, dim=-1) @ v
        else:
            output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return output.transpose(1, 2).flatten(2)


class Stack(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 24, 32)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    """Everything but training, which switches it on again."""
    with torch.no_grad():
        yield


@pytest.fixture
def grad_mode(no_grad: None) -> Any:
    with torch.enable_grad():
        yield


def trace(recorder: Any, model: Any, *inputs: Tensor) -> tuple[Tensor, list[str]]:
    """Return the output of ``model`` compiled whole, and which attention its graph has."""
    torch._dynamo.reset()
    recorder.graphs.clear()
    output = torch.compile(model, backend=recorder, fullgraph=True)(*inputs)
    return output, attention_nodes(recorder.graphs)


def attention_nodes(graphs: list[torch.fx.Graph]) -> list[str]:
    """Return the attention calls of ``graphs`` in order: sage, exact (marked) or sdpa (torch's)."""
    names = {
        ops.sdpa: "sage",
        ops.exact_sdpa: "exact",
        ops.exact_softmax: "exact softmax",
        F.scaled_dot_product_attention: "sdpa",
        torch.ops.aten.scaled_dot_product_attention.default: "sdpa",
        F.multi_head_attention_forward: "mha",
        torch._transformer_encoder_layer_fwd: "encoder layer",
    }
    nodes = [node for graph in graphs for node in graph.nodes]
    return [names[node.target] for node in nodes if node.target in names]


def test_instance(x: Tensor, recorder: Any) -> None:
    block = Block()
    exact = block(x)
    assert sage(ALWAYS)(block) is block
    quantized = block(x)
    assert 0 < (quantized - exact).abs().max() < 0.1
    output, nodes = trace(recorder, block, x)
    assert nodes == ["sage"]
    assert torch.equal(output, quantized)
    exclude(block)
    assert torch.equal(block(x), exact)
    output, nodes = trace(recorder, block, x)
    assert nodes == ["exact"]
    assert torch.equal(output, exact)
    reset_(block)
    assert type(block) is Block
    assert trace(recorder, block, x)[1] == ["sdpa"]


def test_class_and_function(x: Tensor, recorder: Any) -> None:
    @sage(ALWAYS)
    class Quantized(Block):
        pass

    @sage(ALWAYS)
    def attend(q: Tensor) -> Tensor:
        """Attend."""
        return F.scaled_dot_product_attention(query=q, key=q, value=q)

    assert Quantized.__name__ == "Quantized"
    assert attend.__doc__ == "Attend."
    assert trace(recorder, Quantized(), x)[1] == ["sage"]
    assert trace(recorder, attend, x[:, None])[1] == ["sage"]
    assert torch.equal(attend(x[:, None]), ops.sdpa(*[x[:, None]] * 3))
    assert trace(recorder, exclude(Quantized()), x)[1] == ["exact"]
    assert trace(recorder, exclude(attend), x[:, None])[1] == ["exact"]


def test_default_configuration_is_measured(x: Tensor) -> None:
    """``@sage`` alone leaves what is below the crossover to SDPA."""
    block = sage(Block())
    exact = block(x)
    assert torch.equal(exact, reset_(block)(x))
    assert not torch.equal(sage(ALWAYS)(block)(x), exact)


@pytest.mark.parametrize("form", ["sage", "sage()", "sage('auto')", "exclude"])
def test_spellings_of_a_decorator(form: str, recorder: Any) -> None:
    decorate = eval(form, {"sage": sage, "exclude": exclude})
    large = torch.randn(1, 8, 1024, 64)
    attend = decorate(lambda q: F.scaled_dot_product_attention(q, q, q))
    assert trace(recorder, attend, large)[1] == ["exact" if form == "exclude" else "sage"]


def test_innermost_scope_decides(x: Tensor, recorder: Any) -> None:
    model = sage(ALWAYS)(Stack())
    exclude(model.blocks[0])
    sage(OTHER)(model.blocks[1])
    output, nodes = trace(recorder, model, x)
    assert nodes == ["exact", "sage", "sage"]
    smooth = [node.kwargs["smooth"] for node in recorder.nodes(ops.sdpa)]
    assert smooth == ["", "qk"]
    assert torch.equal(output, model(x))
    # An inner scope that falls back keeps the outer one from quantizing what it left exact.
    sage(ALWAYS.with_options(qk="int4"))(model.blocks[2])
    exact = Stack()
    exact.load_state_dict(model.state_dict())
    hidden = x + model.blocks[0](x)
    hidden = hidden + model.blocks[1](hidden)
    assert torch.equal(model(x), hidden + exact.blocks[2](hidden))
    assert trace(recorder, model, x)[1] == ["exact", "sage", "sdpa"]


def test_apply(x: Tensor, recorder: Any) -> None:
    model = Stack(4)
    rules = {r"re:blocks\.\d": ALWAYS, "re:.*2": None, "blocks.1": OTHER, "blocks.3": None}
    assert apply_(model, rules, lambda module, name: name != "blocks.3") is model
    assert trace(recorder, model, x)[1] == ["sage", "sage", "sage", "sdpa"]
    assert [node.kwargs["smooth"] for node in recorder.nodes(ops.sdpa)] == ["qk", "", "qk"]
    apply_(model, {"re:.*2": None, r"re:blocks\.\d": "auto"})
    assert trace(recorder, model, x)[1] == ["sdpa", "sdpa", "exact", "sdpa"]
    reset_(model)
    assert trace(recorder, model, x)[1] == ["sdpa"] * 4


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"blocks.9": None}, ValueError, r"rules must each match.*\['blocks.9'\]"),
        ({"re:block": None, "blocks": None}, ValueError, r"\['re:block'\]"),
        ({"re:(": None}, re.error, ""),
        ({"blocks.0": "sage9"}, ValueError, "config must name one of"),
        ({"blocks.0": 3}, TypeError, "config must be a SageConfig"),
    ],
)
def test_apply_refuses(rules: Any, error: type[Exception], message: str) -> None:
    """A rule that matches nothing is a typing error; nothing is changed before all are known."""
    model = Stack()
    with pytest.raises(error, match=message or None):
        apply_(model, {"re:.*": ALWAYS, **rules})
    assert all(type(block) is Block for block in model.blocks)


@pytest.mark.parametrize("target", [3, "sage9", int, torch.ones(1)])
def test_other_targets_are_errors(target: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="must"):
        sage(target)
    with pytest.raises(TypeError, match="target must be"):
        exclude(target)


def test_generators_are_refused() -> None:
    """Their scope would end before their body ran."""

    def stream() -> Any:
        yield 1

    with pytest.raises(TypeError, match="target must be an ordinary function"):
        sage(stream)


def test_copies_and_pickles_keep_the_scope(x: Tensor, recorder: Any) -> None:
    model = apply_(Stack(), {"blocks.0": ALWAYS, "blocks.1": None})
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.blocks[0]) is type(model.blocks[0])
        output, nodes = trace(recorder, twin, x)
        assert nodes == ["sage", "exact", "sdpa"]
        assert torch.equal(output, expected)
        twin.blocks[0].qkv.weight.zero_()
    assert torch.equal(model(x), expected)
    assert isinstance(model.blocks[0], Block)
    assert repr(model) == repr(Stack())
    assert list(model.state_dict()) == list(Stack().state_dict())


def test_instance_with_a_forward_of_its_own(x: Tensor, recorder: Any) -> None:
    """accelerate's hooks replace ``forward`` on instances; the class's is not called then."""
    block = Block()
    plain = block.forward
    block.forward = lambda x: plain(x) + 1
    exact = block(x)
    sage(ALWAYS)(block)
    assert 0 < (block(x) - exact).abs().max() < 0.1
    assert trace(recorder, block, x)[1] == ["sage"]
    reset_(block)
    assert torch.equal(block(x), exact)


def test_regions_share_a_graph_only_within_a_scope(x: Tensor, recorder: Any) -> None:
    """Blocks are compiled one by one, as diffusers' compile_repeated_blocks does."""
    model = apply_(Stack(6), {r"re:blocks\.[013]": ALWAYS, "blocks.2": OTHER, "blocks.4": None})
    expected = model(x)
    for block in model.blocks:
        block.compile(backend=recorder, fullgraph=True)
    assert torch.equal(model(x), expected)
    assert attention_nodes(recorder.graphs) == ["sage", "sage", "exact", "sdpa"]
    assert len(recorder.graphs) == 4


def test_change_after_compilation_takes_effect(x: Tensor, recorder: Any) -> None:
    block = Block()
    compiled = torch.compile(block, backend=recorder, fullgraph=True)
    exact = compiled(x)
    sage(ALWAYS)(compiled)
    assert not torch.equal(compiled(x), exact)
    exclude(compiled)
    assert torch.equal(compiled(x), exact)
    assert attention_nodes(recorder.graphs) == ["sdpa", "sage", "exact"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(strict: bool, dynamic: bool, x: Tensor) -> None:
    model = apply_(Stack(), {"blocks.0": ALWAYS, "blocks.1": None}).eval()
    shapes = ({1: torch.export.Dim("tokens", min=2, max=512)},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    assert attention_nodes([program.graph]) == ["sage", "exact", "sdpa"]
    decomposed = program.run_decompositions()
    assert attention_nodes([decomposed.graph])[:2] == ["sage", "exact"]
    for tokens in (24, 7) if dynamic else (24,):
        assert torch.equal(program.module()(x[:, :tokens]), model(x[:, :tokens]))


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention(need_weights: bool, x: Tensor, recorder: Any) -> None:
    mha = nn.MultiheadAttention(32, 2, batch_first=True).eval()

    def call(x: Tensor) -> Tensor:
        return mha(x, x, x, need_weights=need_weights)[0]

    exact = call(x)
    sage(ALWAYS)(mha)
    quantized = call(x)
    output, nodes = trace(recorder, call, x)
    assert nodes == ([] if need_weights else ["sage"])
    assert torch.equal(output, quantized)
    assert torch.equal(quantized, exact) == need_weights
    exclude(mha)
    torch.testing.assert_close(call(x), exact)
    output, nodes = trace(recorder, call, x)
    assert nodes == (["exact softmax"] if need_weights else ["exact"])
    torch.testing.assert_close(output, exact)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layer(norm_first: bool, padded: bool, x: Tensor, recorder: Any) -> None:
    """Dynamo takes the fast path, with attention in C++, without asking a function mode."""
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True, norm_first=norm_first).eval()
    hidden = torch.arange(24).expand(2, 24) >= torch.tensor([[24], [20]]) if padded else None

    def call(x: Tensor) -> Tensor:
        return layer(x, src_key_padding_mask=hidden)

    exact = call(x)
    assert trace(recorder, call, x)[1] == ["encoder layer"]
    sage(ALWAYS)(layer)
    quantized = call(x)
    output, nodes = trace(recorder, call, x)
    assert nodes == ["sage"]
    torch.testing.assert_close(output, quantized, atol=0.02, rtol=0)
    assert 1e-5 < (output - exact).abs().max() < 0.1
    exclude(layer)
    output, nodes = trace(recorder, call, x)
    assert nodes == ["exact"]
    torch.testing.assert_close(output, exact)
    reset_(layer)
    assert torch.backends.mha.get_fastpath_enabled()
    assert trace(recorder, call, x)[1] == ["encoder layer"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("decorate", [sage(ALWAYS), exclude])
def test_export_of_an_encoder_layer(strict: bool, decorate: Any, x: Tensor) -> None:
    layer = decorate(nn.TransformerEncoderLayer(32, 2, 48, batch_first=True).eval())
    program = torch.export.export(layer, (x,), strict=strict)
    nodes = attention_nodes([program.graph])
    assert nodes == ["exact" if decorate is exclude else "sage"]
    torch.testing.assert_close(program.module()(x), layer(x), atol=0.02, rtol=0)


@pytest.mark.parametrize("target", ["sdpa", "by hand", "mha", "encoder"])
def test_exclude_holds_under_enable(target: str) -> None:
    """What the Inductor pass would rewrite, it leaves alone where the graph is marked."""
    x = torch.randn(2, 64, 32)
    mha = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    models: dict[str, Any] = {
        "sdpa": Block(),
        "by hand": Block(by_hand=True),
        "mha": exclude(mha) and (lambda x: mha(x, x, x, need_weights=False)[0]),
        "encoder": nn.TransformerEncoderLayer(32, 2, 48, batch_first=True).eval(),
    }
    model = models[target]
    exact = reset_(mha) and model(x)
    torch._dynamo.reset()
    with enable(ALWAYS):
        quantized = torch.compile(model, fullgraph=True)(x)
    assert (quantized - exact).abs().max() > 1e-5, "nothing to exclude"
    exclude(mha if target == "mha" else model)
    torch._dynamo.reset()
    with enable(ALWAYS):
        kept = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(kept, exact)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), exact)
    torch._dynamo.reset()


@pytest.mark.usefixtures("grad_mode")
@pytest.mark.parametrize("scope", ["sage", "exclude"])
@pytest.mark.parametrize("compiled", [False, True])
def test_training_is_exact(scope: str, compiled: bool, x: Tensor, recorder: Any) -> None:
    model = Stack()
    model(x).sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    (exclude if scope == "exclude" else sage(ALWAYS))(model)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    run(x).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_sdpa_by_positions_keywords_and_softmax_spellings(x: Tensor, recorder: Any) -> None:
    q = x[:, None]

    @exclude
    def spellings(q: Tensor) -> list[Tensor]:
        return [
            torch.softmax(q, -1),
            torch.softmax(q, -1, torch.float64),
            q.softmax(2),
            q.softmax(dim=-1, dtype=torch.float64),
            F.softmax(q, dim=1),
            F.softmax(q, -1, 3, torch.float64),
            torch.special.softmax(q, 0),
            nn.Softmax(-1)(q),
            F.scaled_dot_product_attention(q, key=q, value=q, scale=0.5),
            F.scaled_dot_product_attention(q, q, q, None, 0.0, True),
        ]

    expected = spellings(q)
    torch._dynamo.reset()
    output = torch.compile(spellings, backend=recorder, fullgraph=True)(q)
    assert attention_nodes(recorder.graphs) == ["exact softmax"] * 8 + ["exact"] * 2
    for got, want in zip(output, expected, strict=True):
        assert torch.equal(got, want)
