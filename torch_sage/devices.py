"""What the machine has: the compute capability of a GPU, and the kernels that run there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

from torch_sage import _extension

# Compute capability of the GPUs whose instructions code compiled for sm_90a has, and no other's.
SM90 = (9, 0)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def asked_while_tracing(function: _Function) -> _Function:
    """Make dynamo call ``function``, and not trace it.

    As ``torch.compiler.assume_constant_result``, which would import dynamo here.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@cache
def capability(index: int | None) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU, None where torch can use none.

    Asked when attention on that GPU is judged, never at import: it initialises CUDA.
    """
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(index)


@asked_while_tracing
def has_sm90_kernels(index: int | None) -> bool:
    """Return whether GPU ``index`` can run code for sm_90a, and the library has some."""
    return "sm90" in _extension.cuda_archs() and capability(index) == SM90


def rows_of(device: torch.device) -> tuple[str, ...]:
    """Return the rows of the recipe table that ``device`` runs, the preferred one first."""
    if device.type == "cuda" and has_sm90_kernels(device.index):
        return ("cuda.sm90", "cuda")
    return (device.type,)


@asked_while_tracing
def lack_of_sm90(name: str, device: torch.device) -> str | None:
    """Return why tensor ``name`` on ``device`` has no kernels for sm_90a, None if it has them."""
    if device.type != "cuda":
        return f"{name} must be on a GPU of compute capability {dotted(SM90)}, got {device}"
    if "sm90" not in _extension.cuda_archs():
        return "the native library must be built with kernels for sm90, got one without"
    got = capability(device.index)
    if got != SM90:
        found = "none that torch can use" if got is None else dotted(got)
        return f"{name} must be on a GPU of compute capability {dotted(SM90)}, got {found}"
    return None


def dotted(capability: tuple[int, int]) -> str:
    """Return a compute capability as NVIDIA writes it, such as 9.0."""
    return ".".join(map(str, capability))
