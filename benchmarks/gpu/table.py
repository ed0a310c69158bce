"""The benchmark's records as text: a line per problem while it runs, tables at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]
BOTH = ("kernel", "whole")
NONE = "-"  # not measured


def tflops(record: Record, name: str, call: str) -> float:
    """Return the TFLOPS of a call, NaN if it was not measured; a "whole" may be all there is."""
    times = record["contenders"].get(name, {}).get("times", {})
    timing = times.get(call) or (times.get("whole") if call == "kernel" else None)
    return record["flops"] / timing["median"] / 1e9 if timing else math.nan


def best_peer(record: Record, call: str, ours: Sequence[str]) -> float:
    """Return the TFLOPS of the fastest contender that is not one of ``ours``."""
    found = [tflops(record, name, call) for name in record["contenders"] if name not in ours]
    return max((x for x in found if not math.isnan(x)), default=math.nan)


def cell(record: Record, name: str) -> str:
    """Return "kernel/whole" in TFLOPS, or the one number of a contender that does not quantize."""
    kernel, whole = (tflops(record, name, call) for call in BOTH)
    if math.isnan(whole):
        return NONE
    return f"{kernel:.0f}" if kernel == whole else f"{kernel:.0f}/{whole:.0f}"


def title(record: Record) -> str:
    """Return the head dimension and the mask."""
    return f"D={record['head_dim']} {'causal' if record['is_causal'] else 'full'}"


def ratios(record: Record, ours: Sequence[str]) -> str:
    """Return our first contender over the best peer: kernel, whole op."""
    cells = []
    for call in BOTH:
        ratio = tflops(record, ours[0], call) / best_peer(record, call, ours)
        cells.append(NONE if math.isnan(ratio) else f"{ratio:.2f}x")
    return " / ".join(cells)


def line(record: Record, ours: Sequence[str]) -> str:
    """Return all that was measured of one problem."""
    text = [f"{title(record)} L={record['length']} B={record['batch']}"]
    for name, found in record["contenders"].items():
        if "problem" in found:
            text.append(f"  {name:11} {found['problem']}")
            continue
        timing = found["times"]["whole"]
        parts = [f"{call} {t['median']:.3f} ms" for call, t in found["times"].items()]
        errors = [f"{data} {error:.4f}" for data, error in found["errors"].items()]
        text.append(
            f"  {name:11} {cell(record, name):>9} TFLOPS  {', '.join(parts)}; rel L1 "
            f"{', '.join(errors)}; {timing['mhz']:.0f} MHz {timing['watts']:.0f} W"
        )
    if ours[0] in record["contenders"]:
        text.append(f"  {ours[0]} / best peer, kernel / whole: {ratios(record, ours)}")
    return "\n".join(text)


def tables(records: Sequence[Record], ours: Sequence[str]) -> str:
    """Return Markdown: speed in TFLOPS, kernel/whole, and the errors on each kind of data."""
    names = list(dict.fromkeys(name for record in records for name in record["contenders"]))
    with_ours = ours[0] in names
    last = [f"{ours[0]} / best peer, kernel / whole"] if with_ours else []
    rows = [["D, mode", "L", *names, *last]]
    for record in records:
        cells = [cell(record, name) for name in names]
        mine = [ratios(record, ours)] if with_ours else []
        rows.append([title(record), str(record["length"]), *cells, *mine])
    errors = [["D, mode", "L", "data, relative L1", *names]]
    for record in records:
        found = [record["contenders"].get(name, {}).get("errors", {}) for name in names]
        kinds = list(dict.fromkeys(data for x in found for data in x))
        for data in kinds if len(kinds) > 1 else ():  # where other data was judged, too
            cells = [f"{x[data]:.4f}" if data in x else NONE for x in found]
            errors.append([title(record), str(record["length"]), data, *cells])
    return f"{markdown(rows)}\n\n{markdown(errors)}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table, the first one being its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)
