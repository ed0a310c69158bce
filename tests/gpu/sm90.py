"""The recipe for compute capability 9.0: its arguments, its oracle, and how its operands lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cases import AttentionCase, Inputs
from tests.gpu.shared import OPS
from tests.numerics import Expected, assert_within_budget, expect, same_bits
from torch_sage.recipes import PREPARED, SUPPORT

SMOOTHING = SUPPORT[PREPARED].smooth
EXPONENTIALS = SUPPORT[PREPARED].exponential
RECIPE = {"qk": "int8", "granularity": "token_thread", "pv": "e4m3_fp16"}
VALUE_GROUP, VALUE_MAX = 1024, 0.25
# Of the oracle: steps and lag of csrc/attention/sm90/config.cuh, so that a comparison sees the
# kernel's errors, not another sample of rounding.
ORACLE: dict[str, Any] = {
    **RECIPE,
    "value_group": VALUE_GROUP,
    "ranges": (64.0, VALUE_MAX),
    "sum_rounded": True,
    "lag": 1.75,
}
# The same of the recipe whose P and V are in bf16: its exponentials are all exact.
HALF: dict[str, Any] = {**RECIPE, "pv": "bf16", "exponential": "exact"}
HALF_ORACLE: dict[str, Any] = {**RECIPE, "pv": "bf16", "value_group": VALUE_GROUP, "lag": 8.0}
HALF_SMOOTHING = SUPPORT["cuda.sm90.half"].smooth
IMAGE_ROWS, CHUNK = 64, 16
SWIZZLE_BYTES = 128  # the most that a permutation of chunks spans
# Keys of a 16-byte chunk of V, in the order of its bytes.
CHUNK_ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)


def is_for_sm90(case: AttentionCase, row: str = PREPARED) -> bool:
    widest = max(case.head_dim, case.head_dim_v)
    return case.smooth in SUPPORT[row].smooth and widest <= SUPPORT[row].max_head_dim


def width_of(head_dim: int, head_dim_v: int) -> int:
    """Return the channels of both images: the least of the kernels' that hold both."""
    return next(width for width in (64, 128, 256) if max(head_dim, head_dim_v) <= width)


def keys_of_a_step(inputs: Inputs, pv: str) -> int:
    if pv == "bf16":
        return 128 if inputs.attn_mask is None else 64
    return 128 if width_of(inputs.query.shape[3], inputs.value.shape[3]) <= 128 else 64


def expected(inputs: Inputs, smooth: str, exponential: str, pv: str = "e4m3_fp16") -> Expected:
    """Return the references, on the GPU, with the mean that the kernels take of a few keys.

    That of V is the mean of all tokens of a group but for the rounding of fp32 sums.
    """
    mean: Tensor | None = None
    if "k" in smooth:
        mean = OPS.prepare_kv(inputs.key, inputs.value, smooth=smooth)[2]
    oracle = HALF_ORACLE if pv == "bf16" else ORACLE
    recipe = {**oracle, "tile": keys_of_a_step(inputs, pv), "smooth": smooth}
    return expect(*inputs, **recipe, key_mean=mean, exponential=exponential)


def assert_right(inputs: Inputs, smooth: str, exponential: str) -> None:
    """Require ``sdpa`` and ``sdpa_with_lse`` to be what the recipe specifies.

    With a mask or the LSE the exponentials are exact, whatever was asked for.
    """
    recipe = {**RECIPE, "smooth": smooth}
    output = OPS.sdpa(*inputs, **recipe, exponential=exponential)
    full, lse = OPS.sdpa_with_lse(*inputs, **recipe, exponential=exponential)
    if exponential == "exact":
        assert_within_budget(full, expected(inputs, smooth, "exact"), lse=lse)
        assert same_bits(output, full)
        return
    exact = OPS.sdpa(*inputs, **recipe, exponential="exact")
    assert same_bits(full, exact)
    if inputs.attn_mask is None:
        assert_within_budget(output, expected(inputs, smooth, "mixed"))
    else:
        assert same_bits(output, exact)


def assert_half_right(inputs: Inputs, smooth: str) -> None:
    """Require the same of the recipe with bf16, whose output is one with and without the LSE."""
    output = OPS.sdpa(*inputs, **HALF, smooth=smooth)
    full, lse = OPS.sdpa_with_lse(*inputs, **HALF, smooth=smooth)
    assert_within_budget(full, expected(inputs, smooth, "exact", "bf16"), lse=lse)
    assert same_bits(output, full)


def key_image(codes: Tensor, width: int) -> Tensor:
    """Return prepared codes of K in natural order: [B, H, 64 * tiles, width]."""
    b, h, tiles, _ = codes.shape
    piece = min(width, SWIZZLE_BYTES)
    pieces = codes.view(b, h, tiles, width // piece, IMAGE_ROWS, piece).transpose(3, 4)
    chunks = pieces.reshape(b, h, tiles * IMAGE_ROWS, -1, piece // CHUNK, CHUNK)
    row = torch.arange(tiles * IMAGE_ROWS, device=codes.device)[:, None]
    natural = _unswizzle(chunks, row % 8 if piece == SWIZZLE_BYTES else row // 2 % 4)
    return natural.flatten(-2)


def value_image(codes: Tensor, width: int) -> Tensor:
    """Return prepared codes of V in natural order: [B, H, 64 * tiles, width]."""
    b, h, tiles, _ = codes.shape
    chunks = codes.view(b, h, tiles * width, IMAGE_ROWS // CHUNK, CHUNK)
    channel = torch.arange(tiles * width, device=codes.device) % width
    by_channel = _unswizzle(chunks, channel // 2 % 4).view(b, h, tiles, width, -1, CHUNK)
    natural = by_channel[..., torch.tensor(CHUNK_ORDER).argsort()].flatten(-2)
    return natural.mT.reshape(b, h, tiles * IMAGE_ROWS, width)


def half_value_image(codes: Tensor, width: int) -> Tensor:
    """Return prepared values in bf16 in natural order: [B, H, 64 * tiles, width]."""
    b, h, tiles, _ = codes.shape
    chunks = codes.view(b, h, tiles * width, IMAGE_ROWS * 2 // CHUNK, CHUNK // 2)
    channel = torch.arange(tiles * width, device=codes.device) % width
    by_channel = _unswizzle(chunks, channel % 8).view(b, h, tiles, width, IMAGE_ROWS)
    return by_channel.mT.reshape(b, h, tiles * IMAGE_ROWS, width)


def _unswizzle(chunks: Tensor, mask: Tensor) -> Tensor:
    """Undo the XOR of the number of a chunk [..., chunks, codes] with a ``mask`` of the rows."""
    number = torch.arange(chunks.shape[-2], device=chunks.device)
    place = (number ^ mask[..., None])[..., None].expand(chunks.shape)
    return chunks.gather(-2, place).flatten(-2)
