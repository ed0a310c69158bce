"""What became of every attention node that Inductor compiled in this process."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from torch_sage.inductor.html import page
from torch_sage.inductor.passes import COUNTER, REPORT_COUNTER
from torch_sage.inductor.records import AttentionRecord
from torch_sage.inductor.switch import is_enabled, missing_hooks


@dataclass(frozen=True)
class GraphReport:
    """One graph with attention in it."""

    records: tuple[AttentionRecord, ...]
    """Its attention nodes, in graph order."""

    compiled: int = 1
    """How often a graph with these records was compiled, or loaded from a cache."""


@dataclass(frozen=True)
class Report:
    """Attention nodes by graph, and why there may be fewer than expected."""

    graphs: tuple[GraphReport, ...]
    """Graphs with attention, in the order of their first compilation."""

    notes: tuple[str, ...] = ()
    """What kept the passes from running, if anything did."""

    @property
    def records(self) -> tuple[AttentionRecord, ...]:
        """All attention nodes, once for each time that their graph was compiled."""
        return tuple(r for graph in self.graphs for r in graph.records * graph.compiled)

    @property
    def rewritten(self) -> int:
        """How many attention nodes became torch_sage ops."""
        return sum(record.rewritten for record in self.records)

    @property
    def skipped(self) -> int:
        """How many attention nodes were left alone."""
        return len(self.records) - self.rewritten

    @property
    def reasons(self) -> Counter[str]:
        """How often each reason code kept a node from being rewritten."""
        return Counter(str(reason.code) for r in self.records for reason in r.reasons)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-serializable data."""
        return {
            "rewritten": self.rewritten,
            "skipped": self.skipped,
            "reasons": dict(self.reasons),
            "notes": list(self.notes),
            "graphs": [
                {"compiled": g.compiled, "nodes": [record.to_dict() for record in g.records]}
                for g in self.graphs
            ],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON text, and write it to ``path`` if given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """Return the report as one static page, and write it to ``path`` if given."""
        text = page(self.to_dict())
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        """Return the report as text."""
        lines = [f"torch_sage: {self.rewritten} attention nodes rewritten, {self.skipped} skipped"]
        lines += [f"note: {note}" for note in self.notes]
        for number, graph in enumerate(self.graphs):
            lines.append(f"graph {number} (compiled {graph.compiled}x)")
            lines += [f"  {_line(record)}" for record in graph.records]
        return "\n".join(lines)


def report() -> Report:
    """Return what the passes did in this process so far, warm caches included.

    It is read from ``torch._dynamo.utils.counters["inductor"]``; clearing that clears the report.
    """
    graphs = tuple(
        GraphReport(_parse(key.removeprefix(REPORT_COUNTER)), count)
        for key, count in list(counters["inductor"].items())
        if key.startswith(REPORT_COUNTER)
    )
    return Report(graphs, tuple(_notes()))


def _parse(payload: str) -> tuple[AttentionRecord, ...]:
    return tuple(map(AttentionRecord.from_dict, json.loads(payload)))


def _notes() -> list[str]:
    """Return what is known to have kept graphs away from the passes."""
    notes = []
    seen = counters["inductor"].get(f"{COUNTER}graphs", 0)
    unseen = counters["stats"].get("unique_graphs", 0) - seen
    if not seen:
        notes.append("the passes have not run on any graph in this process")
    elif unseen > 0:
        notes.append(f"at least {unseen} graph(s) were compiled without the passes")
    if not is_enabled() and not seen:
        notes.append("torch_sage is not enabled; call enable() or compile with options()")
    notes += [
        f"{name} was reassigned after enable(), which removed the pass; call enable() again"
        for name in missing_hooks()
    ]
    for switch in ("use_joint_graph_passes", "use_post_grad_passes"):
        if not getattr(inductor_config, switch):
            notes.append(f"Inductor's {switch} is False, so the passes do not run")
    if unseen > 0:
        notes.append(
            "reasons for that: compiled before enable() or without options(), mode 'lite' (which "
            "has no joint passes), hooks overwritten by a patch, or another backend than Inductor"
        )
    return notes


def _line(record: AttentionRecord) -> str:
    where = " ".join(filter(None, (record.module, f"({record.source})" if record.source else "")))
    shapes = f"q {record.query}, k {record.key}" if record.query else record.target
    mask = f", mask {record.attn_mask}" if record.attn_mask else ""
    causal = f", causal {record.causal}" if record.causal not in ("", "none") else ""
    outcome = record.outcome or "skipped: " + "; ".join(
        f"{reason.code} ({reason.message})" for reason in record.reasons
    )
    return f"{where or record.target}: {shapes}{mask}{causal} [{record.pattern}] -> {outcome}"
