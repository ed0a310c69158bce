"""Quantized attention for torch.compile: SDPA nodes become SageAttention ops.

Importing this package defines the ops and loads the native library. The Inductor pass is imported
on first use of ``enable``, ``options`` and their like, because it pulls in torch._inductor;
``torch_sage.distributed`` on first use, because it pulls in DTensor.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torch_sage import ops
from torch_sage._extension import library_path
from torch_sage.attention import (
    attention_with_lse,
    scaled_dot_product_attention,
)
from torch_sage.config import PRESETS, SageConfig
from torch_sage.module import apply_, exclude, reset_, sage
from torch_sage.ops.dispatch import Reason, ReasonCode, why_not
from torch_sage.prepared import PreparedKV, attention_prepared, prepare_kv
from torch_sage.reference.attention import AttentionOutput
from torch_sage.varlen import varlen_attention

if TYPE_CHECKING:
    from torch_sage import distributed as distributed
    from torch_sage.inductor.dry_run import explain
    from torch_sage.inductor.exported import apply_to_exported
    from torch_sage.inductor.reporting import report
    from torch_sage.inductor.switch import disable, enable, is_enabled, options

__version__ = "0.1.0"

_INDUCTOR_NAMES = (
    "apply_to_exported",
    "disable",
    "enable",
    "explain",
    "is_enabled",
    "options",
    "report",
)

__all__ = [
    "PRESETS",
    "AttentionOutput",
    "PreparedKV",
    "Reason",
    "ReasonCode",
    "SageConfig",
    "__version__",
    "apply_",
    "apply_to_exported",
    "attention_prepared",
    "attention_with_lse",
    "disable",
    "enable",
    "exclude",
    "explain",
    "is_enabled",
    "library_path",
    "ops",
    "options",
    "prepare_kv",
    "report",
    "reset_",
    "sage",
    "scaled_dot_product_attention",
    "varlen_attention",
    "why_not",
]


def __getattr__(name: str) -> Any:
    if name in _INDUCTOR_NAMES:
        return getattr(importlib.import_module("torch_sage.inductor"), name)
    if name == "distributed":
        return importlib.import_module("torch_sage.distributed")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
