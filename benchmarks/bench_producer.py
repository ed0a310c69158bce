"""What it gains that attention norms and rotates Q and K itself: layers, and the op alone.

Layers of Llama (RoPE), Flux and Wan (norm, RoPE), see ``gpu/blocks.py``: the time of a compiled
step with torch's attention, with ours, and with ours that norms and rotates; how many kernels
Inductor generated for each; and how alike the outputs are. ``--rule`` leaves out the layer, and
varies how Q and K are made (``gpu/rotations.py``) and the number of tokens: what
``torch_sage/fusion.py`` says follows from it.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.graph import GraphLowering

import torch_sage
from benchmarks import bench_gpu, harness
from benchmarks.gpu import blocks, rotations
from benchmarks.gpu.table import Record, markdown
from torch_sage import SageConfig

SAGE = {
    "sage": SageConfig(dispatch="always", producers="never"),
    "fused": SageConfig(dispatch="always", producers="always"),
}
CALL = {
    "sage": re.compile(r"torch\.ops\.torch_sage\.sdpa\.default\("),
    "fused": re.compile(r"torch\.ops\.torch_sage\.rotary_sdpa\.default\("),
}
LAUNCH = re.compile(r"^\s*(triton_\w+)\.run\(", re.MULTILINE)


def launches(codes: list[str]) -> list[str]:
    """Return the Triton kernels that generated code launches, in order."""
    return [name for code in codes for name in LAUNCH.findall(code)]


def compiled(
    name: str, run: Callable[..., Tensor], inputs: tuple[Tensor, ...], **settings: Any
) -> tuple[Callable[[], Tensor], Tensor, list[str]]:
    """Return the compiled step, what it returns, and the kernels that it launches."""
    options = torch_sage.options(SAGE[name]) if name in SAGE else None
    step, codes = torch.compile(run, options=options, **settings), []
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        patch.object(GraphLowering, "save_output_code", codes.append),
    ):
        output = step(*inputs)
    if name in CALL and sum(len(CALL[name].findall(code)) for code in codes) != 1:
        raise RuntimeError(f"{name} must call {CALL[name].pattern}, got {torch_sage.report()}")
    return lambda: step(*inputs), output, launches(codes)


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the least cosine similarity of a token's output."""
    rows = (x.flatten(0, -2) for x in (a, b))
    parts = zip(*(x.split(4096) for x in rows), strict=True)
    return min(F.cosine_similarity(x.float(), y.float(), dim=-1).min().item() for x, y in parts)


def medians(steps: Mapping[str, Callable[[], Tensor]], seconds: float) -> Record:
    """Return the times of all steps, in turns."""
    times = bench_gpu.time_all({n: {"step": step} for n, step in steps.items()}, seconds)
    return {name: times[name]["step"]._asdict() for name in steps}


def measure(name: str, tokens: int, seconds: float) -> Record:
    """Compile, compare and time one layer in three ways."""
    layer, inputs = blocks.build(name, tokens, "cuda")
    steps, outputs, kernels = {}, {}, {}
    for way in ("default", *SAGE):
        steps[way], outputs[way], kernels[way] = compiled(way, layer, inputs, dynamic=False)
    alike = {other: cosine(outputs["fused"], outputs[other]) for other in ("default", "sage")}
    return {
        "block": name,
        "tokens": tokens,
        "step": medians(steps, seconds),
        "kernels": kernels,
        "cosine": alike,
    }


def row(record: Record) -> list[str]:
    """Return the line of the table for one layer."""
    ms = {way: timing["median"] for way, timing in record["step"].items()}
    counts = [str(len(record["kernels"][way])) for way in SAGE]
    return [
        record["block"], str(record["tokens"]), *(f"{t:.3f}" for t in ms.values()),
        f"{ms['sage'] / ms['fused']:.3f}", " → ".join(counts),
        f"{record['cosine']['sage']:.5f}", f"{record['step']['fused']['mhz']:.0f}",
    ]  # fmt: skip


HEAD = ["layer", "tokens", "default, ms", "sage, ms", "fused, ms", "gain", "Triton kernels",
        "cosine", "MHz"]  # fmt: skip


def sweep(name: str, seconds: float) -> list[Record]:
    """Compile one kind of Q and K once for all numbers of tokens, and time each of those."""
    kind, records = rotations.KINDS[name], []
    torch._dynamo.reset()
    run = rotations.attend(kind)
    ways = {way: torch.compile(run, options=torch_sage.options(SAGE[way])) for way in SAGE}
    for tokens in rotations.TOKENS:
        inputs = rotations.operands(kind, tokens, "cuda")
        steps = {way: lambda run=run, x=inputs: run(*x) for way, run in ways.items()}
        outputs = {way: step() for way, step in steps.items()}
        timed = medians(steps, seconds)
        records.append(
            {
                "kind": name,
                "tokens": tokens,
                "elements": rotations.elements(kind, tokens),
                "step": timed,
                "gain": timed["sage"]["median"] / timed["fused"]["median"],
                "cosine": cosine(outputs["sage"].flatten(2), outputs["fused"].flatten(2)),
            }
        )
    return records


def rule_row(record: Record) -> list[str]:
    """Return the line of the table for one kind and number of tokens."""
    ms = [f"{record['step'][way]['median']:.3f}" for way in SAGE]
    sizes = [str(record["tokens"]), f"{record['elements'] / 1e6:.1f}"]
    return [record["kind"], *sizes, *ms, f"{record['gain']:.3f}", f"{record['cosine']:.5f}"]


RULE_HEAD = ["kind", "tokens", "elements, 10^6", "sage, ms", "fused, ms", "gain", "cosine"]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", nargs="+", choices=blocks.BLOCKS, default=[*blocks.BLOCKS])
    parser.add_argument("--rule", action="store_true", help="the op alone")
    parser.add_argument("--kinds", nargs="+", choices=rotations.KINDS, default=[*rotations.KINDS])
    parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each step")
    parser.add_argument("--limit", type=float, default=70, help="start no case after this")
    parser.add_argument("--json", type=Path, help="write it after every case")
    arguments = parser.parse_args()
    start = time.perf_counter()
    stamp: dict[str, Any] = {**harness.environment(), "gpu": torch.cuda.get_device_name()}
    print(" ".join(f"{name}={value}" for name, value in stamp.items()), flush=True)
    records: list[Record] = []
    line = rule_row if arguments.rule else row
    cases: list[tuple[str, Callable[[], list[Record]]]] = [
        (name, lambda name=name: sweep(name, arguments.seconds)) for name in arguments.kinds
    ]
    if not arguments.rule:
        cases = [
            (f"{name} {n}", lambda name=name, n=n: [measure(name, n, arguments.seconds)])
            for name in arguments.blocks
            for n in blocks.BLOCKS[name].tokens
        ]
    with torch.no_grad():
        for title, run in cases:
            if time.perf_counter() - start > arguments.limit:
                print(f"left out: {title}")
                continue
            found = run()
            records += found
            for record in found:
                print(" | ".join(line(record)), record.get("kernels", ""), flush=True)
            if arguments.json:
                text = json.dumps({"environment": stamp, "records": records}, indent=1)
                arguments.json.write_text(text + "\n")
    head = RULE_HEAD if arguments.rule else HEAD
    print(f"{time.perf_counter() - start:.0f} s\n\n{markdown([head, *map(line, records)])}")
    if arguments.rule:
        print("\nfaster at these numbers of tokens:", rotations.faster(records))


if __name__ == "__main__":
    main()
