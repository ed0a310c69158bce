"""The accuracy tables of docs/numerics.md: ``python -m tests.accuracy`` prints them as Markdown.

Four heads, 1,024 tokens, head_dim 128, inputs rounded to bf16, against fp64 attention on the same
inputs: the data of algorithm.md 3.3, whose one head is at the mercy of its own few biases. The
accumulator is fp32: its emulation changes L1 by 1e-4 at most (test_reference_accumulate.py) and
takes a hundred times longer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.numerics import cosine_percent, exact_attention, relative_l1, rmse
from torch_sage import reference
from torch_sage.ops.hadamard import rotated
from torch_sage.recipes import SUPPORT

HEADS, SEQLEN, HEAD_DIM = 4, 1024, 128


class Accuracy(NamedTuple):
    """CosSim in percent, L1 and RMSE of algorithm.md 3."""

    cosine: float
    l1: float
    rmse: float


def make_data(kind: str, seqlen: int = SEQLEN) -> tuple[Tensor, Tensor, Tensor]:
    """Return bf16 q, k, v [1, 4, seqlen, 128] of one kind; biases are drawn per head.

    * gaussian: N(0, 1);
    * key_bias: K with a bias per channel (sd 5);
    * outlier: Q and K with a bias per channel (sd 3) and 4 common channels at +20;
    * video: a common mean, a smooth field of rank 8 over the tokens, and noise of sd .2;
    * value_bias: V with a bias per channel (sd 8);
    * loud: every 16th channel of K and V 8 times as large;
    * sink: 4 keys whose logit is +12 and whose values are about .01.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = (normal(1, HEADS, seqlen, HEAD_DIM) for _ in range(3))
    if kind == "outlier":
        common = torch.zeros(HEAD_DIM)
        common[[3, 40, 77, 101]] = 20.0
        q, k = (x + 3 * normal(HEADS, 1, HEAD_DIM) + common for x in (q, k))
    elif kind == "key_bias":
        k = k + 5 * normal(HEADS, 1, HEAD_DIM)
    elif kind == "video":
        phase = torch.arange(seqlen)[:, None] * (1 + torch.arange(8)) * math.pi / seqlen
        common, field = normal(3, HEADS, 1, HEAD_DIM), normal(3, HEADS, 8, HEAD_DIM) / 2
        q, k, v = (x / 5 + common[i] + phase.cos() @ field[i] for i, x in enumerate((q, k, v)))
    elif kind == "loud":
        k[..., ::16] *= 8
        v[..., ::16] *= 8
    elif kind == "value_bias":
        v = v + 8 * normal(HEADS, 1, HEAD_DIM)
    elif kind == "sink":
        direction = normal(HEAD_DIM)
        direction /= direction.norm()
        q = q + 8 * direction
        k[:, :, :4] = 12 * HEAD_DIM**0.5 / 8 * direction
        v[:, :, :4] *= 0.01
    elif kind != "gaussian":
        raise ValueError(f"unknown data {kind!r}")
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def measure(data: tuple[Tensor, Tensor, Tensor], rotation: str = "none", **recipe: Any) -> Accuracy:
    """Return the error of a recipe on ``data``, relative to fp64 attention."""
    exact = exact_attention(*data).output
    *turned, scale = rotated(rotation, *data[:2], None)
    # In fp32, so that the output's own rounding stays out of the number.
    wide = (x.float() for x in (*turned, data[2]))
    output = reference.attention(*wide, scale=scale, **{"accumulator": "fp32", **recipe}).output
    return Accuracy(cosine_percent(output, exact), relative_l1(output, exact), rmse(output, exact))


def recipe(qk: str, granularity: str, pv: str, smooth: str, **options: Any) -> dict[str, Any]:
    """Spell out the arguments of a recipe."""
    return {"qk": qk, "granularity": granularity, "pv": pv, "smooth": smooth, **options}


