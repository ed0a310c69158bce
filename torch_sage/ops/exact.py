"""Ops that stand for torch's own functions where ``exclude`` forbids quantization.

Only the graph itself survives tracing, export, and every cache key, so ``exclude`` is written into
it: under tracing it calls these opaque ops, which no pattern of the Inductor pass knows. They
compute exactly what they are named after; eager code never calls them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_sage.ops.rules import register_autocast, register_vmap_by_calls, wants_gradient
from torch_sage.ops.schemas import LIBRARY

# Exact strides: SDPA chooses its backend, and with it the result's strides, by the input's strides.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)

DEFINITIONS: dict[str, str] = {
    "exact_sdpa": (
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0,"
        " bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor"
    ),
    "exact_softmax": "(Tensor self, int dim, ScalarType? dtype=None) -> Tensor",
}

ORIGINALS: dict[str, torch._ops.OpOverload[..., Any]] = {
    "exact_sdpa": torch.ops.aten.scaled_dot_product_attention.default,
    "exact_softmax": torch.ops.aten.softmax.int,
}
"""Torch's own op that a graph may have in the place of each after the pass."""


def _register(name: str, original: torch._ops.OpOverload[..., Any]) -> None:
    LIBRARY.define(f"{name}{DEFINITIONS[name]}", tags=_TAGS)  # type: ignore[no-untyped-call]  # torch's

    def kernel(*args: Any, **kwargs: Any) -> Any:
        # A function mode that is active, such as an outer scope, must not see the call again.
        with torch._C.DisableTorchFunction():
            return original(*args, **kwargs)

    def autograd(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        # Torch's own op has a gradient; one that is differentiated need not be marked, either.
        if any(isinstance(arg, Tensor) and wants_gradient(arg) for arg in args):
            return kernel(*args, **kwargs)
        op = getattr(torch.ops.torch_sage, name).default
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    torch.library.register_fake(f"torch_sage::{name}", kernel, lib=LIBRARY)
    register_vmap_by_calls(name)
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]  # torch's
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # torch's


for _name, _original in ORIGINALS.items():
    _register(_name, _original)
register_autocast("exact_sdpa", "cpu")
register_autocast("exact_sdpa", "cuda")
register_autocast("exact_softmax", "cuda")  # the CPU's autocast leaves softmax as it is
