"""Attention for direct calls: SDPA's signature, quantized where possible, exact SDPA elsewhere."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_sage import ops
from torch_sage.config import SageConfig, as_config
from torch_sage.ops.checks import Size, known, largest_head_dim
from torch_sage.ops.dispatch import (
    Reason,
    ReasonCode,
    as_matrices,
    causal_of,
    validate,
    why_not,
)
from torch_sage.ops.hadamard import rotated
from torch_sage.recipes import resolve
from torch_sage.reference.attention import AttentionOutput

# Exact SDPA is the better way there, not a way out: never a warning or an error.
_CHOSEN = (ReasonCode.BELOW_CROSSOVER, ReasonCode.EMPTY)


class _Plan(NamedTuple):
    """What to do with every call of one signature."""

    reasons: tuple[Reason, ...]
    mask_is_causal: bool
    is_direct: bool
    """Whether the op takes the arguments as they are."""
    causal: str
    recipe: dict[str, str]
    keeps_layout: bool


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    config: SageConfig | str | None = None,
) -> Tensor:
    """Compute softmax(query key^T * scale + mask) value with quantized operands.

    A drop-in for ``torch.nn.functional.scaled_dot_product_attention``: same arguments, shapes and
    memory order of the result. What the kernels do not support (``why_not`` lists it), and what
    needs a gradient, runs exact SDPA, or as ``config.on_unsupported`` says.

    Args:
        query: [B, Hq, N, D] or [Hq, N, D]; float32, bfloat16 or float16; any strides.
        key: [B, Hkv, M, D] or [Hkv, M, D].
        value: [B, Hkv, M, Dv] or [Hkv, M, Dv].
        attn_mask: broadcasts to [B, Hq, N, M]; bool (True = attend), a float added to the scores,
            or a ``torch.nn.attention.bias.CausalBias``.
        dropout_p: probability of dropping a weight; not zero means exact SDPA.
        is_causal: key m is visible to query n iff m <= n (top left, as in torch).
        scale: of the scores; None means 1 / sqrt(D).
        enable_gqa: allow Hq to be a multiple of Hkv.
        config: how to compute; None means the default recipe of the device.

    Returns:
        [B, Hq, N, Dv] or [Hq, N, Dv] in the dtype of query.

    Raises:
        TypeError: if query, key, value or attn_mask is not a tensor.
        ValueError: if the arguments contradict each other, whatever ``on_unsupported`` says.
        NotImplementedError: if the input is not supported and ``on_unsupported`` is "error".

    Source: SageAttention (arXiv 2410.02367), SageAttention2 (arXiv 2411.10958).
    """
    signature = None
    if not torch.compiler.is_dynamo_compiling():
        signature = _signature(query, key, value, attn_mask, dropout_p, is_causal, scale)
    if signature is not None:
        signature = (*signature, enable_gqa, config)
        plan = _PLANS.get(signature)
        if plan is not None and not plan.reasons and plan.is_direct:
            # Nothing here wants a gradient, so the ops' Python guard (6 us) has nothing to refuse.
            with torch._C._AutoDispatchBelowAutograd():
                output: Tensor = ops.sdpa(
                    query, key, value, attn_mask, plan.causal, scale, **plan.recipe
                )
            return output if plan.keeps_layout else _laid_out_like(query, output)
    else:
        plan = None
    if plan is None:
        plan = _make_plan(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, config
        )
        if signature is not None:
            _remember(signature, plan)
    if plan.reasons:
        _announce(plan.reasons, as_config(config))
        return exact_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    mask = None if plan.mask_is_causal else attn_mask
    q, k, v = as_matrices(query, key, value)
    turned, keys, factor = rotated(as_config(config).rotation, q, k, scale)
    output = ops.sdpa(turned, keys, v, mask, plan.causal, factor, **plan.recipe)
    if not plan.keeps_layout:
        output = _laid_out_like(q, output)
    return output.squeeze(0) if query.dim() == 3 else output


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    causal: str = "none",
    scale: float | None = None,
    enable_gqa: bool = False,
    config: SageConfig | str | None = None,
) -> AttentionOutput:
    """Compute attention and the log-sum-exp of its scores, by which partial results are merged.

    Takes no dropout and no measured crossover; otherwise as ``scaled_dot_product_attention``. The
    exact fallback materializes the scores, O(N * M) memory per head.

    Args:
        query: as for ``scaled_dot_product_attention``, but 4-D; like the next three.
        key: see ``query``.
        value: see ``query``.
        attn_mask: see ``query``.
        causal: "none", "top_left" (m <= n) or "bottom_right" (m <= n + M - N, as with a KV cache).
        scale: of the scores; None means 1 / sqrt(D).
        enable_gqa: allow Hq to be a multiple of Hkv.
        config: how to compute; None means the default recipe of the device.

    Raises:
        TypeError: if query, key, value or attn_mask is not a tensor.
        ValueError: if the arguments contradict each other, whatever ``on_unsupported`` says.
        NotImplementedError: if the input is not supported and ``on_unsupported`` is "error".
    """
    validate(query, key, value, attn_mask, scale=scale, enable_gqa=enable_gqa, causal=causal)
    if query.dim() != 4:
        raise ValueError(f"query must be 4-D, got {list(query.shape)}")
    config = as_config(config).with_options(dispatch="always")
    reasons = why_not(
        query,
        key,
        value,
        attn_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        config=config,
        causal=causal,
    )
    mask, causal = causal_of(attn_mask, False, causal)
    q, k, v = as_matrices(query, key, value)
    if reasons:
        _announce(reasons, config)
        return _exact_with_lse(q, k, v, mask, causal, scale)
    recipe = resolve(config, query.device, query.dtype, largest_head_dim(query, value)).op_kwargs()
    turned, keys, factor = rotated(config.rotation, q, k, scale)
    output, lse = ops.sdpa_with_lse(
        turned, keys, v, mask, causal, factor, output_order=order_of(q, v.shape[3]), **recipe
    )
    if not _keeps_layout(q, v):
        output = _laid_out_like(q, output)
    return AttentionOutput(output, lse)


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute torch's own SDPA, differentiable, past any function mode that is active."""
    if is_causal and scale is not None and scale <= 0:
        # torch 2.13 on CPU scales the -inf of hidden keys, which gives NaN; its masks are safe.
        is_causal, attn_mask = False, _causal_mask(query, key, "top_left")
    if any(type(t) is not Tensor for t in (query, key, value, attn_mask) if t is not None):
        # Only the function, not the op, knows CausalBias, nested tensors and other subclasses.
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    exact: Tensor = torch.ops.aten.scaled_dot_product_attention.default(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return exact


# Plans by signature; eager models repeat few signatures, and a lookup costs 1/20 of why_not.
_PLANS: dict[tuple[Any, ...], _Plan] = {}
_MAX_PLANS = 4096


def _remember(signature: tuple[Any, ...], plan: _Plan) -> None:
    if len(_PLANS) >= _MAX_PLANS:
        _PLANS.clear()
    _PLANS[signature] = plan


def _signature(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> tuple[Any, ...] | None:
    """Return everything a plan depends on, or None where it must be made anew."""
    if not type(query) is type(key) is type(value) is Tensor:
        return None
    if forward_ad._current_level >= 0 or (
        torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or value.requires_grad)
    ):
        return None
    mask = None
    try:
        if attn_mask is not None:
            if type(attn_mask) is not Tensor or attn_mask.requires_grad:
                return None
            mask = (attn_mask.shape, attn_mask.dtype, attn_mask.device, attn_mask.layout)
        device = query.device
        return (
            query.shape,
            key.shape,
            value.shape,
            query.stride(),
            key.layout,
            value.layout,
            query.dtype,
            key.dtype,
            value.dtype,
            device,
            key.device,
            value.device,
            mask,
            torch.is_autocast_enabled(device.type),
            dropout_p,
            is_causal,
            scale,
        )
    except RuntimeError:
        return None  # nested and sparse tensors have no shape or no strides


def _make_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    config: SageConfig | str | None,
) -> _Plan:
    config = as_config(config)
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    validate(*arguments)
    reasons = why_not(*arguments, config=config)
    if reasons:
        return _Plan(reasons, False, False, "none", {}, True)
    mask, causal = causal_of(attn_mask, is_causal)
    recipe = resolve(config, query.device, query.dtype, largest_head_dim(query, value)).op_kwargs()
    q, k, v = as_matrices(query, key, value)
    return _Plan(
        reasons=(),
        mask_is_causal=mask is not attn_mask,
        is_direct=config.rotation == "none"
        and mask is attn_mask
        and (q is query and k is key and v is value),
        causal=causal,
        recipe={**recipe, "output_order": order_of(q, v.shape[3])},
        keeps_layout=_keeps_layout(q, v),
    )


