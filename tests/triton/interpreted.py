"""The Triton kernels against the oracle: quantizers bit for bit, attention within the budget.

Triton's interpreter runs them on CPU tensors, if TRITON_INTERPRET=1 was set when triton was
imported: test_triton.py starts a process of its own for this file. P and V are fp16 here, as the
interpreter cannot multiply bf16; tests/gpu/test_triton.py runs the same cases with both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.cases import DTYPES, AttentionCase, make_inputs
from tests.numerics import assert_within_budget, same_bits
from tests.triton.oracle import ALL_CASES, GRANULARITIES, arguments, expected
from tests.triton.packed import (
    WITH_LSE,
    assert_nothing_outside_is_found,
    assert_one_by_one,
    assert_tiles_are_found,
    recipe,
)
from tests.varlen import pack, starts
from torch_sage import recipes, reference
from torch_sage.ops import triton_ops

# The interpreter takes a quarter of a second each; tests/gpu/test_triton.py runs all of them.
SOME_CASES = ALL_CASES[::2]


@pytest.fixture(autouse=True)
def cpu_takes_recipes_of_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let CPU tensors ask for what the kernels compute."""
    monkeypatch.setitem(recipes.SUPPORT, "cpu", recipes.SUPPORT["cuda"])
    yield


@pytest.mark.parametrize("case", SOME_CASES, ids=lambda c: c.id)
def test_attention_is_within_budget(case: AttentionCase) -> None:
    inputs = make_inputs(case)
    given = arguments(case, inputs, "fp16")
    output, lse = triton_ops.sdpa_with_lse(**given)
    assert_within_budget(output, expected(case, inputs, "fp16", "cpu"), lse=lse)


@pytest.mark.parametrize(
    ("mask", "causal"), [("none", "none"), ("none", "bottom_right"), ("float_inf", "none")]
)
def test_the_output_is_the_same_without_its_lse(mask: str, causal: str) -> None:
    case = AttentionCase(mask=mask, causal=causal, smooth="qkv")
    given = arguments(case, make_inputs(case), "fp16")
    assert same_bits(triton_ops.sdpa(**given), triton_ops.sdpa_with_lse(**given)[0])


def random_rows(dtype: torch.dtype, rows: int, channels: int) -> torch.Tensor:
    """Return [1, 2, rows, channels] with a zero row, and where there is room NaN and infinity."""
    x = torch.randn(1, 2, rows, channels).mul(3).to(dtype)
    x[0, 0, 0] = 0
    if rows > 20:
        x[0, 1, 5, 3] = torch.nan
        x[0, 0, 9, 1] = torch.inf
    return x


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers_are_bit_exact(granularity: str, dtype: str) -> None:
    rows: dict[str, Any] = {"qk": "int8", "granularity": granularity}
    for shape in ((1, 8), (77, 80), (130, 64), (256, 128)):
        x = random_rows(DTYPES[dtype], *shape)
        pairs = [
            (
                triton_ops.quantize_query(query=x, **rows, block=128, warp=32),
                reference.quantize_query(x, **rows, block=128, warp=32),
            )
        ]
        for smooth, block in itertools.product((True, False), (64, 128)):
            ours = triton_ops.quantize_key(key=x, mean=None, smooth=smooth, **rows, block=block)
            mean = ours[2] if smooth else None
            pairs.append(
                (ours, reference.quantize_key(x, mean, smooth=smooth, **rows, block=block))
            )
        for pv, smooth in itertools.product(("bf16", "fp16"), (True, False)):
            ours = triton_ops.quantize_value(value=x, mean=None, smooth=smooth, pv=pv)
            mean = ours[2] if smooth else None
            pairs.append((ours, reference.quantize_value(x, mean, smooth=smooth, pv=pv)))
        for actual, exact in pairs:
            for a, b in zip(actual, exact, strict=True):
                assert same_bits(a, b)


