"""Hopper's kernels inside torch: streams, CUDA graphs, compilation, transforms, packages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import torch_sage
from tests.gpu.shared import (
    OPS,
    assert_graph_replays_new_inputs,
    assert_memory_order,
    assert_same_bits_on_any_stream,
    assert_streams_do_not_meet,
    opcheck,
    qkv,
)
from tests.gpu.sm90 import EXPONENTIALS, RECIPE
from tests.numerics import relative_l1, same_bits
from torch_sage import SageConfig
from torch_sage.recipes import PREPARED, SUPPORT

ALWAYS = SageConfig(dispatch="always", on_unsupported="error")
DEFAULT: dict[str, Any] = SUPPORT[PREPARED].default.op_kwargs()
BOUND = 0.045  # relative L1 error of the recipe on N(0, 1); few tokens have more of it than many


def test_opcheck() -> None:
    q, k, v = qkv(1, 2, 70, 64)
    mask = torch.ones(70, 70, dtype=torch.bool, device="cuda")
    opcheck(OPS.sdpa, (q, k, v), DEFAULT)
    opcheck(OPS.sdpa, (q, k, v, mask), {**DEFAULT, "output_order": "bshd"})
    opcheck(OPS.sdpa_with_lse, (q, k, v, None, "top_left"), DEFAULT)
    opcheck(OPS.prepare_kv, (k, v), {})
    prepared = (q, *OPS.prepare_kv(k, v), 70, 64)
    opcheck(OPS.attention_prepared, prepared, {})
    opcheck(OPS.attention_prepared_with_lse, (*prepared, mask), {})


@pytest.mark.parametrize("exponential", EXPONENTIALS)
@pytest.mark.parametrize("causal", ["none", "top_left"])
def test_two_runs_are_the_same_bits_on_any_stream(causal: str, exponential: str) -> None:
    recipe = {**RECIPE, "smooth": "kv", "exponential": exponential}
    assert_same_bits_on_any_stream(recipe, causal, head_dim=128)


def test_calls_on_two_streams_do_not_meet() -> None:
    assert_streams_do_not_meet(DEFAULT)


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
    assert_graph_replays_new_inputs(run, causal)


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


def test_other_recipes_run_by_other_kernels() -> None:
    q, k, v = qkv(1, 4, 300, 64)
    exact = F.scaled_dot_product_attention(q, k, v)
    for fields in ({"pv": "half"}, {"granularity": "token"}):  # mma.sync's, Triton's
        config = ALWAYS.with_options(**fields)
        found = torch_sage.scaled_dot_product_attention(q, k, v, config=config)
        assert relative_l1(found, exact) < 0.02
    wide = qkv(1, 4, 300, 192)  # by Hopper's own
    found = torch_sage.scaled_dot_product_attention(*wide, config=ALWAYS)
    assert same_bits(found, OPS.sdpa(*wide, **DEFAULT))


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
    assert_memory_order(DEFAULT, order, dtype)
