"""The Inductor passes: switch them on, and see what they did."""

from __future__ import annotations

from torch_sage.inductor.dry_run import explain
from torch_sage.inductor.exported import apply_to_exported
from torch_sage.inductor.reporting import Report, report
from torch_sage.inductor.switch import Handle, backend, disable, enable, is_enabled, options

__all__ = [
    "Handle",
    "Report",
    "apply_to_exported",
    "backend",
    "disable",
    "enable",
    "explain",
    "is_enabled",
    "options",
    "report",
]
