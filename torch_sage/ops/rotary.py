"""Rotary embeddings of Q and K, norm included: their one definition, and the op on CPU.

On a GPU of compute capability 9.0 the kernels rotate while they read Q and K, which saves writing
both and reading them again; here it is this definition and the op ``sdpa``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_sage.ops.schemas import LIBRARY, require_rotations


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rstd: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float | None = None,
    pairing: str = "halves",
) -> Tensor:
    """Return x [B, H, N, D], normed and with its pairs of channels rotated.

    Of each pair, with z = x * r * weight, ``first * cos - second * sin`` and ``second * cos + first
    * sin``, each channel with its own entry of the tables. Every operation rounds to fp32, the
    result to the dtype of x; kernels sum the squares of x in another order, and do the rest so.

    Args:
        x: what was projected.
        cos: [1 or B, N, D] fp32.
        sin: likewise.
        rstd: r itself, [B, H or 1, N] fp32.
        weight: [H or 1, D] in the dtype of x; 1 if absent.
        eps: r is rsqrt(mean of x^2 over D + eps); without it and ``rstd``, r is 1.
        pairing: "halves" pairs channels (i, i + D / 2), "neighbours" (2i, 2i + 1).
    """
    z = x.float()
    if eps is not None:
        z = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    if rstd is not None:
        z = z * rstd[..., None]
    if weight is not None:
        z = z * weight.float()[:, None]
    (first, second), cosines, sines = (
        _pairs(table, pairing) for table in (z, cos[:, None], sin[:, None])
    )
    turned = first * cosines[0] - second * sines[0], second * cosines[1] + first * sines[1]
    joined = torch.cat(turned, -1) if pairing == "halves" else torch.stack(turned, -1).flatten(-2)
    return joined.to(x.dtype)


def _pairs(x: Tensor, pairing: str) -> tuple[Tensor, Tensor]:
    """Return the first and the second channel of every pair."""
    if pairing == "halves":
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]
    return x[..., 0::2], x[..., 1::2]


def _rotary_sdpa(
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
    *semantics: Any,
    pairing: str = "halves",
    **recipe: Any,
) -> Tensor:
    of_query = (query_cos, query_sin, query_rstd, query_weight, query_eps)
    of_key = (key_cos, key_sin, key_rstd, key_weight, key_eps)
    require_rotations(query, key, value, of_query, of_key, pairing)
    q, k = rotate(query, *of_query, pairing), rotate(key, *of_key, pairing)
    output: Tensor = torch.ops.torch_sage.sdpa.default(q, k, value, *semantics, **recipe)
    return output


def register_kernel() -> None:
    """Run the op on CPU tensors by ``rotate`` and ``sdpa``."""
    LIBRARY.impl("rotary_sdpa", _rotary_sdpa, "CPU")  # type: ignore[no-untyped-call]  # torch's
