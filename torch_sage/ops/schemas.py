"""The op inventory of ``torch.ops.torch_sage``: each schema, its tags, and its fake right below.

Logical shapes are always [batch, heads, seqlen, head_dim]; strides express any memory order.
``causal`` is "none", "top_left" (key m visible to query n iff m <= n) or "bottom_right"
(m <= n + seqlen_k - seqlen_q). Recipe arguments are explained in ``recipes.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torch_sage.devices import lack_of_sm90
from torch_sage.ops import checks, packed
from torch_sage.ops.checks import Size
from torch_sage.recipes import ROTARY as ROTARY_ROWS
from torch_sage.recipes import SUPPORT, Recipe, rows_of_type
from torch_sage.reference.quantize import TOKEN_BLOCK

LIBRARY = torch.library.Library("torch_sage", "DEF")  # type: ignore[no-untyped-call]  # torch's
OP_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)

# Sequences one after the other in the rows of the tensors.
_PACKED = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, str causal='none', float? scale=None"
)

# Arguments of every other attention op after its tensors; `attn_mask` is bool (True = keep) or
# float.
_SEMANTICS = "Tensor? attn_mask=None, str causal='none', float? scale=None"

DEFINITIONS: dict[str, str] = {
    "quantize_query": (
        "(Tensor query, *, str qk='int8', str granularity='token', int block=128, int warp=32)"
        " -> (Tensor codes, Tensor scales)"
    ),
    "quantize_key": (
        "(Tensor key, Tensor? mean=None, *, bool smooth=True, str qk='int8',"
        " str granularity='token', int block=64) -> (Tensor codes, Tensor scales, Tensor mean)"
    ),
    "quantize_value": (
        "(Tensor value, Tensor? mean=None, *, bool smooth=False, str pv='bf16')"
        " -> (Tensor codes, Tensor scales, Tensor mean)"
    ),
    "attention": (
        "(Tensor query, Tensor key_codes, Tensor key_scales, Tensor key_mean,"
        f" Tensor value_codes, Tensor value_scales, Tensor value_mean, {_SEMANTICS}, *,"
        " str qk='int8', str granularity='token', int block=64, str pv='bf16',"
        " str output_order='bhsd') -> Tensor"
    ),
    "attention_with_lse": (
        "(Tensor query, Tensor key_codes, Tensor key_scales, Tensor key_mean,"
        f" Tensor value_codes, Tensor value_scales, Tensor value_mean, {_SEMANTICS}, *,"
        " str qk='int8', str granularity='token', int block=64, str pv='bf16',"
        " str output_order='bhsd') -> (Tensor output, Tensor lse)"
    ),
    "sdpa": (
        f"(Tensor query, Tensor key, Tensor value, {_SEMANTICS}, *, str qk='int8',"
        " str granularity='token', str pv='bf16', str smooth='qk', str exponential='exact',"
        " str output_order='bhsd') -> Tensor"
    ),
    "sdpa_with_lse": (
        f"(Tensor query, Tensor key, Tensor value, {_SEMANTICS}, *, str qk='int8',"
        " str granularity='token', str pv='bf16', str smooth='qk', str exponential='exact',"
        " str output_order='bhsd') -> (Tensor output, Tensor lse)"
    ),
    "varlen_sdpa": (
        f"({_PACKED}, *, str qk='int8', str granularity='token', str pv='bf16', str smooth='qk',"
        " str exponential='exact') -> Tensor"
    ),
    "varlen_sdpa_with_lse": (
        f"({_PACKED}, *, str qk='int8', str granularity='token', str pv='bf16', str smooth='qk',"
        " str exponential='exact') -> (Tensor output, Tensor lse)"
    ),
    "rotary_sdpa": (
        "(Tensor query, Tensor key, Tensor value, Tensor query_cos, Tensor query_sin,"
        " Tensor? query_rstd, Tensor? query_weight, float? query_eps, Tensor key_cos,"
        " Tensor key_sin, Tensor? key_rstd, Tensor? key_weight, float? key_eps,"
        f" {_SEMANTICS}, *, str pairing='halves', str qk='int8', str granularity='token',"
        " str pv='bf16', str smooth='qk', str exponential='exact', str output_order='bhsd')"
        " -> Tensor"
    ),
    "prepare_kv": (
        "(Tensor key, Tensor value, *, str smooth='kv', str pv='e4m3_fp16')"
        " -> (Tensor key_codes, Tensor key_scales, Tensor key_mean, Tensor value_codes,"
        " Tensor value_scales, Tensor value_shift)"
    ),
    "attention_prepared": (
        "(Tensor query, Tensor key_codes, Tensor key_scales, Tensor key_mean,"
        " Tensor value_codes, Tensor value_scales, Tensor value_shift, SymInt seqlen_k,"
        f" int head_dim_v, {_SEMANTICS}, *, str exponential='mixed',"
        " str output_order='bhsd') -> Tensor"
    ),
    "attention_prepared_with_lse": (
        "(Tensor query, Tensor key_codes, Tensor key_scales, Tensor key_mean,"
        " Tensor value_codes, Tensor value_scales, Tensor value_shift, SymInt seqlen_k,"
        f" int head_dim_v, {_SEMANTICS}, *, str exponential='mixed',"
        " str output_order='bhsd') -> (Tensor output, Tensor lse)"
    ),
    "attention_prepared_part": (
        "(Tensor query, Tensor key_codes, Tensor key_scales, Tensor key_mean,"
        " Tensor value_codes, Tensor value_scales, Tensor value_shift, SymInt seqlen_k,"
        f" int head_dim_v, {_SEMANTICS}, *, str exponential='mixed',"
        " str output_order='bhsd') -> (Tensor output, Tensor lse)"
    ),
}

WHOLE = ("sdpa", "sdpa_with_lse")
"""The ops that run every recipe of a device."""

PREPARED = (
    "prepare_kv",
    "attention_prepared",
    "attention_prepared_with_lse",
    "attention_prepared_part",
)
"""The ops of few rows of the recipe table (``recipes.ALL_PREPARED``)."""

VARLEN = ("varlen_sdpa", "varlen_sdpa_with_lse")
"""The ops over packed sequences."""

ROTARY = "rotary_sdpa"
"""The op of few rows (``recipes.ROTARY``), which has its kernel for CPU in Python."""

for _name, _schema in DEFINITIONS.items():
    LIBRARY.define(f"{_name}{_schema}", tags=OP_TAGS)  # type: ignore[no-untyped-call]  # torch's


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    register: Callable[[Callable[..., Any]], Callable[..., Any]]
    register = torch.library.register_fake(f"torch_sage::{name}", lib=LIBRARY)
    return register


@_fake("quantize_query")
def quantize_query(
    query: Tensor,
    *,
    qk: str = "int8",
    granularity: str = "token",
    block: int = 128,
    warp: int = 32,
) -> tuple[Tensor, Tensor]:
    """Shapes of codes [B, Hq, N, D] int8 and scales [B, Hq, groups] fp32."""
    _require(checks.quantizer_problems("query", query, None))
    _require_parts(query, qk=qk, granularity=granularity)
    _require(checks.group_problems(block, warp))
    groups = query_groups(query.shape[2], granularity, block, warp)
    return _codes(query), query.new_empty((*query.shape[:2], groups), dtype=torch.float32)


@_fake("quantize_key")
def quantize_key(
    key: Tensor,
    mean: Tensor | None = None,
    *,
    smooth: bool = True,
    qk: str = "int8",
    granularity: str = "token",
    block: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of codes [B, Hkv, M, D] int8, scales [B, Hkv, groups] fp32, mean [B, Hkv, D] fp32."""
    _require(checks.quantizer_problems("key", key, mean, smooth=smooth))
    _require_parts(key, qk=qk, granularity=granularity)
    _require(checks.group_problems(block))
    groups = key_groups(key.shape[2], granularity, block)
    scales = key.new_empty((*key.shape[:2], groups), dtype=torch.float32)
    return _codes(key), scales, _per_channel(key)


