"""Who may run: ``why_not`` collects every reason against an input, ``validate`` refuses nonsense.

A *reason* means that exact SDPA computes the input and these kernels do not (or would not be
faster): ``on_unsupported`` decides what happens. An *error* means that the arguments contradict
each other, so that no fallback could be right: it is raised whatever ``on_unsupported`` says, even
where some backend of torch returns a number (a value longer than its key, a mask together with
``is_causal``). ``why_not`` lists errors as ``invalid_input``, so that a graph pass leaves such a
node alone.

Everything here works on real, fake and symbolic tensors without adding a guard: a symbolic size
counts only where it is known for certain, and by its hint where speed alone is at stake.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_sage import _extension
from torch_sage.config import SageConfig, as_config
from torch_sage.crossover import Form, prefers_exact
from torch_sage.devices import rows_of
from torch_sage.ops import checks, gpu, hadamard
from torch_sage.ops.checks import Size, known
from torch_sage.ops.reasons import Reason, ReasonCode
from torch_sage.ops.rules import wants_gradient
from torch_sage.recipes import SUPPORT, choose_row, resolve_in

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalBias

__all__ = [
    "Reason",
    "ReasonCode",
    "as_matrices",
    "bias_problems",
    "causal_of",
    "causal_problems",
    "device_reasons",
    "hint",
    "is_plain",
    "rotation_reasons",
    "validate",
    "why_not",
]

# Asked once, here: dynamo would trace the question, down to the look for a file.
MISSING_LIBRARY = _extension.unavailable_reason()
_CPU_KERNEL = "cpu.portable" if _extension.cpu_isa() == "portable" else "cpu"


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    config: SageConfig | str | None = None,
    causal: str | None = None,
) -> tuple[Reason, ...]:
    """Return every reason why torch_sage does not compute this attention; empty means it does.

    Args:
        query: as for ``F.scaled_dot_product_attention``, like the next seven.
        key: see ``query``.
        value: see ``query``.
        attn_mask: see ``query``; a ``torch.nn.attention.bias.CausalBias`` counts as its alignment.
        dropout_p: see ``query``.
        is_causal: see ``query``.
        scale: see ``query``.
        enable_gqa: see ``query``; a graph pass, which sees head counts only, gives True.
        config: what would be computed.
        causal: "none", "top_left" or "bottom_right", in place of ``is_causal``.
    """
    config = as_config(config)
    problems = _causal_problems(query, key, attn_mask, is_causal, causal)
    reasons = [Reason(ReasonCode.INVALID_INPUT, problem) for problem in problems]
    attn_mask, causal = causal_of(attn_mask, is_causal, causal)
    reasons += _gradient_reasons(query=query, key=key, value=value, attn_mask=attn_mask)
    if dropout_p != 0.0:
        reasons.append(Reason(ReasonCode.DROPOUT, f"dropout_p must be 0.0, got {dropout_p}"))
    opaque = list(_layout_reasons(query, key, value, attn_mask) or _rank_reasons(query, key, value))
    # Sizes mean something else in what is opaque.
    head_dim = 1 if opaque else checks.largest_head_dim(query, value)
    reasons += device_reasons(query, config, rows_of(query.device), head_dim)
    if opaque:
        return (*reasons, *opaque)
    for problem in _problems(query, key, value, attn_mask, dropout_p, causal, scale, enable_gqa):
        reasons.append(Reason(ReasonCode.INVALID_INPUT, problem))
    reasons += rotation_reasons(query, config)
    q, k, v = as_matrices(query, key, value)
    reasons += _limit_reasons(q, k, v, attn_mask)
    if (
        not reasons
        and config.dispatch == "measured"
        and _exact_is_faster(q, k, v, attn_mask, causal, config)
    ):
        message = (
            f"query {list(query.shape)} and key {list(key.shape)} must have sizes at which "
            f"{query.device.type} was measured to be faster than exact SDPA; dispatch='always' "
            "ignores this"
        )
        reasons.append(Reason(ReasonCode.BELOW_CROSSOVER, message))
    return tuple(reasons)


def validate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal: str | None = None,
) -> None:
    """Refuse arguments that contradict each other.

    Raises:
        TypeError: if an argument is not a tensor where one must be.
        ValueError: if the arguments contradict each other; the message has every problem.
    """
    for name, tensor in (
        ("query", query),
        ("key", key),
        ("value", value),
        ("attn_mask", attn_mask),
    ):
        if not isinstance(tensor, Tensor) and not (name == "attn_mask" and tensor is None):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    problems = _causal_problems(query, key, attn_mask, is_causal, causal)
    attn_mask, causal = causal_of(attn_mask, is_causal, causal)
    if not _layout_reasons(query, key, value, attn_mask) and not _rank_reasons(query, key, value):
        problems += _problems(query, key, value, attn_mask, dropout_p, causal, scale, enable_gqa)
    if problems:
        raise ValueError("; ".join(problems))


def causal_of(
    attn_mask: Tensor | None, is_causal: bool, causal: str | None = None
) -> tuple[Tensor | None, str]:
    """Return the mask that remains and the causal alignment that the arguments ask for."""
    if causal is None:
        causal = "top_left" if is_causal else "none"
    bias = _causal_bias(attn_mask)
    if bias is None:
        return attn_mask, causal
    return None, "top_left" if bias.variant.name == "UPPER_LEFT" else "bottom_right"


def _causal_bias(attn_mask: Tensor | None) -> CausalBias | None:
    """Return ``attn_mask`` if it is one of torch's causal biases, whose module imports dynamo."""
    if attn_mask is None or type(attn_mask) is Tensor:
        return None
    from torch.nn.attention.bias import CausalBias

    return attn_mask if isinstance(attn_mask, CausalBias) else None


