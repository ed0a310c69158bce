"""What the online softmax works on: quantized operands, base-2 logits, visibility (E1-E7)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torch_sage.recipes import Recipe
from torch_sage.reference.quantize import (
    HALF_FORMATS,
    key_groups,
    quantize_key,
    quantize_query,
    quantize_value,
    query_groups,
    smooth_query,
    value_shift,
)

LOG2_E = math.log2(math.e)
FP32_MAX = torch.finfo(torch.float32).max


class Tile(NamedTuple):
    """Sizes on which groups of rows that share a scale or a mean depend."""

    block_q: int
    block_k: int
    warp: int
    smooth_block: int


class ValueFormat(NamedTuple):
    """How V is quantized beyond its format."""

    code_max: float | None
    group: int | None


class Operands(NamedTuple):
    """Quantized operands with scales per row and kv heads repeated."""

    query_codes: Tensor  # [B, Hq, N, D], negated for a negative softmax scale
    query_scales: Tensor  # [B, Hq, N]
    key_codes: Tensor  # [B, Hq, M, D]
    key_scales: Tensor  # [B, Hq, M]
    value_codes: Tensor  # [B, Hq, M, Dv]
    value_scales: Tensor  # [B, Hq, groups, Dv]
    value_group: int  # tokens that share a scale of V
    value_shift: Tensor  # [B, Hq, groups, Dv], of every token of a group
    correction: Tensor | None  # fp64 Delta S [B, Hq, N, M], negated as query_codes
    lse_shift: Tensor  # fp64 scale * (query . key_mean) [B, Hq, N]
    bias: Tensor | None  # float mask [B, Hq, N, M], natural-log units
    visible: Tensor  # bool [B, Hq, N, M]
    scale_magnitude: float
    exp2_error: float = 0.0

    def probability_error(self, maximum: Tensor) -> Tensor:
        """Return the relative error [B, Hq, N] of P: that of 2**x, and that of x.

        Kernels subtract a rounded maximum from a product that is not rounded, so x may be half a
        unit in the last place of that maximum where it should be 0. Logits with a mask in them are
        rounded before.
        """
        if self.exp2_error == 0 or self.bias is not None:
            return torch.full_like(maximum, self.exp2_error)
        of_maximum = math.log(2) * torch.finfo(torch.float32).eps / 2 * maximum.abs()
        return self.exp2_error + math.copysign(1.0, self.exp2_error) * of_maximum

    def value_groups(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield the keys of each group of V, its scales and shift, and the rows that read it.

        A row reads the groups up to that of the last key it sees: V that is not finite poisons it
        from there, also by a masked key, as in torch.
        """
        seqlen_k = self.value_codes.shape[-2]
        for i, start in enumerate(range(0, seqlen_k, self.value_group)):
            keys = slice(start, min(start + self.value_group, seqlen_k))
            scales, shift = (x[..., i : i + 1, :] for x in (self.value_scales, self.value_shift))
            yield keys, scales, shift, self.visible[..., start:].any(-1)


def visibility(query: Tensor, key: Tensor, attn_mask: Tensor | None, causal: str) -> Tensor:
    """Return which keys each query may attend to, bool [B, Hq, N, M] (2.9).

    Raises:
        ValueError: for an unknown ``causal``, or a mask beside a causal one.
    """
    n, m = query.shape[-2], key.shape[-2]
    offsets = {"none": m, "top_left": 0, "bottom_right": m - n}
    if causal not in offsets:
        raise ValueError(f"causal must be one of {list(offsets)}, got {causal!r}")
    if attn_mask is not None and causal != "none":
        raise ValueError(f"attn_mask must be None with causal={causal!r}, got a tensor")
    shape = (*query.shape[:-1], m)
    if attn_mask is None:
        rows, keys = (torch.arange(size, device=query.device) for size in (n, m))
        visible = keys <= rows[:, None] + offsets[causal]
    elif attn_mask.dtype == torch.bool:
        visible = attn_mask
    else:
        visible = attn_mask != -torch.inf
    return visible.expand(shape)


