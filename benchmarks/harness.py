"""Paired timing: contenders take turns in one process, so all meet the same machine."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import Shape
from torch_sage import _extension

MAX_RELATIVE_L1 = 0.02  # the accuracy that the default CPU recipe promises on N(0, 1)
REFERENCE_ROWS = 64  # query rows that are recomputed in fp64: all of them would be 4 GB at 8192


class Inputs(NamedTuple):
    """What one call of attention takes."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    calls: int


Contender = Callable[[Inputs], Tensor]


def make_inputs(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Return normal q, k, v of ``shape``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, length: int) -> Tensor:
        size = (shape.batch, heads, length, shape.head_dim)
        return torch.randn(size, generator=generator).to(dtype)

    return Inputs(
        normal(shape.heads_q, shape.seqlen_q),
        normal(shape.heads_kv, shape.seqlen_k),
        normal(shape.heads_kv, shape.seqlen_k),
        shape.is_causal,
    )


def relative_error(output: Tensor, inputs: Inputs) -> float:
    """Return the relative L1 error of ``output`` against exact attention in fp64.

    Judged on ``REFERENCE_ROWS`` rows spread evenly over the queries.
    """
    query, key, value, is_causal = inputs
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    rows = torch.linspace(0, seqlen_q - 1, min(seqlen_q, REFERENCE_ROWS)).long()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    scores = query[:, :, rows].double() @ key.mT * query.shape[3] ** -0.5
    if is_causal:
        scores.masked_fill_(torch.arange(seqlen_k) > rows[:, None], float("-inf"))
    exact = scores.softmax(-1) @ value
    return float((output[:, :, rows].double() - exact).abs().sum() / exact.abs().sum())


def check(contenders: Mapping[str, Contender], inputs: Inputs) -> dict[str, float]:
    """Return every contender's relative error.

    Raises:
        RuntimeError: if one is wrong: what is wrong is not worth timing.
    """
    errors = {name: relative_error(run(inputs), inputs) for name, run in contenders.items()}
    for name, error in errors.items():
        if not error <= MAX_RELATIVE_L1:
            raise RuntimeError(f"{name} must have relative L1 error <= 0.02, got {error}")
    return errors


def time_paired(
    contenders: Mapping[str, Contender], inputs: Inputs, seconds: float, least_rounds: int = 5
) -> dict[str, Timing]:
    """Return the time of a call of each contender, all of them taking turns for ``seconds``.

    Short calls are repeated within a turn until it lasts 0.2 ms, so that reading the clock (0.1 us)
    does not count.
    """
    repeats = {}
    for name, run in contenders.items():
        run(inputs)
        start = time.perf_counter()
        run(inputs)
        repeats[name] = max(1, round(2e-4 / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    names = deque(contenders)
    while time.perf_counter() < end or len(samples[names[0]]) < least_rounds:
        for name in names:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                contenders[name](inputs)
            samples[name].append((time.perf_counter() - start) / repeats[name])
        # The same function is up to 10 % slower in one place of the round than in another.
        names.rotate()
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high, len(values))


def sdpa(inputs: Inputs) -> Tensor:
    """Run torch's own attention, the baseline of every comparison."""
    query, key, value, is_causal = inputs
    enable_gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, enable_gqa=enable_gqa
    )


def environment() -> dict[str, str | int]:
    """Return what the numbers depend on."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        ).stdout.strip()
    return {
        "cpu": cpu,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "sage_isa": _extension.build_info()["cpu_isa"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }
