"""Which GPUs the kernels run on, and the registration of those that Triton compiles."""

from __future__ import annotations

import traceback
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from torch_sage import _extension, devices
from torch_sage.devices import asked_while_tracing, dotted
from torch_sage.ops.schemas import DEFINITIONS, LIBRARY, PREPARED, ROTARY, VARLEN, WHOLE

# Ampere: Triton has tensor cores from there on. For Turing (7.5) neither 3.6 nor 3.8 compiles an
# INT8 product at all, and 16-bit ones become scalar code, with which the kernel spills 4 KB a
# thread.
LEAST_CAPABILITY = (8, 0)

_MMA_PREPARE_KV = (
    "mma_prepare_kv(Tensor key, Tensor value, *, str qk, str granularity, str pv, str smooth)"
    " -> (Tensor key_codes, Tensor key_scales, Tensor key_mean, Tensor value_codes,"
    " Tensor value_scales, Tensor value_mean)"
)


@asked_while_tracing
def lack(index: int | None, row: str) -> str | None:
    """Return what GPU ``index`` lacks to run recipes of a row of the table, None if nothing.

    Asked when attention on that GPU is judged, never at import: it initialises CUDA.
    """
    return _lack(index, row)


@cache
def _lack(index: int | None, row: str) -> str | None:
    if row == "cuda" and find_spec("triton") is None:
        return "triton must be installed for attention on cuda"
    if torch.version.hip is not None:
        return "query must be on an NVIDIA GPU: the kernels never ran on another"
    got = devices.capability(index)
    if got is None:
        return "query must be on a GPU that torch can use, got none"
    if got < LEAST_CAPABILITY:
        least = dotted(LEAST_CAPABILITY)
        return f"query must be on a GPU of compute capability {least} or more, got {dotted(got)}"
    return None


def register_kernels() -> None:
    """Run the ops on CUDA tensors by the Triton kernels, imported at the first call.

    A library with CUDA code has the whole ops itself. Recipes that its kernels do not run it hands
    on to ops whose names begin with ``triton_``, which nothing else calls: their last result is the
    text of an error, in UTF-8, which it raises (``csrc/cuda/bindings.cpp``).
    ``mma_prepare_kv`` is the pass over K and V of its mma.sync kernels, for their tests alone.
    """
    if "sm80" in _extension.cuda_gpus():
        LIBRARY.define(_MMA_PREPARE_KV)  # type: ignore[no-untyped-call]  # torch's
    for name in DEFINITIONS:
        if name in PREPARED or name == ROTARY:
            continue
        if name in (*WHOLE, *VARLEN) and _extension.cuda_gpus():
            target = f"triton_{name}"
            arguments, results = DEFINITIONS[name].split(" -> ")
            schema = f"{target}{arguments} -> ({results.strip('()')}, Tensor error)"
            LIBRARY.define(schema)  # type: ignore[no-untyped-call]  # torch's
            kernel = _kernel_of_library(name)
        else:
            target, kernel = name, _kernel(name)
        LIBRARY.impl(target, kernel, "CUDA")  # type: ignore[no-untyped-call]  # torch's


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


def _kernel_of_library(name: str) -> Any:
    kernel = _kernel(name)
    count = len(getattr(torch.ops.torch_sage, name).default._schema.returns)

    def kernel_that_tells(query: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        try:
            results = kernel(query, *args, **kwargs)
        except ValueError as error:
            text = f"ValueError: {error}"
        except Exception:
            text = traceback.format_exc()
        else:
            return (*(results if count > 1 else (results,)), torch.empty(0, dtype=torch.uint8))
        told = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return (*(query.new_empty(0) for _ in range(count)), told)

    return kernel_that_tells
