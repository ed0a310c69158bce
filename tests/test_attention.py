"""The public functions: torch's semantics with quantized arithmetic, and exact SDPA elsewhere."""

from __future__ import annotations

import inspect
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental import symbolic_shapes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from tests.numerics import exact_attention
from torch_sage import SageConfig, _extension, attention, ops
from torch_sage.attention import attention_with_lse, scaled_dot_product_attention

pytestmark = pytest.mark.skipif(not _extension.is_available(), reason="extension not built")

ALWAYS = SageConfig(dispatch="always")
RECIPE = {"qk": "int8", "granularity": "token", "pv": "bf16", "smooth": "qk"}


def qkv(
    b: int = 2, hq: int = 4, hkv: int = 4, n: int = 9, m: int = 11, d: int = 16, dv: int = 16
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, hq, n, d), torch.randn(b, hkv, m, d), torch.randn(b, hkv, m, dv)


def is_quantized(output: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Return whether ``output`` is near SDPA's result without being it."""
    exact = F.scaled_dot_product_attention(*args, **kwargs)
    # INT8 with a scale per token: rel. L1 .0093 on N(0,1) (algorithm.md 3.3); the size of the
    # difference is tests/ops/test_kernels.py's business, here it tells which path ran.
    near = (output - exact).abs().mean() < 0.1 * exact.abs().mean()
    return bool(near) and not torch.equal(output, exact)


def test_signature_is_torchs_plus_config() -> None:
    """torch's function is built in, so its signature is read from the first line of its doc."""
    ours = inspect.signature(scaled_dot_product_attention)
    head, _, _ = (F.scaled_dot_product_attention.__doc__ or "").partition("->")
    declared = head[head.index("(") + 1 : head.rindex(")")].replace("*,", "").split(",")
    names = [argument.split("=")[0].strip() for argument in declared if argument.strip()]
    assert [*ours.parameters] == [*names, "config"]
    assert ours.parameters["config"].kind is inspect.Parameter.KEYWORD_ONLY


CALLS: dict[str, tuple[dict[str, int], dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}, {}),
    "causal": ({}, {"is_causal": True}, {"causal": "top_left"}),
    "scale": ({}, {"scale": 0.4}, {"scale": 0.4}),
    "gqa": ({"hkv": 2}, {"enable_gqa": True}, {}),
    "other value": ({"dv": 24}, {}, {}),
    "bool mask": ({}, {"attn_mask": torch.arange(11) < torch.arange(9)[:, None] + 3}, {}),
    "float mask": ({}, {"attn_mask": torch.linspace(-2, 2, 99).view(9, 11)}, {}),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_reach_the_op(case: str) -> None:
    shape, kwargs, expected = CALLS[case]
    q, k, v = qkv(**shape)
    output = scaled_dot_product_attention(q, k, v, **kwargs, config=ALWAYS)
    mask = kwargs.get("attn_mask")
    assert torch.equal(output, ops.sdpa(q, k, v, mask, **expected, **RECIPE))
    assert is_quantized(output, q, k, v, **kwargs)
    # The second call takes the remembered plan.
    assert torch.equal(output, scaled_dot_product_attention(q, k, v, **kwargs, config=ALWAYS))


def test_config_chooses_the_recipe() -> None:
    q, k, v = qkv()
    config = ALWAYS.with_options(granularity="block", smooth_q=False, smooth_k=False, smooth_v=True)
    expected = ops.sdpa(q, k, v, granularity="block", smooth="v")
    assert torch.equal(scaled_dot_product_attention(q, k, v, config=config), expected)
    named = scaled_dot_product_attention(*[torch.randn(1, 8, 1024, 64)] * 3, config="sage1")
    assert named.shape == (1, 8, 1024, 64)
    with pytest.raises(ValueError, match="config must name one of"):
        scaled_dot_product_attention(q, k, v, config="sage0")


@pytest.mark.parametrize("n", [5, 9, 11, 13])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
def test_causal_bias(bias: Any, n: int) -> None:
    q, k, v = qkv(n=n)
    causal = "bottom_right" if bias is causal_lower_right else "top_left"
    mask = bias(n, 11)
    expected = ops.sdpa(q, k, v, causal=causal)
    assert torch.equal(scaled_dot_product_attention(q, k, v, mask, config=ALWAYS), expected)
    exact = exact_attention(q, k, v, causal=causal).output.float()
    torch.testing.assert_close(expected, exact, atol=0.1, rtol=0)  # rules out the other alignment
    fallback = scaled_dot_product_attention(q, k, v, mask, config="auto")
    torch.testing.assert_close(fallback, exact)


@pytest.mark.parametrize("grad", [False, True])
def test_three_dimensions(grad: bool) -> None:
    q, k, v = (x[0] for x in qkv(hkv=2))
    mask = torch.randn(4, 9, 11)
    kwargs = {"attn_mask": mask, "enable_gqa": True}
    output = scaled_dot_product_attention(q.requires_grad_(grad), k, v, **kwargs, config=ALWAYS)
    exact = F.scaled_dot_product_attention(q, k, v, **kwargs)
    assert output.shape == exact.shape == (4, 9, 16)
    assert torch.equal(output, exact) == grad
    assert is_quantized(output, q, k, v, **kwargs) != grad


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 5, 16), (1, 4, 7, 16), (1, 4, 7, 16)),
        ((2, 4, 5, 16), (2, 1, 7, 16), (2, 4, 7, 16)),
        ((1, 1, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16)),
    ],
    ids=str,
)
def test_broadcast_dimensions(shapes: Any) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    output = scaled_dot_product_attention(*tensors, config=ALWAYS)
    assert output.shape == (2, 4, 5, 16)
    assert is_quantized(output, *tensors)


