"""Quantized attention: E1-E12 of algorithm.md, on whole tensors, one key tile at a time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sage.recipes import Recipe
from torch_sage.reference.accumulate import (
    Accumulator,
    probability_shift,
    round_probabilities,
    select_accumulator,
    sums_rounded_probabilities,
)
from torch_sage.reference.quantize import (
    key_groups,
    quantize_key,
    quantize_query,
    quantize_value,
    query_groups,
    smooth_query,
)

LOG2_E = math.log2(math.e)
FP32_MAX = torch.finfo(torch.float32).max


class AttentionOutput(NamedTuple):
    """What attention with its LSE returns; both are fp64 from the exact oracle."""

    output: Tensor
    """[B, Hq, N, Dv] in the dtype of query."""

    lse: Tensor
    """[B, Hq, N] fp32: natural log of the sum of exponentials of the scores; -inf for a row that
    sees no key."""


class _Tile(NamedTuple):
    block_q: int
    block_k: int
    warp: int
    smooth_block: int


class _Operands(NamedTuple):
    """Quantized operands with scales per row and kv heads repeated."""

    query_codes: Tensor  # [B, Hq, N, D], negated for a negative softmax scale
    query_scales: Tensor  # [B, Hq, N]
    key_codes: Tensor  # [B, Hq, M, D]
    key_scales: Tensor  # [B, Hq, M]
    value_codes: Tensor  # [B, Hq, M, Dv]
    value_scales: Tensor  # [B, Hq, Dv]
    value_mean: Tensor  # [B, Hq, Dv]
    correction: Tensor | None  # fp64 Delta S [B, Hq, N, M], negated as query_codes
    lse_shift: Tensor  # fp64 scale * (query . key_mean) [B, Hq, N]
    bias: Tensor | None  # float mask [B, Hq, N, M], natural-log units
    visible: Tensor  # bool [B, Hq, N, M]
    scale_magnitude: float
    exp2_error: float = 0.0


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    causal: str = "none",
    scale: float | None = None,
    *,
    qk: str,
    granularity: str,
    pv: str,
    smooth: str,
    block_q: int = 128,
    block_k: int = 64,
    warp: int = 32,
    tile: int | None = None,
    smooth_block: int | None = None,
    precision: str = "recipe",
    query_mean: Tensor | None = None,
    key_mean: Tensor | None = None,
    value_mean: Tensor | None = None,
    accumulator: str | None = None,
    two_level: bool = True,
    ranges: tuple[float, float] | None = None,
    sum_rounded: bool | None = None,
    exp2_error: float = 0.0,
) -> AttentionOutput:
    """Compute attention as the recipe specifies it.

    ``precision="exact"`` takes the quantized operands and continues in fp64 (results are fp64):
    what the recipe means. ``"recipe"`` also rounds where the recipe rounds: fp32 scores, P in its
    format, the hardware's accumulator, one rounding to the dtype of ``query`` (lse is fp32).

    Args:
        query: [B, Hq, N, D].
        key: [B, Hkv, M, D]; query head h reads kv head h // (Hq // Hkv).
        value: [B, Hkv, M, Dv].
        attn_mask: bool (True = visible) or float (added, natural-log units), broadcastable to
            [B, Hq, N, M]; only with ``causal="none"``.
        causal: "none", "top_left" (m <= n) or "bottom_right" (m <= n + M - N).
        scale: softmax scale of any sign; D ** -0.5 by default.
        qk: format of Q and K codes.
        granularity: rows that share a Q or K scale.
        pv: format of P and V.
        smooth: which of q, k, v are smoothed, such as "kv".
        block_q: rows of a query tile.
        block_k: rows of a key tile.
        warp: query rows that belong to one warp.
        tile: keys per step of the online softmax, ``block_k`` by default. P is rounded relative to
            the largest score so far, so another tile gives another rounding of the same size.
        smooth_block: query rows that share a mean where Q is smoothed, ``block_q`` by default; the
            CPU kernels take all rows of a head.
        precision: "recipe" or "exact".
        query_mean: fp32 [B, Hq, D] to smooth all rows of Q with, instead of means of blocks.
        key_mean: fp32 [B, Hkv, D] to smooth K with, instead of its own mean.
        value_mean: fp32 [B, Hkv, Dv] to smooth V with, instead of its own mean.
        accumulator: "fp32", "fp22" or "fp16"; by default that of the format's hardware.
        two_level: whether the accumulator is flushed to fp32 after every key tile (2.7).
        ranges: P_r and V_r of an E4M3 format; by default ``E4M3_RANGES``.
        sum_rounded: whether the row sum is taken from the rounded P; by default 2.6's choice.
        exp2_error: relative error given to 2**x, to see what a kernel's approximation may do.

    Returns:
        Output and lse; a row without a visible key has output 0 and lse -inf.

    Raises:
        ValueError: if an argument is not one of its valid values or shapes disagree.
    """
    if precision not in ("recipe", "exact"):
        raise ValueError(f"precision must be one of ['recipe', 'exact'], got {precision!r}")
    _check_shapes(query, key, value)
    probability_max, value_max = ranges or (None, None)
    visible = visibility(query, key, attn_mask, causal)
    ops = _quantize(
        (query, key, value),
        (query_mean, key_mean, value_mean),
        Recipe(qk, granularity, pv, smooth),
        _Tile(block_q, block_k, warp, smooth_block or block_q),
        query.shape[-1] ** -0.5 if scale is None else scale,
        visible,
        value_max,
    )
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        ops = ops._replace(bias=attn_mask.expand(visible.shape))
    accumulate = select_accumulator(pv, accumulator)
    if precision == "exact":
        output, lse = _exact(ops)
        return AttentionOutput(_saturate(output, query.dtype), lse)
    by_rounded = sums_rounded_probabilities(pv) if sum_rounded is None else sum_rounded
    shift = probability_shift(pv, probability_max)
    ops = ops._replace(exp2_error=exp2_error)
    output, lse = _online(ops, pv, tile or block_k, shift, accumulate, two_level, by_rounded)
    return AttentionOutput(_saturate(output, query.dtype).to(query.dtype), lse)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    **arguments: Any,
) -> AttentionOutput:
    """Apply ``attention`` to each sequence of a packed batch: means and groups restart at each one.

    Args:
        query: [total_q, Hq, D].
        key: [total_k, Hkv, D].
        value: [total_k, Hkv, Dv].
        cu_seqlens_q: [sequences + 1] row at which each query sequence starts, then total_q.
        cu_seqlens_k: [sequences + 1], the same for keys.
        arguments: everything else that ``attention`` takes; a mask would fit one sequence only.

    Returns:
        Output [total_q, Hq, Dv] and lse [Hq, total_q].

    Raises:
        ValueError: if the offsets do not ascend from 0 to the number of rows.
    """
    if arguments.get("attn_mask") is not None:
        raise ValueError("attn_mask must be None for packed sequences, got a tensor")
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for name, starts, rows in (("q", starts_q, len(query)), ("k", starts_k, len(key))):
        if starts[0] != 0 or starts[-1] != rows or sorted(starts) != starts:
            raise ValueError(f"cu_seqlens_{name} must ascend from 0 to {rows}, got {starts}")
    if len(starts_q) != len(starts_k):
        expected = f"have {len(starts_q)} elements like cu_seqlens_q"
        raise ValueError(f"cu_seqlens_k must {expected}, got {len(starts_k)}")
    results = []
    for i in range(len(starts_q) - 1):
        q_rows, k_rows = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        packed = (query[q_rows], key[k_rows], value[k_rows])
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in packed)
        results.append(attention(q, k, v, **arguments))
    output = torch.cat([r.output[0].transpose(0, 1) for r in results])
    return AttentionOutput(output, torch.cat([r.lse[0] for r in results], dim=-1))


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
        visible = torch.arange(m) <= torch.arange(n)[:, None] + offsets[causal]
    elif attn_mask.dtype == torch.bool:
        visible = attn_mask
    else:
        visible = attn_mask != -torch.inf
    return visible.expand(shape)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    b, h, _, d = query.shape
    if key.shape[0] != b or key.shape[-1] != d:
        raise ValueError(f"key must have shape [{b}, Hkv, M, {d}], got {list(key.shape)}")
    if value.shape[:-1] != key.shape[:-1]:
        expected = [*key.shape[:-1], "Dv"]
        raise ValueError(f"value must have shape {expected}, got {list(value.shape)}")
    if key.shape[1] == 0 or h % key.shape[1]:
        raise ValueError(f"key must have a divisor of {h} heads, got {key.shape[1]}")


def _saturate(output: Tensor, dtype: torch.dtype) -> Tensor:
    """Keep what is finite within the output's type: a convex combination of V cannot leave it."""
    largest = torch.finfo(dtype).max
    return torch.where(output.isfinite(), output.clamp(-largest, largest), output)


