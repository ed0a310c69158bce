"""What each kind of device computes: the table of recipes, and how a configuration picks one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from torch_sage.config import SageConfig
from torch_sage.devices import rows_of

QK_FORMATS = ("int8", "int4")
GRANULARITIES = ("token", "thread", "warp", "block", "tensor", "token_thread", "token_block")
PV_FORMATS = ("bf16", "fp16", "fp16_fp16", "e4m3", "e4m3_fp16")
SMOOTH_LETTERS = "qkv"
EXPONENTIALS = ("exact", "mixed")


@dataclass(frozen=True)
class Recipe:
    """One fully resolved way to quantize attention; its fields are the ops' recipe arguments."""

    qk: str
    """Format of Q and K codes: one of ``QK_FORMATS``."""

    granularity: str
    """Rows sharing one Q or K scale: one of ``GRANULARITIES``; ``token_thread`` has a scale for
    every row of Q and for every fourth pair of rows in a block of 128 of K, ``token_block`` for
    every row of Q and every block of 128 of K."""

    pv: str
    """Format of P and V and its accumulator: one of ``PV_FORMATS``."""

    smooth: str
    """Which of q, k, v are smoothed: a subset of "qkv" in that order."""

    exponential: str = "exact"
    """How P is computed from the scores: one of ``EXPONENTIALS``. ``mixed`` takes a mantissa linear
    in the score for some columns, an error inside the rounding of P to E4M3."""

    @classmethod
    def of_op(cls, arguments: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a call of the op ``sdpa`` with these ``arguments`` runs."""
        return cls(*(arguments[name] for name in cls.__dataclass_fields__))

    @property
    def name(self) -> str:
        """Readable name, such as ``int8.token/bf16/smooth-qk``."""
        formats = f"{self.qk}.{self.granularity}/{self.pv}/smooth-{self.smooth or 'none'}"
        return formats if self.exponential == "exact" else f"{formats}/exp-{self.exponential}"

    def op_kwargs(self) -> dict[str, str]:
        """Return the keyword arguments with which the op ``sdpa`` runs this recipe."""
        return {
            "qk": self.qk,
            "granularity": self.granularity,
            "pv": self.pv,
            "smooth": self.smooth,
            "exponential": self.exponential,
        }


class Support(NamedTuple):
    """The recipes that one family of kernels can run, as a product of legal values."""

    default: Recipe
    qk: tuple[str, ...]
    granularity: tuple[str, ...]
    pv: tuple[str, ...]
    smooth: tuple[str, ...]
    exponential: tuple[str, ...]

    half: Mapping[torch.dtype, str]
    """The 16-bit format of P and V for each dtype of the operands; empty where there is none."""

    max_head_dim: int
    """The largest head dimension, of Q and K or of V, that fits the kernels."""

    has_parts: bool
    """Whether the ops ``quantize_*`` and ``attention`` run these recipes, not only ``sdpa``."""

    def allows(self, recipe: Recipe) -> bool:
        """Return whether a kernel of this family runs ``recipe``."""
        return (
            recipe.qk in self.qk
            and recipe.granularity in self.granularity
            and recipe.pv in self.pv
            and recipe.smooth in self.smooth
            and recipe.exponential in self.exponential
        )


# CPU: per-token scales cost one multiplication per 16 scores there and halve the INT8 error of
# per-block ones on N(0,1) (algorithm.md 3.3: .0093 against .0131); bf16 is the only 16-bit dot
# product of x86, and unlike 8-bit P it keeps the tail behind an attention sink. Q is smoothed by
# one mean per head: on SmolLM2's own q, k, v the worst layer's cosine is .99987, .99943 without.
#
# CUDA, by Triton: one scale per tile of keys leaves one FMA of scalar work to a score; to smooth Q
# would add one more (docs/kernels/triton.md). V keeps its own 16-bit type and needs no pass, and
# fp32 V takes the one that has its range.
#
# CUDA of compute capability 9.0 alone: a recipe that leaves the least to do between the two
# products on tensor cores (docs/kernels/hopper.md). K and V are centred in the pass that quantizes
# them anyway; Q has no such pass.
#
# A second row there keeps P and V in bf16, whatever the operands are: INT8 Q and K are nearly all
# of the error that is left (relative L1 .011 on N(0,1), not .038).
#
# The other CUDA rows are those of the mma.sync kernels. From compute capability 8.0 on P and V have
# 16 bits; fp16 accumulators, twice as fast on GeForce, overflow where V is large (black images), so
# they run on demand alone. From 8.9 on there is FP8: on q, k, v of SmolLM2, Whisper and DINOv2 the
# fp16 accumulator had the error of the fp32 one, .029, .016 and .008 relative L1 against .020, .006
# and .004 of 16 bits, and products four times as fast on GeForce. V is not smoothed: where a sink
# has small values, the mean is what gets rounded (.016 became .025 on Whisper). The numbers are in
# docs/kernels/mma.md.
_ALL_SMOOTHING = ("", "k", "v", "kv", "q", "qk", "qv", "qkv")
_SM80 = Support(
    default=Recipe("int8", "thread", "bf16", "k"),
    qk=("int8", "int4"),
    granularity=("thread", "warp", "block", "tensor"),
    pv=("bf16", "fp16", "fp16_fp16"),
    smooth=_ALL_SMOOTHING,
    exponential=("exact",),
    half={torch.float32: "bf16", torch.bfloat16: "bf16", torch.float16: "fp16"},
    max_head_dim=256,
    has_parts=False,
)
_SM89 = _SM80._replace(
    default=Recipe("int8", "thread", "e4m3_fp16", "k"),
    pv=("bf16", "fp16", "fp16_fp16", "e4m3", "e4m3_fp16"),
)
SUPPORT: dict[str, Support] = {
    "cpu": Support(
        default=Recipe("int8", "token", "bf16", "qk"),
        qk=("int8",),
        granularity=("token", "thread", "warp", "block", "tensor"),
        pv=("bf16",),
        smooth=_ALL_SMOOTHING,
        exponential=("exact",),
        half={torch.float32: "bf16", torch.bfloat16: "bf16", torch.float16: "bf16"},
        max_head_dim=256,
        has_parts=True,
    ),
    "cuda": Support(
        default=Recipe("int8", "token_block", "bf16", "k"),
        qk=("int8",),
        granularity=("token_block", "token", "thread", "warp", "block"),
        pv=("bf16", "fp16"),
        smooth=_ALL_SMOOTHING,
        exponential=("exact",),
        half={torch.float32: "bf16", torch.bfloat16: "bf16", torch.float16: "fp16"},
        max_head_dim=256,
        has_parts=True,
    ),
    "cuda.sm90": Support(
        default=Recipe("int8", "token_thread", "e4m3_fp16", "kv", "mixed"),
        qk=("int8",),
        granularity=("token_thread",),
        pv=("e4m3_fp16",),
        smooth=("", "k", "v", "kv"),
        exponential=("mixed", "exact"),
        half={},
        max_head_dim=256,
        has_parts=False,
    ),
    "cuda.sm90.half": Support(
        default=Recipe("int8", "token_thread", "bf16", "k"),
        qk=("int8",),
        granularity=("token_thread",),
        pv=("bf16",),
        smooth=("", "k"),
        exponential=("exact",),
        half={torch.float32: "bf16", torch.bfloat16: "bf16", torch.float16: "bf16"},
        max_head_dim=128,
        has_parts=False,
    ),
    "cuda.sm80": _SM80,
    "cuda.sm89": _SM89,
    "cuda.sm120": _SM89,
}
"""Rows by the type of device; after a dot, those of its models that have the kernels."""

PREPARED = "cuda.sm90"
"""The row that takes keys and values quantized before, by ``prepare_kv``, if asked for no other."""

ALL_PREPARED = (PREPARED, "cuda.sm90.half")
"""And all that do."""

ROTARY = ("cpu", *ALL_PREPARED)
"""The rows that take Q and K before their rotary embeddings, in ``rotary_sdpa``."""


def rows_of_type(device_type: str, parts: bool = False) -> tuple[str, ...]:
    """Return the rows that some device of a type runs, the whole op or its parts.

    A device without kernels ("meta") may trace what any device runs.
    """
    usable = [row for row, support in SUPPORT.items() if support.has_parts or not parts]
    own = tuple(row for row in usable if row.split(".")[0] == device_type)
    return own or tuple(usable)


def resolve_in(row: str, config: SageConfig, dtype: torch.dtype) -> Recipe:
    """Return what ``config`` means in a row of the table; that row may not support it.

    ``dtype`` of the operands decides what 16 bits are.
    """
    support = SUPPORT[row]
    default = support.default
    qk = default.qk if config.qk == "auto" else config.qk
    # Four bits have no room for a bias of Q (algorithm.md 3.1: cosine 98.1 % by K alone, 99.5).
    usual = default.smooth + ("q" if qk == "int4" else "")

    def choose(letter: str, wanted: bool | None) -> bool:
        return letter in usual if wanted is None else wanted

    wanted = {"q": config.smooth_q, "k": config.smooth_k, "v": config.smooth_v}
    pv: str = config.pv
    if support.half and (pv == "half" or (pv == "auto" and default.pv in support.half.values())):
        pv = support.half.get(dtype, default.pv)
    elif pv == "auto":
        pv = default.pv
    return Recipe(
        qk=qk,
        granularity=default.granularity if config.granularity == "auto" else config.granularity,
        pv=pv,
        smooth="".join(s for s in SMOOTH_LETTERS if choose(s, wanted[s])),
        exponential=default.exponential if config.exponential == "auto" else config.exponential,
    )


def choose_row(config: SageConfig, rows: Sequence[str], dtype: torch.dtype, head_dim: int) -> str:
    """Return the first of ``rows`` that supports ``config``, else the first of all.

    ``head_dim`` is the larger one of Q and K and of V.
    """
    for row in rows:
        support = SUPPORT[row]
        if head_dim <= support.max_head_dim and support.allows(resolve_in(row, config, dtype)):
            return row
    return rows[0]


def resolve(config: SageConfig, device: torch.device, dtype: torch.dtype, head_dim: int) -> Recipe:
    """Return the recipe that ``config`` asks for on ``device``; it may not be supported there.

    ``head_dim`` is the larger one of Q and K and of V.

    Raises:
        KeyError: if ``device`` has no row at all (``device.type not in SUPPORT``).
    """
    return resolve_in(choose_row(config, rows_of(device), dtype, head_dim), config, dtype)
