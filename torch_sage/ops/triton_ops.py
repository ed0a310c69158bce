"""The ops of ``schemas.py`` on GPUs, made of the Triton kernels.

Each takes every argument of its schema by name. The fake of an op checks the arguments and
allocates the results, here as in tracing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_sage.ops import checks, schemas, triton_attention, triton_quantize
from torch_sage.ops.triton_attention import LOG2_E, Keys, Query, Values
from torch_sage.ops.triton_quantize import Groups
from torch_sage.recipes import Recipe, rows_of_type

# Tiles that the whole op quantizes by, where rows share scales: those of algorithm.md 2.2.
_BLOCK_Q, _WARP, _BLOCK_K = 128, 32, 64


def quantize_query(**arguments: Any) -> tuple[Tensor, Tensor]:
    """Return int8 codes and scales of Q."""
    codes, scales = schemas.quantize_query(**arguments)
    query, granularity = arguments["query"], arguments["granularity"]
    groups = triton_quantize.query_groups(granularity, arguments["block"], arguments["warp"])
    with _device_of(query):
        triton_quantize.quantize_rows(query, None, groups, codes, scales)
    return codes, scales


def quantize_key(**arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return int8 codes, scales and the subtracted mean of K."""
    codes, scales, mean = schemas.quantize_key(**arguments)
    key = arguments["key"]
    groups = triton_quantize.key_groups(arguments["granularity"], arguments["block"])
    with _device_of(key):
        center = _center(key, arguments, mean)
        triton_quantize.quantize_rows(key, center, groups, codes, scales)
    return codes, scales, mean


