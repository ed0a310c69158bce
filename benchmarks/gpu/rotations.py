"""Attention behind norms and rotary embeddings, nothing else: of what the rule is derived.

Compiled with torch_sage, it is Inductor's kernels for norms and rotations and ours for attention,
or ours for all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import blocks


class Kind(NamedTuple):
    """One way that models make Q and K."""

    heads: int
    heads_kv: int
    is_causal: bool
    is_interleaved: bool
    norm: str
    """"", "heads" (each head on its own) or "all" (all heads together)."""


KINDS = {
    "Llama-3 8B": Kind(32, 8, True, False, ""),
    "Llama-2 7B": Kind(32, 32, True, False, ""),
    "Qwen3 8B": Kind(32, 8, True, False, "heads"),
    "Flux": Kind(24, 24, False, True, "heads"),
    "Wan 14B": Kind(40, 40, False, True, "all"),
}
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)


def attend(kind: Kind) -> Callable[..., Tensor]:
    """Return attention of projected q, k and v [B, N, H * D] with tables and weights of norms."""
    rotate = blocks.rotate_pairs if kind.is_interleaved else blocks.rotate_halves

    gqa = kind.heads != kind.heads_kv

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, blocks.HEAD_DIM)).transpose(1, 2)

    def made(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if kind.norm == "all":
            x = F.rms_norm(x, x.shape[-1:], weight)
        x = heads(x)
        if kind.norm == "heads":
            x = F.rms_norm(x, x.shape[-1:], weight)
        return rotate(x, cos, sin)

    def run(q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, *tables: Tensor) -> Tensor:
        query, key = made(q, of_q, *tables), made(k, of_k, *tables)
        output = F.scaled_dot_product_attention(
            query, key, heads(v), is_causal=kind.is_causal, enable_gqa=gqa
        )
        return output.transpose(1, 2)

    return run


def operands(kind: Kind, tokens: int, device: str) -> tuple[Tensor, ...]:
    """Return what ``attend(kind)`` takes, in bf16, with tables in fp32; compiled for any tokens."""
    widths = [heads * blocks.HEAD_DIM for heads in (kind.heads, kind.heads_kv, kind.heads_kv)]
    with torch.device(device):
        q, k, v = (torch.randn(1, tokens, width, dtype=torch.bfloat16) for width in widths)
        sizes = widths[:2] if kind.norm == "all" else [blocks.HEAD_DIM] * 2
        weights = [torch.rand(size, dtype=torch.bfloat16) + 0.5 for size in sizes]
        tables = blocks.tables(tokens, kind.is_interleaved)
    for x, dim in ((q, 1), (k, 1), (v, 1), (tables[0], 0), (tables[1], 0)):
        torch._dynamo.mark_dynamic(x, dim)
    return q, k, v, *weights, *tables


def elements(kind: Kind, tokens: int) -> int:
    """Return the elements of Q and K together."""
    return (kind.heads + kind.heads_kv) * blocks.HEAD_DIM * tokens


def faster(records: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Return at what numbers of tokens each kind gained anything."""
    found: dict[str, list[int]] = {}
    for record in records:
        tokens = found.setdefault(record["kind"], [])
        if record["gain"] > 1:
            tokens.append(record["tokens"])
    return found
