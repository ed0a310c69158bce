"""Hopper's kernels inside torch: streams, CUDA graphs, compilation, transforms, packages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import torch_sage
from tests.gpu.sm90 import EXPONENTIALS, OPS, RECIPE
from tests.numerics import relative_l1, same_bits
from torch_sage import SageConfig
from torch_sage.recipes import PREPARED, SUPPORT

ALWAYS = SageConfig(dispatch="always", on_unsupported="error")
DEFAULT: dict[str, Any] = SUPPORT[PREPARED].default.op_kwargs()
BOUND = 0.045  # relative L1 error of the recipe on N(0, 1); few tokens have more of it than many


def qkv(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, *shape, dtype=dtype, device="cuda").unbind()
    return q, k, v


def test_opcheck() -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

    def check(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        torch.library.opcheck(op.default, args, kwargs, test_utils=tests)

    q, k, v = qkv(1, 2, 70, 64)
    mask = torch.ones(70, 70, dtype=torch.bool, device="cuda")
    check(OPS.sdpa, (q, k, v), DEFAULT)
    check(OPS.sdpa, (q, k, v, mask), {**DEFAULT, "output_order": "bshd"})
    check(OPS.sdpa_with_lse, (q, k, v, None, "top_left"), DEFAULT)
    check(OPS.prepare_kv, (k, v), {})
    prepared = (q, *OPS.prepare_kv(k, v), 70, 64)
    check(OPS.attention_prepared, prepared, {})
    check(OPS.attention_prepared_with_lse, (*prepared, mask), {})


@pytest.mark.parametrize("exponential", EXPONENTIALS)
@pytest.mark.parametrize("causal", ["none", "top_left"])
def test_two_runs_are_the_same_bits_on_any_stream(causal: str, exponential: str) -> None:
    """Enough work that blocks take it in another order every time."""
    recipe = {**RECIPE, "smooth": "kv", "exponential": exponential}
    q, k, v = qkv(2, 64, 1500, 128)
    first = OPS.sdpa(q, k, v, None, causal, **recipe)
    for _ in range(5):
        assert same_bits(OPS.sdpa(q, k, v, None, causal, **recipe), first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late_q, late_k, late_v = torch.zeros(3, *q.shape, dtype=q.dtype, device="cuda")
        torch.cuda._sleep(50_000_000)  # whatever ran on another stream would read zeros
        for late, x in ((late_q, q), (late_k, k), (late_v, v)):
            late.copy_(x)
        second = OPS.sdpa(late_q, late_k, late_v, None, causal, **recipe)
    stream.synchronize()
    assert same_bits(second, first)


def test_calls_on_two_streams_do_not_meet() -> None:
    """Work counters and workspaces belong to a call."""
    inputs = [qkv(1, 16, 1000, 64) for _ in range(2)]
    expected = [OPS.sdpa(*x, None, "top_left", **DEFAULT) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    found: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(OPS.sdpa(*inputs[i], None, "top_left", **DEFAULT))
    torch.cuda.synchronize()
    for outputs, right in zip(found, expected, strict=True):
        assert all(same_bits(output, right) for output in outputs)


def whole(q: Tensor, k: Tensor, v: Tensor, causal: str) -> tuple[Tensor, ...]:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device="cuda").tril()
    plain = OPS.sdpa(q, k, v, None, causal, **DEFAULT)
    return plain, OPS.sdpa(q, k, v, mask, **DEFAULT), *OPS.sdpa_with_lse(q, k, v, **DEFAULT)


def in_parts(q: Tensor, k: Tensor, v: Tensor, causal: str) -> tuple[Tensor, ...]:
    prepared = OPS.prepare_kv(k, v)
    return (OPS.attention_prepared(q, *prepared, k.shape[2], v.shape[3], None, causal),)


@pytest.mark.parametrize("run", [whole, in_parts])
@pytest.mark.parametrize("causal", ["none", "top_left"])
def test_cuda_graph_replays_new_inputs(run: Any, causal: str) -> None:
    q, k, v = qkv(2, 8, 500, 64)
    run(q, k, v, causal)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(q, k, v, causal)
    graph.replay()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        graph.replay()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    for _ in range(3):
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        for found, eager in zip(captured, run(q, k, v, causal), strict=True):
            assert same_bits(found, eager)


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_models_use_the_op(mode: str | None, dynamic: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2) * 2

    torch._dynamo.reset()
    counters["inductor"].clear()
    fast = torch.compile(attend, dynamic=dynamic, options=torch_sage.options(ALWAYS, mode=mode))
    with torch.no_grad():
        for n in (256, 300):
            inputs = qkv(1, 4, n, 64)
            for _ in range(3):
                actual = fast(*inputs).clone()
            eager = OPS.sdpa(*inputs, None, "top_left", **DEFAULT).transpose(1, 2) * 2
            assert same_bits(actual, eager)
            assert relative_l1(actual, attend(*inputs)) < BOUND
    report = torch_sage.report()
    assert report.rewritten > 0 and report.skipped == 0
    assert SUPPORT[PREPARED].default.name in str(report)


def test_compiled_models_prepare_and_attend() -> None:
    """Prepared operands and their lengths pass through a graph without a break."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch_sage.attention_prepared(q, torch_sage.prepare_kv(k, v)) * 2

    torch._dynamo.reset()
    fast = torch.compile(attend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n, m in ((256, 1100), (300, 2100)):
            (q, _, _), (_, k, v) = qkv(1, 4, n, 64), qkv(1, 4, m, 64)
            assert same_bits(fast(q, k, v), attend(q, k, v))


def test_eager_api_takes_the_recipe() -> None:
    q, k, v = qkv(1, 8, 2048, 128)
    assert torch_sage.why_not(q, k, v, config=ALWAYS) == ()
    found = torch_sage.scaled_dot_product_attention(q, k, v, config=ALWAYS)
    assert same_bits(found, OPS.sdpa(q, k, v, **DEFAULT))
    exact = SageConfig(dispatch="always", exponential="exact", smooth_v=False)
    found = torch_sage.scaled_dot_product_attention(q, k, v, is_causal=True, config=exact)
    recipe = {**DEFAULT, "exponential": "exact", "smooth": "k"}
    assert same_bits(found, OPS.sdpa(q, k, v, None, "top_left", **recipe))


def test_other_recipes_run_by_triton() -> None:
    q, k, v = qkv(1, 4, 300, 64)
    half = SageConfig(dispatch="always", on_unsupported="error", pv="half")
    found = torch_sage.scaled_dot_product_attention(q, k, v, config=half)
    assert relative_l1(found, F.scaled_dot_product_attention(q, k, v)) < 0.02
    wide = qkv(1, 4, 300, 192)
    found = torch_sage.scaled_dot_product_attention(*wide, config=ALWAYS)
    assert relative_l1(found, F.scaled_dot_product_attention(*wide)) < 0.02


def test_autocast() -> None:
    q, k, v = qkv(1, 2, 200, 64, dtype=torch.float32)
    with torch.autocast("cuda", torch.float16):
        output = torch_sage.scaled_dot_product_attention(q, k, v, config=ALWAYS)
        prepared = torch_sage.prepare_kv(k, v)
        again = torch_sage.attention_prepared(q, prepared)
    halves = (x.half() for x in (q, k, v))
    assert output.dtype == torch.float16
    assert same_bits(output, OPS.sdpa(*halves, **DEFAULT))
    assert same_bits(again, output)


def test_vmap() -> None:
    q, k, v = qkv(3, 2, 4, 130, 64)
    mask = torch.rand(3, 130, 130, device="cuda") > 0.5

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        output: Tensor = OPS.sdpa(q, k, v, mask, **DEFAULT)
        return output

    def prepare_and_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = OPS.attention_prepared(q, *OPS.prepare_kv(k, v), 130, 64)
        return output

    alone = torch.stack([attend(*x) for x in zip(q, k, v, strict=True)])
    masked = torch.stack([attend(*x) for x in zip(q, k, v, mask, strict=True)])
    assert same_bits(torch.vmap(attend)(q, k, v), alone)
    assert same_bits(torch.vmap(attend)(q, k, v, mask), masked)
    assert same_bits(torch.vmap(prepare_and_attend)(q, k, v), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["bhsd", "bshd"])
def test_memory_order_of_the_output(order: str, dtype: torch.dtype) -> None:
    q, k, v = qkv(2, 3, 77, 40, dtype=dtype)
    output, lse = OPS.sdpa_with_lse(q, k, v[..., :33], **DEFAULT, output_order=order)
    assert (output.transpose(1, 2) if order == "bshd" else output).is_contiguous()
    assert output.shape == (2, 3, 77, 33) and output.dtype == dtype
    assert lse.is_contiguous() and lse.dtype == torch.float32
    assert same_bits(output, OPS.sdpa_with_lse(q, k, v[..., :33], **DEFAULT)[0])