@pytest.mark.parametrize("order", list(itertools.permutations("bhn")), ids="".join)
@pytest.mark.parametrize("dv", [16, 24])
def test_memory_order_is_sdpas(order: tuple[str, ...], dv: int) -> None:
    for b, h, n in itertools.product((1, 2), (1, 3), (1, 5)):
        sizes = {"b": b, "h": h, "n": n}
        stored = torch.randn(*(sizes[letter] for letter in order), 16)
        q = stored.permute(*(order.index(letter) for letter in "bhn"), 3)
        k, v = torch.randn(b, h, 7, 16), torch.randn(b, h, 7, dv)
        expected = F.scaled_dot_product_attention(q, k, v)
        for output in (
            scaled_dot_product_attention(q, k, v, config=ALWAYS),
            attention_with_lse(q, k, v, config=ALWAYS).output,
        ):
            # The stride of a dimension of size 1 means nothing.
            strides = zip(output.stride(), expected.stride(), output.shape, strict=True)
            assert all(ours == theirs for ours, theirs, size in strides if size > 1)
            assert is_quantized(output, q, k, v)


def test_query_with_gaps_and_expanded_query() -> None:
    k, v = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, 16)
    for q in (
        torch.randn(2, 5, 3, 3, 16)[:, :, 1].transpose(1, 2),
        torch.randn(2, 3, 5, 32)[..., ::2],
        torch.randn(1, 3, 5, 16).expand(2, 3, 5, 16),
        torch.randn(2, 1, 5, 16).expand(2, 3, 5, 16),
    ):
        expected = F.scaled_dot_product_attention(q, k, v)
        output = scaled_dot_product_attention(q, k, v, config=ALWAYS)
        assert output.stride() == expected.stride()
        assert is_quantized(output, q, k, v)


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": torch.float64}, "dtype_unsupported"),
    "gradient": ({"requires_grad": True}, "requires_grad"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_falls_back_warns_or_raises(case: str) -> None:
    change, code = UNSUPPORTED[case]
    q, k, v = (torch.randn(1, 2, 8, 16, **change) for _ in "qkv")
    exact = F.scaled_dot_product_attention(q, k, v)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(scaled_dot_product_attention(q, k, v, config=ALWAYS), exact)
    for call in (scaled_dot_product_attention, attention_with_lse):
        with pytest.warns(UserWarning, match=rf"\({code}\).*Exact SDPA runs instead") as caught:
            call(q, k, v, config=ALWAYS.with_options(on_unsupported="warn"))
        assert caught[0].filename == __file__
        with pytest.raises(NotImplementedError, match=code):
            call(q, k, v, config=ALWAYS.with_options(on_unsupported="error"))


@pytest.mark.parametrize("empty", [False, True])
def test_a_choice_is_not_a_lack(empty: bool) -> None:
    """Where exact SDPA is the better way, "error" and "warn" have nothing to say."""
    q, k, v = qkv(n=0) if empty else qkv()
    for mode in ("warn", "error"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = scaled_dot_product_attention(q, k, v, config=SageConfig(on_unsupported=mode))
        assert torch.equal(output, F.scaled_dot_product_attention(q, k, v))


def test_contradictions_are_errors_whatever_the_config() -> None:
    """torch 2.13 on CPU reads past the end of K for a longer V."""
    q, k, v = qkv()
    longer = torch.randn(2, 4, 12, 16)
    for config in (None, ALWAYS, SageConfig(on_unsupported="warn")):
        with pytest.raises(ValueError, match="value must have the number of tokens of key"):
            scaled_dot_product_attention(q, k, longer, config=config)
        with pytest.raises(ValueError, match="attn_mask must be None"):
            scaled_dot_product_attention(q, k, v, torch.zeros(9, 11), 0.0, True, config=config)
        with pytest.raises(ValueError, match="key must have at least one head"):
            scaled_dot_product_attention(q, k[:, :0], v[:, :0], enable_gqa=True, config=config)
        with pytest.raises(ValueError, match="value must have the number of tokens of key"):
            attention_with_lse(q, k, longer, config=config)
    with pytest.raises(TypeError, match="key must be a Tensor, got NoneType"):
        scaled_dot_product_attention(q, None, v)


@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("config", ["auto", ALWAYS], ids=["exact", "quantized"])
def test_causal_with_scale_that_is_not_positive(scale: float, config: Any) -> None:
    """torch 2.13 on CPU returns NaN in every row that has a hidden key."""
    q, k, v = qkv()
    output = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, config=config)
    expected = exact_attention(q, k, v, causal="top_left", scale=scale).output.float()
    torch.testing.assert_close(output, expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("compiled", [False, True])
def test_training_has_sdpas_gradients(which: int, compiled: bool, recorder: Any) -> None:
    tensors = [x.requires_grad_(i == which) for i, x in enumerate(qkv())]

    def loss(*args: Tensor) -> Tensor:
        return scaled_dot_product_attention(*args, config=ALWAYS).square().sum()

    run = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
    (got,) = torch.autograd.grad(run(*tensors), tensors[which])
    exact = F.scaled_dot_product_attention(*tensors).square().sum()
    (expected,) = torch.autograd.grad(exact, tensors[which])
    torch.testing.assert_close(got, expected)
    with torch.no_grad():
        output = scaled_dot_product_attention(*tensors, config=ALWAYS)
        assert is_quantized(output, *tensors)


def test_dropout_runs_exact_sdpa() -> None:
    q, k, v = qkv()
    torch.manual_seed(1)
    output = scaled_dot_product_attention(q, k, v, dropout_p=0.5, config=ALWAYS)
    torch.manual_seed(1)
    assert torch.equal(output, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))


def test_subclasses_keep_their_own_attention() -> None:
    parts = [torch.randn(4, n, 16) for n in (5, 7)]
    q = torch.nested.nested_tensor(parts)
    output = scaled_dot_product_attention(q, q, q, config=ALWAYS)
    for part, got in zip(parts, output.unbind(), strict=True):
        torch.testing.assert_close(got, F.scaled_dot_product_attention(*[part[None]] * 3)[0])


def test_a_plan_depends_on_everything_that_can_change() -> None:
    """One call after another that differ in one property each: no plan may serve the other."""
    q, k, v = qkv(n=11)
    exact = F.scaled_dot_product_attention
    assert is_quantized(scaled_dot_product_attention(q, k, v, config=ALWAYS), q, k, v)
    assert torch.equal(scaled_dot_product_attention(q, k, v, config="auto"), exact(q, k, v))
    qd, kd, vd = q.double(), k.double(), v.double()
    assert torch.equal(scaled_dot_product_attention(qd, kd, vd, config=ALWAYS), exact(qd, kd, vd))
    scaled = scaled_dot_product_attention(q, k, v, scale=0.1, config=ALWAYS)
    assert torch.equal(scaled, ops.sdpa(q, k, v, scale=0.1))
    causal = scaled_dot_product_attention(q, k, v, is_causal=True, config=ALWAYS)
    assert torch.equal(causal, ops.sdpa(q, k, v, causal="top_left"))
    with torch.autocast("cpu", torch.bfloat16):
        cast = scaled_dot_product_attention(q, k.half(), v, config=ALWAYS)
    assert cast.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="same dtype"):
        scaled_dot_product_attention(q, k.half(), v, config=ALWAYS)
    needs = q.clone().requires_grad_()
    assert scaled_dot_product_attention(needs, k, v, config=ALWAYS).requires_grad
    mask = torch.zeros(11, 11, requires_grad=True)
    assert scaled_dot_product_attention(q, k, v, mask, config=ALWAYS).requires_grad
    assert not scaled_dot_product_attention(q, k, v, mask.detach(), config=ALWAYS).requires_grad


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MAX_PLANS", 3)
    monkeypatch.setattr(attention, "_PLANS", {})
    for n in range(1, 9):
        scaled_dot_product_attention(*qkv(n=n), config=ALWAYS)
        assert 1 <= len(attention._PLANS) <= 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_outputs_are_ordinary_tensors(mode: Any) -> None:
    """The remembered plan calls the op below autograd; its output must not show that."""
    q, k, v = qkv()
    for _ in range(2):
        with mode():
            output = scaled_dot_product_attention(q, k, v, config=ALWAYS)
        assert output.is_inference() == (mode is torch.inference_mode)
        assert not output.requires_grad
    outside = scaled_dot_product_attention(q, k, v, config=ALWAYS)
    weight = torch.ones((), requires_grad=True)
    (outside * weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, outside.sum())


