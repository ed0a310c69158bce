"""The fast path of nn.TransformerEncoderLayer: one aten op that hides its attention in C++."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph

from torch_sage.inductor.patterns.match import Match, Refusal


def find(graph: Graph) -> Iterator[Match | Refusal]:
    """Yield the encoder layers of ``graph``."""
    yield from ()
