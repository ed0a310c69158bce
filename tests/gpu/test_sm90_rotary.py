"""Hopper's kernels norm and rotate Q and K as ``rotary.rotate`` does, before they quantize them.

So the bits are those of ``sdpa`` on what ``rotate`` returns. Sums of squares alone are added in
another order; with those the output is within the budget of the oracle, which knows that.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import torch_sage
from benchmarks.gpu import blocks
from tests.cases import AttentionCase, Inputs, Poison, make_inputs, poison
from tests.gpu.shared import OPS, on_gpu, opcheck, same_numbers
from tests.gpu.sm90 import EXPONENTIALS, RECIPE, SMOOTHING, expected
from tests.numerics import Expected, assert_within_budget, relative_l1, same_bits
from tests.rotary import NORMS, ROTARY_CASES, WEIGHTS, RotaryCase, arguments, rotated
from torch_sage import SageConfig
from torch_sage.recipes import PREPARED, SUPPORT

DEFAULT: dict[str, Any] = SUPPORT[PREPARED].default.op_kwargs()
# Of rsqrt(mean of 128 squares): a tree of 7 additions in fp32, and 2 units of rsqrtf.
RSTD_ERROR = 9 * 2.0**-24
BASE = AttentionCase(
    batch=2, heads_q=4, heads_kv=2, seqlen_q=150, seqlen_k=260, dtype="bf16", smooth="kv"
)


def assert_right(
    case: RotaryCase, inputs: Inputs, smooth: str = "kv", exponential: str = "mixed"
) -> None:
    recipe = {**RECIPE, "smooth": smooth, "exponential": exponential}
    output = OPS.rotary_sdpa(*arguments(case, inputs), pairing=case.pairing, **recipe)
    if case.norm == "eps":
        is_exact = inputs.attn_mask is not None  # with a mask the exponentials are
        assert_within_budget(output, normed(case, inputs, smooth, exponential, is_exact))
    else:
        assert same_numbers(output, OPS.sdpa(*rotated(case, inputs), **recipe))


def normed(
    case: RotaryCase, inputs: Inputs, smooth: str, exponential: str, is_exact: bool
) -> Expected:
    """Return what is expected of a norm; R_low, element by element, is the worst of three."""
    kind = "exact" if is_exact else exponential
    first, *others = (
        expected(rotated(case, inputs, factor), smooth, kind)
        for factor in (1.0, 1 + RSTD_ERROR, 1 - RSTD_ERROR)
    )
    oracle, worst = first.oracle.output, first.naive.output
    for other in others:
        found = other.naive.output
        is_worse = (found - oracle).abs() > (worst - oracle).abs()
        worst = torch.where(is_worse, found, worst)
    return first._replace(naive=first.naive._replace(output=worst))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", ROTARY_CASES, ids=lambda c: c.id)
def test_rotations_are_within_budget(case: RotaryCase, dtype: str, head_dim: int) -> None:
    attention = replace(BASE, dtype=dtype, head_dim=head_dim, head_dim_v=head_dim)
    assert_right(case, on_gpu(make_inputs(attention)))


# Rows that fill no tile, one row, none of a head but the last; both sides of tiles of 64 and 128.
TAILS = [(1, 1), (1, 300), (300, 1), (63, 129), (64, 128), (65, 127), (129, 1025), (700, 64)]


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("tokens", TAILS, ids=str)
def test_tails(tokens: tuple[int, int], causal: str) -> None:
    for head_dim, pairing in ((64, "halves"), (64, "neighbours"), (128, "halves")):
        attention = replace(
            BASE, seqlen_q=tokens[0], seqlen_k=tokens[1], head_dim=head_dim, causal=causal
        )
        case = RotaryCase(pairing, norm="eps", weight="channels", by_batch=True)
        assert_right(case, on_gpu(make_inputs(attention)))


@pytest.mark.parametrize("mask", ["bool", "bool_hidden_rows", "key_padding", "float", "alibi"])
def test_masks(mask: str) -> None:
    inputs = on_gpu(make_inputs(replace(BASE, mask=mask)))
    for pairing in ("halves", "neighbours"):
        assert_right(RotaryCase(pairing, norm="rstd", weight="channels"), inputs)


@pytest.mark.parametrize("layout", ["bshd", "sliced", "fused", "expanded", "last_dim_strided"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=str)
def test_layouts_and_grouped_heads(layout: str, heads: tuple[int, int]) -> None:
    attention = replace(BASE, layout=layout, heads_q=heads[0], heads_kv=heads[1])
    inputs = on_gpu(make_inputs(attention))
    for pairing in ("halves", "neighbours"):
        assert_right(RotaryCase(pairing, norm="rstd", weight="heads"), inputs)


def test_strided_tables() -> None:
    """Rows of tables, weights and rstd may lie anywhere; the bits are those of dense ones."""
    inputs = on_gpu(make_inputs(BASE))
    case = RotaryCase("neighbours", norm="rstd_of_heads", weight="heads", by_batch=True)
    args = arguments(case, inputs)

    def spread(x: Any, position: int) -> Any:
        if position < 3 or not isinstance(x, Tensor) or position >= 13:
            return x
        wide = torch.full((*x.shape[:-1], x.shape[-1] + 6), float("nan"), device="cuda").to(x.dtype)
        return wide[..., 2 : 2 + x.shape[-1]].copy_(x)

    spaced = [spread(x, position) for position, x in enumerate(args)]
    recipe = {**DEFAULT, "pairing": case.pairing}
    assert same_bits(OPS.rotary_sdpa(*spaced, **recipe), OPS.rotary_sdpa(*args, **recipe))


@pytest.mark.parametrize("seed", range(16))
def test_random_calls_are_within_budget(seed: int) -> None:
    pick = random.Random(seed)
    for _ in range(12):
        head_dim = pick.choice([64, 128])
        heads_kv, causal = pick.choice([1, 2]), pick.choice(["none", "top_left", "bottom_right"])
        attention = AttentionCase(
            batch=pick.choice([1, 2]),
            heads_q=heads_kv * pick.choice([1, 2, 3]),
            heads_kv=heads_kv,
            seqlen_q=pick.randint(1, 600),
            seqlen_k=pick.choice([pick.randint(1, 300), pick.randint(1, 2600)]),
            head_dim=head_dim,
            head_dim_v=pick.choice([64, head_dim, pick.randint(1, head_dim)]),
            dtype=pick.choice(["bf16", "fp16"]),
            causal=causal,
            mask=pick.choice(["none", "none", "bool", "float"]) if causal == "none" else "none",
            scale=pick.choice([None, 0.05, -0.1]),
            layout=pick.choice(["bhsd", "bshd", "fused"]),
        )
        case = RotaryCase(
            pick.choice(["halves", "neighbours"]),
            pick.choice(NORMS),
            pick.choice(WEIGHTS),
            pick.random() < 0.5,
        )
        smooth, exponential = pick.choice(SMOOTHING), pick.choice(EXPONENTIALS)
        inputs = on_gpu(make_inputs(attention))
        try:
            assert_right(case, inputs, smooth, exponential)
        except AssertionError as error:
            message = f"{attention.id}, {case.id}, {smooth}, {exponential}: {error}"
            raise AssertionError(message) from error


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("operand", [0, 1, 2])
@pytest.mark.parametrize("norm", ["", "eps"])
def test_poison_reaches_what_it_reaches_in_two_steps(
    operand: int, number: float, norm: str
) -> None:
    attention = replace(BASE, smooth="", causal="top_left", seqlen_k=150)
    inputs = on_gpu(poison(make_inputs(attention), Poison(operand, (0, 1, 70, 3), number)))
    for pairing in ("halves", "neighbours"):
        assert_right(RotaryCase(pairing, norm=norm), inputs, smooth="")


def test_zero_rows_stay_zero_with_a_norm() -> None:
    inputs = on_gpu(make_inputs(replace(BASE, data="zero_rows")))
    for pairing in ("halves", "neighbours"):
        assert_right(RotaryCase(pairing, norm="eps"), inputs)


def test_another_pairing_is_far_outside_of_the_budget() -> None:
    inputs = on_gpu(make_inputs(BASE))
    case = RotaryCase("halves", norm="eps")
    output = OPS.rotary_sdpa(*arguments(case, inputs), pairing="neighbours", **DEFAULT)
    with pytest.raises(AssertionError):
        assert_within_budget(output, expected(rotated(case, inputs), "kv", "mixed"))


def test_recipes_of_other_rows_are_refused() -> None:
    args = arguments(RotaryCase(), on_gpu(make_inputs(BASE)))
    with pytest.raises(ValueError, match="granularity must be"):
        OPS.rotary_sdpa(*args, granularity="thread", pv="bf16", smooth="k")
    with pytest.raises(ValueError, match="pairing must be one of"):
        OPS.rotary_sdpa(*args, pairing="quarters", **DEFAULT)
    for replacement, message in (
        (args[3][:, :-1], r"query_cos must have shape \[\d+( or \d+)?, "),
        (args[3][..., :32], "query_cos must have shape"),
        (args[3].bfloat16(), "query_cos must have dtype float32, got bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.rotary_sdpa(*args[:3], replacement, *args[4:], **DEFAULT)
    with pytest.raises(ValueError, match="value must have a head_dim of at most that of key, 64"):
        OPS.rotary_sdpa(*args[:2], torch.cat([args[2]] * 2, -1), *args[3:], **DEFAULT)
    both = [*args[:5], torch.ones(2, 1, 150, device="cuda"), None, 1e-6, *args[8:]]
    with pytest.raises(ValueError, match="query_eps must be None beside query_rstd"):
        OPS.rotary_sdpa(*both, **DEFAULT)


def test_opcheck() -> None:
    inputs = on_gpu(make_inputs(BASE))
    for case in (RotaryCase(), RotaryCase("neighbours", "rstd", "heads")):
        recipe = {**DEFAULT, "pairing": case.pairing}
        opcheck(OPS.rotary_sdpa, arguments(case, inputs), recipe)
        opcheck(OPS.rotary_sdpa, arguments(case, inputs), {**recipe, "output_order": "bshd"})


def test_output_order() -> None:
    args = arguments(RotaryCase(), on_gpu(make_inputs(BASE)))
    plain = OPS.rotary_sdpa(*args, **DEFAULT)
    other = OPS.rotary_sdpa(*args, **DEFAULT, output_order="bshd")
    assert plain.is_contiguous() and other.transpose(1, 2).is_contiguous()
    assert same_bits(plain, other)


def test_cuda_graph_replays_new_inputs() -> None:
    args = arguments(RotaryCase(norm="eps", weight="channels"), on_gpu(make_inputs(BASE)))
    OPS.rotary_sdpa(*args, **DEFAULT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OPS.rotary_sdpa(*args, **DEFAULT)
    for _ in range(3):
        for x in args:
            if isinstance(x, Tensor):
                x.copy_(torch.randn_like(x))
        graph.replay()
        assert same_bits(captured, OPS.rotary_sdpa(*args, **DEFAULT))


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("name", blocks.BLOCKS)
def test_compiled_blocks_fuse(name: str, mode: str | None) -> None:
    """Fewer kernels are generated, and the output is the unfused one's but for rounding."""
    layer, inputs = blocks.build(name, 1024, "cuda", tiny=True)
    outputs, kernels = {}, {}
    for producers in ("never", "always"):
        torch._dynamo.reset()
        counters["inductor"].clear()
        config = SageConfig(dispatch="always", on_unsupported="error", producers=producers)
        fast = torch.compile(layer, options=torch_sage.options(config, mode=mode))
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            output, codes = run_and_get_code(fast, *inputs)
            outputs[producers] = output.clone()  # a replay writes into the same memory
            for _ in range(2):
                assert same_bits(fast(*inputs).clone(), outputs[producers])
        kernels[producers] = sum(code.count("async_compile.triton(") for code in codes)
        calls = sum("torch_sage.rotary_sdpa" in code for code in codes)
        assert calls == (producers == "always")
    if name == "wan":  # a norm across heads leaves a kernel for the factors of each
        assert kernels["always"] <= kernels["never"]
    else:
        assert kernels["always"] < kernels["never"]
    fused, plain = outputs["always"].float(), outputs["never"].float()
    assert F.cosine_similarity(fused, plain, dim=-1).min() > 0.999
    # A layer adds its input, so what attention differs by is small beside the output.
    assert relative_l1(fused, plain) < 0.01
