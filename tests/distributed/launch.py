"""Several processes on this machine, with gloo and a file to meet at: no port, no network."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def launch(worker: Callable[..., Any], size: int, folder: Path, *args: Any) -> list[Any]:
    """Call ``worker(rank, size, *args)`` in ``size`` processes; return each one's result.

    What a worker raises is raised here, with its traceback.
    """
    mp.spawn(_process, (worker, size, folder, args), nprocs=size)
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(size)]


def _process(
    rank: int, worker: Callable[..., Any], size: int, folder: Path, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),  # a deadlock fails, and soon
    )
    result = worker(rank, size, *args)
    (folder / f"rank{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
