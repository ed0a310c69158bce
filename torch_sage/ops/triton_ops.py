"""The ops of ``schemas.py`` on GPUs, made of the Triton kernels.

Each takes every argument of its schema by name. The fake of an op checks the arguments and
allocates the results, here as in tracing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_sage.ops import (
    checks,
    schemas,
    triton_attention,
    triton_dot,
    triton_packed,
    triton_quantize,
    triton_round,
    triton_statistics,
)
from torch_sage.ops.triton_attention import LOG2_E, Keys, Query, Values
from torch_sage.ops.triton_packed import Packed
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
    with _device_of(value):
        center = _center(value, arguments, mean)
    triton_round.round_rows(value, center, codes, scales)
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


def varlen_sdpa(**arguments: Any) -> Tensor:
    """Quantize packed sequences, each by itself, and attend."""
    _refuse_foreign_recipe(arguments)
    output: Tensor = schemas.varlen_sdpa(**arguments)
    _attend_packed(output, None, **arguments)
    return output


def varlen_sdpa_with_lse(**arguments: Any) -> tuple[Tensor, Tensor]:
    """Attend as ``varlen_sdpa``, and return the LSE too."""
    _refuse_foreign_recipe(arguments)
    output, lse = schemas.varlen_sdpa_with_lse(**arguments)
    _attend_packed(output, lse, **arguments)
    return output, lse


def _refuse_foreign_recipe(arguments: dict[str, Any]) -> None:
    """Refuse recipes that the fake of the whole op takes, because some other kernel has them."""
    rows = rows_of_type(arguments["query"].device.type, parts=True)
    recipe = Recipe.of_op(arguments).op_kwargs()
    if problems := checks.recipe_problems(dict.fromkeys(rows, recipe)):
        raise ValueError("; ".join(problems))


def _attend_packed(
    output: Tensor,
    lse: Tensor | None,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **arguments: Any,
) -> None:
    """Fill output and LSE; what is new there has the result of rows that see no key."""
    output.zero_()
    if lse is not None:
        lse.fill_(-math.inf)
    if cu_seqlens_q.shape[0] == 1:
        return  # no sequence
    q, k, v, out = (x.transpose(0, 1)[None] for x in (query, key, value, output))
    _attend_whole(
        out,
        None if lse is None else lse[None],
        query=q,
        key=k,
        value=v,
        queries=Packed(cu_seqlens_q.contiguous(), min(max_seqlen_q, q.shape[2])),
        keys=Packed(cu_seqlens_k.contiguous(), min(max_seqlen_k, k.shape[2])),
        attn_mask=None,
        **arguments,
    )


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
    queries: Packed | None = None,
    keys: Packed | None = None,
    **semantics: Any,
) -> Tensor:
    scale = _softmax_scale(query, scale)
    heads = query.shape[1]
    with _device_of(query):
        key_mean = triton_statistics.token_mean(key, keys) if "k" in smooth else None
        query_mean = bias = None
        if "q" in smooth:
            query_mean = triton_statistics.finite_token_mean(query, queries)
            bias = triton_dot.dot_rows(key, key_mean, query_mean, heads, scale * LOG2_E, keys)
        groups = triton_quantize.key_groups(granularity, _BLOCK_K)
        codes, scales = _quantize_rows(key, key_mean, groups, keys)
        values = _whole_values(value, pv, "v" in smooth, keys)
        quantized = _quantize_query(query, query_mean, granularity, queries)
        quantized_keys = Keys(codes, scales, groups, bias, keys)
        return _attend(
            query, quantized, quantized_keys, values, key_mean, scale, output, lse, semantics
        )


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


def _whole_values(value: Tensor, pv: str, smooth: bool, packed: Packed | None) -> Values:
    """Return V for one use: as it is where its format and range allow."""
    if not smooth and (value.dtype == checks.HALVES[pv] or pv == "bf16"):
        # What is not finite reaches the output through the product itself.
        return Values(value.to(checks.HALVES[pv]), None, None)
    mean = triton_statistics.token_mean(value, packed) if smooth else None
    codes = value.new_empty(value.shape, dtype=checks.HALVES[pv])
    _, h, _, d = value.shape
    scales = value.new_empty((triton_packed.count(value, packed), h, d), dtype=torch.float32)
    triton_round.round_rows(value, mean, codes, scales, packed)
    return Values(codes, scales, mean)


def _quantize_query(
    query: Tensor, mean: Tensor | None, granularity: str, packed: Packed | None = None
) -> Query:
    groups = triton_quantize.query_groups(granularity, _BLOCK_Q, _WARP)
    return Query(*_quantize_rows(query, mean, groups, packed), groups, packed)


def _quantize_rows(
    x: Tensor, mean: Tensor | None, groups: Groups, packed: Packed | None
) -> tuple[Tensor, Tensor]:
    """Return the codes of ``x`` and their scales; nothing is checked."""
    codes = x.new_empty(x.shape, dtype=torch.int8)
    scales = x.new_empty((*x.shape[:2], groups.number(x.shape[2], packed)), dtype=torch.float32)
    triton_quantize.quantize_rows(x, mean, groups, codes, scales, packed)
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
        shift = triton_dot.dot_rows(query, None, key_mean, query.shape[1], scale, quantized.packed)
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
    return mean.copy_(triton_statistics.token_mean(x) if given is None else given)


def _device_of(tensor: Tensor) -> torch.cuda.device:
    """Return a context in which launches go to the device of ``tensor``; none on CPU."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
