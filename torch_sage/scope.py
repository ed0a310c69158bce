"""Where attention is quantized or kept exact: function modes that see torch's attention calls.

A ``TorchFunctionMode`` works alike in eager code, under dynamo and under export. Of nested scopes
the innermost decides: what it calls is hidden from the outer ones.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.backends import mha
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torch_sage import ops
from torch_sage.attention import exact_attention, scaled_dot_product_attention
from torch_sage.config import SageConfig
from torch_sage.ops.dispatch import is_plain

Attend = Callable[..., Tensor]


class Scope(TorchFunctionMode):
    """Attention inside is computed by ``attend``."""

    def __init__(self, key: tuple[Any, ...], attend: Attend, softmax: Attend = F.softmax) -> None:
        """Keep ``key``, which names the scope, ``attend``, and what computes a softmax."""
        super().__init__()
        self.key = key
        self.attend = attend
        self.multi_head = _multi_head_attention(attend, softmax)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Compute SDPA, alone or in multi-head attention, by ``attend``."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self.multi_head(*args, **kwargs)
        if func is Tensor.unflatten and torch.compiler.is_dynamo_compiling():
            # A Python method that calls super(), which dynamo cannot trace from inside a mode.
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)


class ExactScope(Scope):
    """Attention inside is torch's own, and stays so in a graph that the Inductor pass sees."""

    def __init__(self) -> None:
        """Attend by torch's SDPA, in a marked form while a graph is traced."""
        super().__init__(("exclude",), _marked_sdpa, functools.partial(_marked_softmax, F.softmax))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Mark softmax as well: without one, matrix products are no attention to the pass."""
        if func in _SOFTMAX:
            return _marked_softmax(func, *args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def _multi_head_attention(attend: Attend, softmax: Attend) -> Callable[..., Any]:
    """Return F.multi_head_attention_forward with ``attend`` in place of SDPA.

    A copy of the function with globals of its own: called as it is, it would hand itself to the
    function modes again and never come back.
    """
    original = F.multi_head_attention_forward
    namespace = {
        **original.__globals__,
        "scaled_dot_product_attention": attend,
        "softmax": softmax,
        "has_torch_function": _none_has_torch_function,
        "_check_key_padding_mask": _check_key_padding_mask,
    }
    # Dynamo would look names up in the module of this name, not in the copy.
    del namespace["__name__"]
    copied = types.FunctionType(
        original.__code__, namespace, "multi_head_attention_forward", original.__defaults__
    )
    copied.__kwdefaults__ = original.__kwdefaults__
    return copied


def _check_key_padding_mask(key_padding_mask: Tensor, src_len: int, bsz: int) -> None:
    """Check what torch checks, without the closures there that dynamo cannot trace."""
    if key_padding_mask.shape[0] != bsz or key_padding_mask.shape[1] != src_len:
        got = list(key_padding_mask.shape)
        raise AssertionError(f"key_padding_mask must have shape [{bsz}, {src_len}], got {got}")


def _none_has_torch_function(tensors: tuple[Any, ...]) -> bool:
    return False


def _marked_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute SDPA as torch does; in a traced graph as an op that the pass leaves alone.

    The pass rewrites no dropout, so that stays plain.
    """
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    if torch.compiler.is_compiling() and dropout_p == 0.0 and _markable(arguments[:4]):
        exact: Tensor = ops.exact_sdpa(*arguments, scale=scale, enable_gqa=enable_gqa)
        return exact
    return exact_attention(*arguments, scale, enable_gqa)


def _marked_softmax(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute ``func``, one of ``_SOFTMAX``; in a traced graph as an op that is not matched."""
    if torch.compiler.is_compiling() and _markable((*args, *kwargs.values())):
        return _exact_softmax(*args, **kwargs)
    return func(*args, **kwargs)


def _exact_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int | torch.dtype = 3,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if dim is None:
        return F.softmax(input, dim, dtype=dtype)
    # Third is the dtype in torch.softmax, but in F.softmax the stack level of a warning.
    dtype = _stacklevel if isinstance(_stacklevel, torch.dtype) else dtype
    weights: Tensor = ops.exact_softmax(input, dim, dtype)
    return weights


def _markable(values: tuple[Any, ...]) -> bool:
    tensors = [value for value in values if isinstance(value, Tensor)]
    return all(map(is_plain, tensors))


def call_within(scope: Scope, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what ``function`` returns inside ``scope``.

    The fast paths of torch's transformer layers have their attention in C++. Eager layers see the
    mode and do not take them; under dynamo, which sees it later, they must be told.
    """
    with scope:
        if not torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        # Not by set_fastpath_enabled, which dynamo skips. It tracks this assignment and undoes it
        # within the trace, so that nothing changes outside.
        enabled = mha.get_fastpath_enabled()
        mha._is_fastpath_enabled = False
        try:
            return function(*args, **kwargs)
        finally:
            mha._is_fastpath_enabled = enabled


@functools.cache
def sage_scope(config: SageConfig) -> Scope:
    """Return the one scope in which attention is computed as ``config`` says."""
    return Scope(("sage", config), functools.partial(scaled_dot_product_attention, config=config))


_SOFTMAX = (F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax)

EXACT = ExactScope()
"""The one scope in which attention is torch's own."""
