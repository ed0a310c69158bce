"""The mma.sync kernels inside torch: streams, CUDA graphs, compilation, transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torch_sage
from tests.gpu.mma import MEMBERS, Member
from tests.gpu.shared import (
    OPS,
    assert_graph_replays_new_inputs,
    assert_memory_order,
    assert_same_bits_on_any_stream,
    assert_streams_do_not_meet,
    opcheck,
    qkv,
)
from tests.numerics import relative_l1, same_bits
from torch_sage import PRESETS, SageConfig
from torch_sage.devices import rows_of

BOUND = {"int8": 0.045, "int4": 0.25}  # relative L1 error on N(0, 1) with few tokens


def smoothing(member: Member) -> str:
    return "qkv" if member.qk == "int4" else "kv"


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_opcheck(member: Member) -> None:
    q, k, v = qkv(1, 2, 70, 64)
    mask = torch.ones(70, 70, dtype=torch.bool, device="cuda")
    recipe = member.recipe(smooth=smoothing(member))
    opcheck(OPS.sdpa, (q, k, v), recipe)
    opcheck(OPS.sdpa, (q, k, v, mask), {**recipe, "output_order": "bshd"})
    opcheck(OPS.sdpa_with_lse, (q, k, v, None, "top_left"), recipe)


@pytest.mark.parametrize("member", MEMBERS, ids=str)
@pytest.mark.parametrize("causal", ["none", "top_left"])
def test_two_runs_are_the_same_bits_on_any_stream(causal: str, member: Member) -> None:
    assert_same_bits_on_any_stream(member.recipe(smooth=smoothing(member)), causal, head_dim=128)


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_calls_on_two_streams_do_not_meet(member: Member) -> None:
    assert_streams_do_not_meet(member.recipe("tensor", smoothing(member)))


def attend(q: Tensor, k: Tensor, v: Tensor, recipe: dict[str, Any]) -> tuple[Tensor, ...]:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device="cuda").tril()
    plain = OPS.sdpa(q, k, v, None, "top_left", **recipe)
    return plain, OPS.sdpa(q, k, v, mask, **recipe), *OPS.sdpa_with_lse(q, k, v, **recipe)


@pytest.mark.parametrize("granularity", ["thread", "tensor"])
@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_cuda_graph_replays_new_inputs(member: Member, granularity: str) -> None:
    assert_graph_replays_new_inputs(attend, member.recipe(granularity, smoothing(member)))


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("preset", ["sage1", "sage2pp_4b"])
def test_compiled_models_use_the_op(preset: str, dynamic: bool, mode: str | None) -> None:
    config = PRESETS[preset].with_options(dispatch="always", on_unsupported="error")

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2) * 2

    torch._dynamo.reset()
    fast = torch.compile(causal, dynamic=dynamic, options=torch_sage.options(config, mode=mode))
    with torch.no_grad():
        for n in (256, 300):
            inputs = qkv(1, 4, n, 64)
            for _ in range(3):
                actual = fast(*inputs).clone()
            eager = torch_sage.scaled_dot_product_attention(*inputs, is_causal=True, config=config)
            assert same_bits(actual, eager.transpose(1, 2) * 2)
            assert relative_l1(actual, causal(*inputs)) < BOUND[config.qk]
    report = torch_sage.report()
    assert report.rewritten > 0 and report.skipped == 0


@pytest.mark.parametrize("preset", [x for x, config in PRESETS.items() if config.qk != "auto"])
@pytest.mark.parametrize("head_dim", [64, 128, 200])
def test_presets_run_the_recipe_that_they_name(preset: str, head_dim: int) -> None:
    config = PRESETS[preset].with_options(dispatch="always", on_unsupported="error")
    q, k, v = qkv(1, 8, 500, head_dim)
    assert torch_sage.why_not(q, k, v, config=config) == ()
    found = torch_sage.scaled_dot_product_attention(q, k, v, config=config)
    half = {"half": "bf16"}.get(config.pv, config.pv)
    smooth = "qk" if config.smooth_q else "k"
    recipe = {"qk": config.qk, "granularity": config.granularity, "pv": half, "smooth": smooth}
    assert same_bits(found, OPS.sdpa(q, k, v, **recipe))
    assert relative_l1(found, F.scaled_dot_product_attention(q, k, v)) < BOUND[config.qk]


def test_the_gpu_has_a_row_of_the_table() -> None:
    """A build that lacks its code would run everything by Triton, and pass."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert {"cuda.sm89", "cuda.sm120"} & set(rows_of(device))


def test_autocast() -> None:
    q, k, v = qkv(1, 2, 200, 64, dtype=torch.float32)
    config = SageConfig(dispatch="always", granularity="thread", pv="half", smooth_v=False)
    with torch.autocast("cuda", torch.bfloat16):
        output = torch_sage.scaled_dot_product_attention(q, k, v, config=config)
    assert output.dtype == torch.bfloat16
    halves = (x.bfloat16() for x in (q, k, v))
    assert same_bits(output, OPS.sdpa(*halves, **Member("int8", "bf16").recipe()))


@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_vmap(member: Member) -> None:
    q, k, v = qkv(3, 2, 4, 130, 64)
    recipe = member.recipe(smooth=smoothing(member))

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = OPS.sdpa(q, k, v, **recipe)
        return output

    each = torch.stack([alone(*x) for x in zip(q, k, v, strict=True)])
    assert same_bits(torch.vmap(alone)(q, k, v), each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["bhsd", "bshd"])
@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_memory_order_of_the_output(member: Member, order: str, dtype: torch.dtype) -> None:
    assert_memory_order(member.recipe(), order, dtype)
