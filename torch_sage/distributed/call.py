"""What ring and all-to-all attention ask of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torch_sage.config import SageConfig, as_config
from torch_sage.distributed import kernels
from torch_sage.distributed.group import agree
from torch_sage.ops import hadamard
from torch_sage.ops.checks import FLOAT_DTYPES, largest_head_dim, names, shape_of_mask_problems
from torch_sage.ops.dispatch import device_reasons, validate, why_not
from torch_sage.recipes import Recipe, choose_row, resolve_in


class Accepted(NamedTuple):
    """How a call is computed."""

    recipe: Recipe
    rotation: str
    """As in ``SageConfig``."""

    @property
    def name(self) -> str:
        """Return what ranks must agree on, for people."""
        return hadamard.named(self.recipe.name, self.rotation)


def accept(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    config: SageConfig | str | None,
) -> Accepted:
    """Return how to compute.

    Raises:
        ValueError: if the arguments contradict each other.
        NotImplementedError: if they are not supported; nothing falls back to exact attention.
    """
    config = as_config(config)
    semantics = (None, 0.0, is_causal, scale, enable_gqa)
    validate(query, key, value, *semantics)
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(f"query must be 4-D like key and value, got {list(query.shape)}")
    for name, tensor, other, like, axis, what in (
        ("key", key, "query", query, 0, "batch size"),
        ("value", value, "query", query, 0, "batch size"),
        ("value", value, "key", key, 1, "number of heads"),
    ):
        got, expected = tensor.shape[axis], like.shape[axis]
        if got != expected:
            raise ValueError(f"{name} must have the {what} of {other}, {expected}, got {got}")
    if is_causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"key must have query's {query.shape[2]} tokens when is_causal, got {key.shape[2]}"
        )
    if config.smooth_q:
        raise NotImplementedError(
            "config.smooth_q must be None or False: the scores of a query mean need the keys as "
            "they were before quantization, got True"
        )
    config = config.with_options(dispatch="always", smooth_q=False)
    rows, head_dim = kernels.rows_to_send(query.device), largest_head_dim(query, value)
    reasons = [
        *why_not(query, key, value, *semantics, config=config),
        *device_reasons(query, config, rows, head_dim),
    ]
    if reasons:
        raise NotImplementedError(
            "; ".join(f"{r.message} ({r.code})" for r in dict.fromkeys(reasons))
        )
    recipe = resolve_in(choose_row(config, rows, query.dtype, head_dim), config, query.dtype)
    return Accepted(recipe, config.rotation)


def accept_on_every_rank(
    check: Callable[[], Accepted],
    shapes: dict[str, torch.Size],
    options: str,
    ranks: dist.ProcessGroup,
    device: torch.device,
    check_ranks: bool,
) -> Accepted:
    """Return the result of ``check``; if it raises, or ranks differ, raise on every rank.

    Args:
        check: what this rank asks of its arguments.
        shapes: as for ``agree``, like the next three; the recipe is added to ``options``.
        options: see ``shapes``.
        ranks: see ``shapes``.
        device: see ``shapes``.
        check_ranks: whether to ask the other ranks.
    """
    accepted: Accepted | None = None
    refusal: Exception | None = None
    try:
        accepted = check()
    except (ValueError, NotImplementedError) as error:
        refusal = error
    if check_ranks and dist.get_world_size(ranks) > 1:
        recipe = accepted and accepted.name
        agree(refusal, shapes, f"{options}, recipe={recipe}", ranks, device)
    if refusal is not None:
        raise refusal
    assert accepted is not None
    return accepted


def require_mask(
    attn_mask: Tensor | None, shape: tuple[int, ...], is_causal: bool, like: Tensor
) -> None:
    """Refuse a mask that does not broadcast to ``shape``, or that a kernel cannot read."""
    if attn_mask is None:
        return
    if is_causal:
        raise ValueError("attn_mask must be None when is_causal, got a tensor")
    for problem in shape_of_mask_problems(attn_mask, shape):
        raise ValueError(problem)
    if attn_mask.dtype not in (torch.bool, *FLOAT_DTYPES):
        got = names([attn_mask.dtype])
        raise ValueError(
            f"attn_mask must have dtype {names((torch.bool, *FLOAT_DTYPES))}, got {got}"
        )
    if attn_mask.device != like.device:
        raise ValueError(f"attn_mask must be on {like.device}, got {attn_mask.device}")
    if attn_mask.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("attn_mask must not require grad while grad mode is on")


def mask_columns(attn_mask: Tensor | None, source: int, tokens: int) -> Tensor | None:
    """Return the columns of a mask that belong to the keys of rank ``source``."""
    if attn_mask is None or attn_mask.dim() == 0 or attn_mask.shape[-1] == 1:
        return attn_mask
    return attn_mask[..., source * tokens : (source + 1) * tokens]
