"""Scaling of ring and all-to-all attention on CPU with gloo, and the bytes that they move.

Two ranks of half the cores each:

    python -m benchmarks.bench_distributed --tokens 4096

``bench_ring`` is the one for GPUs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import torch_sage
from benchmarks import harness, ranks
from benchmarks.harness import MAX_RELATIVE_L1, Inputs
from benchmarks.shapes import Shape
from torch_sage import SageConfig, distributed
from torch_sage.distributed import kernels
from torch_sage.distributed.order import Order
from torch_sage.recipes import choose_row, resolve_in

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What travels is quantized, and then Q is not smoothed: the one-rank contender does the same.
CONFIG = SageConfig(dispatch="always", smooth_q=False)


class Method(NamedTuple):
    """A way to share one attention among the ranks."""

    name: str
    attend: Callable[..., Tensor]
    order: Order
    is_ring: bool


METHODS = (
    Method("ring", distributed.ring_attention, "contiguous", True),
    Method("ring, zigzag", distributed.ring_attention, "zigzag", True),
    Method("all-to-all", distributed.ulysses_attention, "contiguous", False),
)


def seconds_of(run: Callable[[], Tensor], rounds: int) -> float:
    """Return the median time of a call, each round as long as the slowest rank takes."""
    times = []
    for i in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        run()
        slowest = torch.tensor([time.perf_counter() - start])
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if i > 0:  # the first one warms up
            times.append(slowest.item())
    return statistics.median(times)


def sent_bytes(method: Method, query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int]:
    """Return what a rank sends in one call, and what that would be with K and V in 16 bits."""
    size = dist.get_world_size()
    row = choose_row(
        CONFIG, kernels.rows_to_send(key.device), key.dtype, max(key.shape[3], value.shape[3])
    )
    packet = kernels.quantize(key, value, resolve_in(row, CONFIG, key.dtype)).pack().nbytes
    plain = 2 * (key.numel() + value.numel())
    if method.is_ring:
        return (size - 1) * packet, (size - 1) * plain
    output = query.numel() // query.shape[3] * value.shape[3]
    swapped = query.element_size() * (query.numel() + output)
    return (packet + swapped) * (size - 1) // size, (plain + swapped) * (size - 1) // size


def one_rank(inputs: Inputs) -> Tensor:
    """Compute the whole attention by the op, on rank 0; the others wait."""
    query, key, value, is_causal = inputs
    if dist.get_rank() != 0:
        return query
    causal = "top_left" if is_causal else "none"
    return torch_sage.attention_with_lse(
        query, key, value, causal=causal, enable_gqa=True, config=CONFIG
    ).output


def bench(shape: Shape, dtype: str, rounds: int) -> None:
    """Check every method on ``shape``, time it, and print one row each."""
    is_first = dist.get_rank() == 0
    inputs = harness.make_inputs(shape, DTYPES[dtype])
    alone = seconds_of(lambda: one_rank(inputs), rounds)
    if is_first:
        print(f"| {shape.name} | {dtype} | one rank | {alone * 1e3:.1f} | 1.00 | | | |", flush=True)
    for method in METHODS:
        if shape.heads_kv % dist.get_world_size() and not method.is_ring:
            continue
        local = [distributed.shard_sequence(x, order=method.order) for x in inputs[:3]]
        options = {"is_causal": shape.is_causal, "enable_gqa": True, "config": CONFIG}
        if method.is_ring:
            options["order"] = method.order

        def run(method: Method = method, local: list[Tensor] = local) -> Tensor:
            return method.attend(*local, **options)  # noqa: B023  (called before the next round)

        output = distributed.unshard_sequence(run(), order=method.order)
        error = harness.relative_error(output, inputs)
        if not error <= MAX_RELATIVE_L1:
            raise RuntimeError(f"{method.name} must have relative L1 error <= 0.02, got {error}")
        taken = seconds_of(run, rounds)
        sent, plain = sent_bytes(method, *local)
        if is_first:
            cells = [
                shape.name, dtype, method.name, f"{taken * 1e3:.1f}", f"{alone / taken:.2f}",
                f"{sent / 1e6:.2f}", f"{sent / plain:.2f}", f"{error:.4f}",
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)


def work(rank: int, size: int, init_method: str, arguments: argparse.Namespace) -> None:
    """Join the group and run every shape."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=size)
    if rank == 0:
        environment = {**harness.environment(), "ranks": size}
        print(" ".join(f"{name}={value}" for name, value in environment.items()))
        print("| shape | dtype | method | ms | speed-up | MB sent by a rank | of 16 bits | error |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    heads, heads_kv, head_dim = arguments.heads, arguments.heads_kv, arguments.head_dim
    with torch.inference_mode():
        for tokens in arguments.tokens:
            for is_causal in (False, True):
                shape = Shape(1, heads, heads_kv, tokens, tokens, head_dim, is_causal)
                bench(shape, arguments.dtype, arguments.rounds)
    dist.destroy_process_group()


def main() -> None:
    """Parse the command line; run under torchrun, or start the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096], help="of all ranks")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--heads-kv", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls, of which the median")
    parser.add_argument("--ranks", type=int, default=2, help="processes to start; not by torchrun")
    ranks.start(work, parser.parse_args())


if __name__ == "__main__":
    main()
