"""Merging partial results by their log-sum-exp, in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torch_sage.reference.attention import AttentionOutput


def merge(parts: Iterator[tuple[AttentionOutput, int]]) -> AttentionOutput:
    """Return the attention of all keys from the results of some and the row that each starts at.

    The first one has all rows. Each is merged before the next one is asked for.
    """
    merged = _Merged(next(parts)[0])
    for part, first_row in parts:
        merged.add(part, first_row)
    return merged.result()


class _Merged:
    """Attention of all keys seen so far: an average of partial outputs, weighted by exp(lse).

    Weights are relative to the largest lse and divided by their own sum at the end. A running lse
    would lose them where it is large: beside a mask of -3e38 the log of two disappears.
    """

    def __init__(self, first: AttentionOutput) -> None:
        """Start with the result of some keys, for all rows: [B, H, N, Dv] and [B, H, N]."""
        self.dtype = first.output.dtype
        self.weighted = first.output.to(torch.float32, copy=True)
        self.total = (first.lse != -torch.inf).float()
        self.top = first.lse.clone()

    def add(self, part: AttentionOutput, first_row: int = 0) -> None:
        """Add the result of other keys, for the rows from ``first_row`` on."""
        weighted, total, top = (x[:, :, first_row:] for x in (self.weighted, self.total, self.top))
        new_top = torch.maximum(top, part.lse)
        old, new = _weight(top, new_top), _weight(part.lse, new_top)
        weighted.mul_(old[..., None]).addcmul_(part.output, new[..., None])
        total.mul_(old).add_(new)
        top.copy_(new_top)

    def result(self) -> AttentionOutput:
        """Return the output [B, H, N, Dv] in the dtype of the parts and the lse [B, H, N] in fp32.

        A row that saw no key has output 0 and lse -inf.
        """
        divisor = torch.where(self.total == 0, 1.0, self.total)[..., None]
        output = torch.empty_like(self.weighted, dtype=self.dtype)
        torch.div(self.weighted, divisor, out=output)
        return AttentionOutput(output, self.top + self.total.log())


def _weight(lse: Tensor, top: Tensor) -> Tensor:
    """Return exp(lse - top), 0 without keys: there it would be inf - inf."""
    return torch.where(lse == -torch.inf, 0.0, (lse - top).exp())
