"""The two figures of the demo's report."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from torch_sage.demo.layers import COSINE_TARGET
from torch_sage.demo.measure import ModelResult

_SAGE = "#2f6f4f"
_SDPA = "#b9b9b9"


def speed_bars(results: list[ModelResult], path: Path) -> None:
    """Draw the median time of each workload with and without torch_sage."""
    timings = [(result.title, timing) for result in results for timing in result.timings]
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "torch_sage"}):
        figure, axes = plt.subplots(
            1, len(timings), figsize=(2.3 * len(timings), 3.6), squeeze=False, layout="constrained"
        )
        for axis, (title, timing) in zip(axes[0], timings, strict=True):
            heights = [1e3 * seconds for seconds in timing.medians]
            bars = axis.bar(["SDPA", "torch_sage"], heights, color=[_SDPA, _SAGE], width=0.65)
            axis.bar_label(bars, fmt="%.0f ms", padding=2)
            axis.set_title(f"{title}\n{_wrap(timing.workload)}\n{timing.speedup:.2f}x", fontsize=9)
            axis.margins(y=0.12)
            axis.set_yticks([])
            axis.spines[["top", "right", "left"]].set_visible(False)
        figure.savefig(path)
        plt.close(figure)


def layer_errors(results: list[ModelResult], path: Path) -> None:
    """Draw 1 - cosine of every attention layer against the goal, one line per model."""
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "torch_sage"}):
        figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
        for result, marker in zip(results, "os^", strict=False):
            errors = [1.0 - layer.cosine for layer in result.layers]
            axis.plot(range(len(errors)), errors, marker=marker, label=result.title, linewidth=1)
        axis.axhline(1.0 - COSINE_TARGET, color="black", linestyle="--", linewidth=1, label="goal")
        axis.set_yscale("log")
        axis.set_xlabel("attention call")
        axis.set_ylabel("1 - cosine to exact fp64")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        figure.savefig(path)
        plt.close(figure)


def _wrap(text: str, width: int = 26) -> str:
    return "\n".join(textwrap.wrap(text, width))
