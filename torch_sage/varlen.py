"""Attention over packed sequences of different lengths."""

from __future__ import annotations

from torch import Tensor

from torch_sage import ops
from torch_sage.config import SageConfig, as_config
from torch_sage.devices import rows_of
from torch_sage.ops import packed
from torch_sage.ops.checks import Size, largest_head_dim
from torch_sage.ops.dispatch import (
    Reason,
    causal_of,
    causal_problems,
    device_reasons,
    rotation_reasons,
)
from torch_sage.ops.hadamard import rotated
from torch_sage.recipes import Recipe, choose_row, resolve_in
from torch_sage.reference.attention import AttentionOutput


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Size,
    max_seqlen_k: Size,
    *,
    is_causal: bool = False,
    causal: str | None = None,
    scale: float | None = None,
    config: SageConfig | str | None = None,
    return_lse: bool = False,
) -> Tensor | AttentionOutput:
    """Compute the attention of many sequences that lie one after the other, without padding.

    Every sequence is smoothed and quantized by its own statistics: its result is that of
    ``scaled_dot_product_attention`` on it alone. Inference only, and nothing falls back to exact
    attention. On a GPU the lengths stay there: no synchronisation, and a CUDA graph may be replayed
    with others.

    Args:
        query: [tokens, Hq, D]; float32, bfloat16 or float16; any strides.
        key: [tokens of the keys, Hkv, D], Hq a multiple of Hkv.
        value: [tokens of the keys, Hkv, Dv].
        cu_seqlens_q: [sequences + 1] int32 on the device of query: the queries of sequence i are
            the rows from element i to element i + 1.
        cu_seqlens_k: the same of the keys.
        max_seqlen_q: at least the number of queries of every sequence. A GPU takes the caller's
            word: rows of a sequence beyond it are left out; on CPU they are an error.
        max_seqlen_k: the same of the keys.
        is_causal: key m of a sequence is visible to its query n iff m <= n.
        causal: "none", "top_left" or "bottom_right" (m <= n + M - N of the sequence, as torch's
            ``varlen_attn`` and FlashAttention mean it), in place of ``is_causal``.
        scale: of the scores; None means 1 / sqrt(D).
        config: how to compute; None means the default recipe of the device for packed sequences.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        [tokens, Hq, Dv] in the dtype of query, 0 where a row has no key or no sequence; with
        ``return_lse`` also [Hq, tokens] fp32, -inf there.

    Raises:
        TypeError: if one of the tensors is none.
        ValueError: if the arguments contradict each other, or no kernel takes their dtype or
            head_dim.
        NotImplementedError: if the device has no kernel for packed sequences, or not for
            ``config``.
        RuntimeError: if query, key or value wants a gradient.
    """
    operands = (query, key, value, cu_seqlens_q, cu_seqlens_k)
    config = as_config(config)
    names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k")
    for name, tensor in zip(names, operands, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    alignment = causal_of(None, is_causal, causal)[1]
    problems = [
        *causal_problems(None, is_causal, causal),
        *packed.problems(*operands, max_seqlen_q, max_seqlen_k, alignment, scale),
    ]
    if problems:
        raise ValueError("; ".join(problems))
    recipe, reasons = choose_recipe(query, value, config)
    if recipe is None:
        raise NotImplementedError("; ".join(reason.message for reason in reasons))
    run = ops.varlen_sdpa_with_lse if return_lse else ops.varlen_sdpa
    q, k, factor = rotated(config.rotation, query, key, scale)
    packs = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    result = run(q, k, value, *packs, alignment, factor, **recipe.op_kwargs())
    return AttentionOutput(*result) if return_lse else result


def choose_recipe(
    query: Tensor, value: Tensor, config: SageConfig
) -> tuple[Recipe | None, tuple[Reason, ...]]:
    """Return what ``config`` means for packed sequences, or the reasons why nothing runs it."""
    rows = rows_of(query.device)
    head_dim = largest_head_dim(query, value)
    reasons = device_reasons(query, config, rows, head_dim) + rotation_reasons(query, config)
    if reasons:
        return None, tuple(reasons)
    row = choose_row(config, rows, query.dtype, head_dim)
    return resolve_in(row, config, query.dtype), ()
