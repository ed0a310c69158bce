"""Every op keeps torch's rules: schema, fake, autograd, autocast, vmap, FLOPs, error messages."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils.flop_counter import FlopCounterMode

from tests.varlen import pack
from torch_sage import _extension, ops
from torch_sage.ops.schemas import DEFINITIONS, PREPARED
from torch_sage.recipes import SUPPORT

needs_extension = pytest.mark.skipif(not _extension.is_available(), reason="extension not built")

GQA = {"hq": 4, "hkv": 2}
GRANULARITIES = SUPPORT["cpu"].granularity


def qkv(
    b: int = 2, hq: int = 4, hkv: int = 2, n: int = 9, m: int = 11, d: int = 16, dv: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value."""
    return torch.randn(b, hq, n, d), torch.randn(b, hkv, m, d), torch.randn(b, hkv, m, dv)


def quantized(granularity: str = "token", **shape: int) -> tuple[Tensor, ...]:
    """Return the arguments of ``attention`` up to the mask."""
    q, k, v = qkv(**shape)
    return (q, *ops.quantize_key(k, granularity=granularity), *ops.quantize_value(v))


def rotary(
    norm: str = "", n: int = 9, d: int = 64, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, ...]:
    """Return the arguments of ``rotary_sdpa`` up to the mask; Q and K have other sizes."""
    q, k, v = (x.to(dtype) for x in qkv(n=n, d=d))
    tables = [torch.randn(batch, x.shape[2], d) for x, batch in ((q, 1), (k, 2)) for _ in "cs"]
    weights = [torch.rand(h, d).to(dtype) if norm else None for h in (4, 1)]
    rstd = (torch.rand(2, 1, n), torch.rand(2, 2, 11)) if norm == "rstd" else (None, None)
    eps = (1e-6, 1e-5) if norm == "eps" else (None, None)
    of_query, of_key = zip(rstd, weights, eps, strict=True)
    return (q, k, v, *tables[:2], *of_query, *tables[2:], *of_key)


def samples() -> list[Any]:
    """Calls of every op on CPU: each granularity, masks, causality, layouts, empty tensors."""
    q, k, v = qkv()
    mask = torch.rand(2, 1, 9, 11) > 0.3
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for granularity in GRANULARITIES:
        calls.append(("quantize_query", (q,), {"granularity": granularity}))
        calls.append(("quantize_key", (k,), {"granularity": granularity}))
        calls.append(("attention", quantized(granularity), {"granularity": granularity}))
        calls.append(("sdpa", (q, k, v), {"granularity": granularity}))
    calls += [
        ("quantize_query", (q.transpose(1, 2).bfloat16(),), {}),
        ("quantize_key", (k, k.mean(2)), {}),
        ("quantize_key", (k.half(),), {"smooth": False}),
        ("quantize_value", (v,), {}),
        ("quantize_value", (v, v.mean(2)), {"smooth": True}),
        ("quantize_value", (v.bfloat16().transpose(2, 3),), {"smooth": True}),
        ("attention_with_lse", (*quantized(), mask), {"output_order": "bshd"}),
        ("sdpa", (q, k, v, mask, "none", 0.3), {"output_order": "bshd"}),
        ("sdpa", (q, k, v, torch.randn(9, 11)), {"smooth": "kv"}),
        ("sdpa", (q, k, v, None, "top_left"), {}),
        ("sdpa", (q.half(), k.half(), v.half(), None, "bottom_right"), {}),
        ("sdpa_with_lse", (q, k, v), {}),
        ("sdpa_with_lse", (q, k, v, mask), {"output_order": "bshd"}),
        ("sdpa", (q.transpose(1, 2).contiguous().transpose(1, 2), k, v), {"output_order": "bshd"}),
        ("sdpa", (q, k[:, :, :0], v[:, :, :0]), {}),
        ("sdpa_with_lse", (q[:, :, :0], k, v), {"output_order": "bshd"}),
        ("sdpa", (q[:0], k[:0], v[:0]), {}),
        ("varlen_sdpa", pack([9, 4], [11, 0], head_dim=16, head_dim_v=8), {}),
        ("varlen_sdpa", (*pack([9, 4], [3, 7], layout="htd"), "top_left", 0.3), {"smooth": "k"}),
        ("varlen_sdpa_with_lse", (*pack([0, 5], [2, 7]), "bottom_right"), {}),
        ("varlen_sdpa_with_lse", pack([], []), {}),
        ("rotary_sdpa", rotary(), {}),
        ("rotary_sdpa", rotary(norm="eps"), {"pairing": "neighbours", "smooth": "k"}),
        ("rotary_sdpa", rotary(norm="rstd", dtype=torch.half), {"output_order": "bshd"}),
        ("rotary_sdpa", (*rotary(n=0), None, "top_left"), {}),
    ]
    return [
        pytest.param(name, args, kwargs, id=f"{name}-{i}")
        for i, (name, args, kwargs) in enumerate(calls)
    ]


