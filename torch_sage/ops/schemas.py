"""The op inventory of ``torch.ops.torch_sage``: each schema, its tags, and its fake right below.

Logical shapes are always [batch, heads, seqlen, head_dim]; strides express any memory order.
``causal`` is "none", "top_left" (key m visible to query n iff m <= n) or "bottom_right"
(m <= n + seqlen_k - seqlen_q). Recipe arguments are explained in ``recipes.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("torch_sage", "DEF")
OP_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)

# Arguments of every attention op after its tensors; `attn_mask` is bool (True = keep) or float.
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
        " str granularity='token', str pv='bf16', str smooth='k', str output_order='bhsd')"
        " -> Tensor"
    ),
    "sdpa_with_lse": (
        f"(Tensor query, Tensor key, Tensor value, {_SEMANTICS}, *, str qk='int8',"
        " str granularity='token', str pv='bf16', str smooth='k', str output_order='bhsd')"
        " -> (Tensor output, Tensor lse)"
    ),
}

for _name, _schema in DEFINITIONS.items():
    LIBRARY.define(f"{_name}{_schema}", tags=OP_TAGS)


def empty_output(query: Tensor, head_dim_v: int | torch.SymInt, output_order: str) -> Tensor:
    """Return the uninitialised output [B, Hq, N, Dv] in the memory order that kernels return."""
    b, h, n, _ = query.shape
    if output_order == "bhsd":
        return query.new_empty((b, h, n, head_dim_v))
    if output_order == "bshd":
        return query.new_empty((b, n, h, head_dim_v)).transpose(1, 2)
    raise ValueError(f"output_order must be one of ['bhsd', 'bshd'], got {output_order!r}")
