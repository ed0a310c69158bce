"""Attention on quantized Q and K in Triton: INT8 Q K^T, P and V in 16 bits, fp32 accumulation.

The portable kernel: for every GPU that Triton compiles for and no kernel of ours is written for.
FlashAttention's loop over key tiles with an online softmax in base 2 (algorithm.md 2.4).

Source: SageAttention (arXiv 2410.02367), FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_sage import devices
from torch_sage.ops import triton_packed
from torch_sage.ops.triton_packed import Packed, find_tile, span_of
from torch_sage.ops.triton_quantize import Groups, first_scale
from torch_sage.ops.triton_statistics import padded

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
FP32_MAX = torch.finfo(torch.float32).max
HOPPER = 9  # generation of GPUs, the first number of their compute capability

SUMS = tl.constexpr(8)  # columns of ones behind V, all for the same sum: the least of a product


class Query(NamedTuple):
    """Quantized queries."""

    codes: Tensor
    """[B, Hq, N, D] int8, contiguous."""

    scales: Tensor
    """[B, Hq, groups] fp32, contiguous."""

    groups: Groups

    packed: Packed | None = None
    """Which rows are a sequence, of a batch of one; None if each entry of the batch is one."""


class Keys(NamedTuple):
    """Quantized keys."""

    codes: Tensor
    """[B, Hkv, M, D] int8, any strides."""

    scales: Tensor
    """[B, Hkv, groups] fp32, contiguous."""

    groups: Groups

    score_bias: Tensor | None
    """[B, Hq, M] fp32, added to the base-2 scores of every row: what smoothing took from Q."""

    packed: Packed | None = None
    """As of the queries."""


class Values(NamedTuple):
    """Values, and what undoes their quantization."""

    codes: Tensor
    """[B, Hkv, M, Dv] bfloat16 or float16, any strides; P takes their dtype."""

    scales: Tensor | None
    """[sequences, Hkv, Dv] fp32, or None for 1."""

    mean: Tensor | None
    """[sequences, Hkv, Dv] fp32, or None for 0."""


# Numbers that change from call to call, and whose being 1 or a multiple of 16 saves nothing.
UNSPECIALIZED = (
    "heads",
    "heads_kv",
    "rows_q",
    "rows_k",
    "query_groups",
    "key_groups",
    "units",
    "count",
    "longest_q",
    "longest_k",
    "from_the_end",
)


@triton.jit
def _tile_index(row, SPAN: tl.constexpr, LANE_ROWS: tl.constexpr):
    """Return the scale of each row: ``Groups`` as arithmetic."""
    return row // SPAN * (8 // LANE_ROWS) + row % 8 // LANE_ROWS


@triton.jit
def _attend(
    accumulated,
    total,
    total_exact,
    top,
    query,
    query_scale,
    row,
    first,
    last,
    visible,  # [BLOCK_N] keys that each row sees, as the causal diagonal says
    key,
    key_stride,
    key_stride_d,
    key_scales,
    value,
    value_stride,
    value_stride_d,
    score_bias,
    mask,
    mask_stride_n,
    mask_stride_m,
    seqlen_q,
    seqlen_k,
    channels,
    channels_v,
    HIDES: tl.constexpr,
    MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WANTS_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    WIDE: tl.constexpr,
    KEY_SPAN: tl.constexpr,
    KEY_LANE_ROWS: tl.constexpr,
    BASE2: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Attend to the keys from ``first`` to ``last``; ``HIDES`` if a row does not see them all."""
    channel = tl.arange(0, BLOCK_D)
    channel_v = tl.arange(0, BLOCK_DV)
    ones = tl.full([BLOCK_M, SUMS], 1.0, value.dtype.element_ty)
    for start in range(first, last, BLOCK_M):
        start = tl.multiple_of(start, BLOCK_M)
        col = start + tl.arange(0, BLOCK_M)
        is_key = col < seqlen_k
        place = col.to(tl.int64) if WIDE else col
        # codes: [BLOCK_D, BLOCK_M], the transpose of K
        pointers = key + place[None, :] * key_stride + channel[:, None] * key_stride_d
        if EVEN_D and not HIDES:
            codes = tl.load(pointers)
        elif EVEN_D:
            codes = tl.load(pointers, mask=is_key[None, :], other=0)
        else:
            is_code = is_key[None, :] & (channel < channels)[:, None]
            codes = tl.load(pointers, mask=is_code, other=0)
        score = tl.dot(query, codes, out_dtype=tl.int32).to(tl.float32)
        if KEY_LANE_ROWS == 8 and KEY_SPAN % BLOCK_M == 0:
            # All keys of the tile share a scale.
            factor = query_scale * tl.load(key_scales + start // KEY_SPAN)
        else:
            index = _tile_index(col, KEY_SPAN, KEY_LANE_ROWS)
            score *= tl.load(key_scales + index, mask=is_key, other=1.0)[None, :]
            factor = query_scale

        if HAS_BIAS or MASK != "none" or HIDES:
            score = score * factor[:, None]
            if HAS_BIAS:
                score += tl.load(score_bias + col, mask=is_key, other=0.0)[None, :]
            if MASK != "none":
                at = mask + row.to(tl.int64)[:, None] * mask_stride_n
                at += col.to(tl.int64)[None, :] * mask_stride_m
                is_score = (row < seqlen_q)[:, None] & is_key[None, :]
                if MASK == "bool":
                    keep = tl.load(at, mask=is_score, other=0)
                    score = tl.where(keep != 0, score, float("-inf"))
                else:
                    bias = tl.load(at, mask=is_score, other=0.0).to(tl.float32)
                    # A finite element stays finite: a row of finfo.min is uniform, not hidden.
                    added = tl.minimum(tl.maximum(bias * BASE2, -LARGEST), LARGEST)
                    score += tl.where(bias == float("inf"), bias, added)
                    score = tl.where(bias == float("-inf"), bias, score)
            if HIDES:
                score = tl.where(col[None, :] < visible[:, None], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, axis=1))
            origin = tl.where(new_top == float("-inf"), 0.0, new_top)
            weight = tl.exp2(score - origin[:, None])
        else:
            # The factor is not negative, so the maximum may be taken before it is applied, and
            # applying it costs nothing: it is one FMA with the subtraction.
            new_top = tl.maximum(top, tl.max(score, axis=1) * factor)
            origin = tl.where(new_top == float("-inf"), 0.0, new_top)
            weight = tl.exp2(score * factor[:, None] - origin[:, None])
        rescale = tl.exp2(top - origin)
        top = new_top
        rounded = weight.to(value.dtype.element_ty)
        if WANTS_LSE:
            total_exact = total_exact * rescale + tl.sum(weight, axis=1)
        # The sum of what was rounded, by the tensor cores: to round a lone number, and to widen it
        # for an addition, costs an H100 as much as the exponential.
        total = tl.dot(rounded, ones, total * rescale[:, None])
        accumulated = accumulated * rescale[:, None]
        pointers = value + place[:, None] * value_stride + channel_v[None, :] * value_stride_d
        if EVEN_DV and not HIDES:
            values = tl.load(pointers)
        elif EVEN_DV:
            values = tl.load(pointers, mask=is_key[:, None], other=0.0)
        else:
            is_value = is_key[:, None] & (channel_v < channels_v)[None, :]
            values = tl.load(pointers, mask=is_value, other=0.0)
        accumulated = tl.dot(rounded, values, accumulated)
    return accumulated, total, total_exact, top


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_kernel(
    query,  # [B, Hq, N, D] int8, contiguous
    query_scales,  # [B, Hq, groups] fp32
    key,  # [B, Hkv, M, D] int8
    key_scales,  # [B, Hkv, groups] fp32
    value,  # [B, Hkv, M, Dv]
    value_scales,  # [sequences, Hkv, Dv] fp32
    value_mean,  # [sequences, Hkv, Dv] fp32
    score_bias,  # [B, Hq, M] fp32, base-2 units
    mask,  # [B, Hq, N, M] by strides
    output,  # [B, Hq, N, Dv]
    lse,  # [B, Hq, N] fp32
    lse_shift,  # [B, Hq, N] fp32
    starts_q,
    starts_k,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    key_stride_d,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    value_stride_d,
    mask_stride_b,
    mask_stride_h,
    mask_stride_n,
    mask_stride_m,
    output_stride_b,
    output_stride_h,
    output_stride_n,
    heads,
    heads_kv,
    rows_q,
    rows_k,
    channels,
    channels_v,
    query_groups,
    key_groups,
    units,
    count,
    longest_q,
    longest_k,
    magnitude,  # |scale| * log2(e)
    from_the_end,  # 1 where the last query sees all keys, 0 where the first one sees one
    PACKED: tl.constexpr,
    IS_NEGATIVE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_VALUE_SCALES: tl.constexpr,
    HAS_VALUE_MEAN: tl.constexpr,
    WANTS_LSE: tl.constexpr,
    HAS_LSE_SHIFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_DV: tl.constexpr,
    WIDE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    QUERY_SPAN: tl.constexpr,
    QUERY_LANE_ROWS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_SPAN: tl.constexpr,
    KEY_LANE_ROWS: tl.constexpr,
    BASE2: tl.constexpr,
    NATURAL: tl.constexpr,
    LARGEST: tl.constexpr,
    LARGEST_OUTPUT: tl.constexpr,
):
    # Tiles of one head are neighbours, so that they share its keys in the L2 cache; the tiles that
    # see most keys start first.
    head = (tl.program_id(0) // units).to(tl.int64)
    index = (tl.program_id(0) // units + 1) * units - 1 - tl.program_id(0) % units
    batch, head_q = head // heads, head % heads
    head_kv = head_q // (heads // heads_kv)
    sequence, tile, first_q, seqlen_q = find_tile(
        index, heads, units, rows_q, starts_q, count, longest_q, BLOCK_N, PACKED
    )
    first_k, seqlen_k = span_of(starts_k, sequence, rows_k, longest_k, PACKED)
    if PACKED:
        # Nothing to do for a tile that is none.
        seqlen_k = tl.where(tile * BLOCK_N < seqlen_q, seqlen_k, 0)
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < seqlen_q
    channel = tl.arange(0, BLOCK_D)
    channel_v = tl.arange(0, BLOCK_DV)

    codes = tl.load(
        query
        + (head * rows_q + first_q) * channels
        + row.to(tl.int64)[:, None] * channels
        + channel[None, :],
        mask=is_row[:, None] & (channel < channels)[None, :],
        other=0,
    )
    if IS_NEGATIVE:
        codes = -codes
    query_scales += head * query_groups
    query_scales += first_scale(first_q, sequence, QUERY_BLOCK, QUERY_SPAN, QUERY_LANE_ROWS, PACKED)
    index = _tile_index(row, QUERY_SPAN, QUERY_LANE_ROWS)
    query_scale = tl.load(query_scales + index, mask=is_row, other=0.0) * magnitude

    if CAUSAL:
        # Row n sees the keys up to n + offset.
        offset = (seqlen_k - seqlen_q) * from_the_end
        visible = tl.minimum(row + offset + 1, seqlen_k)
        seen_by_all = tl.maximum(tl.minimum(tile * BLOCK_N + offset + 1, seqlen_k), 0)
        end = tl.maximum(tl.minimum((tile + 1) * BLOCK_N + offset, seqlen_k), 0)
    else:
        visible = tl.full([BLOCK_N], 0, tl.int32) + seqlen_k
        seen_by_all = seqlen_k
        end = seqlen_k
    whole = seen_by_all // BLOCK_M * BLOCK_M

    top = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N, SUMS], tl.float32)
    total_exact = tl.zeros([BLOCK_N], tl.float32)
    accumulated = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    key += batch * key_stride_b + head_kv * key_stride_h + first_k * key_stride_n
    value += batch * value_stride_b + head_kv * value_stride_h + first_k * value_stride_n
    key_scales += (batch * heads_kv + head_kv) * key_groups
    key_scales += first_scale(first_k, sequence, KEY_BLOCK, KEY_SPAN, KEY_LANE_ROWS, PACKED)
    mask += batch * mask_stride_b + head_q * mask_stride_h
    for HIDES in tl.static_range(2):
        accumulated, total, total_exact, top = _attend(
            accumulated,
            total,
            total_exact,
            top,
            codes,
            query_scale,
            row,
            whole if HIDES else 0,
            end if HIDES else whole,
            visible,
            key,
            key_stride_n,
            key_stride_d,
            key_scales,
            value,
            value_stride_n,
            value_stride_d,
            score_bias + head * rows_k + first_k,
            mask,
            mask_stride_n,
            mask_stride_m,
            seqlen_q,
            seqlen_k,
            channels,
            channels_v,
            HIDES,
            MASK,
            HAS_BIAS,
            WANTS_LSE,
            BLOCK_M,
            BLOCK_D,
            BLOCK_DV,
            EVEN_D,
            EVEN_DV,
            WIDE,
            KEY_SPAN,
            KEY_LANE_ROWS,
            BASE2,
            LARGEST,
        )

    is_channel = channel_v < channels_v
    total = tl.max(total, axis=1)
    result = accumulated / total[:, None]
    of_head = (sequence * heads_kv + head_kv) * channels_v + channel_v
    if HAS_VALUE_SCALES:
        result *= tl.load(value_scales + of_head, mask=is_channel, other=0.0)[None, :]
    if HAS_VALUE_MEAN:
        result += tl.load(value_mean + of_head, mask=is_channel, other=0.0)[None, :]
    result = tl.where((total == 0.0)[:, None], 0.0, result)
    if output.dtype.element_ty != tl.float32:
        # A mean of values cannot leave their range, a rounded one can: what is finite stays so.
        inside = tl.minimum(tl.maximum(result, -LARGEST_OUTPUT), LARGEST_OUTPUT)
        result = tl.where(tl.abs(result) < float("inf"), inside, result)
    at = output + batch * output_stride_b + head_q * output_stride_h + first_q * output_stride_n
    at += row.to(tl.int64)[:, None] * output_stride_n + channel_v[None, :]
    tl.store(at, result.to(output.dtype.element_ty), mask=is_row[:, None] & is_channel[None, :])
    if WANTS_LSE:
        at_row = head * rows_q + first_q + row
        natural = (top + tl.log2(total_exact)) * NATURAL
        if HAS_LSE_SHIFT:
            natural += tl.load(lse_shift + at_row, mask=is_row, other=0.0)
        natural = tl.where(total_exact == 0.0, float("-inf"), natural)
        tl.store(lse + at_row, natural, mask=is_row)


