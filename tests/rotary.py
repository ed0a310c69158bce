"""Norms and rotary embeddings at random, for tests of ``rotary_sdpa`` on any device."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.cases import Inputs
from torch_sage.ops.rotary import rotate

NORMS = ("", "eps", "rstd", "rstd_of_heads")
WEIGHTS = ("", "channels", "heads")


@dataclass(frozen=True)
class RotaryCase:
    """How Q and K are normed and rotated; the id says everything."""

    pairing: str = "halves"
    norm: str = ""
    weight: str = ""
    by_batch: bool = False

    @property
    def id(self) -> str:
        batch = "by_batch" if self.by_batch else ""
        return "-".join(filter(None, (self.pairing, self.norm, self.weight, batch)))


# All of it. Tables hold independent numbers, so that one entry that is read for another shows.
ROTARY_CASES = [
    RotaryCase(*fields)
    for fields in itertools.product(("halves", "neighbours"), NORMS, WEIGHTS, (False, True))
]


def rotation(case: RotaryCase, x: Tensor, seed: int) -> tuple[Any, ...]:
    """Return cos, sin, rstd, weight and eps for x [B, H, N, D], on its device."""
    generator = torch.Generator().manual_seed(seed)
    b, h, n, d = x.shape

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tables = [random(b if case.by_batch else 1, n, d) for _ in range(2)]
    rstd = weight = None
    if case.norm.startswith("rstd"):
        rstd = random(b, h if case.norm == "rstd_of_heads" else 1, n).abs() + 0.1
    if case.weight:
        weight = (1 + 0.3 * random(h if case.weight == "heads" else 1, d)).to(x.dtype)
    eps = 1e-3 if case.norm == "eps" else None
    moved = (t if t is None else t.to(x.device) for t in (*tables, rstd, weight))
    return (*moved, eps)


def arguments(case: RotaryCase, inputs: Inputs) -> tuple[Any, ...]:
    """Return the arguments of ``rotary_sdpa`` for ``inputs``, all positional."""
    of_query, of_key = rotation(case, inputs.query, 1), rotation(case, inputs.key, 2)
    return (*inputs[:3], *of_query, *of_key, *inputs[3:])


def rotated(case: RotaryCase, inputs: Inputs, factor: float = 1.0) -> Inputs:
    """Return what ``sdpa`` would take instead; reciprocal roots of means are off by ``factor``."""
    _, _, _, *rest = arguments(case, inputs)

    def made(x: Tensor, cos: Tensor, sin: Tensor, rstd: Any, weight: Any, eps: Any) -> Tensor:
        if eps is not None and factor != 1:
            rstd = torch.rsqrt(x.float().square().mean(-1) + eps) * factor
            eps = None
        return rotate(x, cos, sin, rstd, weight, eps, case.pairing)

    return inputs._replace(query=made(inputs.query, *rest[:5]), key=made(inputs.key, *rest[5:10]))