CPU = SUPPORT["cpu"].default
ROWS: dict[str, dict[str, Any]] = {
    # On the CPU one mean is taken from all rows of Q in a head.
    "CPU default": recipe(CPU.qk, CPU.granularity, CPU.pv, CPU.smooth, smooth_block=SEQLEN),
    "int8 token, bf16, smooth k": recipe("int8", "token", "bf16", "k"),
    "int8 token_block, bf16, smooth k": recipe("int8", "token_block", "bf16", "k"),
    "int8 block, bf16, smooth k": recipe("int8", "block", "bf16", "k"),
    "`i8f16` token": recipe("int8", "token", "fp16", "k"),
    "`i8f16` block": recipe("int8", "block", "fp16", "k"),
    "`i8i8` block": recipe("int8", "block", "int8", "k"),
    "`i8f8` thread": recipe("int8", "thread", "e4m3", "k"),
    "`i8f8` thread, W16/BK128": recipe("int8", "thread", "e4m3", "k", warp=16, block_k=128),
    "`i8f8` warp": recipe("int8", "warp", "e4m3", "k"),
    "`i8f8` block": recipe("int8", "block", "e4m3", "k"),
    "`i8f8` tensor": recipe("int8", "tensor", "e4m3", "k"),
    "`i8f8` thread, no smoothing": recipe("int8", "thread", "e4m3", ""),
    "`i8f8` thread, smooth kv": recipe("int8", "thread", "e4m3", "kv"),
    "`i8f8h` thread (448, 2.25)": recipe("int8", "thread", "e4m3_fp16", "k", ranges=(448, 2.25)),
    "`i8f8h` thread (224, 4.5)": recipe("int8", "thread", "e4m3_fp16", "k", ranges=(224, 4.5)),
    "`i8f8h` thread (112, 9)": recipe("int8", "thread", "e4m3_fp16", "k", ranges=(112, 9)),
    "`i4f8` token, smooth qk": recipe("int4", "token", "e4m3", "qk"),
    "`i4f8` thread, smooth qk": recipe("int4", "thread", "e4m3", "qk"),
    "`i4f8` warp, smooth qk": recipe("int4", "warp", "e4m3", "qk"),
    "`i4f8` block, smooth qk": recipe("int4", "block", "e4m3", "qk"),
    "`i4f8` tensor, smooth qk": recipe("int4", "tensor", "e4m3", "qk"),
    "`i4f8` thread, smooth k": recipe("int4", "thread", "e4m3", "k"),
    "`i4f8` thread, smooth q": recipe("int4", "thread", "e4m3", "q"),
    "`i4f8` thread, no smoothing": recipe("int4", "thread", "e4m3", ""),
}
COLUMNS = ("gaussian", "outlier", "video")
ROTATED_ROWS = ("CPU default", "`i8f8` thread, smooth kv", "`i4f8` thread, smooth qk")
ROTATED_COLUMNS = ("gaussian", "key_bias", "outlier", "loud")


def table() -> str:
    """Return the whole table as Markdown."""
    data = {kind: make_data(kind) for kind in COLUMNS}
    lines = [f"| recipe | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, arguments in ROWS.items():
        cells = (measure(data[kind], **arguments) for kind in COLUMNS)
        lines.append(
            f"| {name} | " + " | ".join(f"{c.cosine:.3f} / {c.l1:.4f}" for c in cells) + " |"
        )
    return "\n".join(lines)


def rotation_table() -> str:
    """Return what the Hadamard rotation changes, as Markdown."""
    data = {kind: make_data(kind) for kind in ROTATED_COLUMNS}
    lines = [f"| recipe | {' | '.join(ROTATED_COLUMNS)} |"]
    lines.append("|---" * (1 + len(ROTATED_COLUMNS)) + "|")
    for name in ROTATED_ROWS:
        pairs = (
            [measure(data[kind], rotation, **ROWS[name]).l1 for rotation in ("none", "hadamard")]
            for kind in ROTATED_COLUMNS
        )
        cells = (f"{plain:.4f} → {turned:.4f}" for plain, turned in pairs)
        lines.append(f"| {name} → rotated | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), rotation_table(), sep="\n\n")  # noqa: T201
