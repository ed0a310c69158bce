"""Keys and values of one rank, quantized once, as they travel and as they are attended to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_sage.distributed.order import Part
from torch_sage.recipes import Recipe
from torch_sage.reference.attention import AttentionOutput

_ALIGNMENT = 128  # of every tensor in a packet, in bytes: kernels may load 16 at once


@dataclass(frozen=True)
class Block(ABC):
    """Quantized keys and values of one rank's tokens, in the layout of one family of kernels.

    K is smoothed around the rank's own mean. That needs no agreement: the LSE of each block
    contains ``query . mean``, so partial results merge as if nothing had been subtracted.
    """

    operands: tuple[Tensor, ...]
    """Codes, scales and mean of K, then of V: all that travels. Each begins with batch and heads,
    and those with tokens, or groups of them, have these third."""

    tokens: int
    head_dim_v: int
    recipe: Recipe

    @classmethod
    @abstractmethod
    def quantize(cls, key: Tensor, value: Tensor, recipe: Recipe) -> Block:
        """Return the block of the keys and values that this rank holds."""

    @abstractmethod
    def prefix(self, tokens: int) -> Block:
        """Return the block of the first ``tokens`` keys."""

    @abstractmethod
    def attention(
        self,
        query: Tensor,
        attn_mask: Tensor | None,
        causal: str,
        scale: float | None,
        wants_lse: bool,
    ) -> AttentionOutput:
        """Return what queries find in all keys of the block.

        Unless its caller wants the LSE itself, that may be any with which parts merge.
        """

    def attend(
        self,
        query: Tensor,
        part: Part,
        attn_mask: Tensor | None,
        scale: float | None,
        wants_lse: bool,
    ) -> AttentionOutput:
        """Return what the queries of ``part`` find in the keys of ``part``."""
        seen = self if part.keys == self.tokens else self.prefix(part.keys)
        queries = query[:, :, part.first_query :]
        return seen.attention(queries, attn_mask, part.causal, scale, wants_lse)

    def of_heads(self, first: int, heads: int) -> Block:
        """Return the block of ``heads`` key heads from ``first`` on."""
        return replace(self, operands=tuple(x[:, first : first + heads] for x in self.operands))

    def pack(self) -> Tensor:
        """Return the operands one behind the other, uint8: one message instead of six."""
        size = sum(_padded(x.nbytes) for x in self.operands)
        packet = self.operands[0].new_empty(size, dtype=torch.uint8)
        for place, operand in zip(self.unpack(packet).operands, self.operands, strict=True):
            place.copy_(operand)
        return packet

    def unpack(self, packet: Tensor) -> Block:
        """Return the block in ``packet``, which one of the same sizes packed; views."""
        operands, start = [], 0
        for like in self.operands:
            raw = packet[start : start + like.nbytes]
            operands.append(raw.view(like.dtype).view(like.shape))
            start += _padded(like.nbytes)
        return replace(self, operands=tuple(operands))


def _padded(size: int) -> int:
    return size + -size % _ALIGNMENT