def _causal_problems(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool, causal: str | None
) -> list[str]:
    """Return how ``is_causal``, ``causal`` and a causal bias exclude each other."""
    problems = causal_problems(attn_mask, is_causal, causal)
    if _causal_bias(attn_mask) is not None:
        problems += bias_problems(attn_mask, query.shape[-2], key.shape[-2])
    return problems


def causal_problems(attn_mask: Tensor | None, is_causal: bool, causal: str | None) -> list[str]:
    """Return which of ``is_causal``, ``causal`` and a causal bias are asked for together."""
    problems = []
    if is_causal and causal is not None:
        problems.append(f"is_causal must be False when causal is given, got causal={causal!r}")
    if _causal_bias(attn_mask) is not None and (is_causal or causal not in (None, "none")):
        problems.append("attn_mask must not be a CausalBias when causal is asked for, got one")
    return problems


def bias_problems(attn_mask: Tensor | None, seqlen_q: Size, seqlen_k: Size) -> list[str]:
    """Return why ``attn_mask``, if it is a causal bias, is one of other sizes."""
    bias = _causal_bias(attn_mask)
    if bias is None:
        return []
    got, expected = (bias.seq_len_q, bias.seq_len_kv), (seqlen_q, seqlen_k)
    if known(got[0] != expected[0]) or known(got[1] != expected[1]):
        return [f"attn_mask must be a CausalBias of {expected}, got one of {got}"]
    return []