def test_mean_is_near_and_a_given_one_is_used() -> None:
    x = torch.randn(2, 3, 300, 40) + 5
    *_, mean = triton_ops.quantize_key(
        key=x, mean=None, smooth=True, qk="int8", granularity="token", block=64
    )
    assert ((mean - x.double().mean(2)).abs() <= 1e-5 * x.double().abs().mean(2)).all()
    given = torch.randn(2, 3, 40)
    codes, scales, returned = triton_ops.quantize_key(
        key=x, mean=given, smooth=True, qk="int8", granularity="token", block=64
    )
    exact = reference.quantize_key(x, given)
    assert same_bits(codes, exact[0]) and same_bits(scales, exact[1])
    assert same_bits(returned, given) and returned is not given


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("smooth", ["", "k", "kv"])
def test_quantized_operands_give_the_whole_ops_bits(granularity: str, smooth: str) -> None:
    case = AttentionCase(
        heads_q=4, seqlen_k=200, granularity=granularity, smooth=smooth, dtype="fp16"
    )
    inputs = make_inputs(case)
    rows: dict[str, Any] = {"qk": "int8", "granularity": granularity, "block": 64}
    keys = triton_ops.quantize_key(key=inputs.key, mean=None, smooth="k" in smooth, **rows)
    values = triton_ops.quantize_value(
        value=inputs.value, mean=None, smooth="v" in smooth, pv="fp16"
    )
    given = arguments(case, inputs, "fp16")
    whole = triton_ops.sdpa_with_lse(**given)
    names = ("codes", "scales", "mean")
    whole_only = ("key", "value", "smooth", "exponential")
    given = {name: given[name] for name in given if name not in whole_only}
    given |= {f"key_{name}": x for name, x in zip(names, keys, strict=True)}
    given |= {f"value_{name}": x for name, x in zip(names, values, strict=True)}
    for actual, expected_bits in zip(
        triton_ops.attention_with_lse(**given, block=64), whole, strict=True
    ):
        assert same_bits(actual, expected_bits)
    assert same_bits(triton_ops.attention(**given, block=64), whole[0])


def test_poison_stays_in_its_rows() -> None:
    """A query row that is not finite poisons itself; a key, every row that sees it."""
    case = AttentionCase(smooth="qk", causal="top_left", seqlen_q=150, seqlen_k=150)
    inputs = make_inputs(case)
    inputs.query[0, 0, 7, 3] = torch.nan
    poisoned = triton_ops.sdpa(**arguments(case, inputs, "fp16")).isnan().any(-1)
    assert poisoned.nonzero().tolist() == [[0, 0, 7]]

    case = AttentionCase(smooth="", causal="top_left", seqlen_q=150, seqlen_k=150)
    inputs = make_inputs(case)
    inputs.key[0, 1, 100, 3] = torch.inf
    poisoned = triton_ops.sdpa(**arguments(case, inputs, "fp16")).isnan().any(-1)
    assert (
        poisoned[0, 1, 100:].all() and not poisoned[0, 1, :100].any() and not poisoned[0, 0].any()
    )


@pytest.mark.parametrize(
    ("granularity", "smooth", "dims", "layout", "causal", "dtype"),
    [
        ("token_block", "k", (64, 64), "thd", "bottom_right", torch.float16),
        ("token", "", (16, 40), "htd", "none", torch.float32),
        ("thread", "qkv", (40, 33), "sliced", "top_left", torch.bfloat16),
        ("warp", "q", (1, 16), "thd", "none", torch.float16),
        ("block", "v", (33, 17), "fused", "bottom_right", torch.float32),
    ],
)
def test_every_sequence_has_the_bits_of_a_call_alone(
    granularity: str,
    smooth: str,
    dims: tuple[int, int],
    layout: str,
    causal: str,
    dtype: torch.dtype,
) -> None:
    """Of empty ones and such as reach over a tile of every kernel, 32 to 256 rows."""
    queries, keys = [65, 0, 1, 130], [33, 7, 0, 300]
    if layout == "fused":
        keys = queries
    packed = pack(
        queries,
        keys,
        heads=2,
        heads_kv=1,
        head_dim=dims[0],
        head_dim_v=dims[1],
        dtype=dtype,
        layout=layout,
    )
    assert_one_by_one(packed, causal, -0.2, **recipe(granularity, smooth))


def test_packed_sequences_are_what_the_oracle_says() -> None:
    packed = pack([65, 0, 30], [40, 7, 77], heads=2, heads_kv=1, dtype=torch.float32)
    output, lse = WITH_LSE(*packed, "bottom_right", **recipe(smooth=""))
    exact = reference.varlen_attention(*packed[:5], causal="bottom_right", **recipe(smooth=""))
    assert torch.allclose(output, exact.output, atol=5e-3)
    assert torch.allclose(lse, exact.lse, atol=1e-5)


