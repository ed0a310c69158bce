"""Attention that starts while keys and values are prepared has the bits of one after the other.

What could go wrong is that it reads what is not there yet, or what an earlier call left there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.gpu.shared import OPS
from tests.gpu.sm90 import EXPONENTIALS, RECIPE
from tests.numerics import same_bits

SMOOTH = "kv"


class Shape(NamedTuple):
    """Sizes of one call."""

    batch: int
    heads: int
    heads_kv: int
    queries: int
    keys: int
    head_dim: int


# More groups of 1024 keys than clusters of blocks, and fewer; tails; many queries for each key, and
# so few that attention is done first.
SHAPES = (
    Shape(2, 32, 32, 300, 2100, 128),
    Shape(3, 24, 8, 2048, 2048, 64),
    Shape(1, 40, 5, 130, 5000, 256),
    Shape(2, 80, 80, 1, 1024, 128),
    Shape(1, 2, 1, 4000, 3000, 128),
    Shape(5, 7, 7, 200, 1, 64),
    Shape(1, 16, 16, 2, 16000, 128),
)


def operands(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    b, h, h_kv, n, m, d = shape
    q, k, v = (
        torch.randn(b, heads, rows, d, device="cuda").to(dtype)
        for heads, rows in ((h, n), (h_kv, m), (h_kv, m))
    )
    return q, k + 2, v - 1  # a mean that is not zero


def one_after_the_other(
    q: Tensor, k: Tensor, v: Tensor, causal: str, **options: Any
) -> tuple[Tensor, Tensor]:
    prepared = OPS.prepare_kv(k, v, smooth=SMOOTH)
    torch.cuda.synchronize()
    arguments = (q, *prepared, k.shape[2], v.shape[3], None, causal)
    output: Tensor = OPS.attention_prepared(*arguments, **options)
    return output, OPS.attention_prepared_with_lse(*arguments, **options)[1]


def together(q: Tensor, k: Tensor, v: Tensor, causal: str, **options: Any) -> Tensor:
    result: Tensor = OPS.sdpa(q, k, v, None, causal, **RECIPE, smooth=SMOOTH, **options)
    return result


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_are_those_of_one_after_the_other(shape: Shape, causal: str) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        inputs = operands(shape, dtype)
        for exponential in EXPONENTIALS:
            expected = one_after_the_other(*inputs, causal, exponential=exponential)
            found = together(*inputs, causal, exponential=exponential)
            assert same_bits(found, expected[0])
            options = {**RECIPE, "smooth": SMOOTH, "exponential": exponential}
            _, lse = OPS.sdpa_with_lse(*inputs, None, causal, **options)
            assert same_bits(lse, expected[1])


@pytest.mark.parametrize("causal", ["none", "top_left"])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_calls_that_reuse_memory_do_not_see_the_last_ones_keys(shape: Shape, causal: str) -> None:
    sets = [operands(shape) for _ in range(3)]
    expected = [one_after_the_other(*inputs, causal, exponential="mixed")[0] for inputs in sets]
    found = [together(*sets[i % 3], causal, exponential="mixed") for i in range(30)]
    for i, result in enumerate(found):
        assert same_bits(result, expected[i % 3])


@pytest.mark.parametrize("causal", ["none", "top_left"])
def test_streams_that_run_at_once_do_not_disturb_each_other(causal: str) -> None:
    shapes = SHAPES[:3]
    sets = [operands(shape) for shape in shapes]
    expected = [one_after_the_other(*inputs, causal, exponential="mixed")[0] for inputs in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    found: list[list[Tensor]] = [[] for _ in sets]
    torch.cuda.synchronize()
    for _ in range(20):
        for results, inputs, stream in zip(found, sets, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(together(*inputs, causal, exponential="mixed"))
    torch.cuda.synchronize()
    for results, result in zip(found, expected, strict=True):
        assert all(same_bits(x, result) for x in results)


@pytest.mark.parametrize("causal", ["none", "top_left"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_a_graph_reads_new_inputs(shape: Shape, causal: str) -> None:
    inputs = operands(shape)
    together(*inputs, causal, exponential="mixed")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # twice, so that a call follows another
        results = [together(*inputs, causal, exponential="mixed") for _ in range(2)]
    for _ in range(5):
        new = operands(shape)
        for x, y in zip(inputs, new, strict=True):
            x.copy_(y)
        expected, _ = one_after_the_other(*new, causal, exponential="mixed")
        for _ in range(3):
            graph.replay()
            assert all(same_bits(x, expected) for x in results)


def test_what_follows_may_use_the_memory_of_all_of_prepare() -> None:
    """One query of 32k keys from the top left sees the first key: the others are not waited for."""
    shape = Shape(1, 16, 16, 1, 32768, 128)
    q, k, v = operands(shape)
    codes = 2 * k.numel()
    for _ in range(20):
        result = together(q, k, v, "top_left", exponential="mixed")
        after = torch.zeros(codes, device="cuda", dtype=torch.uint8)  # where the codes were
        torch.cuda.synchronize()
        assert not after.any()
        assert torch.allclose(result.float(), v[:, :, :1].float(), atol=0.1)
