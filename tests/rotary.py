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
    is_compact: bool = False
    is_fp32: bool = True
    """The tables and weights; otherwise they have the dtype of Q and K."""
    norm: str = ""
    weight: str = ""
    by_batch: bool = False

    @property
    def id(self) -> str:
        form = "compact" if self.is_compact else "full"
        kind = "fp32" if self.is_fp32 else "half"
        batch = "by_batch" if self.by_batch else ""
        return "-".join(filter(None, (self.pairing, form, kind, self.norm, self.weight, batch)))


# Every way to read the tables, then every way to norm. Tables hold independent numbers, so that one
# entry that is read for another shows.
ROTARY_CASES = [
    *(
        RotaryCase(pairing, is_compact, is_fp32, by_batch=by_batch)
        for pairing, is_compact, is_fp32, by_batch in itertools.product(
            ("halves", "neighbours"), (False, True), (False, True), (False, True)
        )
    ),
    *(
        RotaryCase(pairing, norm=norm, weight=weight, is_fp32=is_fp32)
        for pairing, (norm, weight), is_fp32 in itertools.product(
            ("halves", "neighbours"), list(itertools.product(NORMS, WEIGHTS))[1:], (False, True)
        )
    ),
]


def rotation(case: RotaryCase, x: Tensor, seed: int) -> tuple[Any, ...]:
    """Return cos, sin, rstd, weight and eps for x [B, H, N, D], on its device."""
    generator = torch.Generator().manual_seed(seed)
    (b, h, n, d), kind = x.shape, torch.float32 if case.is_fp32 else x.dtype

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tables = [
        random(b if case.by_batch else 1, n, d // 2 if case.is_compact else d).to(kind)
        for _ in range(2)
    ]
    rstd = weight = None
    if case.norm.startswith("rstd"):
        rstd = random(b, h if case.norm == "rstd_of_heads" else 1, n).abs() + 0.1
    if case.weight:
        weight = (1 + 0.3 * random(h if case.weight == "heads" else 1, d)).to(kind)
    eps = 1e-3 if case.norm == "eps" else None
    moved = (t if t is None else t.to(x.device) for t in (*tables, rstd, weight))
    return (*moved, eps)


def arguments(case: RotaryCase, inputs: Inputs) -> tuple[Any, ...]:
    """Return the arguments of ``rotary_sdpa`` for ``inputs``, all positional."""
    of_query, of_key = rotation(case, inputs.query, 1), rotation(case, inputs.key, 2)
    return (*inputs[:3], *of_query, *of_key, *inputs[3:])


def rotated(case: RotaryCase, inputs: Inputs) -> Inputs:
    """Return what ``sdpa`` would take instead."""
    _, _, _, *rest = arguments(case, inputs)
    return inputs._replace(
        query=rotate(inputs.query, *rest[:5], case.pairing),
        key=rotate(inputs.key, *rest[5:10], case.pairing),
    )
