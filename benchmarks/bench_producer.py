"""What fusing quantization into the kernels that produce K could gain: a study of single layers.

Layers of Llama (RoPE), Flux and Wan (norm, RoPE) compiled as they are; see ``gpu/blocks.py``. The
time of a step, and by torch.profiler what its kernels take: "producer" are those whose result is Q
or K as attention reads them, by the code that Inductor generated; "prepare" quantizes K and V,
"attention" attends and quantizes Q; "linear" are the products; all other kernels are "rest".

A producer that wrote codes of K would save the bytes of K in 16 bits, written by the producer and
read by prepare: ``K fused`` is their time at the speed of a copy, and as a share of the step. It
is a bound: scales need the largest element and smoothing the mean before the first code. ``Q and
K`` also counts what codes of Q would save, which attention quantizes while it reads.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile

import torch_sage
from benchmarks import bench_gpu, harness
from benchmarks.gpu import blocks
from benchmarks.gpu.table import Record, markdown
from torch_sage import SageConfig

CONFIG = SageConfig(dispatch="always")
PARTS = ("linear", "producer", "prepare", "attention", "rest")
STEPS = 5  # profiled
PREPARE = re.compile(r"prepare|quantize|statistics|_rows_kernel|_mean|query_amax", re.IGNORECASE)
ATTENTION = re.compile(r"attention|torch_sage.*attend|flash|fmha|sdpa", re.IGNORECASE)
LINEAR = re.compile(r"gemm|nvjet|cutlass|cublas|triton_tem_|splitk", re.IGNORECASE)
CALL = re.compile(r"torch\.ops\.torch_sage\.sdpa\.default\((.*)\)")
LAUNCH = re.compile(r"^\s*(triton_\w+)\.run\((.*)\)", re.MULTILINE)
BUFFER = re.compile(r"\bbuf\d+\b")


def producers(code: str) -> set[str]:
    """Return the names of the Triton kernels that write Q or K of an attention in ``code``."""
    wanted: set[str] = set()
    for call in CALL.finditer(code):
        wanted.update(BUFFER.findall(call[1])[:2])  # the third one is V
    return {launch[1] for launch in LAUNCH.finditer(code) if wanted & {*BUFFER.findall(launch[2])}}


def part_of(kernel: str, produce: set[str]) -> str:
    """Return the part of a step that a kernel belongs to."""
    if kernel in produce:
        return "producer"
    if kernel.startswith("triton_") and not LINEAR.search(kernel):  # Inductor's, named by ops
        return "rest"
    if PREPARE.search(kernel):
        return "prepare"
    if ATTENTION.search(kernel):
        return "attention"
    return "linear" if LINEAR.search(kernel) else "rest"


def kernel_times(step: Callable[[], Tensor]) -> Counter[str]:
    """Return the milliseconds that each kernel takes in one step."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[event.key] += event.self_device_time_total / STEPS / 1e3
    return times


def copy_speed(size: int) -> float:
    """Return the bytes per millisecond, read and written, of a copy of ``size`` bytes."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    timed = bench_gpu.time_all({"copy": {"copy": lambda: target.copy_(source)}}, 0.1)
    return 2 * size / timed["copy"]["copy"].median


def measure(name: str, tokens: int, seconds: float) -> Record:
    """Compile, profile and time one layer with torch's attention and with ours."""
    layer, inputs = blocks.build(name, tokens, "cuda")
    with torch._inductor.config.patch(force_disable_caches=True):
        sage = torch.compile(layer, dynamic=False, options=torch_sage.options(CONFIG))
        _, codes = run_and_get_code(sage, *inputs)
    if not any(CALL.search(code) for code in codes):
        raise RuntimeError(f"{name} must call torch_sage::sdpa, got {torch_sage.report()}")
    produce = {kernel for code in codes for kernel in producers(code)}
    default = torch.compile(layer, dynamic=False)
    steps = {"default": lambda: default(*inputs), "sage": lambda: sage(*inputs)}
    for step in steps.values():
        step()
    times = bench_gpu.time_all({n: {"step": step} for n, step in steps.items()}, seconds)
    kernels = kernel_times(steps["sage"])
    split = dict.fromkeys(PARTS, 0.0)
    for kernel, taken in kernels.items():
        split[part_of(kernel, produce)] += taken
    sizes = blocks.BLOCKS[name].sizes
    q, k = (tokens * heads * blocks.HEAD_DIM for heads in (sizes.heads, sizes.heads_kv))
    speed = copy_speed(2 * k)
    # K: 2 bytes written and 2 read again; Q: 1 of 2 bytes, written and read.
    saved = {"K fused": 4 * k / speed, "Q and K": (4 * k + 2 * q) / speed}
    return {
        "block": name,
        "tokens": tokens,
        "step": {n: times[n]["step"]._asdict() for n in steps},
        "split": split,
        "saved": saved,
        "copy_bytes_per_ms": speed,
        "producers": sorted(produce),
        "kernels": dict(kernels.most_common()),
    }


def row(record: Record) -> list[str]:
    """Return the line of the table for one record."""
    default, sage = (record["step"][name]["median"] for name in ("default", "sage"))
    bounds = [f"{ms:.3f} ({100 * ms / sage:.1f} %)" for ms in record["saved"].values()]
    split = [f"{record['split'][part]:.3f}" for part in PARTS]
    mhz = f"{record['step']['sage']['mhz']:.0f}"
    return [
        record["block"], str(record["tokens"]), f"{default:.3f}", f"{sage:.3f}", *split, *bounds,
        mhz,
    ]  # fmt: skip


HEAD = ["block", "tokens", "default, ms", "sage, ms", *PARTS, "K fused", "Q and K", "MHz"]


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", nargs="+", choices=blocks.BLOCKS, default=[*blocks.BLOCKS])
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each step")
    parser.add_argument("--limit", type=float, default=180, help="start no case after this")
    parser.add_argument("--json", type=Path, help="write it after every case")
    arguments = parser.parse_args()
    start = time.perf_counter()
    stamp: dict[str, Any] = {**harness.environment(), "gpu": torch.cuda.get_device_name()}
    print(" ".join(f"{name}={value}" for name, value in stamp.items()), flush=True)
    records: list[Record] = []
    with torch.no_grad():
        for name in arguments.blocks:
            for tokens in blocks.BLOCKS[name].tokens:
                if time.perf_counter() - start > arguments.limit:
                    print(f"left out: {name} {tokens}")
                    continue
                records.append(measure(name, tokens, arguments.seconds))
                print(" | ".join(row(records[-1])), f"producers: {records[-1]['producers']}")
                if arguments.json:
                    text = json.dumps({"environment": stamp, "records": records}, indent=1)
                    arguments.json.write_text(text + "\n")
    print(f"{time.perf_counter() - start:.0f} s\n\n{markdown([HEAD, *map(row, records)])}")


if __name__ == "__main__":
    main()
