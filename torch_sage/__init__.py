"""Quantized attention for torch.compile: SDPA nodes become SageAttention ops.

Importing this package defines the ops and loads the native library. The Inductor pass is imported
on first use of ``enable``, ``options`` and their like, because it pulls in torch._inductor.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torch_sage import ops
from torch_sage.attention import (
    attention_with_lse,
    scaled_dot_product_attention,
)
from torch_sage.config import PRESETS, SageConfig
from torch_sage.module import apply_, exclude, reset_, sage
from torch_sage.ops.dispatch import Reason, ReasonCode, why_not
from torch_sage.reference.attention import AttentionOutput

if TYPE_CHECKING:
    from torch_sage.inductor.dry_run import explain
    from torch_sage.inductor.reporting import report
    from torch_sage.inductor.switch import disable, enable, is_enabled, options

__version__ = "0.1.0"

_INDUCTOR_NAMES = ("disable", "enable", "explain", "is_enabled", "options", "report")

__all__ = [
    "PRESETS",
    "AttentionOutput",
    "Reason",
    "ReasonCode",
    "SageConfig",
    "__version__",
    "apply_",
    "attention_with_lse",
    "disable",
    "enable",
    "exclude",
    "explain",
    "is_enabled",
    "ops",
    "options",
    "report",
    "reset_",
    "sage",
    "scaled_dot_product_attention",
    "why_not",
]


def __getattr__(name: str) -> Any:
    if name in _INDUCTOR_NAMES:
        return getattr(importlib.import_module("torch_sage.inductor"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
