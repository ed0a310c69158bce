"""Which tokens each rank holds, and what its queries see of another rank's keys."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from torch_sage.distributed.group import Group, as_process_group

Order = Literal["contiguous", "zigzag"]
"""``contiguous``: rank r of W holds the r-th of W equal pieces. ``zigzag``: of 2 W pieces it holds
the r-th and the r-th from the end, in this order. Under causal attention the last rank of a
contiguous order has W times the work of the first; in zigzag order all have the same."""


class Part(NamedTuple):
    """What of the local queries meets what of one rank's keys."""

    first_query: int
    """Queries before this one see none of the keys."""

    keys: int
    """How many keys, from the first on, are seen at all."""

    causal: str
    """Alignment of these queries and keys, as the ops name it."""


def visible_part(order: Order, is_causal: bool, tokens: int, rank: int, source: int) -> Part | None:
    """Return what of ``rank``'s queries meets the keys of ``source``; None if nothing does."""
    if not is_causal:
        return Part(0, tokens, "none")
    if source == rank:  # in both orders tokens ascend within a rank
        return Part(0, tokens, "top_left")
    if order == "contiguous":
        return Part(0, tokens, "none") if source < rank else None
    if source < rank:  # its second piece lies behind both of ours
        return Part(0, tokens // 2, "none")
    return Part(tokens // 2, tokens, "none")  # both its pieces lie between ours


def require_order(order: str, name: str, tokens: int) -> None:
    """Refuse an unknown order, and one in which a rank cannot hold ``tokens`` of ``name``."""
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {list(get_args(Order))}, got {order!r}")
    if order == "zigzag" and tokens % 2:
        raise ValueError(f"{name} must have an even number of tokens in zigzag order, got {tokens}")


def pieces(order: Order, rank: int, size: int) -> list[int]:
    """Return which of the equal pieces of the sequence ``rank`` holds; zigzag has 2 a rank."""
    return [rank] if order == "contiguous" else [rank, 2 * size - 1 - rank]


def shard_sequence(
    tensor: Tensor, dim: int = 2, *, group: Group = None, order: Order = "contiguous"
) -> Tensor:
    """Return this rank's tokens of a tensor that every rank holds whole; a copy.

    Args:
        tensor: any tensor with tokens along ``dim``.
        dim: the dimension of tokens; 2 in [B, H, N, D].
        group: the ranks that share the tokens.
        order: which tokens a rank holds.

    Raises:
        ValueError: if the tokens do not divide evenly.
    """
    process_group = as_process_group(group)
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
    require_order(order, "tensor", 0)
    count = len(pieces(order, rank, size)) * size
    if tensor.shape[dim] % count:
        raise ValueError(
            f"tensor must have a multiple of {count} tokens in dimension {dim} for {order} order "
            f"over {size} ranks, got {tensor.shape[dim]}"
        )
    chunks = tensor.chunk(count, dim)
    return torch.cat([chunks[i] for i in pieces(order, rank, size)], dim)


def unshard_sequence(
    tensor: Tensor, dim: int = 2, *, group: Group = None, order: Order = "contiguous"
) -> Tensor:
    """Return the whole sequence of what ``shard_sequence`` split, on every rank.

    Args:
        tensor: this rank's tokens, as many as on every other rank.
        dim: the dimension of tokens.
        group: the ranks that share the tokens.
        order: which tokens a rank holds.
    """
    process_group = as_process_group(group)
    size = dist.get_world_size(process_group)
    require_order(order, "tensor", tensor.shape[dim])
    shards = [torch.empty_like(tensor.contiguous()) for _ in range(size)]
    dist.all_gather(shards, tensor.contiguous(), process_group)
    placed: dict[int, Tensor] = {}
    for rank, shard in enumerate(shards):
        held = pieces(order, rank, size)
        placed |= dict(zip(held, shard.chunk(len(held), dim), strict=True))
    return torch.cat([placed[i] for i in sorted(placed)], dim)
