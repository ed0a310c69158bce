"""How the ops meet torch's transforms: autograd, autocast, vmap, FLOP counting, missing kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_sage.devices import lack_of_sm90
from torch_sage.ops.after_import import after_import
from torch_sage.ops.schemas import DEFINITIONS, LIBRARY, PREPARED, ROTARY, VARLEN

# Arguments that torch's own function casts under autocast, SDPA's to the region's dtype, softmax's
# to float32; scales, means and codes of quantized operands keep their dtype.
_CAST_LOWER = frozenset({"query", "key", "value", "attn_mask"})
_CAST_FLOAT32 = frozenset({"self"})


def wants_gradient(tensor: Tensor) -> bool:
    """Return whether autograd, reverse or forward mode, would differentiate through ``tensor``."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    # _current_level is -1 outside forward_ad.dual_level(), which also holds under torch.func.jvp.
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]  # torch's


def _overload(name: str) -> torch._ops.OpOverload[..., Any]:
    overload: torch._ops.OpOverload[..., Any] = getattr(torch.ops.torch_sage, name).default
    return overload


def _register_autograd_guard(name: str) -> None:
    """Refuse inputs whose gradient is wanted; otherwise go on below autograd.

    Without this kernel eager would differentiate nothing and say so only in backward, and a
    compiled graph would return no gradient at all, silently.
    """
    op = _overload(name)
    argument_names = [argument.name for argument in op._schema.arguments]
    below = torch._C._after_autograd_keyset

    def refuse(args: tuple[Any, ...]) -> None:
        for argument, value in zip(argument_names, args, strict=False):
            if isinstance(value, Tensor) and wants_gradient(value):
                raise RuntimeError(
                    f"{argument} must not require grad: torch_sage::{name} is inference only; call "
                    "torch_sage.scaled_dot_product_attention, which falls back to SDPA"
                )

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        # Every tensor of every schema is positional, so kwargs need no look.
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            refuse(args)
        return op.redispatch(keyset & below, *args, **kwargs)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]  # torch's


def register_autocast(name: str, device_type: str) -> None:
    """Cast as F.scaled_dot_product_attention does: to one dtype, all floats but float64."""
    op = _overload(name)
    names = [argument.name for argument in op._schema.arguments]
    key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}
    excluded = torch._C.DispatchKeySet(key[device_type])

    def cast(name: str, arg: Any) -> Any:
        if name in _CAST_LOWER and _follows_autocast(arg, device_type):
            return arg.to(torch.get_autocast_dtype(device_type))
        if name in _CAST_FLOAT32 and _follows_autocast(arg, device_type):
            return arg.float()
        return arg

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*map(cast, names, args), **kwargs)

    LIBRARY.impl(name, kernel, key[device_type].name)  # type: ignore[no-untyped-call]  # torch's


def _follows_autocast(arg: Any, device_type: str) -> bool:
    return (
        isinstance(arg, Tensor)
        and arg.is_floating_point()
        and arg.dtype != torch.float64
        and arg.device.type == device_type
    )


def _register_vmap(name: str) -> None:
    """Fold the mapped dimension into the batch, which is the first one of every tensor."""
    op = _overload(name)
    argument_names = [argument.name for argument in op._schema.arguments]

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        mapped = []
        for arg, dim in zip(args, in_dims, strict=False):
            if isinstance(arg, Tensor):
                arg = (
                    arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
                )
            mapped.append(arg)
        batch = mapped[0].shape[1]
        folded = [
            arg
            if not isinstance(arg, Tensor)
            else (_with_batch(arg, batch) if argument == "attn_mask" else arg).flatten(0, 1)
            for argument, arg in zip(argument_names, mapped, strict=False)
        ]
        result = op(*folded, **kwargs)
        if isinstance(result, Tensor):
            return _unfold(result, info.batch_size, batch), 0
        outputs = tuple(_unfold(out, info.batch_size, batch) for out in result)
        return outputs, (0,) * len(outputs)

    torch.library.register_vmap(f"torch_sage::{name}", rule, lib=LIBRARY)