class Tile(NamedTuple):
    """How one program works: rows, keys a step, warps, and stages of the loads' pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_for(channels: int, channels_v: int, device: torch.device) -> Tile:
    """Return the tile for head dimensions padded to powers of two."""
    widest = max(channels, channels_v)
    if device.type == "cuda" and devices.generation(device.index) == HOPPER:
        # One warpgroup a program, two programs on an SM: while one has its products on the tensor
        # cores, the other one computes exponentials.
        return Tile(64, 128, 4, 2) if widest <= 128 else Tile(64, 64, 4, 2)
    if torch.version.hip is not None:
        return Tile(64, 32, 8, 1)  # more does not fit registers; nobody has timed it
    return Tile(128, 64, 8, 3) if widest <= 128 else Tile(64, 32, 8, 2)


def _reach(x: Tensor, tile: Tile) -> int:
    """Return a bound of offsets in a head of ``x``, those of a tile's keys beyond its end, too."""
    return (x.shape[2] + tile.keys) * x.stride(2) + x.shape[3] * x.stride(3)


def attention(
    query: Query,
    keys: Keys,
    values: Values,
    output: Tensor,
    *,
    attn_mask: Tensor | None,
    causal: str,
    scale: float,
    lse: Tensor | None = None,
    lse_shift: Tensor | None = None,
) -> None:
    """Fill ``output`` [B, Hq, N, Dv] and ``lse`` [B, Hq, N].

    Args:
        query: quantized queries.
        keys: quantized keys.
        values: values in 16 bits.
        output: uninitialised, with unit stride of the last dimension.
        attn_mask: bool or float, broadcasts to [B, Hq, N, M].
        causal: "none", "top_left" or "bottom_right".
        scale: softmax scale of any sign.
        lse: uninitialised fp32 [B, Hq, N], or None if it is not wanted.
        lse_shift: fp32 [B, Hq, N] added to the natural-log LSE.
    """
    b, heads, n, d = query.codes.shape
    heads_kv, m = keys.codes.shape[1:3]
    dv = values.codes.shape[3]
    # An int8 product needs 32 channels, a 16-bit one 16 columns.
    block_d, block_dv = max(32, padded(d)), max(16, padded(dv))
    tile = tile_for(block_d, block_dv, output.device)
    packed = query.packed
    units = triton_packed.units(n, tile.rows, packed)
    if b * heads * units == 0:
        return
    mask_kind, mask = "none", query.codes
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if attn_mask is not None:
        mask = attn_mask.expand(b, heads, n, m)
        mask_strides = mask.stride()
        mask_kind = "bool" if mask.dtype == torch.bool else "float"
        if mask_kind == "bool":
            mask = mask.view(torch.uint8)
    arguments: dict[str, Any] = {
        "PACKED": packed is not None,
        "IS_NEGATIVE": scale < 0,
        "CAUSAL": causal != "none",
        "MASK": mask_kind,
        "HAS_BIAS": keys.score_bias is not None,
        "HAS_VALUE_SCALES": values.scales is not None,
        "HAS_VALUE_MEAN": values.mean is not None,
        "WANTS_LSE": lse is not None,
        "HAS_LSE_SHIFT": lse_shift is not None,
        "BLOCK_N": tile.rows,
        "BLOCK_M": tile.keys,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "EVEN_D": block_d == d,
        "EVEN_DV": block_dv == dv,
        "WIDE": max(_reach(x.codes, tile) for x in (keys, values)) >= 2**31,
        "QUERY_BLOCK": query.groups.block,
        "QUERY_SPAN": query.groups.span,
        "QUERY_LANE_ROWS": query.groups.lane_rows,
        "KEY_BLOCK": keys.groups.block,
        "KEY_SPAN": keys.groups.span,
        "KEY_LANE_ROWS": keys.groups.lane_rows,
        "BASE2": LOG2_E,
        "NATURAL": LN_2,
        "LARGEST": FP32_MAX,
        "LARGEST_OUTPUT": torch.finfo(output.dtype).max,
        "enable_fp_fusion": True,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    unused = query.scales
    starts_q, count, longest_q = triton_packed.arguments(packed, unused)
    starts_k, _, longest_k = triton_packed.arguments(keys.packed, unused)
    _attention_kernel[(b * heads * units,)](
        query.codes,
        query.scales,
        keys.codes,
        keys.scales,
        values.codes,
        unused if values.scales is None else values.scales,
        unused if values.mean is None else values.mean,
        unused if keys.score_bias is None else keys.score_bias,
        mask,
        output,
        unused if lse is None else lse,
        unused if lse_shift is None else lse_shift,
        starts_q,
        starts_k,
        *keys.codes.stride(),
        *values.codes.stride(),
        *mask_strides,
        *output.stride()[:3],
        heads,
        heads_kv,
        n,
        m,
        d,
        dv,
        query.scales.shape[2],
        keys.scales.shape[2],
        units,
        count,
        longest_q,
        longest_k,
        abs(scale) * LOG2_E,
        int(causal == "bottom_right"),
        **arguments,
    )
