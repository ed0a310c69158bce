"""The families of kernels whose keys and values can be sent: ops in parts, and prepared operands.

The others quantize and attend in one op, so they have nothing to send.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_sage import ops
from torch_sage.devices import rows_of
from torch_sage.distributed.block import Block
from torch_sage.ops.checks import prepared_operands
from torch_sage.ops.schemas import key_groups
from torch_sage.recipes import ALL_PREPARED, SUPPORT, Recipe
from torch_sage.reference.attention import AttentionOutput

_BLOCK = 64  # rows of K that make one group or more: the ops' default


def rows_to_send(device: torch.device) -> tuple[str, ...]:
    """Return the rows of the recipe table with which ``device`` can share attention.

    One row that does not suit is left where there is none, for ``device_reasons`` to refuse.
    """
    rows = rows_of(device)
    able = (
        row for row in rows if row in ALL_PREPARED or (row in SUPPORT and SUPPORT[row].has_parts)
    )
    return tuple(able) or rows[:1]


def quantize(key: Tensor, value: Tensor, recipe: Recipe) -> Block:
    """Quantize the keys and values that this rank holds, by the family that runs ``recipe``."""
    is_prepared = any(SUPPORT[row].allows(recipe) for row in ALL_PREPARED)
    family = PreparedBlock if is_prepared else PartsBlock
    return family.quantize(key, value, recipe)


@dataclass(frozen=True)
class PartsBlock(Block):
    """What ``quantize_key`` and ``quantize_value`` return: CPU and Triton kernels."""

    @classmethod
    def quantize(cls, key: Tensor, value: Tensor, recipe: Recipe) -> PartsBlock:
        """Quantize K in groups of tokens, V to 16 bits."""
        keys = ops.quantize_key(
            key,
            smooth="k" in recipe.smooth,
            qk=recipe.qk,
            granularity=recipe.granularity,
            block=_BLOCK,
        )
        values = ops.quantize_value(value, smooth="v" in recipe.smooth, pv=recipe.pv)
        return cls((*keys, *values), key.shape[2], value.shape[3], recipe)

    def prefix(self, tokens: int) -> PartsBlock:
        """Return the first keys: their scales come first, too, in every granularity."""
        key_codes, key_scales, key_mean, value_codes, *of_value = self.operands
        groups = key_groups(tokens, self.recipe.granularity, _BLOCK)
        operands = (
            key_codes[:, :, :tokens],
            key_scales[:, :, :groups],
            key_mean,
            value_codes[:, :, :tokens],
            *of_value,
        )
        return replace(self, operands=operands, tokens=tokens)

    def attention(
        self,
        query: Tensor,
        attn_mask: Tensor | None,
        causal: str,
        scale: float | None,
        wants_lse: bool,
    ) -> AttentionOutput:
        """Attend by ``attention_with_lse``: there is no faster way."""
        del wants_lse
        output, lse = ops.attention_with_lse(
            query,
            *self.operands,
            attn_mask,
            causal,
            scale,
            qk=self.recipe.qk,
            granularity=self.recipe.granularity,
            block=_BLOCK,
            pv=self.recipe.pv,
        )
        return AttentionOutput(output, lse)


@dataclass(frozen=True)
class PreparedBlock(Block):
    """What ``prepare_kv`` returns: the kernels for compute capability 9.0."""

    @classmethod
    def quantize(cls, key: Tensor, value: Tensor, recipe: Recipe) -> PreparedBlock:
        """Quantize K to INT8 and V to its format in one pass."""
        operands = ops.prepare_kv(key, value, smooth=recipe.smooth, pv=recipe.pv)
        return cls(tuple(operands), key.shape[2], value.shape[3], recipe)

    def prefix(self, tokens: int) -> PreparedBlock:
        """Return the first keys: images, scales and groups of tokens come in ascending order."""
        batch, heads, head_dim = self.operands[2].shape
        sizes = (batch, heads, tokens, head_dim, self.head_dim_v)
        shorter = prepared_operands(*sizes, self.recipe.pv)
        operands = tuple(
            operand[:, :, : shape[2]]
            for operand, (_, shape) in zip(self.operands, shorter.values(), strict=True)
        )
        return replace(self, operands=operands, tokens=tokens)

    def attention(
        self,
        query: Tensor,
        attn_mask: Tensor | None,
        causal: str,
        scale: float | None,
        wants_lse: bool,
    ) -> AttentionOutput:
        """Attend by ``attention_prepared_with_lse``, or faster for merging alone."""
        op = ops.attention_prepared_with_lse if wants_lse else ops.attention_prepared_part
        output, lse = op(
            query,
            *self.operands,
            self.tokens,
            self.head_dim_v,
            attn_mask,
            causal,
            scale,
            exponential=self.recipe.exponential,
        )
        return AttentionOutput(output, lse)
