"""What each kind of device computes: one table of recipes, one of measured crossovers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from torch_sage.config import SageConfig

QK_FORMATS = ("int8", "int4")
GRANULARITIES = ("token", "thread", "warp", "block", "tensor")
PV_FORMATS = ("bf16", "fp16", "e4m3", "e4m3_fp16")
SMOOTH_LETTERS = "qkv"


@dataclass(frozen=True)
class Recipe:
    """One fully resolved way to quantize attention; its fields are the ops' recipe arguments."""

    qk: str
    """Format of Q and K codes: one of ``QK_FORMATS``."""

    granularity: str
    """Rows sharing one Q or K scale: one of ``GRANULARITIES``."""

    pv: str
    """Format of P and V and its accumulator: one of ``PV_FORMATS``."""

    smooth: str
    """Which of q, k, v are smoothed: a subset of "qkv" in that order."""

    @property
    def name(self) -> str:
        """Readable name, such as ``int8.token/bf16/smooth-qk``."""
        return f"{self.qk}.{self.granularity}/{self.pv}/smooth-{self.smooth or 'none'}"

    def op_kwargs(self) -> dict[str, str]:
        """Return the keyword arguments with which the op ``sdpa`` runs this recipe."""
        return {
            "qk": self.qk,
            "granularity": self.granularity,
            "pv": self.pv,
            "smooth": self.smooth,
        }


class Support(NamedTuple):
    """The recipes that one kind of device can run, as a product of legal values."""

    default: Recipe
    qk: tuple[str, ...]
    granularity: tuple[str, ...]
    pv: tuple[str, ...]
    smooth: tuple[str, ...]

    half: Mapping[torch.dtype, str]
    """The 16-bit format of P and V for each dtype of the operands."""

    def allows(self, recipe: Recipe) -> bool:
        """Return whether a kernel of this device runs ``recipe``."""
        return (
            recipe.qk in self.qk
            and recipe.granularity in self.granularity
            and recipe.pv in self.pv
            and recipe.smooth in self.smooth
        )


# CPU: per-token scales cost one multiplication per 16 scores there and halve the INT8 error of
# per-block ones on N(0,1) (algorithm.md 3.3: .0093 against .0131); bf16 is the only 16-bit dot
# product of x86, and unlike 8-bit P it keeps the tail behind an attention sink. Q is smoothed by
# one mean per head: on SmolLM2's own q, k, v the worst layer's cosine is .99987, .99943 without.
#
# CUDA, by Triton: the same arithmetic, so the same defaults; V keeps its own 16-bit type and needs
# no pass, and fp32 V takes the one that has its range.
_ALL_SMOOTHING = ("", "k", "v", "kv", "q", "qk", "qv", "qkv")
SUPPORT: dict[str, Support] = {
    "cpu": Support(
        default=Recipe("int8", "token", "bf16", "qk"),
        qk=("int8",),
        granularity=GRANULARITIES,
        pv=("bf16",),
        smooth=_ALL_SMOOTHING,
        half={torch.float32: "bf16", torch.bfloat16: "bf16", torch.float16: "bf16"},
    ),
    "cuda": Support(
        default=Recipe("int8", "token", "bf16", "qk"),
        qk=("int8",),
        granularity=("token", "thread", "warp", "block"),
        pv=("bf16", "fp16"),
        smooth=_ALL_SMOOTHING,
        half={torch.float32: "bf16", torch.bfloat16: "bf16", torch.float16: "fp16"},
    ),
}


def resolve(config: SageConfig, device_type: str, dtype: torch.dtype = torch.bfloat16) -> Recipe:
    """Return the recipe that ``config`` asks for on ``device_type``; it may not be supported there.

    ``dtype`` of the operands decides what 16 bits are.

    Raises:
        KeyError: if no recipe exists for ``device_type`` (``device_type not in SUPPORT``).
    """
    support = SUPPORT[device_type]
    default = support.default

    def choose(letter: str, wanted: bool | None) -> bool:
        return letter in default.smooth if wanted is None else wanted

    wanted = {"q": config.smooth_q, "k": config.smooth_k, "v": config.smooth_v}
    pv: str = config.pv
    if pv == "half" or (pv == "auto" and default.pv in support.half.values()):
        pv = support.half.get(dtype, default.pv)
    elif pv == "auto":
        pv = default.pv
    return Recipe(
        qk=default.qk if config.qk == "auto" else config.qk,
        granularity=default.granularity if config.granularity == "auto" else config.granularity,
        pv=pv,
        smooth="".join(s for s in SMOOTH_LETTERS if choose(s, wanted[s])),
    )