def _quantize(
    inputs: tuple[Tensor, Tensor, Tensor],
    means: tuple[Tensor | None, Tensor | None, Tensor | None],
    recipe: Recipe,
    tile: _Tile,
    scale: float,
    visible: Tensor,
    value_max: float | None,
) -> _Operands:
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
        value, means[2], smooth="v" in smooth, pv=recipe.pv, value_max=value_max
    )
    # E6: fold the sign of the softmax scale into Q; code ranges are symmetric, so this is exact.
    sign = -1.0 if scale < 0 else 1.0
    q_input, correction = query.float(), None
    if "q" in smooth:
        if means[0] is None:
            q_input, q_mean = smooth_query(query, tile.smooth_block)
        else:
            q_mean = means[0][..., None, :].expand(query.shape)
            q_input = query.float() - q_mean
        smoothed_key = per_query_head(key.float() - k_mean[..., None, :])
        correction = sign * (q_mean.double() @ smoothed_key.mT.double())
    q_codes, q_scales = quantize_query(q_input, block=tile.block_q, warp=tile.warp, **rows)
    return _Operands(
        query_codes=q_codes if sign > 0 else -q_codes,
        query_scales=q_scales[..., groups_of_query],
        key_codes=per_query_head(k_codes),
        key_scales=per_query_head(k_scales)[..., groups_of_key],
        value_codes=per_query_head(v_codes),
        value_scales=per_query_head(v_scales),
        value_mean=per_query_head(v_mean),
        correction=correction,
        lse_shift=scale * (query.double() * per_query_head(k_mean)[..., None, :]).sum(-1),
        bias=None,
        visible=visible,
        scale_magnitude=abs(scale),
    )