def register_vmap_by_calls(name: str) -> None:
    """Call the op for every index of the mapped dimension."""
    op = _overload(name)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        pairs = list(zip(args, in_dims, strict=True))
        calls = [
            op(*(arg if dim is None else arg.select(dim, i) for arg, dim in pairs), **kwargs)
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        results = tuple(map(torch.stack, zip(*calls, strict=True)))
        return results, (0,) * len(results)

    torch.library.register_vmap(f"torch_sage::{name}", rule, lib=LIBRARY)


def _unfold(tensor: Tensor, size: int, batch: int) -> Tensor:
    unfolded: Tensor = tensor.unflatten(0, (size, batch))  # type: ignore[no-untyped-call]  # torch's
    return unfolded


def _with_batch(mapped_mask: Tensor, batch: int) -> Tensor:
    """Return [V, ...] as [V, batch, heads or 1, N or 1, M or 1]."""
    missing = 5 - mapped_mask.dim()
    shape = (mapped_mask.shape[0], *(1,) * missing, *mapped_mask.shape[1:])
    return mapped_mask.view(shape).expand(-1, batch, -1, -1, -1)


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    """Count a multiplication and an addition per query-key pair and channel, as torch does.

    Like torch's formula for SDPA this counts every pair, whatever ``causal`` or the mask hides;
    quantization adds time, never FLOPs.
    """
    batch, heads, seqlen_q, head_dim = query
    return 2 * batch * heads * seqlen_q * key[2] * (head_dim + value[3])


def _quantized_attention_flops(
    query: torch.Size,
    key_codes: torch.Size,
    key_scales: torch.Size,
    key_mean: torch.Size,
    value_codes: torch.Size,
    *_: Any,
    **__: Any,
) -> int:
    """Count as ``_attention_flops`` on operands that were quantized before."""
    del key_scales, key_mean
    return _attention_flops(query, key_codes, value_codes)


def _prepared_attention_flops(
    query: torch.Size,
    key_codes: torch.Size,
    key_scales: torch.Size,
    key_mean: torch.Size,
    value_codes: torch.Size,
    value_scales: torch.Size,
    value_shift: torch.Size,
    seqlen_k: int,
    head_dim_v: int,
    *_: Any,
    **__: Any,
) -> int:
    """Count as ``_attention_flops``, without what fills up the tiles."""
    del key_codes, key_scales, key_mean, value_codes, value_scales, value_shift
    batch, heads, seqlen_q, head_dim = query
    return 2 * batch * heads * seqlen_q * seqlen_k * (head_dim + head_dim_v)


def register_missing_kernels(reason: str) -> None:
    """Make every op say why it cannot run on CPU, not the dispatcher's list of backends."""

    def register(name: str) -> None:
        def kernel(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"torch_sage::{name} must have its native library, got: {reason}")

        LIBRARY.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]  # torch's

    for name in DEFINITIONS:
        if name not in PREPARED and name != ROTARY:
            register(name)


def _register_lack_of_kernels(
    name: str, lack_of: Callable[[str, torch.device], str | None]
) -> None:
    """Say what runs an op of few rows of the recipe table, where the library has no kernel."""
    argument = _overload(name)._schema.arguments[0].name

    def kernel(first: Tensor, *_: Any, **__: Any) -> Any:
        lack = lack_of(argument, first.device)
        raise NotImplementedError(f"torch_sage::{name} has no kernel here: {lack}")

    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]  # torch's


def _varlen_flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *_: Any,
    **__: Any,
) -> int:
    """Count as ``_attention_flops``, sequence by sequence, as torch does for its packed op."""

    def lengths(starts: Tensor, longest: int) -> list[int]:
        if type(starts) is Tensor and starts.device.type != "meta":
            return [min(length, longest) for length in starts.diff().tolist()]
        return [longest] * (starts.shape[0] - 1)

    pairs = zip(
        lengths(cu_seqlens_q, max_seqlen_q), lengths(cu_seqlens_k, max_seqlen_k), strict=True
    )
    scores = query.shape[1] * sum(n * m for n, m in pairs)
    return int(2 * scores * (query.shape[2] + value.shape[2]))


_FLOPS: dict[str, Callable[..., int]] = {
    "attention": _quantized_attention_flops,
    "attention_with_lse": _quantized_attention_flops,
    "attention_prepared": _prepared_attention_flops,
    "attention_prepared_with_lse": _prepared_attention_flops,
    "attention_prepared_part": _prepared_attention_flops,
    "sdpa": _attention_flops,
    "sdpa_with_lse": _attention_flops,
    "rotary_sdpa": _attention_flops,
}


def _register_flops() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in _FLOPS.items():
        register_flop_formula(getattr(torch.ops.torch_sage, name))(formula)
    for name in VARLEN:
        register_flop_formula(getattr(torch.ops.torch_sage, name), get_raw=True)(_varlen_flops)


for _name in DEFINITIONS:
    _register_autograd_guard(_name)
    register_autocast(_name, "cpu")
    register_autocast(_name, "cuda")
    if _name == ROTARY or _name in VARLEN:
        # Neither norm weights nor packed sequences have a batch to fold into.
        register_vmap_by_calls(_name)
    else:
        _register_vmap(_name)
for _name in (*PREPARED, ROTARY):
    _register_lack_of_kernels(_name, lack_of_sm90)
# It imports triton, which takes half a second and makes folders.
after_import("torch.utils.flop_counter", _register_flops)
