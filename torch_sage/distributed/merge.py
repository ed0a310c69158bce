"""Merging partial results by their log-sum-exp, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sage.reference.attention import AttentionOutput


class Merged:
    """Attention of all keys seen so far: an average of partial outputs, weighted by exp(lse)."""

    def __init__(self, query: Tensor, head_dim_v: int) -> None:
        """Start with no keys, for the rows of ``query`` [B, H, N, D]."""
        rows = query.shape[:3]
        self.dtype = query.dtype
        self.output = query.new_zeros((*rows, head_dim_v), dtype=torch.float32)
        self.lse = query.new_full(rows, -torch.inf, dtype=torch.float32)

    def add(self, part: AttentionOutput, first_row: int = 0) -> None:
        """Add the result of other keys, for the rows from ``first_row`` on."""
        output, lse = self.output[:, :, first_row:], self.lse[:, :, first_row:]
        total = torch.logaddexp(lse, part.lse)
        output.mul_(_weight(lse, total)).add_(part.output * _weight(part.lse, total))
        lse.copy_(total)

    def result(self) -> AttentionOutput:
        """Return the output [B, H, N, Dv] in the dtype of query and the lse [B, H, N] in fp32."""
        return AttentionOutput(self.output.to(self.dtype), self.lse)


def _weight(lse: Tensor, total: Tensor) -> Tensor:
    """Return exp(lse - total) [B, H, N, 1]: 0 without keys, where that would be inf - inf."""
    return torch.where(lse == -torch.inf, 0.0, (lse - total).exp())[..., None]
