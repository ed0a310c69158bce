"""Argument rules of attention over packed sequences, as ``checks`` has them for batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torch_sage.ops import checks
from torch_sage.ops.checks import Size, known


def rank_problems(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> list[str]:
    """Return which tensors are not [tokens, heads, head_dim], or not the starts of sequences."""
    operands = {"query": query, "key": key, "value": value}
    problems = [
        f"{name} must be 3-D [tokens, heads, head_dim], got {list(tensor.shape)}"
        for name, tensor in operands.items()
        if tensor.dim() != 3
    ]
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if tensor.dim() != 1 or known(tensor.shape[0] == 0):
            problems.append(
                f"{name} must be 1-D with one element more than there are sequences, "
                f"got {list(tensor.shape)}"
            )
    return problems


def contradictions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Size,
    max_seqlen_k: Size,
    causal: str,
    scale: float | None,
) -> Iterator[str]:
    """Yield what makes tensors of the right ranks impossible to attend with."""
    if known(value.shape[0] != key.shape[0]):
        expected, got = key.shape[0], value.shape[0]
        yield f"value must have the number of tokens of key, {expected}, got {got}"
    if known(key.shape[2] != query.shape[2]):
        expected, got = query.shape[2], key.shape[2]
        yield f"key must have the head_dim of query, {expected}, got {got}"
    yield from checks.head_contradictions(query.shape[1], key.shape[1])
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        shape = tuple(cu_seqlens_q.shape)
        yield from checks.operand_problems(name, tensor, query, torch.int32, shape)
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if known(longest < 0):
            yield f"{name} must not be negative, got {longest}"
    if causal not in checks.CAUSAL:
        yield f"causal must be one of {list(checks.CAUSAL)}, got {causal!r}"
    yield from checks.scale_problems(scale)


def problems(*arguments: Any) -> Iterator[str]:
    """Yield every reason why the op cannot run on these arguments, whatever the lengths are.

    Args:
        arguments: those of ``contradictions``.
    """
    ranks = rank_problems(*arguments[:5])
    if ranks:
        yield from ranks
        return
    query, key, value = arguments[:3]
    yield from (reason.message for reason in checks.limits(query, key, value, None))
    yield from contradictions(*arguments)
