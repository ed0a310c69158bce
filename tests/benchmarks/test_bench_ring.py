"""The benchmark of ring attention on two CPU processes: what it counts, and what it refuses."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")

import torch

from benchmarks import bench_ring
from tests.distributed.emulated import sm90_on_cpu
from tests.distributed.launch import launch
from torch_sage.distributed import kernels, ring

NAMES = ["one GPU", "one GPU, lse", "torch", "ring", "ring, lse", "all-to-all"]


def forgetful(*args: Any) -> Any:
    """Quantize, and forget the mean of K."""
    block = kernels.quantize(*args)
    codes, scales, mean, *of_value = block.operands
    forgotten = (codes, scales, torch.zeros_like(mean), *of_value)
    return dataclasses.replace(block, operands=forgotten)


def measure(rank: int, size: int) -> dict[str, Any]:
    device, arguments = torch.device("cpu"), argparse.Namespace(seconds=0.01)
    found: dict[str, Any] = {}
    with torch.no_grad():
        problem = bench_ring.make_problem(1024, 2, True, device)
        problem.key.add_(1)  # a mean that matters
        found["parts"] = bench_ring.measure(problem, arguments, device)
        with sm90_on_cpu():
            found["prepared"] = bench_ring.measure(problem, arguments, device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ring, "quantize", forgetful)
            found["wrong"] = bench_ring.measure(problem, arguments, device)
    return found


def test_it_counts_bytes_and_errors_and_refuses_wrong_answers(tmp_path: Path) -> None:
    found = launch(measure, 2, tmp_path)[0]
    for family, recipe, share in (("parts", "token", 0.75), ("prepared", "token_thread", 0.5)):
        record = found[family]
        contenders = record["contenders"]
        assert record["recipe"].startswith(f"int8.{recipe}/")
        assert list(contenders) == NAMES
        assert all(c["time"]["median"] > 0 for c in contenders.values())
        for name in ("ring", "ring, lse"):
            assert share < contenders[name]["of_16_bits"] < share + 0.03
        assert contenders["ring"]["bytes"] < contenders["all-to-all"]["bytes"]
        assert 0 < contenders["ring, lse"]["lse_error"] < bench_ring.MAX_LSE_ERROR
        assert math.isclose(
            contenders["all-to-all"]["error"], contenders["ring"]["error"], rel_tol=0.3
        )
        assert set(record["steps"]) >= {"quantize", "first step", "other step", "messages"}
        assert len(bench_ring.rows(record)) == len(contenders)
    head, _, *lines = bench_ring.overview([found["parts"], found["prepared"]]).splitlines()
    assert head == "| tokens, heads | " + " | ".join(NAMES) + " |"
    assert [line.startswith("| 1k, 2, causal | ") for line in lines] == [True, True]
    assert all(line.split(" | ")[1].endswith(" (1.00)") for line in lines)
    assert bench_ring.faults(found["parts"]) == []
    *errors, lse = bench_ring.faults(found["wrong"])
    for name, error in zip(("ring", "ring, lse"), errors, strict=True):
        assert f"{name} must have the unsplit error" in error
    assert "merged LSE must be right" in lse
