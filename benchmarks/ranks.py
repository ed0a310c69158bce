"""Processes that measure together: started here, or by torchrun."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable

import torch.multiprocessing as mp

# Of a rank: its number, how many there are, where they meet, the command line.
Work = Callable[[int, int, str, argparse.Namespace], None]


def start(work: Work, arguments: argparse.Namespace) -> None:
    """Run ``work`` in ``arguments.ranks`` processes, or in this one if torchrun started it."""
    if "RANK" in os.environ:
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "env://", arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        mp.spawn(work, (arguments.ranks, store, arguments), nprocs=arguments.ranks)
