"""One sequence on several processes: ``python examples/ring_attention.py``, or by torchrun."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import torch_sage

HEADS, TOKENS, HEAD_DIM = 8, 2048, 64


def work(rank: int, ranks: int, init_method: str) -> None:
    """Share a sequence with the other ranks, attend to all of it, compare with one process."""
    on_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    device = torch.device("cpu")
    if on_gpus:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=ranks)
    generator = torch.Generator().manual_seed(0)  # the same sequence on every rank
    whole = torch.randn(3, 1, HEADS, TOKENS, HEAD_DIM, generator=generator).to(device)
    exact = F.scaled_dot_product_attention(*whole, is_causal=True)

    # Each rank holds TOKENS / ranks tokens: one piece from the front, and its mirror image.
    query, key, value = torch_sage.distributed.shard_sequence(whole, dim=3, order="zigzag")
    output = torch_sage.distributed.ring_attention(
        query, key, value, is_causal=True, order="zigzag"
    )
    ring = torch_sage.distributed.unshard_sequence(output, order="zigzag")

    # Or: all tokens of HEADS / ranks heads to each rank, and back.
    query, key, value = torch_sage.distributed.shard_sequence(whole, dim=3)
    output = torch_sage.distributed.ulysses_attention(query, key, value, is_causal=True)
    ulysses = torch_sage.distributed.unshard_sequence(output)

    for name, result in (("ring", ring), ("all-to-all", ulysses)):
        error = ((result - exact).abs().sum() / exact.abs().sum()).item()
        if rank == 0:
            print(f"{name} over {ranks} {backend} ranks, relative L1 error: {error:.4f}")
        assert error < (0.05 if on_gpus else 0.02)  # P and V in 8 bits, or in 16
    dist.destroy_process_group()


def main() -> None:
    """Run under torchrun, or start two processes."""
    if "RANK" in os.environ:
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (2, f"file://{folder}/store"), nprocs=2)


if __name__ == "__main__":
    main()