def _exact(ops: _Operands) -> AttentionOutput:
    """Continue in fp64 from the quantized operands: no further rounding worth mentioning."""
    scores = ops.query_codes.double() @ ops.key_codes.double().mT
    scores = scores * (ops.query_scales.double()[..., None] * ops.key_scales.double()[..., None, :])
    if ops.correction is not None:
        scores = scores + ops.correction
    scores = scores * ops.scale_magnitude
    if ops.bias is not None:
        scores = scores + ops.bias.double()
    scores = scores.masked_fill(~ops.visible, -torch.inf)
    if scores.shape[-1] == 0:
        scores = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
        ops = ops._replace(value_codes=torch.zeros_like(ops.value_scales)[..., None, :])
    top = scores.amax(-1, keepdim=True)
    p = (scores - top.masked_fill(top == -torch.inf, 0.0)).exp()
    total = p.sum(-1, keepdim=True)
    values = ops.value_codes.double() * ops.value_scales.double()[..., None, :]
    output = p @ values / total + ops.value_mean.double()[..., None, :]
    lse = (top + total.log()).squeeze(-1) + ops.lse_shift
    attends = total.squeeze(-1) != 0
    return AttentionOutput(
        torch.where(attends[..., None], output, 0.0), torch.where(attends, lse, -torch.inf)
    )


def _logits_base2(ops: _Operands, keys: slice) -> Tensor:
    """E5-E7: fp32 base-2 logits of one key tile; hidden keys are -inf by selection."""
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


def _online(
    ops: _Operands,
    pv: str,
    tile: int,
    shift: float,
    accumulate: Accumulator,
    two_level: bool,
    by_rounded: bool,
) -> AttentionOutput:
    """E8-E12: online softmax over key tiles in ascending order, in fp32."""
    rows = ops.query_codes.shape[:-1]
    top = torch.full(rows, -torch.inf)
    total, total_rounded = torch.zeros(rows), torch.zeros(rows)
    accumulated = torch.zeros(*rows, ops.value_codes.shape[-1])
    seqlen_k = ops.key_codes.shape[-2]
    for start in range(0, seqlen_k, tile):
        keys = slice(start, min(start + tile, seqlen_k))
        z = _logits_base2(ops, keys)
        new_top = torch.maximum(top, z.amax(-1) - shift)
        origin = new_top.masked_fill(new_top == -torch.inf, 0.0)
        alpha = (top - origin).exp2()
        p = (z - origin[..., None]).exp2() * (1 + ops.exp2_error)
        rounded = round_probabilities(p, pv)
        total = alpha * total + p.sum(-1)
        total_rounded = alpha * total_rounded + rounded.sum(-1)
        decayed = alpha[..., None] * accumulated
        values = ops.value_codes[..., keys, :].float()
        if two_level:
            accumulated = decayed + accumulate(torch.zeros_like(decayed), rounded, values)
        else:
            accumulated = accumulate(decayed, rounded, values)
        top = new_top
    divisor = total_rounded if by_rounded else total
    output = accumulated / divisor[..., None] * ops.value_scales[..., None, :]
    output = output + ops.value_mean[..., None, :]
    lse = math.log(2) * (top + total.log2()) + ops.lse_shift.float()
    attends = total != 0
    return AttentionOutput(
        torch.where(attends[..., None], output, 0.0), torch.where(attends, lse, -torch.inf)
    )