@_fake("quantize_value")
def quantize_value(
    value: Tensor, mean: Tensor | None = None, *, smooth: bool = False, pv: str = "bf16"
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of codes [B, Hkv, M, Dv] bf16, scales and mean [B, Hkv, Dv] fp32."""
    _require(checks.quantizer_problems("value", value, mean, smooth=smooth))
    _require_parts(value, pv=pv)
    codes = value.new_empty(value.shape, dtype=checks.HALVES[pv])
    return codes, _per_channel(value), _per_channel(value)


@_fake("attention")
def attention(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    key_mean: Tensor,
    value_codes: Tensor,
    value_scales: Tensor,
    value_mean: Tensor,
    attn_mask: Tensor | None = None,
    causal: str = "none",
    scale: float | None = None,
    *,
    qk: str = "int8",
    granularity: str = "token",
    block: int = 64,
    pv: str = "bf16",
    output_order: str = "bhsd",
) -> Tensor:
    """Shape of the output [B, Hq, N, Dv] in the dtype of query."""
    keys = (key_codes, key_scales, key_mean)
    values = (value_codes, value_scales, value_mean)
    _require_parts(query, qk=qk, granularity=granularity, pv=pv)
    _require(checks.group_problems(block))
    _require(checks.quantized_problems(query, keys, values, attn_mask, causal, scale, pv))
    groups = key_groups(key_codes.shape[2], granularity, block)
    _require(checks.shape_problems("key_scales", key_scales, (*key_codes.shape[:2], groups)))
    return empty_output(query, value_codes.shape[3], output_order)


@_fake("attention_with_lse")
def attention_with_lse(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Shapes of the output [B, Hq, N, Dv] and the natural-log LSE [B, Hq, N] fp32."""
    return attention(query, *args, **kwargs), empty_lse(query)


@_fake("sdpa")
def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    causal: str = "none",
    scale: float | None = None,
    *,
    qk: str = "int8",
    granularity: str = "token",
    pv: str = "bf16",
    smooth: str = "qk",
    exponential: str = "exact",
    output_order: str = "bhsd",
) -> Tensor:
    """Shape of the output [B, Hq, N, Dv] in the dtype of query."""
    _require(checks.sdpa_problems(query, key, value, attn_mask, causal, scale))
    _require_recipe(query, value, Recipe(qk, granularity, pv, smooth, exponential), tuple(SUPPORT))
    return empty_output(query, value.shape[3], output_order)


