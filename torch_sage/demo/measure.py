"""Runs one model three ways: unmodified, compiled, and compiled with torch_sage."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import torch_sage
from torch_sage.demo.layers import COSINE_TARGET, LayerError, layer_errors
from torch_sage.demo.model import DemoModel, Forwards, Goal, Workload
from torch_sage.demo.nodes import AttentionNodes
from torch_sage.inductor.reporting import report

Progress = Callable[[str], None]
"""Called with the name of each step before it begins."""

# unmodified, compiled, compiled with torch_sage, quality, error by layer
STEPS_BESIDE_TIMING = 5

# Two shapes and two compilers share each piece of model code; the default limit is 8.
_RECOMPILE_LIMIT = 32
_MIN_PAIRS = 3
_MAX_PAIRS = 21


@dataclass(frozen=True)
class Timing:
    """Paired times of one workload, in seconds."""

    workload: str
    sdpa: list[float]
    sage: list[float]
    must_be_faster: bool

    @property
    def medians(self) -> tuple[float, float]:
        """Return the median time without and with torch_sage."""
        return statistics.median(self.sdpa), statistics.median(self.sage)

    @property
    def ratios(self) -> list[float]:
        """Return the speed-up of each pair; the two calls of a pair see the same machine."""
        return [a / b for a, b in zip(self.sdpa, self.sage, strict=True)]

    @property
    def speedup(self) -> float:
        """Return the median of the paired ratios."""
        return statistics.median(self.ratios)

    @property
    def noise(self) -> float:
        """Return half the interquartile range of the ratios."""
        lower, _, upper = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return (upper - lower) / 2

    def goal(self) -> Goal:
        """Return whether torch_sage won, or at least did not lose by more than the noise."""
        floor = 1.0 if self.must_be_faster else 1.0 - self.noise
        return Goal(
            name=f"speed-up, {self.workload}",
            value=f"{self.speedup:.2f}x +- {self.noise:.2f}",
            target="faster" if self.must_be_faster else "not slower, within noise",
            met=self.speedup > floor if self.must_be_faster else self.speedup >= floor,
        )


@dataclass(frozen=True)
class ModelResult:
    """Everything the report shows about one model."""

    title: str
    nodes: AttentionNodes
    quality: list[Goal]
    timings: list[Timing]
    layers: list[LayerError]
    first_call_seconds: dict[str, float]
    """Time of the first calls, in which compilation happens, by the name of the compiler."""

    @property
    def goals(self) -> list[Goal]:
        """Return the goals whose miss fails the demo; speed is shown beside them."""
        worst = min(layer.cosine for layer in self.layers)
        attention = Goal(
            name=f"attention cosine, worst of {len(self.layers)} layers",
            value=f"{worst:.6f}",
            target=f">= {COSINE_TARGET}",
            met=worst >= COSINE_TARGET,
        )
        return [self.nodes.goal(), *self.quality, attention]

    @property
    def all_goals(self) -> list[Goal]:
        """Return the goals, those on speed included."""
        return [*self.goals, *(timing.goal() for timing in self.timings)]


def measure(model: DemoModel, seconds: float, progress: Progress) -> ModelResult:
    """Return the result of ``model``; each workload is timed for about ``seconds``."""
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT):
        progress("unmodified, eager")
        reference = run(model, model.parts)
        first_call_seconds: dict[str, float] = {}

        timed = [workload for workload in model.workloads if workload.timed]
        progress("torch.compile")
        sdpa = model.compile(dynamic=False)
        start = time.perf_counter()
        for workload in timed:
            workload.call(sdpa)
        first_call_seconds["sdpa"] = time.perf_counter() - start

        progress("torch.compile with torch_sage")
        before = report()
        sage = model.compile(dynamic=False, options=torch_sage.options())
        start = time.perf_counter()
        outputs = run(model, sage)
        first_call_seconds["torch_sage"] = time.perf_counter() - start
        nodes = AttentionNodes.since(before, model.attention_nodes)

        progress("quality")
        quality = model.quality(reference, outputs)
        timings = []
        for workload in timed:
            progress(f"timing {workload.name}")
            timings.append(pair_times(workload, sdpa, sage, seconds))
        progress("error by layer")
        layers = layer_errors(model.probe)
    return ModelResult(model.title, nodes, quality, timings, layers, first_call_seconds)


def run(model: DemoModel, parts: Forwards) -> dict[str, Any]:
    """Return the output of each workload by its name."""
    return {workload.name: workload.call(parts) for workload in model.workloads}


def pair_times(workload: Workload, sdpa: Forwards, sage: Forwards, seconds: float) -> Timing:
    """Time both, alternating who goes first, until ``seconds`` have passed."""
    times: dict[str, list[float]] = {"sdpa": [], "sage": []}
    contenders = [("sdpa", sdpa), ("sage", sage)]
    for _, parts in contenders:
        workload.call(parts)
    start = time.perf_counter()
    while len(times["sage"]) < _MIN_PAIRS or (
        time.perf_counter() - start < seconds and len(times["sage"]) < _MAX_PAIRS
    ):
        for name, parts in contenders:
            begin = time.perf_counter()
            workload.call(parts)
            times[name].append(time.perf_counter() - begin)
        contenders.reverse()
    return Timing(workload.name, times["sdpa"], times["sage"], workload.must_be_faster)
