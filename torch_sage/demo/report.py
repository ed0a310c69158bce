"""``demo-report/``: the results as JSON for machines and as a page for people."""

from __future__ import annotations

import html
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import torch_sage
from torch_sage import _extension
from torch_sage.demo import plots
from torch_sage.demo.measure import ModelResult
from torch_sage.demo.model import Goal
from torch_sage.inductor.reporting import report as node_report

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .8rem; text-align: left;
border-bottom: 1px solid #ddd; vertical-align: top } img { max-width: 100% } .missed { color: #b00 }
.met { color: #2f6f4f } small { color: #666 }
"""


def write(results: list[ModelResult], folder: Path) -> Path:
    """Write the pages, the figures and ``report.json``; return the path of ``index.html``."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = describe_environment()
    data = {"environment": environment, "models": [to_data(result) for result in results]}
    (folder / "report.json").write_text(json.dumps(data, indent=2) + "\n")
    plots.speed_bars(results, folder / "speed.svg")
    plots.layer_errors(results, folder / "layers.svg")
    node_report().to_html(folder / "attention.html")
    page = folder / "index.html"
    page.write_text(_page(results, environment))
    return page


def describe_environment() -> dict[str, str]:
    """Return what the numbers depend on."""
    return {
        "torch_sage": torch_sage.__version__,
        "kernel": _extension.kernel_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
    }


def to_data(result: ModelResult) -> dict[str, Any]:
    """Return one model's results as JSON-serializable data."""
    return {
        "title": result.title,
        "goals": [goal._asdict() for goal in result.goals],
        "nodes": result.nodes.to_data(),
        "timings": [
            {
                "workload": timing.workload,
                "sdpa_seconds": timing.sdpa,
                "torch_sage_seconds": timing.sage,
                "speedup": timing.speedup,
                "noise": timing.noise,
                "goal": timing.goal()._asdict(),
            }
            for timing in result.timings
        ],
        "layers": [layer._asdict() for layer in result.layers],
        "first_call_seconds": result.first_call_seconds,
    }


def _page(results: list[ModelResult], environment: dict[str, str]) -> str:
    sections = [_section(result) for result in results]
    stamp = ", ".join(f"{name} {value}" for name, value in environment.items())
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>torch_sage demo</title><style>{_STYLE}</style>
<h1>torch_sage on real models</h1>
<p>Each model is compiled twice in one process, with torch's SDPA and with torch_sage; times are
medians of interleaved calls, outputs are compared with the unmodified model.</p>
<p><small>{html.escape(stamp)}</small></p>
<h2>Time per call</h2><img src="speed.svg" alt="time per call">
<h2>Error by layer</h2><img src="layers.svg" alt="error by layer">
{"".join(sections)}
<p><a href="attention.html">Every attention node, with its module and source line</a></p>
</html>
"""


def _section(result: ModelResult) -> str:
    speed = _table(
        ("workload", "SDPA", "torch_sage", "speed-up"),
        (
            (timing.workload, *(f"{1e3 * t:.1f} ms" for t in timing.medians), timing.goal().value)
            for timing in result.timings
        ),
    )
    layers = _table(
        ("call", "query", "key", "cosine", "relative L1"),
        (
            (str(e.call), e.query, e.key, f"{e.cosine:.6f}", f"{e.relative_l1:.4f}")
            for e in result.layers
        ),
    )
    return (
        f"<h2>{html.escape(result.title)}</h2>{_goal_table(result.all_goals)}{speed}"
        f"<details><summary>attention nodes</summary>{_nodes_table(result)}</details>"
        f"<details><summary>error by layer</summary>{layers}</details>"
    )


def _goal_table(goals: list[Goal]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(goal.name)}<td>{html.escape(goal.value)}"
        f"<td>{html.escape(goal.target)}"
        + ('<td class="met">met' if goal.met else '<td class="missed">missed')
        for goal in goals
    )
    return f"<table><tr><th>goal<th>result<th>target<th>{rows}</table>"


def _nodes_table(result: ModelResult) -> str:
    return _table(("nodes", "query", "key", "fate"), result.nodes.rows())


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = "".join(f"<th>{html.escape(cell)}" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}" for c in row) for row in rows)
    return f"<table><tr>{header}{body}</table>"
