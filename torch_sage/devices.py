"""What the machine has: the compute capability of a GPU, and the kernels that run there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

from torch_sage import _extension

# Compute capability of the GPUs whose instructions code compiled for sm_90a has, and no other's.
SM90 = (9, 0)
SM120 = 12  # first number of the consumer Blackwells' capabilities

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
def has_kernels(family: str, index: int | None) -> bool:
    """Return whether the library has a family of kernels, such as "sm90", that GPU ``index`` runs.

    That is decided where the library is built, by what nvcc compiled.
    """
    got = capability(index)
    return got is not None and dotted(got) in _extension.cuda_gpus().get(family, ())


@asked_while_tracing
def generation(index: int | None) -> int | None:
    """Return the first number of GPU ``index``'s compute capability."""
    got = capability(index)
    return None if got is None else got[0]


def rows_of(device: torch.device) -> tuple[str, ...]:
    """Return the rows of the recipe table that ``device`` runs, the preferred one first."""
    if device.type != "cuda":
        return (device.type,)
    is_hopper = has_kernels("sm90", device.index)
    has_fp8 = has_kernels("sm89", device.index)
    rows = ["cuda.sm90", "cuda.sm90.half"] if is_hopper else []
    # A row with FP8 has the 16-bit formats, too, but prefers FP8, which Hopper emulates in
    # mma.sync: what its own row lacks, such as wide heads, has 16 bits there.
    if has_kernels("sm80", device.index) and (is_hopper or not has_fp8):
        rows.append("cuda.sm80")
    if has_fp8:
        rows.append("cuda.sm120" if generation(device.index) == SM120 else "cuda.sm89")
    return (*rows, "cuda")


@asked_while_tracing
def lack_of_sm90(name: str, device: torch.device) -> str | None:
    """Return why tensor ``name`` on ``device`` has no kernels for sm_90a, None if it has them."""
    if device.type != "cuda":
        return f"{name} must be on a GPU of compute capability {dotted(SM90)}, got {device}"
    if "sm90" not in _extension.cuda_gpus():
        return "the native library must be built with kernels for sm90, got one without"
    got = capability(device.index)
    if got != SM90:
        found = "none that torch can use" if got is None else dotted(got)
        return f"{name} must be on a GPU of compute capability {dotted(SM90)}, got {found}"
    return None


def dotted(capability: tuple[int, int]) -> str:
    """Return a compute capability as NVIDIA writes it, such as 9.0."""
    return ".".join(map(str, capability))
