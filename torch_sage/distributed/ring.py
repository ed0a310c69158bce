"""Ring attention: tokens are shared among ranks, and keys and values go round."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor

from torch_sage.config import SageConfig
from torch_sage.distributed import call
from torch_sage.distributed.group import Group, as_process_group
from torch_sage.distributed.kernels import quantize
from torch_sage.distributed.merge import merge
from torch_sage.distributed.order import Order, require_order, visible_part
from torch_sage.ops.hadamard import rotated
from torch_sage.reference.attention import AttentionOutput


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    group: Group = None,
    order: Order = "contiguous",
    config: SageConfig | str | None = None,
    check_ranks: bool = True,
) -> Tensor:
    """Compute attention over the tokens of all ranks of ``group``; each returns its own rows.

    Every rank quantizes its keys and values once. They go round in 8 (K) and 16 or 8 (V) bits,
    while partial results are merged by their LSE in fp32: the next block is under way while this
    one is attended to. Inference only; nothing falls back to exact attention. Q is not smoothed.

    Args:
        query: [B, Hq, N, D], this rank's tokens; float32, bfloat16 or float16.
        key: [B, Hkv, M, D], this rank's tokens: as many on every rank, N of them if ``is_causal``.
        value: [B, Hkv, M, Dv].
        attn_mask: broadcasts to [B, Hq, N, W * M]: this rank's rows, and a column per key in the
            order of ranks. bool (True = attend) or float (added to the scores).
        is_causal: a query sees the keys up to its own place in the whole sequence.
        scale: of the scores; None means 1 / sqrt(D).
        enable_gqa: allow Hq to be a multiple of Hkv.
        group: the ranks that share the sequence: a process group, a 1-D mesh, or None for all.
        order: which tokens a rank holds (``shard_sequence``); it matters only if ``is_causal``.
        config: how to compute; None means the default recipe of the device, without smoothing Q.
        check_ranks: compare sizes and options over the ranks first, in one small all_gather, so
            that a difference is an error on every rank. Without it, a difference may hang; GPUs
            then need not be waited for.

    Returns:
        [B, Hq, N, Dv] in the dtype of query, contiguous.

    Raises:
        ValueError: if the arguments contradict each other, here or between ranks.
        NotImplementedError: if the kernels do not support them; ``why_not`` explains.
        RuntimeError: if torch.distributed is not initialized.

    Source: Ring Attention (arXiv 2310.01889), SageAttention (arXiv 2410.02367).
    """
    options = (is_causal, scale, enable_gqa, group, order, config, check_ranks)
    return _ring(query, key, value, attn_mask, *options, wants_lse=False).output


def ring_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    group: Group = None,
    order: Order = "contiguous",
    config: SageConfig | str | None = None,
    check_ranks: bool = True,
) -> AttentionOutput:
    """Compute ``ring_attention`` and the natural-log LSE [B, Hq, N] of its scores, in fp32."""
    options = (is_causal, scale, enable_gqa, group, order, config, check_ranks)
    return _ring(query, key, value, attn_mask, *options, wants_lse=True)


def _ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    group: Group,
    order: Order,
    config: SageConfig | str | None,
    check_ranks: bool,
    *,
    wants_lse: bool,
) -> AttentionOutput:
    ring = as_process_group(group)
    rank, size = dist.get_rank(ring), dist.get_world_size(ring)

    def check() -> call.Accepted:
        accepted = call.accept(
            query,
            key,
            value,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            config=config,
        )
        seen = (*query.shape[:3], size * key.shape[2])
        call.require_mask(attn_mask, seen, is_causal, query)
        require_order(order, "key", key.shape[2] if is_causal else 0)
        return accepted

    shapes = {"key": key.shape, "value": value.shape}
    options = f"is_causal={is_causal}, order={order}"
    recipe, rotation = call.accept_on_every_rank(
        check, shapes, options, ring, query.device, check_ranks
    )
    query, key, scale = rotated(rotation, query, key, scale)
    own = quantize(key, value, recipe)
    tokens = key.shape[2]

    def parts() -> Iterator[tuple[AttentionOutput, int]]:
        for source, packet in _rotate(own.pack(), ring):
            part = visible_part(order, is_causal, tokens, rank, source)
            if part is not None:
                mask = call.mask_columns(attn_mask, source, tokens)
                block = own.unpack(packet)
                yield block.attend(query, part, mask, scale, wants_lse), part.first_query

    return merge(parts())


def _rotate(packet: Tensor, ring: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """Yield every rank and its packet, this rank's own first.

    A packet is on its way to the next rank, and another one coming in, before it is yielded. On
    GPUs both wait for what was launched before and not for what the caller launches now.
    """
    rank, size = dist.get_rank(ring), dist.get_world_size(ring)
    incoming = packet.new_empty(packet.shape) if size > 1 else packet
    for step in range(size):
        requests: list[dist.Work] = []
        if step + 1 < size:
            requests = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, packet, group=ring, group_peer=(rank + 1) % size),
                    dist.P2POp(dist.irecv, incoming, group=ring, group_peer=(rank - 1) % size),
                ]
            )
        yield (rank - step) % size, packet
        for request in requests:
            request.wait()
        packet, incoming = incoming, packet
