"""The attention problems of the GPU benchmark, their data, and their exact answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

HEADS = 32
TOKENS = 32768  # batch times length, from 8k on; below, the batch is MOST_BATCHES
MOST_BATCHES = 4
OUTLIERS = slice(None, None, 16)
ROWS = 2048  # of queries at a time in the exact answer: its scores take ROWS * L * 4 bytes a head


class Problem(NamedTuple):
    """Self-attention on [batch, heads, length, head_dim], contiguous, bf16."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool

    @property
    def flops(self) -> int:
        """Operations of both products: ``4 B H L^2 D``, half of it where the mask is causal."""
        batch, heads, length, head_dim = self.query.shape
        return 4 * batch * heads * length**2 * head_dim // (2 if self.is_causal else 1)


def batch_of(length: int) -> int:
    """Return the batch that goes with a length."""
    return min(MOST_BATCHES, max(1, TOKENS // length))


def normal(query: Tensor, key: Tensor, value: Tensor) -> None:
    """N(0, 1), as it comes."""


def key_bias(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Add to each channel of K a constant of N(0, 5^2), which softmax does not see."""
    shape = (1, *key.shape[1:2], 1, key.shape[3])
    key += 5 * torch.randn(shape, device=key.device, dtype=key.dtype)


def channel_outliers(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Make every 16th channel of K and V 8 times as large."""
    key[..., OUTLIERS] *= 8
    value[..., OUTLIERS] *= 8


DATA: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "normal": normal,
    "key bias": key_bias,
    "channel outliers": channel_outliers,
}


def make(
    shape: tuple[int, int, int, int], is_causal: bool, data: str, device: str = "cuda"
) -> Problem:
    """Return the problem of a shape with one of ``DATA``, the same numbers at every call."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    DATA[data](query, key, value)
    return Problem(query, key, value, is_causal)


def exact(problem: Problem, heads: int) -> Tensor:
    """Return the answer for the first ``heads`` heads of the first batch, computed in fp32."""
    query, key, value = (x[0, :heads].float() for x in problem[:3])
    length = query.shape[1]
    columns = torch.arange(length, device=query.device)
    chunks = []
    for start in range(0, length, ROWS):
        rows = query[:, start : start + ROWS]
        scores = rows @ key.mT * query.shape[2] ** -0.5
        if problem.is_causal:
            visible = columns <= columns[start : start + ROWS, None]
            scores = scores.masked_fill(~visible, float("-inf"))
        chunks.append(scores.softmax(-1) @ value)
    return torch.cat(chunks, 1)


def relative_l1(output: Tensor, answer: Tensor) -> float:
    """Return the relative L1 error of an output whose first heads ``answer`` has."""
    output = output[0, : answer.shape[0]].float()
    return float((output - answer).abs().sum() / answer.abs().sum())
