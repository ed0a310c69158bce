"""Packed sequences on a GPU: ours beside torch's varlen_attn, and both on a batch of their lengths.

bf16, 32 heads, whole op, medians on the device; FLOPs are those of the pairs attended to.
``python -m benchmarks.bench_varlen`` prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

import torch_sage
from benchmarks.gpu import timing
from benchmarks.gpu.table import markdown
from tests.numerics import relative_l1

HEADS = 32
LENGTHS = {
    "16 x 2048": [2048] * 16,
    "64 of 100 to 1900": [100 + (i * 797) % 1801 for i in range(64)],
    "20000 and 50 x 30": [20000] + [30] * 50,
    "1000 x 40": [40] * 1000,
}


def flops(lengths: Sequence[int], head_dim: int, is_causal: bool) -> int:
    """Return multiplications and additions of exact attention."""
    pairs = sum(n * (n + 1) // 2 if is_causal else n * n for n in lengths)
    return 4 * HEADS * head_dim * pairs


def calls(lengths: Sequence[int], head_dim: int, is_causal: bool) -> dict[str, Callable[[], Any]]:
    """Return what is timed; the first one is the yardstick of the others."""
    q, k, v = torch.randn(3, sum(lengths), HEADS, head_dim, device="cuda").bfloat16()
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    packed = (q, k, v, starts, starts, max(lengths), max(lengths))
    window = (-1, 0) if is_causal else (-1, -1)
    found: dict[str, Callable[[], Any]] = {
        "torch": lambda: varlen_attn(*packed, window_size=window),
        "ours": lambda: torch_sage.varlen_attention(*packed, is_causal=is_causal),
    }
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0], HEADS, head_dim)
        batch = [x.view(shape).transpose(1, 2) for x in (q, k, v)]

        def flat(x: torch.Tensor) -> torch.Tensor:
            return x.transpose(1, 2).flatten(0, 1)

        recipe = {"qk": "int8", "granularity": "thread", "pv": "bf16", "smooth": "k"}
        semantics = (None, "top_left" if is_causal else "none")
        sdpa = torch.ops.torch_sage.sdpa
        found["torch, batch"] = lambda: flat(
            F.scaled_dot_product_attention(*batch, is_causal=is_causal)
        )
        found["ours, batch"] = lambda: flat(sdpa(*batch, *semantics, **recipe))
    return found


def main() -> None:
    """Time all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seconds", type=float, default=0.1, help="of a contender's turn")
    arguments = parser.parse_args()
    rows = [["lengths", "D", "mode", "contender", "ms", "TFLOPS", "rel L1 to torch's"]]
    for name, lengths in LENGTHS.items():
        for head_dim in arguments.head_dims:
            for is_causal in (False, True):
                contenders = calls(lengths, head_dim, is_causal)
                outputs = {who: run() for who, run in contenders.items()}
                turns: dict[str, list[timing.Turn]] = {who: [] for who in contenders}
                for _ in range(3):
                    for who, run in contenders.items():
                        turns[who].append(timing.turn(run, arguments.seconds))
                for who in contenders:
                    ms = timing.summary(turns[who]).median
                    speed = flops(lengths, head_dim, is_causal) / ms / 1e9
                    error = relative_l1(outputs[who], outputs["torch"])
                    cells = [f"{ms:.3f}", f"{speed:.0f}", f"{error:.4f}"]
                    mode = "causal" if is_causal else "full"
                    rows.append([name, str(head_dim), mode, who, *cells])
    print(markdown(rows))


if __name__ == "__main__":
    main()
