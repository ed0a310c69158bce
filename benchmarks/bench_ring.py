"""Ring and all-to-all attention on several GPUs with NCCL, against one GPU and against torch.

    python -m benchmarks.bench_ring --ranks 2
    torchrun --standalone --nproc-per-node 2 -m benchmarks.bench_ring

bf16, B = 1, D = 128. "one GPU" is torch_sage's unsplit op on all tokens, "one GPU, lse" the same
with the LSE, whose exponentials are always exact; "ring, lse" returns it, too. "torch" is
SDPA on one GPU, "torch ring" its context_parallel. Causal rings are in zigzag order. Times are
those of the slowest rank from a common start until its device is idle, contenders in turn, medians.
The steps of a ring call are timed on their own, too: their sum less its time is what overlaps.

Errors are relative L1 against fp64 attention of a few rows; "lse" is the largest difference of the
merged LSE from the fp64 log-sum-exp of scores computed from the codes, scales and means that the
ranks quantized. Exits with 1 if an answer is wrong: an error above that of the unsplit op by more
than a tenth, or an LSE by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._attention import _cp_options
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_sage
from benchmarks import harness, ranks
from benchmarks.gpu import timing
from benchmarks.gpu.table import Record, markdown
from tests.gpu.sm90 import key_image, width_of
from torch_sage import AttentionOutput, SageConfig, distributed, reference
from torch_sage.distributed import kernels, ring
from torch_sage.distributed.block import Block
from torch_sage.distributed.kernels import PreparedBlock, quantize
from torch_sage.distributed.order import Order, Part, pieces
from torch_sage.recipes import Recipe, choose_row, resolve_in
from torch_sage.reference.quantize import key_groups

CONFIG = SageConfig(dispatch="always", smooth_q=False)
HEAD_DIM = 128
JUDGED_ROWS, JUDGED_HEADS = 64, 2
MAX_LSE_ERROR, MORE_ERROR = 1e-4, 1.1
LEAST_ROUNDS, MOST_ROUNDS = 3, 15
TORCH_BACKENDS = {
    "torch ring, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch ring, FA2": SDPBackend.FLASH_ATTENTION,
}
# A rank that waits longer for another has lost it.
PATIENCE = timedelta(seconds=120)


class Problem(NamedTuple):
    """Self-attention of all tokens, the same numbers on every rank."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool

    @property
    def order(self) -> Order:
        """How a ring shares the tokens."""
        return "zigzag" if self.is_causal else "contiguous"

    @property
    def judged(self) -> Tensor:
        """The rows whose exact answer is computed."""
        tokens = self.query.shape[2]
        places = torch.linspace(0, tokens - 1, min(tokens, JUDGED_ROWS), device=self.query.device)
        return places.long()

    def shards(self, order: Order) -> list[Tensor]:
        """Return this rank's tokens of query, key and value."""
        return [distributed.shard_sequence(x, order=order) for x in self[:3]]


class Timing(NamedTuple):
    """Milliseconds of the slowest rank; the SM clock of each while it ran, in MHz."""

    median: float
    low: float
    high: float
    calls: int
    mhz: list[float]


def make_problem(tokens: int, heads: int, is_causal: bool, device: torch.device) -> Problem:
    """Return N(0, 1) in bf16."""
    torch.manual_seed(0)
    shape = (1, heads, tokens, HEAD_DIM)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    return Problem(q, k, v, is_causal)


def recipe_of(problem: Problem) -> Recipe:
    """Return the recipe of the ring on this device."""
    dtype = problem.key.dtype
    row = choose_row(CONFIG, kernels.rows_to_send(problem.key.device), dtype, HEAD_DIM)
    return resolve_in(row, CONFIG, dtype)


# What is compared.


