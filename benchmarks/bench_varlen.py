"""Packed sequences on a GPU: our recipes, torch's varlen_attn, FlashAttention-3 where it imports.

Where all lengths are equal, also each on a batch. bf16, 32 heads, whole op, medians on the device;
FLOPs are those of the pairs attended to. ``python -m benchmarks.bench_varlen`` prints a Markdown
table; ``--equal 4096 32768`` takes so many tokens in sequences of equal lengths, from which the
rule for packed sequences in ``torch_sage/crossover.py`` was made.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from benchmarks.gpu import timing
from benchmarks.gpu.table import markdown
from tests.numerics import relative_l1
from torch_sage.ops import sdpa, varlen_sdpa
from torch_sage.recipes import SUPPORT

HEADS = 32
LENGTHS = {
    "16 x 2048": [2048] * 16,
    "64 of 100 to 1900": [100 + (i * 797) % 1801 for i in range(64)],
    "20000 and 50 x 30": [20000] + [30] * 50,
    "1000 x 40": [40] * 1000,
}
EQUAL = (256, 512, 1024, 2048, 4096)
RECIPES = {
    "triton": SUPPORT["cuda"].default,
    "mma": SUPPORT["cuda.sm80"].default,
    "hopper": SUPPORT["cuda.sm90"].default,
}


def flops(lengths: Sequence[int], head_dim: int, is_causal: bool) -> int:
    """Return multiplications and additions of exact attention."""
    pairs = sum(n * (n + 1) // 2 if is_causal else n * n for n in lengths)
    return 4 * HEADS * head_dim * pairs


def calls(lengths: Sequence[int], head_dim: int, is_causal: bool) -> dict[str, Callable[[], Any]]:
    """Return what is timed; the first one is the yardstick of the others."""
    q, k, v = torch.randn(3, sum(lengths), HEADS, head_dim, device="cuda").bfloat16()
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    longest = max(lengths)
    packed = (q, k, v, starts, starts, longest, longest)
    window = (-1, 0) if is_causal else (-1, -1)
    causal = "bottom_right" if is_causal else "none"
    found: dict[str, Callable[[], Any]] = {
        "torch": lambda: varlen_attn(*packed, window_size=window),
    }
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_varlen_func

        found["FA3"] = lambda: flash_attn_varlen_func(
            q, k, v, starts, starts, longest, longest, causal=is_causal
        )
    for name, recipe in RECIPES.items():
        found[name] = partial(varlen_sdpa, *packed, causal, **recipe.op_kwargs())
    if len(set(lengths)) == 1:
        shape = (len(lengths), longest, HEADS, head_dim)
        batch = [x.view(shape).transpose(1, 2) for x in (q, k, v)]

        def flat(attend: Callable[..., torch.Tensor], **others: Any) -> torch.Tensor:
            return attend(*batch, **others).transpose(1, 2).flatten(0, 1)

        found["torch, batch"] = partial(flat, F.scaled_dot_product_attention, is_causal=is_causal)
        for name, recipe in RECIPES.items():
            order = {"causal": causal, "output_order": "bshd"}
            found[f"{name}, batch"] = partial(flat, sdpa, **order, **recipe.op_kwargs())
    return found


def main() -> None:
    """Time all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seconds", type=float, default=0.1, help="of a contender's turn")
    parser.add_argument("--equal", type=int, nargs="+", help="of equal lengths, so many tokens")
    parser.add_argument("--only", nargs="+", default=[], help="contenders beside torch")
    arguments = parser.parse_args()
    rows = [["lengths", "D", "mode", "contender", "ms", "TFLOPS", "rel L1 to torch's"]]
    packs = LENGTHS
    if arguments.equal:
        equal = [(t // n, n) for t in arguments.equal for n in EQUAL if n <= t]
        packs = {f"{count} x {length}": [length] * count for count, length in equal}
    for name, lengths in packs.items():
        for head_dim in arguments.head_dims:
            for is_causal in (False, True):
                contenders = {
                    who: run
                    for who, run in calls(lengths, head_dim, is_causal).items()
                    if who in ("torch", *arguments.only) or not arguments.only
                }
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