def test_rows_that_no_sequence_has_are_zero() -> None:
    packed = pack([40, 70, 9], [40, 70, 9], heads=2, heads_kv=1)
    inner = torch.tensor([40, 110], dtype=torch.int32)
    output, lse = WITH_LSE(*packed[:3], inner, inner, 70, 70, **recipe("thread", "kv"))
    whole, whole_lse = WITH_LSE(*packed, **recipe("thread", "kv"))
    assert same_bits(output[40:110], whole[40:110])
    assert same_bits(lse[:, 40:110], whole_lse[:, 40:110])
    for outside in (slice(40), slice(110, 119)):
        assert (output[outside] == 0).all() and (lse[:, outside] == -torch.inf).all()


def test_what_is_longer_than_it_may_be_is_left_out() -> None:
    packed = pack([90, 40], [90, 40], heads=2, heads_kv=1)
    output, _ = WITH_LSE(*packed[:5], 50, 50, "bottom_right", **recipe(smooth="qk"))
    short = [torch.cat([x[:50], x[90:]]) for x in packed[:3]]
    edges = starts([50, 40])
    expected, _ = WITH_LSE(*short, edges, edges, 50, 50, "bottom_right", **recipe(smooth="qk"))
    assert same_bits(torch.cat([output[:50], output[90:]]), expected)
    assert (output[50:90] == 0).all()


@pytest.mark.parametrize(
    "edges",
    [[0, 2**31 - 1, -(2**31), 5, 100], [-1] * 5, [2**30] * 5, [119, 0, 119, 0, 9], [-7, 90, 3]],
)
def test_lengths_that_make_no_sense_stay_inside(edges: list[int]) -> None:
    wrong = torch.tensor(edges, dtype=torch.int32)
    for size in (1, 32, 128):
        assert_nothing_outside_is_found(wrong, 119, size, longest=70)


def test_no_sequence_and_no_row() -> None:
    output, lse = WITH_LSE(*pack([], [], heads=2, heads_kv=1), **recipe())
    assert output.shape == (0, 2, 64) and lse.shape == (2, 0)
    output, lse = WITH_LSE(*pack([0, 0], [3, 0], heads=2, heads_kv=1), **recipe())
    assert output.shape == (0, 2, 64) and lse.shape == (2, 0)
    output, lse = WITH_LSE(*pack([5, 0], [0, 0], heads=2, heads_kv=1), **recipe(smooth="kv"))
    assert (output == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("lengths", [[300], [1, 0, 31, 32, 33, 100], [3, 0, 9] * 43, [1] * 17000])
def test_tiles_of_packed_sequences_are_found(lengths: list[int]) -> None:
    """Of up to 128 sequences in one step, 128 times as many in each one more."""
    assert_tiles_are_found(starts(lengths), 32, most=100)
    assert_tiles_are_found(torch.cat([starts([200]), starts(lengths) + 200])[1:], 32, most=100)


def test_what_is_finite_stays_finite_in_the_output() -> None:
    """Smoothed and rounded to 32, one value is 16 more than the largest of fp16."""
    value = torch.tensor([65504.0, -1664.0]).half().expand(1, 1, 16, 2).mT
    key = torch.tensor([1.0, -1.0]).half().expand(1, 1, 64, 2).mT
    query = torch.full((1, 1, 1, 64), 8.0).half()
    case = AttentionCase(head_dim_v=16, smooth="v", dtype="fp16")
    inputs = make_inputs(case)._replace(query=query, key=key, value=value)
    output = triton_ops.sdpa(**arguments(case, inputs, "fp16"))
    assert (output == 65504).all()
    value = torch.where(value > 0, torch.inf, value)
    given = arguments(case, inputs._replace(value=value), "fp16") | {"smooth": ""}
    assert (triton_ops.sdpa(**given) == torch.inf).all()


def test_a_row_block_that_is_no_power_of_two_is_an_error() -> None:
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(
        ValueError, match="block must be a power of two from 8 on for Triton, got 24"
    ):
        triton_ops.quantize_key(
            key=x, mean=None, smooth=False, qk="int8", granularity="block", block=24
        )
    with pytest.raises(ValueError, match=r"granularity must be one of \['token_block', 'token'"):
        triton_ops.quantize_key(
            key=x, mean=None, smooth=False, qk="int8", granularity="tensor", block=64
        )
