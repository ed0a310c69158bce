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
    assert same_bits(triton_ops.sdpa(**given), output)


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
