"""Quantized attention: E1-E12 of algorithm.md, on whole tensors, one key tile at a time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_sage.recipes import EXPONENTIALS, Recipe
from torch_sage.reference.accumulate import (
    Accumulator,
    probability_shift,
    round_probabilities,
    select_accumulator,
    sums_rounded_probabilities,
)
from torch_sage.reference.grouped import ACCUMULATORS, online_by_groups
from torch_sage.reference.operands import (
    Operands,
    Tile,
    ValueFormat,
    logits_base2,
    quantize_operands,
    visibility,
)
from torch_sage.reference.quantize import E4M3_RANGES


class AttentionOutput(NamedTuple):
    """What attention with its LSE returns; both are fp64 from the exact oracle."""

    output: Tensor
    """[B, Hq, N, Dv] in the dtype of query."""

    lse: Tensor
    """[B, Hq, N] fp32: natural log of the sum of exponentials of the scores; -inf for a row that
    sees no key."""


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
    value_group: int | None = None,
    exponential: str = "exact",
    lag: float = 0.0,
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
        query_mean: fp32 [B, Hq, blocks, D] to smooth blocks of ``smooth_block`` rows of Q with, or
            [B, Hq, D] for all rows, instead of their own means.
        key_mean: fp32 [B, Hkv, D] to smooth K with, instead of its own mean.
        value_mean: fp32 [B, Hkv, Dv], with ``value_group`` [B, Hkv, groups, Dv], to smooth V with,
            instead of its own mean.
        accumulator: "fp32", "fp22", "fp16" or "fp16_converted"; by default that of the format's
            hardware.
        two_level: whether the accumulator is flushed to fp32 after every key tile (2.7).
        ranges: P_r and V_r of an E4M3 format; by default ``E4M3_RANGES``.
        sum_rounded: whether the row sum is taken from the rounded P; by default 2.6's choice.
        exp2_error: relative error given to 2**x, to see what a kernel's approximation may do; what
            the rounding of a row's largest score may do besides is given the same sign.
        value_group: tokens of V that share a scale and a mean per channel, all by default. Each
            token then also gets back what the codes of its group lack on average (``value_shift``),
            the accumulator is flushed after every group and sums the rounded P, too; only with
            pv="e4m3_fp16", or with "bf16", which has no scales: there it is the tokens of a channel
            that one of them poisons.
        exponential: "exact", or with pv="e4m3_fp16" and ``value_group`` also "mixed": 3 of 4 keys
            take a mantissa that is linear in the score, truncated to E4M3 (the lse is always
            exact).
        lag: with ``value_group``, how far (base 2) a row may exceed the maximum that P is relative
            to before that moves.

    Returns:
        Output and lse; a row without a visible key has output 0 and lse -inf.

    Raises:
        ValueError: if an argument is not one of its valid values or shapes disagree.
    """
    if precision not in ("recipe", "exact"):
        raise ValueError(f"precision must be one of ['recipe', 'exact'], got {precision!r}")
    _check_shapes(query, key, value)
    _check_groups(pv, value_group, exponential, accumulator, two_level, sum_rounded)
    probability_max, value_max = ranges or E4M3_RANGES.get(pv, (1.0, 1.0))
    visible = visibility(query, key, attn_mask, causal)
    ops = quantize_operands(
        (query, key, value),
        (query_mean, key_mean, value_mean),
        Recipe(qk, granularity, pv, smooth),
        Tile(block_q, block_k, warp, smooth_block or block_q),
        ValueFormat(value_max, value_group),
        query.shape[-1] ** -0.5 if scale is None else scale,
        visible,
    )
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        ops = ops._replace(bias=attn_mask.expand(visible.shape))
    accumulate = select_accumulator(pv, accumulator)
    if precision == "exact":
        output, lse = _exact(ops)
        return AttentionOutput(_saturate(output, query.dtype), lse)
    by_rounded = sums_rounded_probabilities(pv) if sum_rounded is None else sum_rounded
    shift, tile = probability_shift(pv, probability_max), tile or block_k
    ops = ops._replace(exp2_error=exp2_error)
    if value_group is None:
        output, lse = _online(ops, pv, tile, shift, accumulate, two_level, by_rounded)
    else:
        output, lse = online_by_groups(ops, pv, exponential, tile, shift, value_max, lag)
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


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    b, h, _, d = query.shape
    if key.shape[0] != b or key.shape[-1] != d:
        raise ValueError(f"key must have shape [{b}, Hkv, M, {d}], got {list(key.shape)}")
    if value.shape[:-1] != key.shape[:-1]:
        expected = [*key.shape[:-1], "Dv"]
        raise ValueError(f"value must have shape {expected}, got {list(value.shape)}")
    if key.shape[1] == 0 or h % key.shape[1]:
        raise ValueError(f"key must have a divisor of {h} heads, got {key.shape[1]}")


