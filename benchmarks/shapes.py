"""The shapes of every benchmark, in order, and the FLOP model."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """One attention problem."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    is_causal: bool

    @property
    def name(self) -> str:
        """Readable name, such as ``b1-h8/2-q1024-k1024-d64-causal``."""
        heads = f"h{self.heads_q}" + (f"/{self.heads_kv}" if self.heads_kv != self.heads_q else "")
        causal = "-causal" if self.is_causal else ""
        return f"b{self.batch}-{heads}-q{self.seqlen_q}-k{self.seqlen_k}-d{self.head_dim}{causal}"

    @property
    def attended_pairs(self) -> int:
        """Number of (query, key) pairs of one head that the mask leaves, causal being top-left."""
        if not self.is_causal:
            return self.seqlen_q * self.seqlen_k
        square = min(self.seqlen_q, self.seqlen_k)
        return square * (square + 1) // 2 + (self.seqlen_q - square) * self.seqlen_k

    @property
    def flops(self) -> int:
        """Operations of exact attention: both products over the attended pairs, 2 per multiply-add.

        ``4 * B * Hq * D * pairs``; softmax and quantization add time, never FLOPs.
        """
        return 4 * self.batch * self.heads_q * self.head_dim * self.attended_pairs


def square(length: int, head_dim: int, is_causal: bool) -> Shape:
    """Return self-attention of ``length`` tokens with the 8 heads of the speed table."""
    return Shape(1, 8, 8, length, length, head_dim, is_causal)


LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
HEAD_DIMS = (64, 128)

SPEED = tuple(
    square(length, head_dim, is_causal)
    for head_dim in HEAD_DIMS
    for is_causal in (False, True)
    for length in LENGTHS
)

LONGEST = square(8192, 64, True)

# Around the crossover: short self-attention, few queries on many keys (decoding, cross-attention),
# many queries on few keys, many small heads, and grouped heads.
CROSSOVER = tuple(
    [
        Shape(batch, 8, heads_kv, length, length, head_dim, is_causal)
        for head_dim in (32, 64, 128)
        for is_causal in (False, True)
        for batch, heads_kv in ((1, 8), (8, 8), (1, 2))
        for length in (16, 32, 64, 96, 128, 192, 256, 384)
    ]
    + [
        Shape(1, 8, heads_kv, seqlen_q, seqlen_k, 64, False)
        for heads_kv in (8, 2)
        for seqlen_q in (1, 4, 16, 32, 64, 128)
        for seqlen_k in (256, 1024, 4096)
    ]
    + [
        Shape(1, 8, 8, seqlen_q, seqlen_k, 64, False)
        for seqlen_q in (1024, 4096)
        for seqlen_k in (4, 16, 32, 77)
    ]
)

TINY = Shape(1, 1, 1, 1, 1, 8, False)