@_fake("sdpa_with_lse")
def sdpa_with_lse(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Shapes of the output [B, Hq, N, Dv] and the natural-log LSE [B, Hq, N] fp32."""
    return sdpa(query, *args, **kwargs), empty_lse(query)


@_fake("varlen_sdpa")
def varlen_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Size,
    max_seqlen_k: Size,
    causal: str = "none",
    scale: float | None = None,
    *,
    qk: str = "int8",
    granularity: str = "token",
    pv: str = "bf16",
    smooth: str = "qk",
    exponential: str = "exact",
) -> Tensor:
    """Shape of the output [tokens, Hq, Dv] in the dtype of query."""
    starts, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    _require(packed.problems(query, key, value, *starts, *longest, causal, scale))
    _require_recipe(query, value, Recipe(qk, granularity, pv, smooth, exponential), tuple(SUPPORT))
    tokens, heads, _ = query.shape
    return query.new_empty((tokens, heads, value.shape[2]))


@_fake("varlen_sdpa_with_lse")
def varlen_sdpa_with_lse(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Shapes of the output [tokens, Hq, Dv] and the natural-log LSE [Hq, tokens] fp32."""
    output = varlen_sdpa(query, *args, **kwargs)
    tokens, heads, _ = query.shape
    return output, query.new_empty((heads, tokens), dtype=torch.float32)


@_fake("rotary_sdpa")
def rotary_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_cos: Tensor,
    query_sin: Tensor,
    query_rstd: Tensor | None,
    query_weight: Tensor | None,
    query_eps: float | None,
    key_cos: Tensor,
    key_sin: Tensor,
    key_rstd: Tensor | None,
    key_weight: Tensor | None,
    key_eps: float | None,
    attn_mask: Tensor | None = None,
    causal: str = "none",
    scale: float | None = None,
    *,
    pairing: str = "halves",
    qk: str = "int8",
    granularity: str = "token",
    pv: str = "bf16",
    smooth: str = "qk",
    exponential: str = "exact",
    output_order: str = "bhsd",
) -> Tensor:
    """Shape of what ``sdpa`` returns for the query and key that ``rotary.rotate`` makes."""
    of_query = (query_cos, query_sin, query_rstd, query_weight, query_eps)
    of_key = (key_cos, key_sin, key_rstd, key_weight, key_eps)
    require_rotations(query, key, value, of_query, of_key, pairing)
    _require(checks.sdpa_problems(query, key, value, attn_mask, causal, scale))
    _require_recipe(query, value, Recipe(qk, granularity, pv, smooth, exponential), ROTARY_ROWS)
    return empty_output(query, value.shape[3], output_order)


