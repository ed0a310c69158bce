"""Speed of the whole op, quantization included, against torch's SDPA.

``--crossover`` prints the numbers of torch_sage/crossover.py instead, ``--overhead`` the cost of an
eager call on tiny tensors. ``--device cuda`` is bench_gpu.py, with its options: kernels alone and
whole ops beside all peers that are installed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_sage
from benchmarks import harness, shapes
from benchmarks.harness import Contender, Inputs
from benchmarks.shapes import Shape
from torch_sage.crossover import Crossover

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Two medians of the same function differ by less than this on a quiet machine.
NOISE = 0.03


def sage_op(inputs: Inputs) -> Tensor:
    """Run the op that compiled graphs call."""
    query, key, value, is_causal = inputs
    causal = "top_left" if is_causal else "none"
    return torch.ops.torch_sage.sdpa(query, key, value, None, causal)


def sage_api(inputs: Inputs) -> Tensor:
    """Run the public function, whatever it chooses."""
    query, key, value, is_causal = inputs
    enable_gqa = query.shape[1] != key.shape[1]
    return torch_sage.scaled_dot_product_attention(
        query, key, value, is_causal=is_causal, enable_gqa=enable_gqa
    )


CONTENDERS: dict[str, Contender] = {"sdpa": harness.sdpa, "op": sage_op, "api": sage_api}


def measure(shape: Shape, dtype: str, names: Sequence[str], seconds: float) -> dict[str, Any]:
    """Check the contenders on ``shape``, then time them; return one record."""
    inputs = harness.make_inputs(shape, DTYPES[dtype])
    contenders = {name: CONTENDERS[name] for name in names}
    errors = harness.check(contenders, inputs)
    timings = harness.time_paired(contenders, inputs, seconds)
    return {
        "shape": shape.name,
        "dtype": dtype,
        "flops": shape.flops,
        "errors": errors,
        "timings": {name: timing._asdict() for name, timing in timings.items()},
        "speedup": {n: timings["sdpa"].median / timings[n].median for n in names if n != "sdpa"},
    }


def print_record(record: dict[str, Any]) -> None:
    """Print one record as a line: median and half the spread between quartiles."""
    cells = [f"{record['shape']:32} {record['dtype']}"]
    for name, timing in record["timings"].items():
        spread = (timing["high"] - timing["low"]) / 2 / timing["median"]
        gflops = record["flops"] / timing["median"] / 1e9
        cells.append(
            f"{name} {timing['median'] * 1e3:9.3f} ms ±{spread:4.0%} {gflops:5.0f} GFLOP/s"
        )
    cells += [f"{name} x{speedup:.2f}" for name, speedup in record["speedup"].items()]
    print("  ".join(cells), flush=True)


def bench_speed(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the lengths of the speed table."""
    records = []
    chosen = [s for s in (*shapes.SPEED, shapes.LONGEST) if s.seqlen_q in arguments.lengths]
    for dtype in arguments.dtypes:
        for shape in chosen:
            records.append(measure(shape, dtype, ("sdpa", "op", "api"), arguments.seconds))
            print_record(records[-1])
    return records


def bench_overhead(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time calls that have nothing to compute."""
    inputs = harness.make_inputs(shapes.TINY, torch.float32)
    timings = harness.time_paired(CONTENDERS, inputs, arguments.seconds)
    for name, timing in timings.items():
        low, high = timing.low * 1e6, timing.high * 1e6
        print(f"{name:5} {timing.median * 1e6:6.2f} us per call ({low:.2f} to {high:.2f})")
    return [{"overhead": {name: timing._asdict() for name, timing in timings.items()}}]


def reuse(shape: Shape) -> float:
    """Return multiplications per element of q, k and v, as torch_sage/crossover.py counts them."""
    elements = shape.batch * shape.heads_q * shape.head_dim * (shape.seqlen_q + 2 * shape.seqlen_k)
    return multiplications(shape) / elements


def multiplications(shape: Shape) -> float:
    """Return the multiplications of both products, as torch_sage/crossover.py counts them."""
    return 2.0 * shape.batch * shape.heads_q * shape.head_dim * shape.seqlen_q * shape.seqlen_k


def fit_crossover(measured: Sequence[tuple[Shape, float]]) -> Crossover:
    """Return the rule that takes the most shapes, of those that take none which got slower."""
    best, most = Crossover(float("inf"), float("inf")), 0
    for least_reuse in sorted({reuse(shape) for shape, _ in measured}):
        for least_work in sorted({multiplications(shape) for shape, _ in measured}):
            taken = [
                speedup
                for shape, speedup in measured
                if reuse(shape) >= least_reuse and multiplications(shape) >= least_work
            ]
            if len(taken) > most and min(taken) >= 1 + NOISE:
                best, most = Crossover(least_reuse, least_work), len(taken)
    return best


def bench_crossover(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the shapes around the crossover and print the rule that follows."""
    records, measured = [], []
    for dtype in arguments.dtypes:
        for shape in shapes.CROSSOVER:
            records.append(measure(shape, dtype, ("sdpa", "op"), arguments.seconds))
            print_record(records[-1])
            measured.append((shape, records[-1]["speedup"]["op"]))
    rule = fit_crossover(measured)
    taken = sum(
        reuse(shape) >= rule.reuse and multiplications(shape) >= rule.multiplications
        for shape, _ in measured
    )
    faster = sum(speedup >= 1 + NOISE for _, speedup in measured)
    print(f"{rule}: takes {taken} of the {faster} shapes that got faster, of {len(measured)}")
    return records


def main() -> None:
    """Parse the command line and run."""
    choice = argparse.ArgumentParser(add_help=False)
    choice.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    chosen, rest = choice.parse_known_args()
    if chosen.device == "cuda":
        from benchmarks import bench_gpu  # needs Triton

        return bench_gpu.main(rest)
    parser = argparse.ArgumentParser(description=__doc__, parents=[choice])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--crossover", action="store_true", help="find where SDPA is faster")
    mode.add_argument("--overhead", action="store_true", help="time calls on tiny tensors")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    lengths = [*shapes.LENGTHS, shapes.LONGEST.seqlen_q]
    parser.add_argument("--lengths", nargs="+", type=int, choices=lengths, default=lengths)
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each shape")
    parser.add_argument("--json", type=Path, help="write records and environment to this file")
    arguments = parser.parse_args()
    environment = harness.environment()
    print(" ".join(f"{name}={value}" for name, value in environment.items()))
    bench = bench_speed
    if arguments.crossover:
        bench = bench_crossover
    elif arguments.overhead:
        bench = bench_overhead
    with torch.inference_mode():
        records = bench(arguments)
    if arguments.json is not None:
        text = json.dumps({"environment": environment, "records": records}, indent=1)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
