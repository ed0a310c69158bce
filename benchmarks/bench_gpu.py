"""Speed of the whole op on a GPU, quantization included, against each backend of torch's SDPA.

bf16 in, bf16 out, H = 32, B = min(4, 32768 / L); TFLOPS = 4 B H L^2 D / time, causal half; medians.
``--tiles`` times other tiles of the Triton kernel, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_sage.ops import triton_attention
from torch_sage.ops.triton_attention import Tile

BACKENDS = {
    "fa2": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
TILES = (
    Tile(128, 64, 4, 3),
    Tile(128, 64, 8, 4),
    Tile(128, 128, 8, 3),
    Tile(64, 64, 4, 3),
)
HEADS = 32


def clock() -> str:
    """Return the SM clock in MHz."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip()


def median_ms(run: Callable[[], Any], seconds: float) -> float:
    """Return the median time of ``run`` on the device, L2 cache as the calls leave it."""
    run()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    rounds = min(50, max(5, int(seconds * 1e3 / start.elapsed_time(end))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for before, after in events:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def exact(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, is_causal: bool
) -> Callable[[], Tensor]:
    """Return a call of torch's SDPA with one backend."""

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    return run


def measure(
    length: int, head_dim: int, is_causal: bool, seconds: float, tiles: bool
) -> dict[str, Any]:
    """Time every contender on one shape; return milliseconds."""
    batch = min(4, max(1, 32768 // length))
    shape = (batch, HEADS, length, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    causal = "top_left" if is_causal else "none"
    record: dict[str, Any] = {"length": length, "head_dim": head_dim, "is_causal": is_causal}
    record["flops"] = 4 * batch * HEADS * length**2 * head_dim // (2 if is_causal else 1)
    times = {}
    for name, backend in BACKENDS.items():
        times[name] = median_ms(exact(backend, q, k, v, is_causal), seconds)
    times["default"] = median_ms(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal), seconds
    )
    chosen = triton_attention.tile_for
    for smooth in ("qk", "k"):
        times[f"sage {smooth}"] = median_ms(
            lambda s=smooth: torch.ops.torch_sage.sdpa(q, k, v, None, causal, smooth=s), seconds
        )
    if tiles:
        for tile in TILES:
            triton_attention.tile_for = lambda *_, t=tile: t
            try:
                times[f"sage k {tuple(tile)}"] = median_ms(
                    lambda: torch.ops.torch_sage.sdpa(q, k, v, None, causal, smooth="k"), seconds
                )
            except Exception as error:  # more shared memory than there is
                times[f"sage k {tuple(tile)}"] = float("nan")
                record.setdefault("errors", []).append(repr(error)[:200])
        triton_attention.tile_for = chosen
    return {**record, "times": times, "clock": clock()}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384]
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    records = []
    with torch.inference_mode():
        for head_dim in arguments.head_dims:
            for is_causal in (False, True):
                for length in arguments.lengths:
                    tiles = arguments.tiles and not is_causal and length in (2048, 8192)
                    record = measure(length, head_dim, is_causal, arguments.seconds, tiles)
                    records.append(record)
                    cells = [
                        f"{name} {ms:.3f} ms {record['flops'] / ms / 1e9:.0f}"
                        for name, ms in record["times"].items()
                    ]
                    kind = "causal" if is_causal else "full"
                    print(
                        f"d{head_dim} {kind} {length} [{record['clock']} MHz]",
                        "  ".join(cells),
                        flush=True,
                    )
    if arguments.json:
        arguments.json.write_text(json.dumps(records))


if __name__ == "__main__":
    main()