def quantize_value(**arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return 16-bit codes, scales (1, or NaN for a channel that is not finite) and mean of V."""
    codes, scales, mean = schemas.quantize_value(**arguments)
    value = arguments["value"]
    center = _center(value, arguments, mean)
    _round_value(value, center, codes, scales)
    return codes, scales, mean


def attention(**arguments: Any) -> Tensor:
    """Attend to K and V that were quantized before."""
    return _attend_quantized(schemas.attention(**arguments), None, **arguments)


def attention_with_lse(**arguments: Any) -> tuple[Tensor, Tensor]:
    """Attend as ``attention``, and return the LSE too."""
    output, lse = schemas.attention_with_lse(**arguments)
    return _attend_quantized(output, lse, **arguments), lse


def sdpa(**arguments: Any) -> Tensor:
    """Quantize and attend."""
    _refuse_foreign_recipe(arguments)
    return _attend_whole(schemas.sdpa(**arguments), None, **arguments)


def sdpa_with_lse(**arguments: Any) -> tuple[Tensor, Tensor]:
    """Quantize and attend, and return the LSE too."""
    _refuse_foreign_recipe(arguments)
    output, lse = schemas.sdpa_with_lse(**arguments)
    return _attend_whole(output, lse, **arguments), lse


def _refuse_foreign_recipe(arguments: dict[str, Any]) -> None:
    """Refuse recipes that the fake of the whole op takes, because some other kernel has them."""
    rows = rows_of_type(arguments["query"].device.type, parts=True)
    recipe = Recipe.of_op(arguments).op_kwargs()
    if problems := checks.recipe_problems(dict.fromkeys(rows, recipe)):
        raise ValueError("; ".join(problems))


def _attend_whole(
    output: Tensor,
    lse: Tensor | None,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    granularity: str,
    pv: str,
    smooth: str,
    **semantics: Any,
) -> Tensor:
    scale = _softmax_scale(query, scale)
    with _device_of(query):
        key_mean = triton_quantize.token_mean(key) if "k" in smooth else None
        query_mean = triton_quantize.finite_token_mean(query) if "q" in smooth else None
        bias = None
        if query_mean is not None:
            bias = triton_quantize.dot_rows(
                key, key_mean, query_mean, query.shape[1], scale * LOG2_E
            )
        groups = triton_quantize.key_groups(granularity, _BLOCK_K)
        count = schemas.key_groups(key.shape[2], granularity, _BLOCK_K)
        codes, scales = _quantize_rows(key, key_mean, groups, count)
        values = _whole_values(value, pv, "v" in smooth)
        quantized = _quantize_query(query, query_mean, granularity)
        keys = Keys(codes, scales, groups, bias)
        return _attend(query, quantized, keys, values, key_mean, scale, output, lse, semantics)


def _attend_quantized(
    output: Tensor,
    lse: Tensor | None,
    *,
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    key_mean: Tensor,
    value_codes: Tensor,
    value_scales: Tensor,
    value_mean: Tensor,
    scale: float | None,
    granularity: str,
    block: int,
    **semantics: Any,
) -> Tensor:
    scale = _softmax_scale(query, scale)
    groups = triton_quantize.key_groups(granularity, block)
    with _device_of(query):
        keys = Keys(key_codes, key_scales.contiguous(), groups, None)
        values = Values(value_codes, value_scales.contiguous(), value_mean.contiguous())
        quantized = _quantize_query(query, None, granularity)
        key_mean = key_mean.contiguous()
        return _attend(query, quantized, keys, values, key_mean, scale, output, lse, semantics)


def _whole_values(value: Tensor, pv: str, smooth: bool) -> Values:
    """Return V for one use: as it is where its format and range allow."""
    if not smooth and (value.dtype == checks.HALVES[pv] or pv == "bf16"):
        # What is not finite reaches the output through the product itself.
        return Values(value.to(checks.HALVES[pv]), None, None)
    codes, scales, _ = schemas.quantize_value(value, smooth=smooth, pv=pv)
    center = triton_quantize.token_mean(value) if smooth else None
    _round_value(value, center, codes, scales)
    return Values(codes, scales, center)


def _round_value(value: Tensor, center: Tensor | None, codes: Tensor, scales: Tensor) -> None:
    """Fill the codes of V and scales that are 1, or NaN for a channel that is not finite."""
    x = value.float() if center is None else value.float() - center[:, :, None]
    largest = x.abs().amax(2) if x.shape[2] else torch.zeros_like(scales)
    limit = torch.finfo(codes.dtype)
    # bfloat16 has the range of fp32; what fp16 rounds to infinity poisons its channel.
    is_finite = (largest.half() if codes.dtype == torch.float16 else largest).isfinite()
    codes.copy_(torch.where(is_finite[:, :, None], x.clamp(limit.min, limit.max), 0.0))
    scales.copy_(torch.where(is_finite, 1.0, torch.nan))


def _quantize_query(query: Tensor, mean: Tensor | None, granularity: str) -> Query:
    groups = triton_quantize.query_groups(granularity, _BLOCK_Q, _WARP)
    count = schemas.query_groups(query.shape[2], granularity, _BLOCK_Q, _WARP)
    return Query(*_quantize_rows(query, mean, groups, count), groups)


def _quantize_rows(
    x: Tensor, mean: Tensor | None, groups: Groups, count: checks.Size
) -> tuple[Tensor, Tensor]:
    """Return the codes of ``x`` and their ``count`` scales per head; nothing is checked."""
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty((*x.shape[:2], count), dtype=torch.float32)
    triton_quantize.quantize_rows(x, mean, groups, codes, scales)
    return codes, scales


def _attend(
    query: Tensor,
    quantized: Query,
    keys: Keys,
    values: Values,
    key_mean: Tensor | None,
    scale: float,
    output: Tensor,
    lse: Tensor | None,
    semantics: dict[str, Any],
) -> Tensor:
    shift = None
    if lse is not None and key_mean is not None:
        shift = triton_quantize.dot_rows(query, None, key_mean, query.shape[1], scale)
    triton_attention.attention(
        quantized,
        keys,
        values,
        output,
        attn_mask=semantics["attn_mask"],
        causal=semantics["causal"],
        scale=scale,
        lse=lse,
        lse_shift=shift,
    )
    return output


def _softmax_scale(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[3]) if scale is None else scale


def _center(x: Tensor, arguments: dict[str, Any], mean: Tensor) -> Tensor | None:
    """Fill the returned ``mean``, and return it, or None where nothing is subtracted."""
    if not arguments["smooth"]:
        mean.zero_()
        return None
    given = arguments["mean"]
    return mean.copy_(triton_quantize.token_mean(x) if given is None else given)


def _device_of(tensor: Tensor) -> torch.cuda.device:
    """Return a context in which launches go to the device of ``tensor``; none on CPU."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