def on_one_gpu(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return ``run`` for rank 0; the others wait."""
    return run if dist.get_rank() == 0 else lambda: None


def contenders(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Return the calls to time, those of several ranks on shards that are there already."""
    query, key, value, is_causal = problem
    causal = "top_left" if is_causal else "none"
    heads, order = query.shape[1], problem.order
    local = problem.shards(order)
    options: dict[str, Any] = {"is_causal": is_causal, "config": CONFIG, "check_ranks": False}
    calls: dict[str, Callable[[], Any]] = {
        "one GPU": on_one_gpu(
            lambda: torch_sage.scaled_dot_product_attention(
                query, key, value, is_causal=is_causal, config=CONFIG
            )
        ),
        "one GPU, lse": on_one_gpu(
            lambda: torch_sage.attention_with_lse(query, key, value, causal=causal, config=CONFIG)
        ),
        "torch": on_one_gpu(
            lambda: F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        ),
        "ring": lambda: distributed.ring_attention(*local, order=order, **options),
        "ring, lse": lambda: distributed.ring_attention_with_lse(*local, order=order, **options),
    }
    if heads % dist.get_world_size() == 0:
        contiguous = local if order == "contiguous" else problem.shards("contiguous")
        calls["all-to-all"] = lambda: distributed.ulysses_attention(*contiguous, **options)
    return calls


def whole(output: Any, name: str, problem: Problem) -> Tensor:
    """Return the output for all tokens, on rank 0 at least."""
    if isinstance(output, AttentionOutput):
        output = output.output
    if name.startswith(("one GPU", "torch")):
        return output
    order = problem.order if name.startswith("ring") else "contiguous"
    return distributed.unshard_sequence(output, order=order)


def steps_of_ring(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Return the parts of a ring call, each on its own."""
    query, key, value = problem.shards(problem.order)
    recipe = recipe_of(problem)
    block = quantize(key, value, recipe)
    packet, group = block.pack(), dist.group.WORLD
    tokens = key.shape[2]
    own = Part(0, tokens, "top_left" if problem.is_causal else "none")
    if problem.is_causal:  # what a step with another rank's keys is: half of them, or of our rows
        other = Part(0, tokens // 2, "none")
    else:
        other = own

    def attend(part: Part) -> AttentionOutput:
        return block.attend(query, part, None, None, wants_lse=False)

    found = [attend(part) for part in (own, other)]
    return {
        "quantize": lambda: quantize(key, value, recipe),
        "pack": block.pack,
        "first step": lambda: attend(own),
        "other step": lambda: attend(other),
        "merge two": lambda: ring.merge(iter([(part, 0) for part in found])),
        "messages": lambda: deque(ring._rotate(packet, group), maxlen=0),
    }


# Time.


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def call_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call on the slowest rank, from a common start."""
    dist.barrier()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    slowest = torch.tensor([time.perf_counter() - start], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def clocks(run: Callable[[], Any], device: torch.device) -> list[float]:
    """Return the SM clock of every rank while ``run`` runs; 0 where it cannot be asked."""
    dist.barrier()
    run()
    mhz = timing.state()[0] if device.type == "cuda" else 0.0
    synchronize(device)
    own = torch.tensor([mhz], device=device).nan_to_num(0.0)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return [x.item() for x in found]


def time_in_turn(
    runs: dict[str, Callable[[], Any]], seconds: float, device: torch.device
) -> dict[str, Timing]:
    """Return the time of each, called in turn for about ``seconds`` each; all have run before."""
    rounds = {}
    for name, run in runs.items():
        rounds[name] = int(seconds / call_seconds(run, device))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(MOST_ROUNDS):
        for name, run in runs.items():
            if i < max(LEAST_ROUNDS, rounds[name]):
                samples[name].append(call_seconds(run, device) * 1e3)
    times = {}
    for name, run in runs.items():
        low, median, high = statistics.quantiles(samples[name], n=4)
        times[name] = Timing(median, low, high, len(samples[name]), clocks(run, device))
    return times


# Judgement.


def relative_l1(output: Tensor, problem: Problem) -> float:
    """Return the relative L1 error of the judged rows against fp64 attention, head by head."""
    rows, difference, size = problem.judged, 0.0, 0.0
    columns = torch.arange(problem.key.shape[2], device=rows.device)
    for head in range(output.shape[1]):
        query, key, value = (x[0, head].double() for x in problem[:3])
        scores = query[rows] @ key.mT * HEAD_DIM**-0.5
        if problem.is_causal:
            scores.masked_fill_(columns > rows[:, None], -torch.inf)
        exact = scores.softmax(-1) @ value
        difference += (output[0, head, rows].double() - exact).abs().sum().item()
        size += exact.abs().sum().item()
    return difference / size


def dequantized_keys(block: Block) -> Tensor:
    """Return K without its mean, as the codes and scales say, in fp64."""
    codes, scales = block.operands[:2]
    if isinstance(block, PreparedBlock):
        codes = key_image(codes, width_of(HEAD_DIM, HEAD_DIM))[:, :, : block.tokens, :HEAD_DIM]
    group_of_key, _ = key_groups(block.tokens, block.recipe.granularity, 64)
    return codes.double() * scales.flatten(2)[:, :, group_of_key, None].double()


def lse_of_codes(problem: Problem, order: Order, heads: int) -> Tensor:
    """Return the fp64 LSE [heads, rows] of the judged rows, by what the ranks quantized."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows, recipe = problem.judged, recipe_of(problem)
    block = quantize(*problem.shards(order)[1:], recipe).of_heads(0, heads)
    count = len(pieces(order, rank, size)) * size
    chunks = torch.arange(problem.key.shape[2], device=rows.device).chunk(count)
    tokens = torch.cat([chunks[i] for i in pieces(order, rank, size)])
    query = problem.query[:, :heads, rows]
    codes, scales = reference.quantize_query(query, granularity=recipe.granularity)
    scores = (codes.double() * scales[..., None].double()) @ dequantized_keys(block).mT
    scores += (query.double() * block.operands[2][:, :, None].double()).sum(-1, keepdim=True)
    scores *= HEAD_DIM**-0.5
    if problem.is_causal:
        scores.masked_fill_(tokens > rows[:, None], -torch.inf)
    own = scores.logsumexp(-1)[0].contiguous()
    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own)
    return torch.stack(parts).logsumexp(0)


def lse_error(result: AttentionOutput, problem: Problem) -> float:
    """Return the largest error of a ring's LSE among the judged rows of the first heads."""
    heads = min(JUDGED_HEADS, problem.query.shape[1])
    merged = distributed.unshard_sequence(result.lse, order=problem.order)[0, :heads]
    expected = lse_of_codes(problem, problem.order, heads)
    return (merged[:, problem.judged].double() - expected).abs().max().item()


# Bytes.


@contextmanager
def sent_bytes(counts: list[int]) -> Iterator[None]:
    """Append the bytes of every message that this rank sends to another."""
    post, swap = dist.batch_isend_irecv, dist.all_to_all_single

    def posted(ops: list[dist.P2POp]) -> Any:
        counts.append(sum(op.tensor.nbytes for op in ops if op.op is dist.isend))
        return post(ops)

    def swapped(output: Tensor, source: Tensor, **options: Any) -> Any:
        size = dist.get_world_size()
        counts.append(source.nbytes * (size - 1) // size)
        return swap(output, source, **options)

    with (
        mock.patch.object(dist, "batch_isend_irecv", posted),
        mock.patch.object(dist, "all_to_all_single", swapped),
    ):
        yield


def bytes_in_16_bits(name: str, problem: Problem) -> int:
    """Return what a rank would send with keys and values in 16 bits."""
    size = dist.get_world_size()
    tensor = problem.key.nbytes // size  # this rank's tokens of any of Q, K, V and the output
    if name.startswith("ring"):
        return 2 * tensor * (size - 1)
    return 4 * tensor * (size - 1) // size


# Everything about one problem.


def time_torch_ring(
    problem: Problem, backend: SDPBackend, seconds: float, device: torch.device
) -> tuple[Timing, float]:
    """Return time and error of torch's context_parallel."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    buffers = [x.clone() for x in problem[:3]]
    balanced, attention = _cp_options.enable_load_balance, F.scaled_dot_product_attention
    _cp_options.enable_load_balance = problem.is_causal
    try:
        with (
            sdpa_kernel(backend),
            context_parallel(
                mesh, buffers=buffers, buffer_seq_dims=[2] * 3, no_restore_buffers=set(buffers)
            ),
        ):

            def run() -> Tensor:
                return F.scaled_dot_product_attention(*buffers, is_causal=problem.is_causal)

            output = distributed.unshard_sequence(run(), order=problem.order)
            times = time_in_turn({"ring": run}, seconds, device)
    finally:  # after an error torch leaves its own function in place
        _cp_options.enable_load_balance = balanced
        F.scaled_dot_product_attention = attention
    return times["ring"], relative_l1(output, problem)


def measure(problem: Problem, arguments: argparse.Namespace, device: torch.device) -> Record:
    """Judge and time every contender."""
    found: dict[str, Record] = {}
    runs = contenders(problem)
    for name, run in runs.items():
        counts: list[int] = []
        with sent_bytes(counts):
            result = run()
        record: Record = {}
        if result is not None:
            record["error"] = relative_l1(whole(result, name, problem), problem)
        if name == "ring, lse":
            record["lse_error"] = lse_error(result, problem)
        if counts:
            record["bytes"] = sum(counts)
            record["of_16_bits"] = record["bytes"] / bytes_in_16_bits(name, problem)
        found[name] = record
        del result
    for name, timed in time_in_turn(runs, arguments.seconds, device).items():
        found[name]["time"] = timed._asdict()
    for name, backend in TORCH_BACKENDS.items() if device.type == "cuda" else ():
        try:
            timed, error = time_torch_ring(problem, backend, arguments.seconds, device)
            found[name] = {"time": timed._asdict(), "error": error}
        except Exception as failure:  # the same on every rank: torch refuses arguments
            found[name] = {"problem": f"{type(failure).__name__}: {str(failure)[:200]}"}
    steps = time_in_turn(steps_of_ring(problem), arguments.seconds / 4, device)
    _, heads, tokens, head_dim = problem.query.shape
    return {
        "tokens": tokens,
        "heads": heads,
        "is_causal": problem.is_causal,
        "flops": 4 * heads * tokens**2 * head_dim // (2 if problem.is_causal else 1),
        "recipe": recipe_of(problem).name,
        "contenders": found,
        "steps": {name: timed.median for name, timed in steps.items()},
    }


def faults(record: Record) -> list[str]:
    """Return what is wrong with the answers."""
    alone = record["contenders"]["one GPU"]["error"]
    where = title(record)
    found = []
    for name in ("ring", "ring, lse", "all-to-all"):
        error = record["contenders"].get(name, {}).get("error", 0.0)
        if not error <= MORE_ERROR * alone:
            found.append(
                f"{where}: {name} must have the unsplit error {alone:.4f}, got {error:.4f}"
            )
    lse = record["contenders"]["ring, lse"]["lse_error"]
    if not lse <= MAX_LSE_ERROR:
        found.append(f"{where}: the merged LSE must be right to {MAX_LSE_ERROR}, got {lse:.1e}")
    return found


def rows(record: Record) -> list[list[str]]:
    """Return the lines of the table for one record."""
    alone = record["contenders"]["one GPU"]["time"]["median"]
    lines = []
    for name, c in record["contenders"].items():
        if "problem" in c:
            lines.append([title(record), name, c["problem"], *[""] * 6])
            continue
        taken = c["time"]["median"]
        lines.append(
            [
                title(record),
                name,
                f"{taken:.2f}",
                f"{alone / taken:.2f}",
                f"{record['flops'] / taken / 1e9:.0f}",
                f"{c['bytes'] / 1e6:.1f} ({c['of_16_bits']:.2f})" if "bytes" in c else "",
                f"{c['error']:.4f}",
                f"{c['lse_error']:.1e}" if "lse_error" in c else "",
                "/".join(f"{mhz:.0f}" for mhz in c["time"]["mhz"]),
            ]
        )
    return lines


def title(record: Record) -> str:
    """Return the name of a problem."""
    causal = ", causal" if record["is_causal"] else ""
    return f"{record['tokens'] // 1024}k, {record['heads']}{causal}"


def overview(records: list[Record]) -> str:
    """Return the table of docs/distributed.md: ms, and how many times as fast as one GPU."""
    names = list(records[0]["contenders"])
    lines = [["tokens, heads", *names]]
    for record in records:
        contenders = record["contenders"]
        alone = contenders["one GPU"]["time"]["median"]
        taken = [contenders.get(name, {}).get("time", {}).get("median", math.nan) for name in names]
        lines.append([title(record), *(f"{ms:.1f} ({alone / ms:.2f})" for ms in taken)])
    return markdown(lines)


HEAD = ["tokens, heads", "contender", "ms", "of one GPU", "TFLOPS", "MB sent (of 16 bits)"]
HEAD += ["rel L1", "lse", "MHz"]


def work(rank: int, size: int, init_method: str, arguments: argparse.Namespace) -> None:
    """Join the group and measure every problem."""
    device = join(rank, size, init_method, arguments)
    start = time.perf_counter()
    stamp: dict[str, Any] = {**harness.environment(), "ranks": size}
    if device.type == "cuda":
        stamp |= {"gpu": torch.cuda.get_device_name(device), "nccl": torch.cuda.nccl.version()}
    if rank == 0:
        print(" ".join(f"{name}={value}" for name, value in stamp.items()), flush=True)
    records: list[Record] = []
    wrong: list[str] = []
    with torch.no_grad():
        for tokens in arguments.tokens:
            for heads in arguments.heads:
                for is_causal in (False, True):
                    elapsed = torch.tensor([time.perf_counter() - start], device=device)
                    dist.broadcast(elapsed, 0)
                    if elapsed.item() > arguments.limit:
                        if rank == 0:
                            print(f"left out: {tokens} tokens, {heads} heads, {is_causal=}")
                        continue
                    problem = make_problem(tokens, heads, is_causal, device)
                    record = measure(problem, arguments, device)
                    del problem
                    if rank == 0:
                        records.append(record)
                        wrong += faults(record)
                        report(record, time.perf_counter() - start)
                        if arguments.json:
                            text = json.dumps({"environment": stamp, "records": records}, indent=1)
                            arguments.json.write_text(text + "\n")
    if rank == 0:
        print("\n" + markdown([HEAD, *(line for record in records for line in rows(record))]))
        print("\n" + overview(records))
        print("\n".join(wrong) or "every answer is right")
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        sys.exit(1)


def join(rank: int, size: int, init_method: str, arguments: argparse.Namespace) -> torch.device:
    """Join the group; return this rank's device."""
    options: dict[str, Any] = {"init_method": init_method, "rank": rank, "world_size": size}
    options["timeout"] = PATIENCE
    if arguments.device == "cpu":
        torch.set_num_threads(1)
        dist.init_process_group("gloo", **options)
        return torch.device("cpu")
    if torch.cuda.device_count() < size:
        raise RuntimeError(f"ranks must be at most {torch.cuda.device_count()} GPUs, got {size}")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    if arguments.priority == "high":
        options["pg_options"] = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    dist.init_process_group("nccl", device_id=device, **options)
    return device


def report(record: Record, seconds: float) -> None:
    """Print one record while the rest is measured."""
    for line in rows(record):
        print(" | ".join(line))
    steps = ", ".join(f"{name} {ms:.2f}" for name, ms in record["steps"].items())
    print(f"  {record['recipe']}; ms of its steps: {steps} ({seconds:.0f} s)", flush=True)


def main() -> None:
    """Parse the command line; run under torchrun, or start the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[65536, 131072, 262144])
    parser.add_argument("--heads", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--ranks", type=int, default=2, help="processes to start; not by torchrun")
    parser.add_argument(
        "--priority",
        choices=["high", "normal"],
        default="high",
        help="of NCCL's streams; at normal priority a message may wait for the kernel it hides in",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each contender")
    parser.add_argument("--limit", type=float, default=230, help="start no problem after this")
    parser.add_argument("--json", type=Path, help="write it after every problem")
    ranks.start(work, parser.parse_args())


if __name__ == "__main__":
    main()
