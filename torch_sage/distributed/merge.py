"""Merging partial results by their log-sum-exp, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_sage.reference.attention import AttentionOutput


class Merged:
    """Attention of all keys seen so far: an average of partial outputs, weighted by exp(lse).

    Weights are relative to the largest lse and divided by their own sum at the end. A running lse
    would lose them where it is large: beside a mask of -3e38 the log of two disappears.
    """

    def __init__(self, query: Tensor, head_dim_v: int) -> None:
        """Start with no keys, for the rows of ``query`` [B, H, N, D]."""
        rows = query.shape[:3]
        self.dtype = query.dtype
        self.weighted = query.new_zeros((*rows, head_dim_v), dtype=torch.float32)
        self.total = query.new_zeros(rows, dtype=torch.float32)
        self.top = query.new_full(rows, -torch.inf, dtype=torch.float32)

    def add(self, part: AttentionOutput, first_row: int = 0) -> None:
        """Add the result of other keys, for the rows from ``first_row`` on."""
        weighted, total, top = (x[:, :, first_row:] for x in (self.weighted, self.total, self.top))
        new_top = torch.maximum(top, part.lse)
        old, new = _weight(top, new_top), _weight(part.lse, new_top)
        weighted.mul_(old[..., None]).addcmul_(part.output.float(), new[..., None])
        total.mul_(old).add_(new)
        top.copy_(new_top)

    def result(self) -> AttentionOutput:
        """Return the output [B, H, N, Dv] in the dtype of query and the lse [B, H, N] in fp32.

        A row that saw no key has output 0 and lse -inf.
        """
        divisor = torch.where(self.total == 0, 1.0, self.total)
        output = (self.weighted / divisor[..., None]).to(self.dtype)
        return AttentionOutput(output, self.top + self.total.log())


def _weight(lse: Tensor, top: Tensor) -> Tensor:
    """Return exp(lse - top), 0 without keys: there it would be inf - inf."""
    return torch.where(lse == -torch.inf, 0.0, (lse - top).exp())
