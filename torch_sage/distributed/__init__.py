"""Attention over several processes: sharding rules, ring and all-to-all attention.

Importing this package gives the ops their DTensor sharding rules. The engine is
``torch.distributed``: gloo on CPU, NCCL on GPUs; the code is the same.
"""

from __future__ import annotations

import torch.distributed

if not torch.distributed.is_available():
    raise ImportError("torch_sage.distributed must have a torch built with distributed, got none")

from torch_sage.distributed import sharding
from torch_sage.distributed.context_parallel import context_parallel
from torch_sage.distributed.order import Order, shard_sequence, unshard_sequence
from torch_sage.distributed.ring import ring_attention, ring_attention_with_lse
from torch_sage.distributed.sharding import register_cpu_sdpa_sharding
from torch_sage.distributed.ulysses import ulysses_attention, ulysses_attention_with_lse

sharding.register()

__all__ = [
    "Order",
    "context_parallel",
    "register_cpu_sdpa_sharding",
    "ring_attention",
    "ring_attention_with_lse",
    "shard_sequence",
    "ulysses_attention",
    "ulysses_attention_with_lse",
    "unshard_sequence",
]
