"""Which GPUs the Triton kernels run on, and the ops' registration there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from torch_sage.ops.schemas import DEFINITIONS, LIBRARY

# Ampere: Triton compiles INT8 products to tensor cores from there on; for Turing (7.5) it has had
# none since 3.8.
LEAST_CAPABILITY = (8, 0)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _asked_while_tracing(function: _Function) -> _Function:
    """Make dynamo call ``function``, and not trace it.

    As ``torch.compiler.assume_constant_result``, which would import dynamo here.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_asked_while_tracing
def lack(index: int | None) -> str | None:
    """Return what GPU ``index`` lacks to run the kernels, None if nothing.

    Asked when attention on that GPU is judged, never at import: it initialises CUDA.
    """
    return _lack(index)


@cache
def _lack(index: int | None) -> str | None:
    if find_spec("triton") is None:
        return "triton must be installed for attention on cuda"
    if torch.version.hip is not None:
        return "query must be on an NVIDIA GPU: the kernels never ran on another"
    if not torch.cuda.is_available():
        return "query must be on a GPU that torch can use, got none"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        least, got = (f"{major}.{minor}" for major, minor in (LEAST_CAPABILITY, capability))
        return f"query must be on a GPU of compute capability {least} or more, got {got}"
    return None


def register_kernels() -> None:
    """Run the ops on CUDA tensors by the Triton kernels, imported at the first call."""
    for name in DEFINITIONS:
        LIBRARY.impl(name, _kernel(name), "CUDA")  # type: ignore[no-untyped-call]  # torch's


def _kernel(name: str) -> Any:
    schema = getattr(torch.ops.torch_sage, name).default._schema
    names = [argument.name for argument in schema.arguments]
    # The dispatcher leaves out trailing arguments that have their default.
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}

    def kernel(*args: Any, **kwargs: Any) -> Any:
        from torch_sage.ops import triton_ops

        given = dict(zip(names, args, strict=False))
        return getattr(triton_ops, name)(**{**defaults, **given, **kwargs})

    return kernel