def _check_groups(
    pv: str,
    value_group: int | None,
    exponential: str,
    accumulator: str | None,
    two_level: bool,
    sum_rounded: bool | None,
) -> None:
    """Refuse what scales of V per group of keys do not go with."""
    valid = ["exact"] if value_group is None or pv == "bf16" else list(EXPONENTIALS)
    if exponential not in valid:
        expected = f"be one of {valid} with pv={pv!r} and value_group={value_group}"
        raise ValueError(f"exponential must {expected}, got {exponential!r}")
    if value_group is None:
        return
    if value_group < 1:
        raise ValueError(f"value_group must be at least 1, got {value_group}")
    if pv not in ACCUMULATORS:
        expected = f"be one of {list(ACCUMULATORS)} with value_group={value_group}"
        raise ValueError(f"pv must {expected}, got {pv!r}")
    only = ACCUMULATORS[pv]
    if accumulator not in (None, only) or not two_level or sum_rounded is False:
        raise ValueError(
            f"accumulator must be {only!r}, two_level and sum_rounded True with value_group, got "
            f"{accumulator!r}, {two_level} and {sum_rounded}"
        )


def _saturate(output: Tensor, dtype: torch.dtype) -> Tensor:
    """Keep what is finite within the output's type: a convex combination of V cannot leave it."""
    largest = torch.finfo(dtype).max
    return torch.where(output.isfinite(), output.clamp(-largest, largest), output)


def _exact(ops: Operands) -> AttentionOutput:
    """Continue in fp64 from the quantized operands: no further rounding worth mentioning."""
    scores = ops.query_codes.double() @ ops.key_codes.double().mT
    scores = scores * (ops.query_scales.double()[..., None] * ops.key_scales.double()[..., None, :])
    if ops.correction is not None:
        scores = scores + ops.correction
    scores = scores * ops.scale_magnitude
    if ops.bias is not None:
        scores = scores + ops.bias.double()
    scores = scores.masked_fill(~ops.visible, -torch.inf)
    output = torch.zeros(*scores.shape[:-1], ops.value_codes.shape[-1]).to(scores)
    if scores.shape[-1] == 0:
        return AttentionOutput(output, torch.full_like(scores.sum(-1), -torch.inf))
    top = scores.amax(-1, keepdim=True)
    p = (scores - top.masked_fill(top == -torch.inf, 0.0)).exp()
    total = p.sum(-1, keepdim=True)
    for keys, scales, shift, reads in ops.value_groups():
        weights = p[..., keys]
        values = ops.value_codes[..., keys, :].double() * scales.double()
        share = weights.sum(-1, keepdim=True) / total  # exactly 1 where there is one group
        added = weights @ values / total + share * shift.double()
        output = output + torch.where(reads[..., None], added, 0.0)
    lse = (top + total.log()).squeeze(-1) + ops.lse_shift
    attends = total.squeeze(-1) != 0
    return AttentionOutput(
        torch.where(attends[..., None], output, 0.0), torch.where(attends, lse, -torch.inf)
    )


def _online(
    ops: Operands,
    pv: str,
    tile: int,
    shift: float,
    accumulate: Accumulator,
    two_level: bool,
    by_rounded: bool,
) -> AttentionOutput:
    """E8-E12: online softmax over key tiles in ascending order, in fp32."""
    rows = ops.query_codes.shape[:-1]
    device = ops.query_codes.device
    top = torch.full(rows, -torch.inf, device=device)
    total, total_rounded = torch.zeros(2, *rows, device=device)
    accumulated = torch.zeros(*rows, ops.value_codes.shape[-1], device=device)
    seqlen_k = ops.key_codes.shape[-2]
    for start in range(0, seqlen_k, tile):
        keys = slice(start, min(start + tile, seqlen_k))
        z = logits_base2(ops, keys)
        new_top = torch.maximum(top, z.amax(-1) - shift)
        origin = new_top.masked_fill(new_top == -torch.inf, 0.0)
        alpha = (top - origin).exp2()
        p = (z - origin[..., None]).exp2() * (1 + ops.probability_error(origin))[..., None]
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
    output = accumulated / divisor[..., None] * ops.value_scales
    output = output + ops.value_shift
    lse = math.log(2) * (top + total.log2()) + ops.lse_shift.float()
    attends = total != 0
    return AttentionOutput(
        torch.where(attends[..., None], output, 0.0), torch.where(attends, lse, -torch.inf)
    )