def as_matrices(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views [B, H, N, D] with one batch size, and one head count of key and value.

    torch broadcasts batch and head dimensions of size 1; here they become dimensions of stride 0,
    but for key heads of size 1 that the kernels share among the query heads anyway.
    """
    if query.dim() == 3:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    batch = _common(query.shape[0], key.shape[0], value.shape[0])
    heads_kv = _common(key.shape[1], value.shape[1])
    heads_q = query.shape[1]
    if known(heads_q == 1) and known(heads_kv != 1):
        heads_q = heads_kv
    return (
        _expand(query, batch, heads_q),
        _expand(key, batch, heads_kv),
        _expand(value, batch, heads_kv),
    )


def _common(*sizes: Size) -> Size:
    """Return the first size that is not known to be 1."""
    return next((size for size in sizes if not known(size == 1)), 1)


def _expand(tensor: Tensor, batch: Size, heads: Size) -> Tensor:
    b, h, n, d = tensor.shape
    if known(b == 1) and not known(batch == 1):
        b = batch
    if known(h == 1) and not known(heads == 1):
        h = heads
    if b is tensor.shape[0] and h is tensor.shape[1]:
        return tensor
    return tensor.expand(b, h, n, d)


def _problems(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    causal: str,
    scale: float | None,
    enable_gqa: bool,
) -> list[str]:
    """Return every contradiction between arguments whose sizes can be read."""
    problems = []
    if not 0.0 <= dropout_p <= 1.0:
        problems.append(f"dropout_p must be between 0 and 1, got {dropout_p}")
    problems.extend(checks.scale_problems(scale))
    if attn_mask is not None and attn_mask.dim() > query.dim():
        problems.append(
            f"attn_mask must have at most query's {query.dim()} dimensions, got {attn_mask.dim()}"
        )
    q, k, v = as_matrices(query, key, value)
    problems.extend(checks.contradictions(q, k, v, attn_mask, causal))
    for name, heads in (("key", k.shape[1]), ("value", v.shape[1])):
        if not enable_gqa and known(heads != q.shape[1]) and not known(heads == 1):
            problems.append(
                f"{name} must have query's {q.shape[1]} heads, or 1, without enable_gqa, "
                f"got {heads}"
            )
    return list(dict.fromkeys(problems))


def _layout_reasons(*tensors: Tensor | None) -> list[Reason]:
    """Return which tensors are not plain strided ones."""
    reasons = []
    for name, tensor in zip(("query", "key", "value", "attn_mask"), tensors, strict=True):
        if tensor is None or is_plain(tensor):
            continue
        kind = type(tensor).__name__ if tensor.layout == torch.strided else str(tensor.layout)
        kind = "nested" if tensor.is_nested else kind
        reasons.append(
            Reason(ReasonCode.LAYOUT, f"{name} must be a plain strided Tensor, got {kind}")
        )
    return reasons


def is_plain(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is dense and strided, and of torch's own classes."""
    kind = type(tensor)
    return (
        # torch's own tracing tensors are subclasses, too: FakeTensor and FunctionalTensor.
        (
            kind is Tensor
            or kind is torch.nn.Parameter
            or kind.__module__.startswith("torch._subclasses.")
        )
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
    )


def _rank_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[Reason]:
    """Return why the tensors have no [.., heads, seqlen, head_dim] in common."""
    if query.dim() in (3, 4) and query.dim() == key.dim() == value.dim():
        return []
    got = f"{query.dim()}-D, {key.dim()}-D and {value.dim()}-D"
    message = f"query, key and value must all be 4-D or all be 3-D, got {got}"
    return [Reason(ReasonCode.RANK, message)]


def device_reasons(
    query: Tensor, config: SageConfig, rows: Sequence[str], head_dim: int
) -> list[Reason]:
    """Return why the device of ``query`` runs ``config`` in none of the table's ``rows``.

    ``head_dim`` is the larger one of Q and K and of V.
    """
    reasons = []
    device = query.device.type
    if device not in SUPPORT:
        message = f"query must be on one of {sorted(SUPPORT)}, got {device}"
        return [Reason(ReasonCode.DEVICE_UNSUPPORTED, message)]
    if device == "cpu" and MISSING_LIBRARY is not None:
        message = f"the native library must be loaded, got: {MISSING_LIBRARY}"
        reasons.append(Reason(ReasonCode.EXTENSION_NOT_BUILT, message))
    row = choose_row(config, rows, query.dtype, head_dim)
    lack = gpu.lack(query.device.index, row) if device == "cuda" else None
    if lack is not None:
        reasons.append(Reason(ReasonCode.DEVICE_UNSUPPORTED, lack))
    wanted = {row: resolve_in(row, config, query.dtype).op_kwargs() for row in rows}
    for problem in checks.recipe_problems(wanted, head_dim):
        reasons.append(Reason(ReasonCode.RECIPE_UNSUPPORTED, problem))
    return reasons


def rotation_reasons(query: Tensor, config: SageConfig) -> list[Reason]:
    """Return why ``query`` and its keys cannot be rotated as ``config`` says."""
    problems = hadamard.problems(config.rotation, query.shape[-1])
    return [Reason(ReasonCode.RECIPE_UNSUPPORTED, problem) for problem in problems]


def _gradient_reasons(**tensors: Tensor | None) -> list[Reason]:
    """Return which tensors want a gradient, which quantized attention does not have."""
    return [
        Reason(
            ReasonCode.MASK_REQUIRES_GRAD if name == "attn_mask" else ReasonCode.REQUIRES_GRAD,
            f"{name} must not require grad while grad mode is on",
        )
        for name, tensor in tensors.items()
        if tensor is not None and wants_gradient(tensor)
    ]


def _limit_reasons(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> list[Reason]:
    """Return which dtypes and sizes of matrices the kernels do not take."""
    reasons = list(checks.limits(query, key, value, attn_mask))
    device, dtypes = query.device.type, (query.dtype, key.dtype, value.dtype)
    if (
        device in SUPPORT  # torch raises for "meta"
        and torch.is_autocast_enabled(device)
        and all(dtype in checks.FLOAT_DTYPES for dtype in dtypes)
    ):
        # The op's autocast rule will give them one dtype.
        reasons = [reason for reason in reasons if reason.code != ReasonCode.DTYPE_MISMATCH]
    sizes = (*query.shape[:3], key.shape[2])
    if any(known(size == 0) for size in sizes):
        reasons.append(
            Reason(ReasonCode.EMPTY, f"batch, heads and seqlens must not be 0, got {list(sizes)}")
        )
    return reasons


def _exact_is_faster(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    causal: str,
    config: SageConfig,
) -> bool:
    """Return whether exact SDPA was measured to be faster at these sizes, or at their hints."""
    batch, heads_q, seqlen_q, head_dim = (hint(size) for size in query.shape)
    row = choose_row(
        config, rows_of(query.device), query.dtype, checks.largest_head_dim(query, value)
    )
    form: Form = "full" if causal == "none" else "causal"
    if attn_mask is not None:
        form = "ragged" if _is_ragged(attn_mask) else "masked"
    return prefers_exact(
        _CPU_KERNEL if row == "cpu" else row,
        form,
        batch=batch,
        heads_q=heads_q,
        seqlen_q=seqlen_q,
        seqlen_k=hint(key.shape[2]),
        head_dim=head_dim,
        head_dim_v=hint(value.shape[3]),
    )


def _is_ragged(mask: Tensor) -> bool:
    """Return whether kernels cannot read the rows of a mask 16 bytes at a time.

    By hints of sizes, for speed alone. The library asks strides and the address of the mask that it
    gets (``is_dense`` in ``csrc/cuda/ops.cpp``), since a wrong answer there reads other bytes.
    """
    strides = [hint(s) for size, s in zip(mask.shape, mask.stride(), strict=True) if size != 1]
    return (
        strides[-1:] != [1]
        or mask.shape[-1] == 1
        or any(stride * mask.itemsize % 16 for stride in strides[:-1])
    )


# What an unbacked size, which has no hint, counts as: lengths known only at run time are long.
UNKNOWN_SIZE = 4096


def hint(size: Size) -> int:
    """Return a size to judge speed by; reading it adds no guard, but for dynamo outside export.

    There the guard is wanted: a length on the other side of the crossover compiles a graph of its
    own. An exported graph serves every length, by the choice that suits its example.
    """
    if torch.compiler.is_dynamo_compiling():
        from torch.fx.experimental import symbolic_shapes

        # optimization_hint is there from torch 2.13 on; before, strict export may have to guard.
        if torch.compiler.is_exporting() and hasattr(symbolic_shapes, "optimization_hint"):
            return symbolic_shapes.optimization_hint(size, fallback=UNKNOWN_SIZE)
        return int(size)
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else UNKNOWN_SIZE
