"""The Triton kernels without a GPU: interpreted against the oracle, compiled for every target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton has wheels for Linux only")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*arguments: str, **environment: str) -> str:
    """Run Python on ``arguments``; return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done.stdout


def test_interpreted_kernels_agree_with_the_oracle() -> None:
    """In a process of its own: all of triton is interpreted there."""
    run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/triton/interpreted.py",
        TRITON_INTERPRET="1",
    )


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What ``compile_targets`` reports of every kernel on every target."""
    report: list[dict[str, Any]] = json.loads(run("-m", "tests.triton.compile_targets"))
    return report


def test_every_target_compiles_without_spills(compiled: list[dict[str, Any]]) -> None:
    arches = {kernel["arch"] for kernel in compiled}
    assert arches == {75, 80, 89, 90, 100, 120, "gfx942", "gfx1100"}
    for kernel in compiled:
        assert kernel["stack"] == 0, kernel
        assert kernel["local"] == 0, kernel


def test_hopper_queues_the_products_of_a_tile(compiled: list[dict[str, Any]]) -> None:
    """One wait for all of Q K^T and one for all of P V, in the loop with hidden keys and without.

    If ptxas cannot keep the accumulators where they are, it waits for every instruction (C7515).
    """
    waits = [
        kernel["waits"]
        for kernel in compiled
        if kernel["arch"] == 90 and kernel["name"].startswith("attention")
    ]
    assert waits == [4] * 4


def test_products_run_on_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    """INT8 for Q K^T and 16 bits for P V, by the instructions of each generation."""
    names = {
        80: ("IMMA.16832.S8", "HMMA.16816.F32"),
        89: ("IMMA.16832.S8", "HMMA.16816.F32"),
        90: ("IGMMA", "HGMMA"),
        100: ("UTCIMMA", "UTCHMMA"),
        120: ("IMMA.16832.S8", "HMMA.16816.F32"),
        "gfx942": ("v_mfma_i32", "v_mfma_f32"),
        "gfx1100": ("v_wmma_i32", "v_wmma_f32"),
    }
    for kernel in compiled:
        if kernel["name"].startswith("attention"):
            for instruction in names[kernel["arch"]]:
                assert kernel["instructions"].get(instruction, 0) > 0, kernel
