"""Where attention that norms and rotates Q and K itself is faster: measured, one rule per row.

A kernel less is launched, and Q and K are neither written nor read again; but a row of Q waits for
its tables, and a row of K for its norm, where the kernels have nothing else to do. The numbers are
printed by ``python -m benchmarks.bench_producer --rule`` (docs/kernels/producers.md shows them).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from torch_sage.config import Producers
from torch_sage.ops.dispatch import hint


class Least(NamedTuple):
    """From all of these on, the fused op was measured to be the faster one."""

    queries: int
    """Tokens of Q."""

    elements: int
    """Elements of Q and K together."""


# No row is known to be faster. On CPU the op is a composition, which saves nothing.
FUSED: dict[str, tuple[Least, ...]] = {"cpu": (), "cuda.sm90": ()}


def is_faster(producers: Producers, row: str, query: Tensor, key: Tensor) -> bool:
    """Return whether to fuse, as the configuration says; sizes count by their hints."""
    if producers != "measured":
        return producers == "always"
    queries = hint(query.shape[2])
    elements = sum(_elements(x) for x in (query, key))
    return any(queries >= least.queries and elements >= least.elements for least in FUSED[row])


def _elements(x: Tensor) -> int:
    b, h, n, d = map(hint, x.shape)
    return b * h * n * d
