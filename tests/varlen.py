"""Packed sequences for tests, and what the ops over batches say of each of them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sage import ops


class Packed(NamedTuple):
    """The first seven arguments of ``varlen_sdpa``."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def starts(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    """Return where sequences of these lengths start, and the last one ends."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def pack(
    queries: Sequence[int],
    keys: Sequence[int],
    *,
    heads: int = 4,
    heads_kv: int = 2,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    layout: str = "thd",
) -> Packed:
    """Return N(0, 1) tensors, but every sequence has a bias of its own in K and V.

    A mean or a scale of other rows than the sequence's shows. ``layout`` "htd" has heads before
    tokens, "fused" all three in the rows of one tensor, "sliced" gaps between rows.
    """
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    numbers = torch.Generator(device).manual_seed(1)

    def draw(tokens: int, count: int, channels: int) -> Tensor:
        return torch.randn(tokens, count, channels, generator=numbers, device=device)

    def biased(x: Tensor) -> Tensor:
        first = 0
        for i, length in enumerate(keys):
            x[first : first + length] += draw(1, *x.shape[1:]) * (3 + i % 4)
            first += length
        return x

    operands = (
        draw(sum(queries), heads, head_dim),
        biased(draw(sum(keys), heads_kv, head_dim)),
        biased(draw(sum(keys), heads_kv, head_dim_v)),
    )
    q, k, v = (_lay_out(x.to(dtype), layout) for x in operands)
    if layout == "fused":
        columns = [x.flatten(1).shape[1] for x in (q, k, v)]
        rows = torch.cat([x.flatten(1) for x in (q, k, v)], 1).split(columns, 1)
        q, k, v = (part.unflatten(1, x.shape[1:]) for part, x in zip(rows, (q, k, v), strict=True))
    longest = max(queries, default=0), max(keys, default=0)
    return Packed(q, k, v, starts(queries, device), starts(keys, device), *longest)


def _lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "htd":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        wide = torch.full((*x.shape[:2], x.shape[2] + 3), torch.nan, dtype=x.dtype, device=x.device)
        wide[..., 1:-2] = x
        return wide[..., 1:-2]
    return x


def sequences(packed: Packed) -> list[tuple[slice, slice]]:
    """Return the rows of every sequence's queries and keys."""
    edges = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_k.tolist()
    pairs = zip(*map(pairwise, edges), strict=True)
    return [(slice(*q), slice(*k)) for q, k in pairs]


def as_batch(x: Tensor, rows: slice) -> Tensor:
    """Return rows of a packed tensor as a batch of one sequence."""
    return x[rows].transpose(0, 1).unsqueeze(0)


def one_by_one(
    packed: Packed,
    causal: str,
    scale: float | None = None,
    *,
    sdpa_with_lse: Callable[..., tuple[Tensor, Tensor]] = ops.sdpa_with_lse,
    **recipe: Any,
) -> tuple[Tensor, Tensor]:
    """Return output and LSE of ``sdpa_with_lse`` on every sequence alone, packed."""
    q, k, v = packed[:3]
    output = q.new_zeros((*q.shape[:2], v.shape[2]))
    lse = torch.full(q.shape[1::-1], -torch.inf, device=q.device)
    for queries, keys in sequences(packed):
        operands = as_batch(q, queries), as_batch(k, keys), as_batch(v, keys)
        alone = sdpa_with_lse(*operands, None, causal, scale, **recipe)
        output[queries] = alone[0][0].transpose(0, 1)
        lse[:, queries] = alone[1][0]
    return output, lse
