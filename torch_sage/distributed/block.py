"""Keys and values of one rank, quantized once, as they travel and as they are attended to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_sage import ops
from torch_sage.distributed.order import Part
from torch_sage.ops.schemas import key_groups
from torch_sage.recipes import Recipe
from torch_sage.reference.attention import AttentionOutput

_BLOCK = 64  # rows of K per block, the ops' default
_ALIGNMENT = 128  # of every tensor in a packet, in bytes: kernels may load 16 at once


class Block(NamedTuple):
    """What ``quantize_key`` and ``quantize_value`` return for one rank's tokens.

    K is smoothed around the rank's own mean. That needs no agreement: the LSE of each block
    contains ``query . mean``, so partial results merge as if nothing had been subtracted.
    """

    key_codes: Tensor  # [B, Hkv, M, D]
    key_scales: Tensor  # [B, Hkv, groups]
    key_mean: Tensor  # [B, Hkv, D]
    value_codes: Tensor  # [B, Hkv, M, Dv]
    value_scales: Tensor  # [B, Hkv, Dv]
    value_mean: Tensor  # [B, Hkv, Dv]


def quantize(key: Tensor, value: Tensor, recipe: Recipe) -> Block:
    """Quantize the keys and values that this rank holds."""
    keys = ops.quantize_key(
        key,
        smooth="k" in recipe.smooth,
        qk=recipe.qk,
        granularity=recipe.granularity,
        block=_BLOCK,
    )
    return Block(*keys, *ops.quantize_value(value, smooth="v" in recipe.smooth, pv=recipe.pv))


def head_slice(block: Block, first: int, heads: int) -> Block:
    """Return the block of ``heads`` key heads from ``first`` on."""
    return Block(*(tensor[:, first : first + heads] for tensor in block))


def _prefix(block: Block, tokens: int, granularity: str) -> Block:
    """Return the first keys of a block: their scales come first, too, in every granularity."""
    return block._replace(
        key_codes=block.key_codes[:, :, :tokens],
        key_scales=block.key_scales[..., : key_groups(tokens, granularity, _BLOCK)],
        value_codes=block.value_codes[:, :, :tokens],
    )


def attend(
    query: Tensor,
    block: Block,
    part: Part,
    attn_mask: Tensor | None,
    scale: float | None,
    recipe: Recipe,
) -> AttentionOutput:
    """Return what the queries of ``part`` find in the keys of ``part``."""
    if part.keys < block.key_codes.shape[2]:
        block = _prefix(block, part.keys, recipe.granularity)
    output, lse = ops.attention_with_lse(
        query[:, :, part.first_query :],
        *block,
        attn_mask,
        part.causal,
        scale,
        qk=recipe.qk,
        granularity=recipe.granularity,
        block=_BLOCK,
        pv=recipe.pv,
    )
    return AttentionOutput(output, lse)


def pack(block: Block) -> Tensor:
    """Return the bytes of a block, uint8: one message instead of six."""
    parts = []
    for tensor in block:
        raw = tensor.contiguous().flatten().view(torch.uint8)
        parts.append(torch.nn.functional.pad(raw, (0, -raw.numel() % _ALIGNMENT)))
    return torch.cat(parts)


def unpack(packet: Tensor, like: Block) -> Block:
    """Return views of ``packet`` with the dtypes and shapes of ``like``."""
    tensors, start = [], 0
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        raw = packet[start : start + size]
        tensors.append(raw.view(tensor.dtype).view(tensor.shape))
        start += size + -size % _ALIGNMENT
    return Block(*tensors)