def quantize_operands(
    inputs: tuple[Tensor, Tensor, Tensor],
    means: tuple[Tensor | None, Tensor | None, Tensor | None],
    recipe: Recipe,
    tile: Tile,
    value_format: ValueFormat,
    scale: float,
    visible: Tensor,
) -> Operands:
    """Quantize Q, K and V, and what the attention needs besides (E1-E4, E6).

    Raises:
        ValueError: if ``recipe`` has a field that is none of its values.
    """
    query, key, value = inputs
    smooth, rows = recipe.smooth, {"qk": recipe.qk, "granularity": recipe.granularity}
    if smooth not in ("", "q", "k", "v", "qk", "qv", "kv", "qkv"):
        raise ValueError(f"smooth must be letters of 'qkv' in this order, got {smooth!r}")
    groups_of_query, _ = query_groups(query.shape[-2], recipe.granularity, tile.block_q, tile.warp)
    groups_of_key, _ = key_groups(key.shape[-2], recipe.granularity, tile.block_k)
    group = query.shape[1] // key.shape[1]

    def per_query_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, dim=1)

    k_codes, k_scales, k_mean = quantize_key(
        key, means[1], smooth="k" in smooth, block=tile.block_k, **rows
    )
    v_codes, v_scales, v_mean = quantize_value(
        value,
        means[2],
        smooth="v" in smooth,
        pv=recipe.pv,
        value_max=value_format.code_max,
        group=value_format.group,
    )
    if value_format.group is None:
        v_group = max(value.shape[-2], 1)
        v_scales, v_shift = (x[..., None, :] for x in (v_scales, v_mean))
    else:
        v_group = value_format.group
        v_shift = v_mean
        if recipe.pv not in HALF_FORMATS:
            v_shift = value_shift(value, v_mean, v_codes, v_scales, v_group)
    # E6: fold the sign of the softmax scale into Q; code ranges are symmetric, so this is exact.
    sign = -1.0 if scale < 0 else 1.0
    q_input, correction = query.float(), None
    if "q" in smooth:
        if means[0] is None:
            q_input, q_mean = smooth_query(query, tile.smooth_block)
        else:
            q_mean = _by_row(means[0], query, tile.smooth_block)
            q_input = query.float() - q_mean
        smoothed_key = per_query_head(key.float() - k_mean[..., None, :])
        correction = sign * (q_mean.double() @ smoothed_key.mT.double())
    q_codes, q_scales = quantize_query(q_input, block=tile.block_q, warp=tile.warp, **rows)
    return Operands(
        query_codes=q_codes if sign > 0 else -q_codes,
        query_scales=q_scales[..., groups_of_query],
        key_codes=per_query_head(k_codes),
        key_scales=per_query_head(k_scales)[..., groups_of_key],
        value_codes=per_query_head(v_codes),
        value_scales=per_query_head(v_scales),
        value_group=v_group,
        value_shift=per_query_head(v_shift),
        correction=correction,
        lse_shift=scale * (query.double() * per_query_head(k_mean)[..., None, :]).sum(-1),
        bias=None,
        visible=visible,
        scale_magnitude=abs(scale),
    )


def _by_row(mean: Tensor, query: Tensor, block: int) -> Tensor:
    """Return the mean [B, Hq, D] or [B, Hq, blocks, D] that each row of ``query`` has."""
    if mean.dim() < query.dim():
        return mean[..., None, :].expand(query.shape)
    return mean.repeat_interleave(block, dim=-2)[..., : query.shape[-2], :]


def logits_base2(ops: Operands, keys: slice) -> Tensor:
    """Return E5-E7: fp32 base-2 logits of one key tile; hidden keys are -inf by selection."""
    # int32 sums stay below 2**24 for head_dim <= 1040, so fp32 holds them exactly.
    codes = ops.query_codes.float() @ ops.key_codes[..., keys, :].float().mT
    kappa = torch.tensor(ops.scale_magnitude * LOG2_E, dtype=torch.float32)
    z = codes * ((ops.query_scales * kappa)[..., None] * ops.key_scales[..., None, keys])
    if ops.correction is not None:
        z = z + kappa * ops.correction[..., keys].float()
    if ops.bias is not None:
        bias = ops.bias[..., keys].float()
        finite = (bias * LOG2_E).clamp(-FP32_MAX, FP32_MAX)
        z = z + torch.where(bias.isfinite(), finite, bias)
    return z.masked_fill(~ops.visible[..., keys], -torch.inf)