def _announce(reasons: tuple[Reason, ...], config: SageConfig) -> None:
    """Warn or raise, if ``config`` wants that for the input against which ``reasons`` are."""
    if config.on_unsupported == "fallback":
        return
    lacks = [f"{r.message} ({r.code})" for r in reasons if r.code not in _CHOSEN]
    if not lacks:
        return
    message = "torch_sage does not support this input: " + "; ".join(lacks)
    if config.on_unsupported == "error":
        raise NotImplementedError(message)
    warnings.warn(f"{message}. Exact SDPA runs instead.", stacklevel=3)


def order_of(query: Tensor, head_dim_v: Size) -> str:
    """Return the memory order of SDPA's result among those the op can write."""
    if not _follows_query(query, head_dim_v):
        return "bhsd"
    _, h, n, _ = query.stride()
    return "bshd" if known(0 < h) and known(h < n) and known(query.shape[1] != 1) else "bhsd"


def _keeps_layout(query: Tensor, value: Tensor) -> bool:
    """Return whether the op can write the result in SDPA's memory order itself."""
    if not _follows_query(query, value.shape[3]) or known(query.shape[0] == 1):
        return True
    b, h, n, _ = query.stride()
    outermost = [stride for stride, size in ((h, query.shape[1]), (n, query.shape[2])) if size != 1]
    return known(b == 0) or not any(known(b < stride) for stride in outermost)