def require_rotations(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_query: tuple[Any, ...],
    of_key: tuple[Any, ...],
    pairing: str,
) -> None:
    """Refuse what does not rotate query and key: for each cos, sin, rstd, weight and eps."""
    _require(checks.rank_problems(query=query, key=key, value=value))
    _require(
        [
            *checks.rotation_problems("query", query, *of_query),
            *checks.rotation_problems("key", key, *of_key),
            *checks.rotary_problems(key, value, pairing),
        ]
    )


@_fake("prepare_kv")
def prepare_kv(
    key: Tensor, value: Tensor, *, smooth: str = "kv", pv: str = "e4m3_fp16"
) -> tuple[Tensor, ...]:
    """Shapes of codes, scales and mean of K, of codes, scales and shift of V.

    With T = ceil(M / 128) and P = 64, 128 or 256, the least that holds both head dimensions:
    key_codes [B, Hkv, 2 T, 64 P] int8, an image of 64 tokens each; key_scales [B, Hkv, T, 4] fp32;
    key_mean [B, Hkv, D] fp32; value_codes like key_codes, but uint8 or, for pv="bf16", that type,
    which tells ``attention_prepared`` what they are; value_scales and value_shift
    [B, Hkv, ceil(M / 1024), P] fp32.
    """
    _require_prepared_device("key", key)
    _require(checks.preparation_problems(key, value, smooth, pv))
    b, h, m, d = key.shape
    operands = checks.prepared_operands(b, h, m, d, value.shape[3], pv)
    return tuple(key.new_empty(shape, dtype=dtype) for dtype, shape in operands.values())


@_fake("attention_prepared")
def attention_prepared(
    query: Tensor,
    key_codes: Tensor,
    key_scales: Tensor,
    key_mean: Tensor,
    value_codes: Tensor,
    value_scales: Tensor,
    value_shift: Tensor,
    seqlen_k: Size,
    head_dim_v: int,
    attn_mask: Tensor | None = None,
    causal: str = "none",
    scale: float | None = None,
    *,
    exponential: str = "mixed",
    output_order: str = "bhsd",
) -> Tensor:
    """Shape of the output [B, Hq, N, Dv] in the dtype of query."""
    prepared = {
        "key_codes": key_codes,
        "key_scales": key_scales,
        "key_mean": key_mean,
        "value_codes": value_codes,
        "value_scales": value_scales,
        "value_shift": value_shift,
    }
    _require_prepared_device("query", query)
    _require(
        checks.prepared_problems(
            query, prepared, seqlen_k, head_dim_v, attn_mask, causal, scale, exponential
        )
    )
    return empty_output(query, head_dim_v, output_order)


