"""The report as one HTML page without external resources."""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
       padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid #8884; padding: .35rem .6rem; text-align: left;
         vertical-align: top; }
code { font-size: .92em; }
.rewritten { color: #1a7f37; } .skipped { color: #b35900; }
.bar { background: #b3590066; border-radius: 4px; height: .6rem; overflow: hidden; }
.bar div { background: #1a7f37; height: 100%; }
"""

_COLUMNS = ("module", "source", "query", "key", "value", "attn_mask", "causal", "pattern")


def page(report: dict[str, Any]) -> str:
    """Return the page for ``Report.to_dict()``."""
    total = report["rewritten"] + report["skipped"]
    share = 100 * report["rewritten"] / total if total else 0
    body = [
        "<h1>torch_sage report</h1>",
        f"<p><b class=rewritten>{report['rewritten']}</b> of {total} attention nodes rewritten, "
        f"<b class=skipped>{report['skipped']}</b> skipped.</p>",
        f"<div class=bar><div style='width:{share:.1f}%'></div></div>",
        *(f"<p class=skipped>{escape(note)}</p>" for note in report["notes"]),
        *_reasons(report["reasons"]),
    ]
    for number, graph in enumerate(report["graphs"]):
        body.append(f"<h2>Graph {number}, compiled {graph['compiled']}x</h2>")
        body.append(_table(graph["nodes"]))
    return (
        "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8><title>torch_sage report</title>"
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _reasons(reasons: dict[str, int]) -> list[str]:
    if not reasons:
        return []
    rows = "".join(
        f"<tr><td><code>{escape(code)}</code></td><td>{count}</td></tr>"
        for code, count in sorted(reasons.items())
    )
    return [f"<h2>Reasons</h2><table><tr><th>reason</th><th>nodes</th></tr>{rows}</table>"]


def _table(nodes: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("outcome", *_COLUMNS))
    rows = "".join(f"<tr>{_outcome(node)}{_cells(node)}</tr>" for node in nodes)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _outcome(node: dict[str, Any]) -> str:
    if node["recipe"]:
        also = f", with {node['producers']}" if node["producers"] else ""
        return f"<td class=rewritten>{escape(node['recipe'] + also)}</td>"
    reasons = "<br>".join(
        f"<code>{escape(r['code'])}</code> {escape(r['message'])}" for r in node["reasons"]
    )
    return f"<td class=skipped>{reasons}</td>"


def _cells(node: dict[str, Any]) -> str:
    return "".join(f"<td>{escape(str(node[name]))}</td>" for name in _COLUMNS)