def _follows_query(query: Tensor, head_dim_v: Size) -> bool:
    """Return whether SDPA's result has the query's memory order; else it is contiguous.

    So do torch's fused kernels; its math path, which takes a last dimension with gaps and another
    head_dim of value, does not.
    """
    return known(query.stride(3) == 1) and not known(query.shape[3] != head_dim_v)


def _laid_out_like(query: Tensor, output: Tensor) -> Tensor:
    return torch.empty_like(query, dtype=output.dtype).copy_(output)


def _causal_mask(query: Tensor, key: Tensor, causal: str) -> Tensor | None:
    """Return the bool mask [N, M] of a causal alignment."""
    if causal == "none":
        return None
    n, m = query.shape[-2], key.shape[-2]
    offset = m - n if causal == "bottom_right" else 0
    return torch.ones(n, m, dtype=torch.bool, device=query.device).tril(offset)


def _exact_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    causal: str,
    scale: float | None,
) -> AttentionOutput:
    mask = attn_mask if causal == "none" else _causal_mask(query, key, causal)
    output = exact_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    group = query.shape[1] // key.shape[1] if key.shape[1] else 1
    keys = key.repeat_interleave(group, 1).float()
    factor = query.shape[3] ** -0.5 if scale is None else scale
    scores = query.float() @ keys.transpose(-2, -1) * factor
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    return AttentionOutput(output, scores.logsumexp(-1))
