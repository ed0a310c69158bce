"""Keys and values that are quantized once and attended to many times."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from torch_sage import ops
from torch_sage.attention import order_of
from torch_sage.config import SageConfig, as_config
from torch_sage.devices import lack_of_sm90
from torch_sage.ops.checks import prepared_pv, recipe_problems
from torch_sage.ops.dispatch import bias_problems, causal_of, causal_problems, rotation_reasons
from torch_sage.ops.hadamard import rotate, scale_of_rotated
from torch_sage.recipes import ALL_PREPARED, Recipe, choose_row, resolve_in


class PreparedKV(NamedTuple):
    """Keys and values as the kernels read them; what ``prepare_kv`` returns.

    The tensors may be moved, stored, and indexed along batch and heads; how codes and scales lie
    inside one head is the kernels' own business, and may change between versions.
    """

    key_codes: Tensor
    key_scales: Tensor
    key_mean: Tensor
    value_codes: Tensor
    value_scales: Tensor
    value_shift: Tensor
    seqlen_k: int
    head_dim_v: int
    rotation: str = "none"
    """What the keys were multiplied by, as in ``SageConfig``."""


def prepare_kv(key: Tensor, value: Tensor, config: SageConfig | str | None = None) -> PreparedKV:
    """Quantize keys and values for any number of calls of ``attention_prepared``.

    Cross attention to a text, or to a prefix that many requests share, then costs the attention
    alone: in every other call K and V are read and quantized anew. Inference only.

    Args:
        key: [B, Hkv, M, D]; float32, bfloat16 or float16; any strides.
        value: [B, Hkv, M, Dv] in the dtype of key.
        config: how to rotate and smooth, and the format of V; None means the default recipe of the
            device.

    Raises:
        TypeError: if key or value is not a tensor.
        ValueError: if the arguments contradict each other.
        NotImplementedError: if the device has no such kernel, or not for ``config``: today a GPU of
            compute capability 9.0 has, with a library that was built for it.
        RuntimeError: if key or value wants a gradient.
    """
    _require_tensors(key=key, value=value)
    config = as_config(config)
    widest = max(1, *key.shape[-1:], *value.shape[-1:])
    recipe = _recipe("key", key, config, widest)
    if config.rotation == "hadamard":
        key = rotate(key)
    operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    operands = ops.prepare_kv(key, value, smooth=recipe.smooth, pv=recipe.pv)
    return PreparedKV(*operands, key.shape[2], value.shape[3], config.rotation)


def attention_prepared(
    query: Tensor,
    prepared: PreparedKV,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    causal: str | None = None,
    config: SageConfig | str | None = None,
) -> Tensor:
    """Compute softmax(query key^T * scale + mask) value with prepared keys and values.

    The result is that of ``scaled_dot_product_attention`` with the same recipe. Nothing falls back
    to exact attention: the keys are not there any more.

    Args:
        query: [B, Hq, N, D], Hq a multiple of Hkv; float32, bfloat16 or float16; any strides.
        prepared: what ``prepare_kv`` returned.
        attn_mask: broadcasts to [B, Hq, N, M]; bool (True = attend), a float added to the scores,
            or a ``torch.nn.attention.bias.CausalBias``.
        is_causal: key m is visible to query n iff m <= n (top left, as in torch).
        scale: of the scores; None means 1 / sqrt(D).
        causal: "none", "top_left" or "bottom_right" (m <= n + M - N, as with a KV cache), in place
            of ``is_causal``.
        config: how to compute, with the rotation of prepared; None means the default recipe for
            such values, without one.

    Returns:
        [B, Hq, N, Dv] in the dtype of query, and in its memory order where heads or tokens come
        first in a batch entry.

    Raises:
        TypeError: if query or attn_mask is not a tensor, or prepared no ``PreparedKV``.
        ValueError: if the arguments contradict each other.
        NotImplementedError: as for ``prepare_kv``.
        RuntimeError: if query or attn_mask wants a gradient.
    """
    _require_tensors(query=query, **({} if attn_mask is None else {"attn_mask": attn_mask}))
    if not isinstance(prepared, PreparedKV):
        raise TypeError(f"prepared must be a PreparedKV, got {type(prepared).__name__}")
    config, pv = as_config(config), prepared_pv(prepared.value_codes)
    if config.pv == "auto":
        config = config.with_options(pv=pv)
    recipe = _recipe("query", query, config, max((*query.shape[-1:], prepared.head_dim_v)))
    if recipe.pv != pv:
        raise ValueError(f"prepared must have values in {recipe.pv}, got {pv}")
    if config.rotation != prepared.rotation:
        expected = f"have the rotation of prepared, {prepared.rotation!r}"
        raise ValueError(f"config must {expected}, got {config.rotation!r}")
    problems = causal_problems(attn_mask, is_causal, causal)
    problems += bias_problems(attn_mask, query.shape[2], prepared.seqlen_k)
    if problems:
        raise ValueError("; ".join(problems))
    mask, alignment = causal_of(attn_mask, is_causal, causal)
    order = order_of(query, prepared.head_dim_v)
    if prepared.rotation == "hadamard":
        query, scale = rotate(query), scale_of_rotated(query.shape[3], scale)
    output: Tensor = ops.attention_prepared(
        query,
        *prepared[:-1],
        mask,
        alignment,
        scale,
        exponential=recipe.exponential,
        output_order=order,
    )
    return output


def _require_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def _recipe(name: str, operand: Tensor, config: SageConfig, head_dim: int) -> Recipe:
    """Return the recipe to compute with on the device of ``operand``, which is ``name``."""
    if operand.dim() != 4:
        raise ValueError(f"{name} must be 4-D, got {list(operand.shape)}")
    if lack := lack_of_sm90(name, operand.device):
        raise NotImplementedError(lack)
    recipes = {row: resolve_in(row, config, operand.dtype) for row in ALL_PREPARED}
    wanted = {row: recipe.op_kwargs() for row, recipe in recipes.items()}
    problems = recipe_problems(wanted, head_dim)
    problems += [reason.message for reason in rotation_reasons(operand, config)]
    if problems:
        raise NotImplementedError("; ".join(problems))
    return recipes[choose_row(config, ALL_PREPARED, operand.dtype, head_dim)]