def test_vmap_and_functional_grad() -> None:
    q, k, v = qkv()
    queries = torch.stack([q, -q])
    mapped = torch.vmap(lambda x: scaled_dot_product_attention(x, k, v, config=ALWAYS))(queries)
    assert torch.equal(mapped[1], scaled_dot_product_attention(-q, k, v, config=ALWAYS))

    def loss(call: Any, x: Tensor) -> Tensor:
        return call(x, k, v).sum()

    got = torch.func.grad(lambda x: loss(scaled_dot_product_attention, x))(q)
    torch.testing.assert_close(
        got, torch.func.grad(lambda x: loss(F.scaled_dot_product_attention, x))(q)
    )


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("masked", [False, True])
def test_lse(causal: str, masked: bool) -> None:
    q, k, v = qkv(hkv=2)
    mask = torch.randn(9, 11) if masked and causal == "none" else None
    result = attention_with_lse(q, k, v, mask, causal=causal, enable_gqa=True, config=ALWAYS)
    expected = ops.sdpa_with_lse(q, k, v, mask, causal)
    assert torch.equal(result.output, expected[0])
    assert torch.equal(result.lse, expected[1])
    exact = exact_attention(q, k, v, mask, causal)
    # INT8 rounding alone leaves up to 0.02 (algorithm.md 2.8).
    torch.testing.assert_close(result.lse, exact.lse.float(), atol=0.02, rtol=0)
    fallback = attention_with_lse(
        q.requires_grad_(), k, v, mask, causal=causal, enable_gqa=True, config=ALWAYS
    )
    torch.testing.assert_close(fallback.output, exact.output.float())
    torch.testing.assert_close(fallback.lse, exact.lse.float())
    assert fallback.lse.requires_grad


