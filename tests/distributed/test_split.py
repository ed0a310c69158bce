"""Ring and all-to-all attention on 2 and 4 processes against the oracle on one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.emulated import sm90_on_cpu
from tests.distributed.launch import launch
from tests.distributed.split import (
    PARTS,
    PREPARED,
    PREPARED_CASES,
    SPLIT_CASES,
    Kernels,
    SplitCase,
    attend,
    expect_split,
    ring,
)
from tests.numerics import Expected, assert_within_budget, budget_use, output_budget_use
from torch_sage import AttentionOutput, _extension

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason=_extension.unavailable_reason() or ""
)

MAX_LSE_ERROR = 1e-4  # of merged partial results; issue 5

WRONG_ORDER = ring("zigzag", causal="top_left", data="uneven")
NO_MEAN = ring(data="uneven")


def attend_without_means(case: SplitCase, kernels: Kernels) -> AttentionOutput:
    """Smooth K by each rank's mean, and forget to correct the LSE by it."""
    from torch_sage.distributed import ring as module

    quantize = module.quantize

    def forgetful(*args: Any) -> Any:
        block = quantize(*args)
        key_codes, key_scales, mean, *of_value = block.operands
        forgotten = (key_codes, key_scales, torch.zeros_like(mean), *of_value)
        return dataclasses.replace(block, operands=forgotten)

    module.quantize = forgetful
    try:
        return attend(case, kernels)
    finally:
        module.quantize = quantize


def run(kernels: Kernels, cases: list[SplitCase]) -> dict[str, tuple[Tensor, ...]]:
    results = {case.id: tuple(attend(case, kernels)) for case in cases}
    results["wrong order"] = tuple(attend(WRONG_ORDER, kernels, "contiguous"))
    results["no mean"] = tuple(attend_without_means(NO_MEAN, kernels))
    return results


def work(rank: int, size: int) -> dict[str, Any]:
    results = {"parts": run(PARTS, SPLIT_CASES)}
    with sm90_on_cpu():
        results["prepared"] = run(PREPARED, PREPARED_CASES)
    return results if rank == 0 else {}


@pytest.fixture(scope="module", params=[2, 4])
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The number of processes, and all results of one group of them."""
    folder: Path = tmp_path_factory.mktemp("split")
    return request.param, launch(work, request.param, folder)[0]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The oracle's many small tensors: on two busy cores two threads take 46 s, one takes 3."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(case: SplitCase, results: dict[str, Any], expected: Expected) -> None:
    output, lse = results[case.id]
    assert_within_budget(output, expected, lse=lse)
    # Rows that see no key, or under a mask of -3e38 none in earnest, have an lse of that size.
    ordinary = expected.oracle.lse > -1e30
    error = torch.where(ordinary, lse.double() - expected.oracle.lse, 0.0).abs().max().item()
    assert error <= MAX_LSE_ERROR


@pytest.mark.parametrize("case", SPLIT_CASES, ids=lambda case: case.id)
def test_within_the_budget_of_the_unsplit_op(split: Any, case: SplitCase) -> None:
    size, results = split
    check(case, results["parts"], expect_split(case, size))


@pytest.mark.parametrize("case", PREPARED_CASES, ids=lambda case: case.id)
def test_prepared_operands_are_cut_and_merged_right(split: Any, case: SplitCase) -> None:
    size, results = split
    with sm90_on_cpu():
        check(case, results["prepared"], expect_split(case, size, PREPARED))


@pytest.fixture(params=["parts", "prepared"])
def family(request: pytest.FixtureRequest) -> Iterator[tuple[str, Kernels]]:
    with sm90_on_cpu() if request.param == "prepared" else contextlib.nullcontext():
        yield request.param, {"parts": PARTS, "prepared": PREPARED}[request.param]


def test_budget_sees_a_wrong_order_of_tokens(split: Any, family: tuple[str, Kernels]) -> None:
    (size, results), (name, kernels) = split, family
    output = results[name]["wrong order"][0]
    assert output_budget_use(output, expect_split(WRONG_ORDER, size, kernels)) > 4


def test_budget_sees_an_lse_without_the_mean_of_the_keys(
    split: Any, family: tuple[str, Kernels]
) -> None:
    (size, results), (name, kernels) = split, family
    output, lse = results[name]["no mean"]
    expected = expect_split(NO_MEAN, size, kernels)
    assert output_budget_use(output, expected) > 4
    lse_use = budget_use(lse, expected.oracle.lse, expected.naive.lse, expected.lse_rounding)
    assert lse_use > 4
