"""Where attention that norms and rotates Q and K itself is faster: measured, for each row.

Kernels in front of attention go away, and with them Q and K in 16 bits, written and read again. But
ours rotate two adjacent channels at a time in the pass that quantizes, which Inductor's may do
better. The numbers are printed by ``python -m benchmarks.bench_producer --rule``
(docs/kernels/producers.md shows them).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from torch_sage.ops.dispatch import hint


class Faster(NamedTuple):
    """Where the fused op was measured to be the faster one."""

    pairing: str
    """Of the channels that rotate together, as in the op."""

    norm: str
    """"eps" if the op computes the norm, "rstd" if it gets its factors, "" without a norm."""

    head_dim: int

    group: int
    """Least number of query heads for a key head."""

    least: float
    """Elements of Q and K together."""

    most: float
    """Likewise."""


# cuda.sm90: an H100; gains of 8 to 33 % for Flux (1k to 32k tokens of 24 heads), 4 % of its layers.
# On CPU the op is a composition, which saves nothing.
FUSED: dict[str, tuple[Faster, ...]] = {
    "cpu": (),
    "cuda.sm90.half": (),  # not measured
    "cuda.sm90": (Faster("neighbours", "eps", 128, 1, 6.2e6, float("inf")),),
}


def is_faster(row: str, query: Tensor, key: Tensor, pairing: str, norm: str) -> bool:
    """Return whether to fuse; sizes count by their hints."""
    batch, heads, seqlen_q, head_dim = map(hint, query.shape)
    heads_kv, seqlen_k = hint(key.shape[1]), hint(key.shape[2])
    elements = batch * head_dim * (heads * seqlen_q + heads_kv * seqlen_k)
    return any(
        (pairing, norm, head_dim) == measured[:3]
        and heads >= heads_kv * measured.group
        and measured.least <= elements <= measured.most
        for measured in FUSED[row]
    )
