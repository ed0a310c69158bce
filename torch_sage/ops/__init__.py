"""Handles of the ops in ``torch.ops.torch_sage``, resolved once.

Importing this package defines every op with its fake and its rules; the kernels for the CPU come
from the native library, those for GPUs from Triton. Without the library each op raises the reason,
while tracing and fakes still work.
"""

from __future__ import annotations

import torch

from torch_sage import _extension
from torch_sage.ops import exact, gpu, rotary, rules, schemas

_reason = _extension.unavailable_reason()
if _reason is not None:
    rules.register_missing_kernels(_reason)
gpu.register_kernels()
rotary.register_kernel()

quantize_query = torch.ops.torch_sage.quantize_query.default
quantize_key = torch.ops.torch_sage.quantize_key.default
quantize_value = torch.ops.torch_sage.quantize_value.default
attention = torch.ops.torch_sage.attention.default
attention_with_lse = torch.ops.torch_sage.attention_with_lse.default
sdpa = torch.ops.torch_sage.sdpa.default
sdpa_with_lse = torch.ops.torch_sage.sdpa_with_lse.default
varlen_sdpa = torch.ops.torch_sage.varlen_sdpa.default
varlen_sdpa_with_lse = torch.ops.torch_sage.varlen_sdpa_with_lse.default
rotary_sdpa = torch.ops.torch_sage.rotary_sdpa.default
prepare_kv = torch.ops.torch_sage.prepare_kv.default
attention_prepared = torch.ops.torch_sage.attention_prepared.default
attention_prepared_with_lse = torch.ops.torch_sage.attention_prepared_with_lse.default
attention_prepared_part = torch.ops.torch_sage.attention_prepared_part.default

exact_sdpa = torch.ops.torch_sage.exact_sdpa.default
exact_softmax = torch.ops.torch_sage.exact_softmax.default

__all__ = [*schemas.DEFINITIONS, *exact.ORIGINALS]
