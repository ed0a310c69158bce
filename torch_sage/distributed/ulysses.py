"""All-to-all attention: tokens are shared among ranks, and swapped for heads while attending."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from torch_sage.config import SageConfig
from torch_sage.distributed import call
from torch_sage.distributed.block import Block
from torch_sage.distributed.group import Group, as_process_group
from torch_sage.distributed.kernels import quantize
from torch_sage.distributed.merge import merge
from torch_sage.distributed.order import Part
from torch_sage.ops.hadamard import rotated
from torch_sage.reference.attention import AttentionOutput


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    group: Group = None,
    config: SageConfig | str | None = None,
    check_ranks: bool = True,
) -> Tensor:
    """Compute attention over the tokens of all ranks of ``group``; each returns its own rows.

    Each rank gets all tokens of 1/W of the heads, attends, and sends the rows back. Keys and values
    travel quantized as in ``ring_attention``, queries and results in their own dtype. Tokens are in
    contiguous order: sharing the heads balances causal work by itself.

    Args:
        query: [B, Hq, N, D], this rank's tokens, as many on every rank; Hq a multiple of W.
        key: [B, Hkv, M, D], this rank's tokens, N of them if ``is_causal``; Hkv a multiple of W.
        value: [B, Hkv, M, Dv].
        attn_mask: broadcasts to [B, Hq, W * N, W * M]: whole, and the same on every rank.
        is_causal: as for ``ring_attention``, like the rest.
        scale: see ``is_causal``.
        enable_gqa: see ``is_causal``.
        group: see ``is_causal``.
        config: see ``is_causal``.
        check_ranks: see ``is_causal``.

    Returns:
        [B, Hq, N, Dv] in the dtype of query, contiguous.

    Raises:
        ValueError: if the arguments contradict each other, here or between ranks.
        NotImplementedError: if the kernels do not support them.
        RuntimeError: if torch.distributed is not initialized.

    Source: DeepSpeed Ulysses (arXiv 2309.14509), SageAttention (arXiv 2410.02367).
    """
    ranks = as_process_group(group)
    result = _attend_heads(
        query, key, value, attn_mask, is_causal, scale, enable_gqa, ranks, config, check_ranks,
        wants_lse=False,
    )  # fmt: skip
    return _heads_to_tokens(result.output, ranks)


def ulysses_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    group: Group = None,
    config: SageConfig | str | None = None,
    check_ranks: bool = True,
) -> AttentionOutput:
    """Compute ``ulysses_attention`` and the natural-log LSE [B, Hq, N] of its scores, in fp32."""
    ranks = as_process_group(group)
    result = _attend_heads(
        query, key, value, attn_mask, is_causal, scale, enable_gqa, ranks, config, check_ranks,
        wants_lse=True,
    )  # fmt: skip
    lse = _heads_to_tokens(result.lse[..., None], ranks)
    return AttentionOutput(_heads_to_tokens(result.output, ranks), lse[..., 0])


def _attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    ranks: dist.ProcessGroup,
    config: SageConfig | str | None,
    check_ranks: bool,
    *,
    wants_lse: bool,
) -> AttentionOutput:
    """Return the result for this rank's heads and all tokens, [B, Hq / W, W * N, Dv]."""
    rank, size = dist.get_rank(ranks), dist.get_world_size(ranks)

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
        for name, heads in (("query", query.shape[1]), ("key", key.shape[1])):
            if heads % size:
                raise ValueError(
                    f"{name} must have a multiple of {size} heads to share them among {size} "
                    f"ranks, got {heads}; ring_attention takes any number"
                )
        seen = (*query.shape[:2], size * query.shape[2], size * key.shape[2])
        call.require_mask(attn_mask, seen, is_causal, query)
        return accepted

    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    options = f"dtype={query.dtype}, is_causal={is_causal}"
    recipe, rotation = call.accept_on_every_rank(
        check, shapes, options, ranks, query.device, check_ranks
    )
    query, key, scale = rotated(rotation, query, key, scale)
    own = quantize(key, value, recipe)
    heads_q, heads_kv = query.shape[1] // size, key.shape[1] // size
    by_rank = [own.of_heads(i * heads_kv, heads_kv) for i in range(size)]
    outgoing = [block.pack() for block in by_rank]
    packets, arrival = _exchange(torch.stack(outgoing), ranks)
    heads_query = _tokens_of_heads(query, ranks)
    _wait(arrival)
    mask = _mask_heads(attn_mask, rank * heads_q, heads_q)
    blocks = [by_rank[rank].unpack(packet) for packet in packets]
    return merge(_attend_blocks(heads_query, blocks, mask, is_causal, scale, wants_lse))


def _attend_blocks(
    query: Tensor,
    blocks: list[Block],
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    wants_lse: bool,
) -> Iterator[tuple[AttentionOutput, int]]:
    """Attend to the blocks of all ranks, in ascending order of tokens."""
    tokens = blocks[0].tokens
    for source, block in enumerate(blocks):
        part = Part(source * tokens, tokens, "top_left") if is_causal else Part(0, tokens, "none")
        mask = call.mask_columns(attn_mask, source, tokens)
        yield block.attend(query, part, mask, scale, wants_lse), part.first_query


def _mask_heads(attn_mask: Tensor | None, first: int, heads: int) -> Tensor | None:
    """Return what a mask says about ``heads`` query heads from ``first`` on."""
    if attn_mask is None or attn_mask.dim() < 3 or attn_mask.shape[-3] == 1:
        return attn_mask
    return attn_mask.narrow(-3, first, heads)


def _exchange(tensor: Tensor, ranks: dist.ProcessGroup) -> tuple[Tensor, dist.Work | None]:
    """Send tensor[i] to rank i; what rank j sent arrives in the result's [j]."""
    outgoing = tensor.contiguous().view(torch.uint8)
    incoming = torch.empty_like(outgoing)
    work = dist.all_to_all_single(incoming, outgoing, group=ranks, async_op=True)
    return incoming.view(tensor.dtype), work


def _wait(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


def _tokens_of_heads(x: Tensor, ranks: dist.ProcessGroup) -> Tensor:
    """Swap all heads of this rank's tokens [B, H, N, D] for its heads of all tokens."""
    by_rank = torch.stack(x.chunk(dist.get_world_size(ranks), 1))
    received, work = _exchange(by_rank, ranks)
    _wait(work)
    return torch.cat([*received], 2)


def _heads_to_tokens(x: Tensor, ranks: dist.ProcessGroup) -> Tensor:
    """Swap this rank's heads of all tokens [B, H / W, W * N, D] for all heads of its tokens."""
    by_rank = torch.stack(x.chunk(dist.get_world_size(ranks), 2))
    received, work = _exchange(by_rank, ranks)
    _wait(work)
    return torch.cat([*received], 1)