CALLS = samples() if _extension.is_available() else []


@needs_extension
@pytest.mark.parametrize(("name", "args", "kwargs"), CALLS)
def test_opcheck(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Schema, autograd registration, fake tensors, AOT dispatch with static and dynamic shapes."""
    torch.library.opcheck(getattr(ops, name), args, kwargs)
    torch.library.opcheck(getattr(ops, name), args, kwargs, test_utils="test_aot_dispatch_static")


@needs_extension
@pytest.mark.parametrize(("name", "args", "kwargs"), CALLS)
def test_fake_strides_are_the_real_ones(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    real = getattr(ops, name)(*args, **kwargs)
    meta_args = [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
        if isinstance(a, Tensor)
        else a
        for a in args
    ]
    fake = getattr(ops, name)(*meta_args, **kwargs)
    for r, f in zip(
        (real,) if isinstance(real, Tensor) else real,
        (fake,) if isinstance(fake, Tensor) else fake,
        strict=True,
    ):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def test_every_op_has_a_sample() -> None:
    if _extension.is_available():
        assert {call.values[0] for call in CALLS} == set(DEFINITIONS) - set(PREPARED)


def q_(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(*shape, **kwargs)


S = (2, 4, 9, 16)
BAD_SDPA: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "rank": ((q_(4, 9, 16), q_(*S), q_(*S)), {}, "query must be 4-D"),
    "dtype": (
        (q_(*S, dtype=torch.float64),) * 3,
        {},
        "query must have dtype float32 or bfloat16 or float16, got float64",
    ),
    "integers": ((q_(*S, dtype=torch.int8),) * 3, {}, "query must have dtype"),
    "key dtype": ((q_(*S), q_(*S).half(), q_(*S)), {}, "key must have the dtype of query"),
    "value dtype": ((q_(*S), q_(*S), q_(*S).half()), {}, "value must have the dtype of query"),
    "batch": (
        (q_(*S), q_(1, 4, 9, 16), q_(2, 4, 9, 16)),
        {},
        "key must have the batch size of query, 2, got 1",
    ),
    "value batch": (
        (q_(*S), q_(*S), q_(3, 4, 9, 16)),
        {},
        "value must have the batch size of query, 2, got 3",
    ),
    "heads": (
        (q_(*S), q_(2, 3, 9, 16), q_(2, 3, 9, 16)),
        {},
        "key must have a number of heads that divides query's 4, got 3",
    ),
    "no heads": (
        (q_(*S), q_(2, 0, 9, 16), q_(2, 0, 9, 16)),
        {},
        "key must have at least one head for 4 query heads, got 0",
    ),
    "value heads": (
        (q_(*S), q_(*S), q_(2, 2, 9, 16)),
        {},
        "value must have the number of heads of key, 4, got 2",
    ),
    "value longer": (
        (q_(*S), q_(*S), q_(2, 4, 10, 16)),
        {},
        "value must have the number of tokens of key, 9, got 10",
    ),
    "head_dim": (
        (q_(*S), q_(2, 4, 9, 8), q_(*S)),
        {},
        "key must have the head_dim of query, 16, got 8",
    ),
    "wide": ((q_(1, 1, 2, 257),) * 3, {}, "query must have a head_dim between 1 and 256, got 257"),
    "no channels": ((q_(1, 1, 2, 0),) * 3, {}, "must have a head_dim between 1 and 256, got 0"),
    "wide value": (
        (q_(1, 1, 2, 8), q_(1, 1, 2, 8), q_(1, 1, 2, 300)),
        {},
        "value must have a head_dim between 1 and 256, got 300",
    ),
    "mask shape": (
        (q_(*S), q_(*S), q_(*S), q_(3, 9)),
        {},
        "attn_mask must broadcast to [2, 4, 9, 9], got [3, 9]",
    ),
    "mask rank": ((q_(*S), q_(*S), q_(*S), q_(1, 1, 1, 9, 9)), {}, "attn_mask must broadcast to"),
    "mask dtype": (
        (q_(*S), q_(*S), q_(*S), q_(9, 9, dtype=torch.int32)),
        {},
        "attn_mask must have dtype bool or float32 or bfloat16 or float16, got int32",
    ),
    "mask and causal": (
        (q_(*S), q_(*S), q_(*S), q_(9, 9), "top_left"),
        {},
        "attn_mask must be None when causal is 'top_left', got",
    ),
    "causal": (
        (q_(*S), q_(*S), q_(*S), None, "lower"),
        {},
        "causal must be one of ['none', 'top_left', 'bottom_right']",
    ),
    "scale": ((q_(*S), q_(*S), q_(*S), None, "none", float("nan")), {}, "scale must be finite"),
    "order": (
        (q_(*S),) * 3,
        {"output_order": "sbhd"},
        "output_order must be one of ['bhsd', 'bshd']",
    ),
    "qk": ((q_(*S),) * 3, {"qk": "int4"}, "qk must be one of ['int8'] on cpu, got 'int4'"),
    "granularity": ((q_(*S),) * 3, {"granularity": "row"}, "granularity must be one of ['token'"),
    "pv": ((q_(*S),) * 3, {"pv": "fp16"}, "pv must be one of ['bf16'] on cpu, got 'fp16'"),
    "smooth": ((q_(*S),) * 3, {"smooth": "vk"}, "smooth must be one of ['', 'k', 'v', 'kv'"),
    "exponential": (
        (q_(*S),) * 3,
        {"exponential": "mixed"},
        "exponential must be one of ['exact'] on cpu, got 'mixed'",
    ),
}


@pytest.mark.parametrize("where", ["fake", "real"])
@pytest.mark.parametrize("case", BAD_SDPA)
def test_bad_arguments_of_the_whole_op(case: str, where: str) -> None:
    """The fake and the kernel refuse the same arguments in the same words."""
    args, kwargs, message = BAD_SDPA[case]
    expect_error(ops.sdpa, where, args, kwargs, message)


def bad_quantized() -> dict[str, tuple[str, int, Any, str]]:
    """Return for each case: what replaces which argument of ``attention``, and the message."""
    return {
        "key_codes dtype": ("attention", 1, q_(2, 2, 11, 16), "key_codes must have dtype int8"),
        "key_scales": ("attention", 2, q_(2, 2, 10), "key_scales must have shape [2, 2, 11]"),
        "key_mean": ("attention", 3, q_(2, 2, 15), "key_mean must have shape [2, 2, 16]"),
        "key_mean dtype": ("attention", 3, q_(2, 2, 16).half(), "key_mean must have dtype float32"),
        "value_codes dtype": ("attention", 4, q_(2, 2, 11, 8), "value_codes must have dtype bf"),
        "value_scales": ("attention", 5, q_(2, 2, 9), "value_scales must have shape [2, 2, 8]"),
        "value_mean": ("attention", 6, q_(2, 1, 8), "value_mean must have shape [2, 2, 8]"),
        "query": ("attention", 0, q_(9, 16), "query must be 4-D"),
    }


@needs_extension
@pytest.mark.parametrize("where", ["fake", "real"])
@pytest.mark.parametrize("case", bad_quantized())
def test_bad_quantized_operands(case: str, where: str) -> None:
    name, position, replacement, message = bad_quantized()[case]
    args = list(quantized())
    args[position] = replacement
    for op in (ops.attention, ops.attention_with_lse):
        expect_error(op, where, tuple(args), {}, message.replace("dtype bf", "dtype bfloat16"))
    assert name == "attention"


BAD_QUANTIZERS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], str]] = {
    "rank": ("quantize_query", (q_(4, 9, 16),), {}, "query must be 4-D"),
    "dtype": ("quantize_key", (q_(*S, dtype=torch.int64),), {}, "key must have dtype float32"),
    "head_dim": ("quantize_value", (q_(1, 1, 1, 257),), {}, "value must have a head_dim between"),
    "block": ("quantize_query", (q_(*S),), {"block": 0}, "block must be"),
    "warp": ("quantize_query", (q_(*S),), {"warp": 48}, "warp must be"),
    "key block": ("quantize_key", (q_(*S),), {"block": -8}, "block must be"),
    "mean shape": ("quantize_key", (q_(*S), q_(2, 4, 9)), {}, "mean must have shape [2, 4, 16]"),
    "mean dtype": ("quantize_key", (q_(*S), q_(2, 4, 16).half()), {}, "mean must have dtype float"),
    "mean unused": (
        "quantize_key",
        (q_(*S), q_(2, 4, 16)),
        {"smooth": False},
        "mean must be None when smooth is False",
    ),
    "qk": ("quantize_key", (q_(*S),), {"qk": "fp8"}, "qk must be one of ['int8'] on cpu"),
    "pv": ("quantize_value", (q_(*S),), {"pv": "e4m3"}, "pv must be one of ['bf16'] on cpu"),
}


@pytest.mark.parametrize("where", ["fake", "real"])
@pytest.mark.parametrize("case", BAD_QUANTIZERS)
def test_bad_arguments_of_quantizers(case: str, where: str) -> None:
    name, args, kwargs, message = BAD_QUANTIZERS[case]
    expect_error(getattr(ops, name), where, args, kwargs, message)


def expect_error(
    op: Any, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], message: str
) -> None:
    """Check that a call on fake or on real CPU tensors raises ValueError with ``message``."""
    if where == "real":
        if not _extension.is_available():
            pytest.skip("extension not built")
        with pytest.raises(ValueError) as caught:
            op(*args, **kwargs)
    else:
        mode = torch._subclasses.FakeTensorMode()
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        with mode, pytest.raises(ValueError) as caught:
            op(*fakes, **kwargs)
    assert message in str(caught.value)


def test_fake_lists_every_problem() -> None:
    meta = [x.to("meta") for x in (q_(*S), q_(1, 4, 9, 8), q_(2, 4, 7, 16))]
    with pytest.raises(ValueError, match=r"key must have the batch size.*; value must have the nu"):
        ops.sdpa(*meta)


def symbolic(tensors: tuple[Tensor, ...]) -> tuple[ShapeEnv, list[Tensor]]:
    """Return fakes of ``tensors`` with every size symbolic and independent."""
    env = ShapeEnv()
    mode = torch._subclasses.FakeTensorMode(shape_env=env)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 4)
    return env, [mode.from_tensor(t, symbolic_context=context) for t in tensors]


@pytest.mark.parametrize("name", ["sdpa", "sdpa_with_lse"])
def test_fake_adds_no_guard(name: str) -> None:
    """Sizes that are not known to be wrong pass; the kernel checks the real ones."""
    env, fakes = symbolic(qkv())
    before = len(env.guards)
    getattr(ops, name)(*fakes)
    assert len(env.guards) == before


def test_fakes_of_quantizers_add_no_guard() -> None:
    env, (q, k, v) = symbolic(qkv())
    before = len(env.guards)
    for granularity in GRANULARITIES:
        ops.quantize_query(q, granularity=granularity)
        keys = ops.quantize_key(k, granularity=granularity)
        ops.attention(q, *keys, *ops.quantize_value(v), granularity=granularity)
    assert len(env.guards) == before


TENSORS = ["query", "key", "value"]


@needs_extension
@pytest.mark.parametrize("position", range(3), ids=TENSORS)
def test_wanted_gradient_is_refused_by_name(position: int) -> None:
    args = list(qkv())
    args[position].requires_grad_()
    with pytest.raises(RuntimeError, match=f"{TENSORS[position]} must not require grad"):
        ops.sdpa(*args)
    with torch.no_grad():
        assert not ops.sdpa(*args).requires_grad
    with torch.inference_mode():
        ops.sdpa(*args)


@needs_extension
def test_gradient_of_the_mask_is_refused() -> None:
    mask = torch.zeros(9, 11, requires_grad=True)
    with pytest.raises(RuntimeError, match="attn_mask must not require grad"):
        ops.sdpa(*qkv(), attn_mask=mask)


@needs_extension
def test_forward_mode_gradient_is_refused() -> None:
    """A tangent would be dropped without a word."""
    q, k, v = qkv()
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="query must not require grad"):
            ops.sdpa(forward_ad.make_dual(q, q), k, v)
        ops.sdpa(q, k, v)  # no tangent, no error


@needs_extension
def test_gradient_is_refused_under_compile(recorder: Any) -> None:
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match="key must not require grad"):
        torch.compile(ops.sdpa, backend="aot_eager", fullgraph=True)(q, k.requires_grad_(), v)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_sdpa(dtype: torch.dtype, compiled: bool, recorder: Any) -> None:
    q, k, v = qkv(hkv=4)
    mask = torch.randn(9, 11)
    args = (q, k.bfloat16(), v, mask)

    def run(op: Any) -> Tensor:
        with torch.autocast("cpu", dtype):
            return op(*args)

    expected = ops.sdpa(q.to(dtype), args[1].to(dtype), v.to(dtype), mask.to(dtype))
    run_ = torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run
    got = run_(ops.sdpa)
    assert got.dtype == run(F.scaled_dot_product_attention).dtype == dtype
    assert torch.equal(got, expected)
    with torch.autocast("cpu", dtype, enabled=False):
        assert ops.sdpa(q, k, v).dtype == torch.float32


@needs_extension
def test_autocast_leaves_quantized_operands() -> None:
    args = quantized()
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.attention(*args)
    assert torch.equal(output, ops.attention(args[0].bfloat16(), *args[1:]))


@needs_extension
@pytest.mark.parametrize("dims", [(0, 0, 0), (1, None, 2), (None, 0, None)])
def test_vmap(dims: tuple[int | None, ...]) -> None:
    single = qkv()
    args = tuple(
        x if dim is None else torch.stack([x, x + 1, x * 2], dim)
        for x, dim in zip(single, dims, strict=True)
    )
    mapped = torch.vmap(ops.sdpa, in_dims=dims)(*args)
    for i in range(3):
        one = [a if dim is None else a.select(dim, i) for a, dim in zip(args, dims, strict=True)]
        assert torch.equal(mapped[i], ops.sdpa(*one))


@needs_extension
@pytest.mark.parametrize("shape", [(9, 11), (1, 1, 9, 11), (2, 4, 9, 11), (4, 1, 11)])
@pytest.mark.parametrize("mapped_mask", [False, True])
def test_vmap_with_mask_and_lse(shape: tuple[int, ...], mapped_mask: bool) -> None:
    q, k, v = qkv()
    queries = torch.stack([q, -q])
    mask = torch.rand(2, *shape) > 0.3 if mapped_mask else torch.rand(shape) > 0.3
    dims = (0, None, None, 0 if mapped_mask else None)
    output, lse = torch.vmap(ops.sdpa_with_lse, in_dims=dims)(queries, k, v, mask)
    for i in range(2):
        expected = ops.sdpa_with_lse(queries[i], k, v, mask[i] if mapped_mask else mask)
        assert torch.equal(output[i], expected[0])
        assert torch.equal(lse[i], expected[1])


@needs_extension
def test_vmap_of_quantizers() -> None:
    _, k, v = qkv()
    codes, scales, mean = torch.vmap(ops.quantize_key)(torch.stack([k, -k]))
    for mapped, expected in zip((codes, scales, mean), ops.quantize_key(-k), strict=True):
        assert torch.equal(mapped[1], expected)
    values = torch.stack([v, -v], 3)
    means = torch.vmap(lambda x: ops.quantize_value(x, smooth=True)[2], in_dims=3)(values)
    assert torch.equal(means[1], ops.quantize_value(-v, smooth=True)[2])


@needs_extension
@pytest.mark.parametrize("first", ["torch_sage", "torch.utils.flop_counter"])
def test_flop_formulas_are_there_in_either_order_of_imports(first: str) -> None:
    """torch's counter imports triton, so torch_sage must not import it."""
    code = (
        f"import importlib, sys\nimportlib.import_module({first!r})\n"
        "import torch, torch_sage\n"
        f"assert ('torch.utils.flop_counter' in sys.modules) == ({first!r} != 'torch_sage')\n"
        "from torch.utils import flop_counter\n"
        "assert torch.ops.torch_sage.sdpa in flop_counter.flop_registry\n"
        "assert type(flop_counter.__spec__.loader).__name__ == 'SourceFileLoader'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("causal", ["none", "top_left"])
def test_flops_are_counted_as_for_sdpa(causal: str) -> None:
    """torch's counter leaves out the CPU's flash kernel, so its math backend is the yardstick."""
    q, k, v = qkv(hq=2, hkv=2)
    with (
        FlopCounterMode(display=False) as expected,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        F.scaled_dot_product_attention(q, k, v, is_causal=causal != "none")
    for op in (ops.sdpa, ops.sdpa_with_lse):
        with FlopCounterMode(display=False) as counted:
            op(q, k, v, causal=causal)
        assert counted.get_total_flops() == expected.get_total_flops() == 2 * 4 * 9 * 11 * (16 + 8)
    with FlopCounterMode(display=False) as counted:
        ops.attention(*quantized(hq=2))
    assert counted.get_total_flops() == expected.get_total_flops()


@needs_extension
def test_exact_ops_are_torchs_own() -> None:
    q, k, v = qkv()
    args, kwargs = (q, k, v, None, 0.0, True), {"scale": 0.5, "enable_gqa": True}
    expected = F.scaled_dot_product_attention(*args, **kwargs)
    assert torch.equal(ops.exact_sdpa(*args, **kwargs), expected)
    torch.library.opcheck(ops.exact_sdpa, args, kwargs)
    torch.library.opcheck(ops.exact_softmax, (q, -2))
    assert torch.equal(ops.exact_softmax(q, -2, torch.float64), q.softmax(-2, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.exact_softmax(q.bfloat16(), -1).dtype == q.bfloat16().softmax(-1).dtype
        assert ops.exact_sdpa(q, k, v, enable_gqa=True).dtype == torch.bfloat16
    mapped = torch.vmap(ops.exact_softmax, in_dims=(0, None))(q, -1)
    assert torch.equal(mapped, q.softmax(-1))
