"""Speed and error of attention on a GPU: our kernels, torch's backends and the 8-bit peers.

bf16 in, bf16 out, H = 32, B = min(4, 32768 / L); TFLOPS = 4 B H L^2 D / time, causal half. Every
call is timed on the device, medians; contenders take turns, once forwards and once backwards. A
cell "kernel/whole" gives the attention kernel on operands that are ready, and the whole op with its
quantization. Peers that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.gpu import problem, table, timing
from benchmarks.gpu.contender import Calls, Contender, Unsupported
from benchmarks.gpu.peers import PEERS
from benchmarks.gpu.problem import Problem
from benchmarks.gpu.sage import MMA, ROTATED, SAGE, TRITON
from benchmarks.gpu.table import Record
from benchmarks.gpu.timing import Timing, Turn

CONTENDERS: dict[str, Contender] = {**PEERS, **SAGE, **ROTATED, **MMA, **TRITON}
OURS = (*SAGE, *ROTATED, *MMA, *TRITON)
JUDGED_HEADS = 2  # whose exact answer is computed
# More than this on N(0, 1) is a fault, not a format: FP8 with one scale per tensor has .06.
MOST_ERROR = 0.1


def present(names: Sequence[str]) -> list[str]:
    """Return the contenders that can run here, and say why the others cannot."""
    lacks = {name: CONTENDERS[name].lack() for name in names}
    for name, lack in lacks.items():
        if lack is not None:
            print(f"without {name}: {lack}", flush=True)
    return [name for name, lack in lacks.items() if lack is None]


def judge(calls: Calls, answer: torch.Tensor) -> float:
    """Call everything, which also compiles it; return the larger error of kernel and whole op."""
    outputs = {name: call() for name, call in calls.items()}
    return max(problem.relative_l1(outputs[n], answer) for n in table.BOTH if n in outputs)


def prepare(
    names: Sequence[str], task: Problem, most_error: float
) -> tuple[dict[str, Calls], dict[str, float], dict[str, str]]:
    """Return the calls and errors of the contenders that work, and what is wrong with the rest."""
    answer = problem.exact(task, JUDGED_HEADS)
    ready: dict[str, Calls] = {}
    errors: dict[str, float] = {}
    problems: dict[str, str] = {}
    for name in names:
        try:
            calls = CONTENDERS[name].calls(task)
            error = judge(calls, answer)
        except Unsupported as reason:
            problems[name] = str(reason)
        except Exception as failure:  # a contender that fails must not end the run of the others
            problems[name] = f"{type(failure).__name__}: {str(failure)[:300]}"
        else:
            if error <= most_error:
                ready[name], errors[name] = calls, error
            else:
                problems[name] = f"wrong: relative L1 error {error:.3f}"
    return ready, errors, problems


def time_all(ready: dict[str, Calls], seconds: float) -> dict[str, dict[str, Timing]]:
    """Return the times of every call: the contenders in turn, then once more in reverse."""
    order = [(name, call) for name, calls in ready.items() for call in calls]
    turns: dict[tuple[str, str], list[Turn]] = {key: [] for key in order}
    for name, call in (*order, *reversed(order)):
        turns[name, call].append(timing.turn(ready[name][call], seconds / 2))
    return {
        name: {call: timing.summary(turns[name, call]) for call in calls}
        for name, calls in ready.items()
    }


def measure(
    names: Sequence[str],
    shape: tuple[int, int, int, int],
    is_causal: bool,
    seconds: float,
    other_data: Sequence[str],
) -> Record:
    """Judge and time every contender on N(0, 1), judge it on ``other_data``; return one record."""
    task = problem.make(shape, is_causal, "normal")
    ready, errors, problems = prepare(names, task, MOST_ERROR)
    times = time_all(ready, seconds)
    judged = {"normal": errors}
    for data in other_data:
        other = problem.make(shape, is_causal, data)
        judged[data] = prepare(list(ready), other, float("inf"))[1]
    batch, _, length, head_dim = shape
    return {
        "batch": batch,
        "length": length,
        "head_dim": head_dim,
        "is_causal": is_causal,
        "flops": task.flops,
        "contenders": {
            name: {"problem": problems[name]}
            if name in problems
            else {
                "times": {call: timing._asdict() for call, timing in times[name].items()},
                "errors": {data: found[name] for data, found in judged.items() if name in found},
            }
            for name in names
        },
    }


def environment() -> dict[str, str | int]:
    """Return what the numbers depend on."""
    return {
        **harness.environment(),
        "gpu": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        "cudnn": torch.backends.cudnn.version() or "none",
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, or ``argv``, and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument(
        "--modes", nargs="+", choices=["full", "causal"], default=["full", "causal"]
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument(
        "--data-lengths", type=int, nargs="*", default=[4096], help="other data, too"
    )
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=[*PEERS, *SAGE], metavar="NAME"
    )
    parser.add_argument("--seconds", type=float, default=0.06, help="time spent on each call")
    parser.add_argument("--limit", type=float, default=230, help="start no problem after this")
    parser.add_argument("--json", type=Path, help="write it after every problem")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    stamp = environment()
    print(" ".join(f"{name}={value}" for name, value in stamp.items()), flush=True)
    names = present(arguments.contenders)
    records: list[Record] = []
    grid = itertools.product(arguments.head_dims, arguments.modes, arguments.lengths)
    with torch.inference_mode():
        for head_dim, mode, length in grid:
            seconds = time.perf_counter() - start
            if seconds > arguments.limit:
                print(f"left out at {seconds:.0f} s: D={head_dim} {mode} L={length}", flush=True)
                continue
            shape = (problem.batch_of(length), problem.HEADS, length, head_dim)
            other_data = list(problem.DATA)[1:] if length in arguments.data_lengths else []
            records.append(measure(names, shape, mode == "causal", arguments.seconds, other_data))
            print(table.line(records[-1], OURS), flush=True)
            if arguments.json:
                text = json.dumps({"environment": stamp, "records": records}, indent=1)
                arguments.json.write_text(text + "\n")
    print(f"{time.perf_counter() - start:.0f} s\n\n{table.tables(records, OURS)}")


if __name__ == "__main__":
    main()
