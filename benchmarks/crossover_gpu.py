"""Where torch's fastest backend is faster than ours on this GPU: the numbers of crossover.py.

bf16, whole op, medians on the device; the fastest of torch's own choice, FlashAttention and cuDNN
counts. Prints a rule for each kind of mask: from there on no measured shape got slower.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.bench_attention import fit_crossover
from benchmarks.gpu import timing
from benchmarks.gpu.sage import ACCURATE, FAST
from benchmarks.shapes import Shape
from torch_sage.recipes import Recipe

BACKENDS = (None, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
MASKS = ("full", "causal", "masked")


def shapes(head_dims: Sequence[int], is_causal: bool) -> Iterator[Shape]:
    """Yield self-attention of few and many heads, few and grouped key heads, cross-attention."""
    for head_dim in head_dims:
        for length in (256, 512, 1024, 1536, 2048, 3072, 4096, 6144):
            for batch, heads in ((1, 8), (1, 24), (2, 32), (8, 16)):
                yield Shape(batch, heads, heads, length, length, head_dim, is_causal)
        for length in (1024, 2048, 4096):
            yield Shape(1, 32, 8, length, length, head_dim, is_causal)
            if not is_causal:
                yield Shape(2, 24, 24, length, 256, head_dim, is_causal)
                yield Shape(2, 24, 24, 128, length, head_dim, is_causal)


def exact(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
) -> dict[str, Callable[[], Tensor]]:
    """Return torch's contenders that take this input."""

    def call(backend: SDPBackend | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            arguments: dict[str, Any] = {"attn_mask": mask, "is_causal": is_causal}
            grouped = q.shape[1] != k.shape[1]
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **arguments, enable_gqa=grouped)

        return run

    calls = {}
    for backend in BACKENDS:
        run = call(backend)
        try:
            run()
        except RuntimeError:  # no kernel of this backend takes it
            continue
        calls["torch" if backend is None else backend.name] = run
    return calls


def milliseconds(run: Callable[[], Tensor], seconds: float) -> float:
    """Return the median time of a call."""
    return statistics.median(timing.turn(run, seconds).times)


def measure(shape: Shape, kind: str, seconds: float, recipe: Recipe) -> dict[str, float]:
    """Return the milliseconds of every contender."""

    def normal(heads: int, tokens: int) -> Tensor:
        size = (shape.batch, heads, tokens, shape.head_dim)
        return torch.randn(size, device="cuda", dtype=torch.bfloat16)

    q = normal(shape.heads_q, shape.seqlen_q)
    k, v = (normal(shape.heads_kv, shape.seqlen_k) for _ in range(2))
    mask = None
    if kind == "masked":
        mask = torch.rand(shape.seqlen_q, shape.seqlen_k, device="cuda") > 0.3
    causal = "top_left" if shape.is_causal else "none"
    calls = exact(q, k, v, mask, shape.is_causal)
    calls["sage"] = lambda: torch.ops.torch_sage.sdpa(q, k, v, mask, causal, **recipe.op_kwargs())
    calls["sage"]()
    return {name: milliseconds(run, seconds) for name, run in calls.items()}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.01, help="time spent on each call")
    parser.add_argument(
        "--head-dims",
        type=int,
        nargs="+",
        default=[64, 128],
        help="of one rule: see crossover.WIDTHS",
    )
    parser.add_argument("--kinds", nargs="+", choices=MASKS, default=MASKS)
    parser.add_argument("--accurate", action="store_true", help="of the recipe with P in bf16")
    parser.add_argument("--json", type=Path, help="write every time")
    arguments = parser.parse_args()
    recipe = ACCURATE if arguments.accurate else FAST
    records = []
    with torch.inference_mode():
        for kind in arguments.kinds:
            measured = []
            for shape in shapes(arguments.head_dims, kind == "causal"):
                times = measure(shape, kind, arguments.seconds, recipe)
                speedup = min(ms for name, ms in times.items() if name != "sage") / times["sage"]
                measured.append((shape, speedup))
                records.append({"shape": shape._asdict(), "kind": kind, "milliseconds": times})
                print(f"{kind:7} {shape.name:40} x{speedup:.2f}", flush=True)
            print(f"{kind}={fit_crossover(measured)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(records))


if __name__ == "__main__":
    main()
