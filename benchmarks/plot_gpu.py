"""Draw what bench_gpu.py measured: TFLOPS over length, a panel per head dimension and mask.

Usage: python -m benchmarks.plot_gpu out.json out.png. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import zip_longest
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.gpu import table

COLUMNS = 3  # of panels, which fill one after another


def main() -> None:
    """Read the JSON and write the picture: whole ops solid, kernels alone dotted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    measured = json.loads(arguments.json.read_text())
    records = measured["records"]
    panels = list(dict.fromkeys(table.title(record) for record in records))
    names = list(dict.fromkeys(name for record in records for name in record["contenders"]))
    rows = math.ceil(len(panels) / COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4 * COLUMNS, 3.5 * rows), squeeze=False)
    lines = {}
    for axis, panel in zip_longest(axes.T.flat, panels):
        if panel is None:
            axis.remove()
            continue
        mine = [record for record in records if table.title(record) == panel]
        lengths = [record["length"] for record in mine]
        for i, name in enumerate(names):
            for call, style in zip(table.BOTH, (":", "-"), strict=True):
                speeds = [table.tflops(record, name, call) for record in mine]
                if all(map(math.isnan, speeds)):
                    continue
                (line,) = axis.plot(lengths, speeds, style, color=f"C{i}", marker=".")
                if call == "whole":
                    lines[name] = line
        axis.set(title=panel, xlabel="tokens", xscale="log", ylim=(0, None))
        axis.minorticks_off()
        axis.set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
    axes[0][0].set_ylabel("TFLOPS: whole op solid, kernel dotted")
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=len(lines))
    figure.suptitle(measured["environment"]["gpu"])
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(arguments.picture, dpi=80)


if __name__ == "__main__":
    main()
