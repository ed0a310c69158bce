"""Few queries against many keys on a GPU: K and V prepared once, torch's SDPA and FlashAttention-3.

bf16 queries; torch and FA3 read K and V in bf16, ours as INT8 and E4M3. Each call is one of several
in a CUDA graph, as in decoding, with K and V that no call before it has left in the L2 cache. GB/s
are those of K and V as ours has them, 2 bytes a key and channel. The error is the one beside FA2.
``python -m benchmarks.bench_decode`` prints a Markdown table.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_sage
from benchmarks.gpu.table import markdown
from tests.numerics import relative_l1

HEADS = ((1, 32, 32), (1, 32, 8), (8, 32, 8))  # batch, heads of Q, heads of K and V
CACHE_BYTES = 50 << 20  # of the L2 cache
CALLS = 20  # in a graph
ROUNDS = 5
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return what torch's FlashAttention-2 computes, which splits keys, too."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def torch_default(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return what the backend computes that torch chooses."""
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def fa3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return what FlashAttention-3 computes, which chooses the number of splits."""
    from flash_attn_interface import flash_attn_with_kvcache

    operands = (x.transpose(1, 2) for x in (query, key, value))
    output: Tensor = flash_attn_with_kvcache(*operands, num_splits=0)
    return output.transpose(1, 2)


def contenders() -> dict[str, Call]:
    """Return those that take tensors of [B, H, N, D]; the first one is the yardstick."""
    found: dict[str, Call] = {"FA2": torch_flash, "torch": torch_default}
    if importlib.util.find_spec("flash_attn_interface"):
        found["FA3"] = fa3
    return found


def milliseconds(calls: list[Callable[[], Tensor]]) -> float:
    """Return the median time of one of CALLS calls in a graph, each of which reads other keys."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            calls[i % len(calls)]()
    times = []
    for _ in range(ROUNDS):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        graph.replay()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) / CALLS)
    return statistics.median(times[1:])


def measure(
    shape: tuple[int, int, int], tokens: int, keys: int, head_dim: int, names: list[str]
) -> list[list[str]]:
    """Return the rows of a table for one problem."""
    batch, heads, heads_kv = shape
    size = 2 * batch * heads_kv * keys * head_dim
    sets = 1 + CACHE_BYTES // size
    query = torch.randn(batch, heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16)
    of_keys = (2, batch, heads_kv, keys, head_dim)
    kv = [torch.randn(of_keys, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    prepared = [torch_sage.prepare_kv(*x) for x in kv]
    known = contenders()
    calls: dict[str, list[Callable[[], Tensor]]] = {
        name: [lambda k=k, v=v, run=known[name]: run(query, k, v) for k, v in kv]
        for name in names
        if name in known
    }
    calls["ours"] = [lambda p=p: torch_sage.attention_prepared(query, p) for p in prepared]
    rows = []
    right = torch_flash(query, *kv[0])
    for name, runs in calls.items():
        title = f"{batch}, {heads}, {heads_kv}"
        row = [title, str(head_dim), str(tokens), f"{keys // 1024}k", name]
        try:
            error = relative_l1(runs[0](), right)
            ms = milliseconds(runs)
        except Exception as failure:  # a peer that fails must not end the run of the others
            rows.append([*row, f"{type(failure).__name__}: {str(failure)[:200]}", "-", "-"])
            continue
        rows.append([*row, f"{1e3 * ms:.1f}", f"{size / ms / 1e6:.0f}", f"{error:.4f}"])
    return rows


def main() -> None:
    """Time all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--keys", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--contenders", nargs="*", default=["FA2", "torch", "FA3"])
    arguments = parser.parse_args()
    rows = [["B, Hq, Hkv", "D", "queries", "keys", "contender", "us", "GB/s", "rel L1 to FA2"]]
    with torch.inference_mode():
        for head_dim, shape, keys, tokens in itertools.product(
            arguments.head_dims, HEADS, arguments.keys, arguments.tokens
        ):
            rows += measure(shape, tokens, keys, head_dim, arguments.contenders)
            print(*rows[-1], flush=True)
            torch.cuda.empty_cache()
    print(markdown(rows))


if __name__ == "__main__":
    main()
