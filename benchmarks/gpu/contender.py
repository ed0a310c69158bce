"""What the GPU benchmark compares: a name, what it lacks here, and its calls for a problem."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from benchmarks.gpu.problem import Problem

# The calls of a contender, each on inputs that are ready. "whole" takes bf16 Q, K, V to the bf16
# output; "kernel" does so from the contender's own operands, where it quantizes at all. Both return
# [B, H, L, D]. Other names are parts of "whole", given in milliseconds.
Calls = dict[str, Callable[[], Tensor]]


class Unsupported(Exception):
    """The contender has no kernel for this problem."""


class Contender(NamedTuple):
    """One implementation of attention."""

    lack: Callable[[], str | None]
    """Say why it cannot run here, if it cannot."""
    calls: Callable[[Problem], Calls]
    """Prepare a problem; raise ``Unsupported`` where it has no kernel."""


def nothing() -> None:
    """Lack nothing."""


def module(name: str) -> Callable[[], str | None]:
    """Lack a module that cannot be imported."""

    def lack() -> str | None:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:
            return f"{name}: {error}"
        return None

    return lack
