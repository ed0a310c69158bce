"""Several processes on this machine and a file to meet at: no port, no network."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A deadlock fails, and soon; GPUs also wait for each other's compilers.
PATIENCE = {"gloo": timedelta(seconds=60), "nccl": timedelta(seconds=120)}


def launch(
    worker: Callable[..., Any], size: int, folder: Path, *args: Any, backend: str = "gloo"
) -> list[Any]:
    """Call ``worker(rank, size, *args)`` in ``size`` processes; return each one's result.

    With "nccl" each has a GPU, its current device. What a worker raises is raised here, with its
    traceback.
    """
    mp.spawn(_process, (worker, size, folder, args, backend), nprocs=size)
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(size)]


def _process(
    rank: int,
    worker: Callable[..., Any],
    size: int,
    folder: Path,
    args: tuple[Any, ...],
    backend: str,
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=PATIENCE[backend],
    )
    result = worker(rank, size, *args)
    (folder / f"rank{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
