"""The attention nodes of one model's compiled graphs, from ``torch_sage.report()``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch_sage.demo.model import Goal
from torch_sage.inductor.records import AttentionRecord
from torch_sage.inductor.reporting import Report, report
from torch_sage.ops.reasons import ReasonCode

# Why an eligible node may stay exact: it is small enough for SDPA to be the faster one.
_ACCEPTED = {str(ReasonCode.BELOW_CROSSOVER)}


@dataclass(frozen=True)
class AttentionNodes:
    """What became of each attention node, and how many at least had to be rewritten."""

    records: tuple[AttentionRecord, ...]
    at_least: int

    @classmethod
    def since(cls, before: Report, at_least: int) -> AttentionNodes:
        """Return the nodes of graphs that were compiled after the report ``before``."""
        graphs = Counter({graph.records: graph.compiled for graph in report().graphs})
        graphs.subtract({graph.records: graph.compiled for graph in before.graphs})
        return cls(tuple(r for records in graphs.elements() for r in records), at_least)

    def goal(self) -> Goal:
        """Return whether every node that torch_sage is for was rewritten."""
        rewritten = sum(record.rewritten for record in self.records)
        reasons = Counter(str(reason.code) for r in self.records for reason in r.reasons)
        skipped = ", ".join(f"{code} {count}" for code, count in sorted(reasons.items()))
        return Goal(
            name="attention nodes rewritten",
            value=f"{rewritten} of {len(self.records)}"
            + (f"; skipped: {skipped}" if skipped else ""),
            target=f"all eligible, >= {self.at_least}",
            met=rewritten >= self.at_least and reasons.keys() <= _ACCEPTED,
        )

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield count, query, key and fate of each group of equal nodes."""
        groups = Counter(
            (record.query, record.key, record.recipe or "; ".join(r[1] for r in record.reasons))
            for record in self.records
        )
        for (query, key, fate), count in groups.items():
            yield f"{count}x", query, key, fate

    def to_data(self) -> list[dict[str, Any]]:
        """Return the records as JSON-serializable data."""
        return [record.to_dict() for record in self.records]
