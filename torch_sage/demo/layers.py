"""The error of every attention layer on the model's own queries, keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import torch_sage

COSINE_TARGET = 0.9998
# Small layers count, too, and an input that we cannot compute is an error, not a perfect score.
_ALWAYS = torch_sage.SageConfig(dispatch="always", on_unsupported="error")


class LayerError(NamedTuple):
    """How far one layer's quantized attention is from exact attention in fp64."""

    call: int
    query: str
    key: str
    cosine: float
    relative_l1: float


class _Compare(TorchFunctionMode):
    """Runs every SDPA call as it is, then compares ours with fp64 on the same arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[LayerError] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.errors.append(_layer_error(len(self.errors), *args, **kwargs))
        return func(*args, **kwargs)


def layer_errors(forward: Callable[[], object]) -> list[LayerError]:
    """Return the error of every SDPA call of ``forward``, in order; its own results are exact."""
    compare = _Compare()
    with torch.inference_mode(), compare:
        forward()
    return compare.errors


def _layer_error(call_number: int, *args: Any, **kwargs: Any) -> LayerError:
    signature = inspect.signature(torch_sage.scaled_dot_product_attention)
    call = signature.bind(*args, **kwargs).arguments
    ours = torch_sage.scaled_dot_product_attention(**call, config=_ALWAYS).double()
    with sdpa_kernel(SDPBackend.MATH):
        exact = F.scaled_dot_product_attention(**{name: _double(x) for name, x in call.items()})
    return LayerError(
        call=call_number,
        query="x".join(map(str, call["query"].shape)),
        key="x".join(map(str, call["key"].shape)),
        cosine=F.cosine_similarity(ours.flatten(), exact.flatten(), dim=0).item(),
        relative_l1=((ours - exact).abs().sum() / exact.abs().sum()).item(),
    )


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