def test_lse_ignores_the_crossover_and_refuses_other_ranks() -> None:
    q, k, v = qkv()
    assert is_quantized(attention_with_lse(q, k, v).output, q, k, v)
    with pytest.raises(ValueError, match="query must be 4-D"):
        attention_with_lse(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="causal must be one of"):
        attention_with_lse(q, k, v, causal="lower")


def sage_and_sdpa(recorder: Any) -> tuple[int, int]:
    exact = torch.ops.aten.scaled_dot_product_attention.default
    return len(recorder.nodes(ops.sdpa)), len(recorder.nodes(exact))


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph(dynamic: bool, recorder: Any) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        x = scaled_dot_product_attention(q, k, v, mask, config=ALWAYS)
        x = scaled_dot_product_attention(x, k, v, is_causal=True, scale=0.2, config=ALWAYS)
        return scaled_dot_product_attention(x, k, v, dropout_p=0.0, config="sage2_4b")

    compiled = torch.compile(run, backend=recorder, fullgraph=True, dynamic=dynamic)
    lengths = (9, 14, 23) if dynamic else (9,)
    for n in lengths:
        q, k, v = qkv(n=n)
        mask = torch.rand(n, 11) > 0.2
        assert torch.equal(compiled(q, k, v, mask), run(q, k, v, mask))
    assert sage_and_sdpa(recorder) == (2, 1)
    assert len(recorder.graphs) == 1


def test_crossover_is_guarded_under_dynamo(recorder: Any) -> None:
    """A length on the other side of the crossover compiles a graph of its own, and no third."""
    run = torch.compile(
        lambda q, k, v: scaled_dot_product_attention(q, k, v),
        backend=recorder,
        fullgraph=True,
        dynamic=True,
    )
    for n in (16, 17, 2048, 2050, 18):
        run(*[torch.randn(1, 8, n, 64)] * 3)
    assert sage_and_sdpa(recorder) == (1, 1)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("config", ["auto", ALWAYS], ids=["measured", "always"])
def test_export_serves_every_length(strict: bool, config: Any) -> None:
    if strict and config == "auto" and not hasattr(symbolic_shapes, "optimization_hint"):
        pytest.xfail("before torch 2.13 strict export guards on a size whose hint is read")

    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True, config=config)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    example = tuple(torch.randn(1, 8, 1024, 64) for _ in "qkv")
    program = torch.export.export(
        Model(), example, dynamic_shapes=({2: tokens},) * 3, strict=strict
    )
    targets = [node.target for node in program.graph.nodes]
    assert ops.sdpa in targets
    for n in (3, 65):
        q, k, v = (torch.randn(1, 8, n, 64) for _ in "qkv")
        got = program.module()(q, k, v)
        assert torch.equal(got, ops.sdpa(q, k, v, causal="top_left"))


def test_fallback_obeys_the_backend_that_the_user_chose() -> None:
    q, k, v = qkv()
    with sdpa_kernel(SDPBackend.MATH):
        math = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        assert torch.equal(scaled_dot_product_attention(q, k, v, scale=0.3), math)