@_fake("attention_prepared_with_lse")
def attention_prepared_with_lse(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Shapes of the output [B, Hq, N, Dv] and the natural-log LSE [B, Hq, N] fp32."""
    return attention_prepared(query, *args, **kwargs), empty_lse(query)


@_fake("attention_prepared_part")
def attention_prepared_part(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Shapes as of ``attention_prepared_with_lse``.

    The LSE, [B, Hq, N] fp32, is for merging parts: the logarithm of the sum that the output was
    divided by, of probabilities as they were rounded. Outputs weighted by it add up to what one
    call for all keys returns; as a log-sum-exp it is off by the error of those, 1 % or less.
    """
    return attention_prepared(query, *args, **kwargs), empty_lse(query)


def empty_output(query: Tensor, head_dim_v: Size, output_order: str) -> Tensor:
    """Return the uninitialised output [B, Hq, N, Dv] in the memory order that kernels return."""
    b, h, n, _ = query.shape
    if output_order == "bhsd":
        return query.new_empty((b, h, n, head_dim_v))
    if output_order == "bshd":
        return query.new_empty((b, n, h, head_dim_v)).transpose(1, 2)
    raise ValueError(
        f"output_order must be one of {list(checks.OUTPUT_ORDERS)}, got {output_order!r}"
    )


def empty_lse(query: Tensor) -> Tensor:
    """Return the uninitialised log-sum-exp [B, Hq, N] fp32."""
    return query.new_empty(query.shape[:3], dtype=torch.float32)


def query_groups(seqlen: Size, granularity: str, block: int, warp: int) -> Size:
    """Return the number of query scales per head (algorithm.md 2.2)."""
    blocks = (seqlen + block - 1) // block
    groups = {
        "tensor": 1,
        "token": seqlen,
        "token_block": seqlen,
        "block": blocks,
        "warp": blocks * (block // warp),
        "thread": blocks * (block // warp) * 8,
    }
    return groups[granularity]


def key_groups(seqlen: Size, granularity: str, block: int) -> Size:
    """Return the number of key scales per head (algorithm.md 2.2)."""
    blocks = (seqlen + block - 1) // block
    groups = {
        "tensor": 1,
        "token": seqlen,
        "token_block": (seqlen + TOKEN_BLOCK - 1) // TOKEN_BLOCK,
        "block": blocks,
        "warp": blocks,
        "thread": blocks * 4,
    }
    return groups[granularity]


def _codes(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


def _per_channel(x: Tensor) -> Tensor:
    b, h, _, d = x.shape
    return x.new_empty((b, h, d), dtype=torch.float32)


def _require_recipe(query: Tensor, value: Tensor, recipe: Recipe, able: tuple[str, ...]) -> None:
    """Refuse what none of the ``able`` rows runs on the kind of device of ``query``."""
    rows = [row for row in rows_of_type(query.device.type) if row in able]
    head_dim = checks.largest_head_dim(query, value)
    _require(checks.recipe_problems(dict.fromkeys(rows, recipe.op_kwargs()), head_dim))


def _require_parts(x: Tensor, **fields: str) -> None:
    """Refuse recipe arguments that no op but the whole one runs on the kind of device of ``x``."""
    rows = rows_of_type(x.device.type, parts=True)
    _require(checks.recipe_problems(dict.fromkeys(rows, fields)))


def _require_prepared_device(name: str, x: Tensor) -> None:
    """Refuse devices that have kernels, and none for prepared operands."""
    if x.device.type != "cuda" and x.device.type in SUPPORT:
        raise NotImplementedError(lack_of_sm90(name, x.device))


def _require(problems: Iterable[str]) -> None:
    if found := list(problems):
        raise ValueError("; ".join(found))
