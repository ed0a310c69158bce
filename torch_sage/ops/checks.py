"""Argument rules of the attention ops, written once for fakes, ``why_not`` and ``validate``.

``contradictions`` finds inputs that no attention could compute; ``limits`` finds inputs that torch
computes and these kernels do not. Both yield every problem, and compare sizes without adding a
guard: a symbolic size is only refused when it is known to be wrong, and the op itself checks real
sizes again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_sage.ops.reasons import Reason, ReasonCode
from torch_sage.recipes import ALL_PREPARED, SUPPORT

Size = Any  # int | torch.SymInt: torch types the shape of a Tensor as int only

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # dtypes of the codes of V by format
MAX_HEAD_DIM = 256  # largest head_dim whose tiles fit the kernels' registers and shared memory
FLOAT32_MAX = float(torch.finfo(torch.float32).max)
PADDED_HEAD_DIMS = (64, 128, 256)  # channels of a row of prepared keys and values
TILE = 64  # tokens of one image of prepared codes
KEY_BLOCK = 128  # tokens that share four scales of prepared keys
VALUE_GROUP = 1024  # tokens that share a scale and a shift per channel of prepared values
CAUSAL = ("none", "top_left", "bottom_right")
OUTPUT_ORDERS = ("bhsd", "bshd")
PAIRINGS = ("halves", "neighbours")
ROTARY_DTYPES = (torch.bfloat16, torch.float16)
ROTARY_HEAD_DIMS = (64, 128)


def known(condition: bool | torch.SymBool) -> bool:
    """Return whether ``condition`` is certain, without guarding on symbolic sizes."""
    # Dynamo takes a symbolic condition for a bool, too.
    if isinstance(condition, bool) and not torch.compiler.is_dynamo_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def describe(tensor: Tensor) -> str:
    """Return dtype, shape and device of ``tensor`` for an error message."""
    return f"{str(tensor.dtype)[6:]}{list(tensor.shape)} on {tensor.device}"


def names(values: Sequence[object]) -> str:
    """Return ``values`` as the alternatives of an error message."""
    return " or ".join(str(v).removeprefix("torch.") for v in values)


def contradictions(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, causal: str
) -> Iterator[str]:
    """Yield what makes 4-D ``query, key, value`` impossible to attend with."""
    for name, tensor, other, reference, axis, what in (
        ("key", key, "query", query, 0, "batch size"),
        ("value", value, "query", query, 0, "batch size"),
        ("value", value, "key", key, 2, "number of tokens"),
        ("key", key, "query", query, 3, "head_dim"),
    ):
        got, expected = tensor.shape[axis], reference.shape[axis]
        if known(got != expected):
            yield f"{name} must have the {what} of {other}, {expected}, got {got}"
    yield from head_contradictions(query.shape[1], key.shape[1])
    yield from mask_contradictions(query, key.shape[2], attn_mask, causal)


def head_contradictions(heads_q: Size, heads_kv: Size) -> Iterator[str]:
    """Yield why ``heads_q`` query heads cannot share ``heads_kv`` key heads."""
    if known(heads_q == 0):
        return
    if known(heads_kv == 0):
        yield f"key must have at least one head for {heads_q} query heads, got 0"
    elif known(heads_q % heads_kv != 0):
        yield f"key must have a number of heads that divides query's {heads_q}, got {heads_kv}"


def mask_contradictions(
    query: Tensor, seqlen_k: Size, attn_mask: Tensor | None, causal: str
) -> Iterator[str]:
    """Yield why ``attn_mask`` and ``causal`` do not fit the scores."""
    if causal not in CAUSAL:
        yield f"causal must be one of {list(CAUSAL)}, got {causal!r}"
    if attn_mask is None:
        return
    if causal != "none":
        yield f"attn_mask must be None when causal is {causal!r}, got {describe(attn_mask)}"
    yield from shape_of_mask_problems(attn_mask, (*query.shape[:3], seqlen_k))


def shape_of_mask_problems(attn_mask: Tensor, scores: Sequence[Size]) -> Iterator[str]:
    """Yield why ``attn_mask`` does not broadcast to the shape of the scores."""
    if attn_mask.dim() > 4 or any(
        known(size != 1) and known(size != full)
        for size, full in zip(reversed(attn_mask.shape), reversed(scores), strict=False)
    ):
        yield f"attn_mask must broadcast to {list(scores)}, got {list(attn_mask.shape)}"


def scale_problems(scale: float | None) -> Iterator[str]:
    """Yield why ``scale`` cannot multiply float32 scores."""
    if isinstance(scale, (int, float)) and not abs(scale) <= FLOAT32_MAX:
        yield f"scale must be finite in float32, got {scale}"


def limits(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Iterator[Reason]:
    """Yield what torch's SDPA may accept and the kernels do not, in the dtypes and head sizes."""
    if query.dtype not in FLOAT_DTYPES:
        yield Reason(
            ReasonCode.DTYPE_UNSUPPORTED,
            f"query must have dtype {names(FLOAT_DTYPES)}, got {names([query.dtype])}",
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            yield Reason(
                ReasonCode.DTYPE_MISMATCH,
                f"{name} must have the dtype of query, {names([query.dtype])}, "
                f"got {names([tensor.dtype])}",
            )
    for name, tensor in (("query", query), ("value", value)):
        head_dim = tensor.shape[-1]
        if known(head_dim < 1) or known(head_dim > MAX_HEAD_DIM):
            yield Reason(
                ReasonCode.HEAD_DIM,
                f"{name} must have a head_dim between 1 and {MAX_HEAD_DIM}, got {head_dim}",
            )
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, *FLOAT_DTYPES):
        yield Reason(
            ReasonCode.MASK_DTYPE,
            f"attn_mask must have dtype {names((torch.bool, *FLOAT_DTYPES))}, "
            f"got {names([attn_mask.dtype])}",
        )
    if known(value.shape[1] != key.shape[1]):
        yield Reason(
            ReasonCode.HEADS,
            f"value must have the number of heads of key, {key.shape[1]}, got {value.shape[1]}",
        )
    for name, other in (("key", key), ("value", value), ("attn_mask", attn_mask)):
        if other is not None and other.device != query.device:
            yield Reason(
                ReasonCode.DEVICE_MISMATCH,
                f"{name} must be on {query.device} like query, got {other.device}",
            )


def largest_head_dim(*tensors: Tensor) -> int:
    """Return the largest head dimension, which decides what kernels fit, up to ``MAX_HEAD_DIM``.

    One that is not known counts as that; on a GPU, where there is a choice of kernels, a symbolic
    one is guarded to stay among those that the same kernel takes.
    """
    return min(max(_bound(tensor) for tensor in tensors), MAX_HEAD_DIM)


def _bound(tensor: Tensor) -> int:
    size = tensor.shape[-1]
    if isinstance(size, int):
        return size
    if tensor.device.type != "cuda" or not size.node.has_hint():
        return MAX_HEAD_DIM
    return next((bound for bound in PADDED_HEAD_DIMS if size <= bound), MAX_HEAD_DIM)


def recipe_problems(wanted: Mapping[str, Mapping[str, str]], head_dim: int = 1) -> list[str]:
    """Return why no row of the recipe table runs what is wanted of it; nothing if one does.

    Args:
        wanted: for each row that may run, the recipe arguments to judge.
        head_dim: the larger one of Q and K and of V, where it matters.
    """
    found = [_row_problems(row, fields, head_dim) for row, fields in wanted.items()]
    if not all(found):
        return []
    if len(found) == 1:
        return [*found[0].values()]
    # What is wrong in every row is enough to say; else each row has its own objection.
    shared = set(found[0]).intersection(*found)
    relevant = [[p for f, p in problems.items() if not shared or f in shared] for problems in found]
    return [", or ".join(" and ".join(problems) for problems in relevant)]


def _row_problems(row: str, fields: Mapping[str, str], head_dim: int) -> dict[str, str]:
    """Return by name which values a row of the recipe table does not have."""
    problems = {}
    for field, got in fields.items():
        valid = getattr(SUPPORT[row], field)
        if got not in valid:
            problems[field] = f"{field} must be one of {list(valid)} on {row}, got {got!r}"
    limit = SUPPORT[row].max_head_dim
    if head_dim > limit:
        problems["head_dim"] = f"head_dim must be at most {limit} on {row}, got {head_dim}"
    return problems


def group_problems(block: int, warp: int | None = None) -> Iterator[str]:
    """Yield why rows cannot be grouped in ``block`` and ``warp`` (algorithm.md 2.2)."""
    if block <= 0 or block % 8:
        yield f"block must be a positive multiple of 8, got {block}"
    elif warp is not None and (warp <= 0 or warp % 8 or block % warp):
        yield f"warp must be a multiple of 8 that divides block {block}, got {warp}"


def rank_problems(**tensors: Tensor) -> Iterator[str]:
    """Yield which tensors are not [batch, heads, seqlen, head_dim]."""
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            yield f"{name} must be 4-D [batch, heads, seqlen, head_dim], got {list(tensor.shape)}"


def shape_problems(name: str, tensor: Tensor, expected: Sequence[Size]) -> Iterator[str]:
    """Yield how the shape of ``tensor`` differs from ``expected``."""
    if tensor.dim() != len(expected) or any(
        known(got != size) for got, size in zip(tensor.shape, expected, strict=True)
    ):
        yield f"{name} must have shape {list(expected)}, got {list(tensor.shape)}"


def sdpa_problems(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    causal: str,
    scale: float | None,
) -> Iterator[str]:
    """Yield every reason why the whole op cannot run on these arguments."""
    ranks = list(rank_problems(query=query, key=key, value=value))
    if ranks:
        yield from ranks
        return
    yield from (reason.message for reason in limits(query, key, value, attn_mask))
    yield from contradictions(query, key, value, attn_mask, causal)
    yield from scale_problems(scale)


def rotation_problems(
    name: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rstd: Tensor | None,
    weight: Tensor | None,
    eps: float | None,
) -> Iterator[str]:
    """Yield why 4-D ``x`` cannot be normed and rotated (``rotary.rotate``)."""
    b, h, n, d = x.shape
    if x.dtype not in ROTARY_DTYPES:
        yield f"{name} must have dtype {names(ROTARY_DTYPES)}, got {names([x.dtype])}"
    if all(known(d != fits) for fits in ROTARY_HEAD_DIMS):
        yield f"{name} must have a head_dim of {names(ROTARY_HEAD_DIMS)}, got {d}"
    for part, table in (("cos", cos), ("sin", sin)):
        like = ((b, 1), (n,), (d,))
        yield from _table_problems(f"{name}_{part}", table, x, torch.float32, like)
    if rstd is not None:
        yield from _table_problems(f"{name}_rstd", rstd, x, torch.float32, ((b,), (h, 1), (n,)))
        if eps is not None:
            yield f"{name}_eps must be None beside {name}_rstd, got {eps}"
    if weight is not None:
        yield from _table_problems(f"{name}_weight", weight, x, x.dtype, ((h, 1), (d,)))
    if isinstance(eps, (int, float)) and not 0 <= eps <= FLOAT32_MAX:
        yield f"{name}_eps must be finite in float32 and not negative, got {eps}"


def _table_problems(
    name: str,
    table: Tensor,
    like: Tensor,
    dtype: torch.dtype,
    sizes: Sequence[Sequence[Size]],
) -> Iterator[str]:
    """Yield why ``table`` is no ``dtype`` beside ``like``, each size one of ``sizes``."""
    if table.dtype != dtype:
        yield f"{name} must have dtype {names([dtype])}, got {names([table.dtype])}"
    if table.device != like.device:
        yield f"{name} must be on {like.device}, got {table.device}"
    if table.dim() != len(sizes) or any(
        all(known(got != size) for size in allowed)
        for got, allowed in zip(table.shape, sizes, strict=True)
    ):
        expected = ", ".join(names(allowed) for allowed in sizes)
        yield f"{name} must have shape [{expected}], got {list(table.shape)}"


def rotary_problems(key: Tensor, value: Tensor, pairing: str) -> Iterator[str]:
    """Yield what attention that rotates Q and K cannot do besides."""
    if pairing not in PAIRINGS:
        yield f"pairing must be one of {list(PAIRINGS)}, got {pairing!r}"
    head_dim, of_value = key.shape[-1], value.shape[-1]
    if known(of_value > head_dim):
        yield f"value must have a head_dim of at most that of key, {head_dim}, got {of_value}"


def quantizer_problems(
    name: str, x: Tensor, mean: Tensor | None, smooth: bool = False
) -> Iterator[str]:
    """Yield every reason why ``x`` cannot be quantized around ``mean``."""
    ranks = list(rank_problems(**{name: x}))
    if ranks:
        yield from ranks
        return
    if x.dtype not in FLOAT_DTYPES:
        yield f"{name} must have dtype {names(FLOAT_DTYPES)}, got {names([x.dtype])}"
    head_dim = x.shape[3]
    if known(head_dim < 1) or known(head_dim > MAX_HEAD_DIM):
        yield f"{name} must have a head_dim between 1 and {MAX_HEAD_DIM}, got {head_dim}"
    if mean is not None:
        if not smooth:
            yield f"mean must be None when smooth is False, got {describe(mean)}"
        yield from operand_problems("mean", mean, x, torch.float32, (*x.shape[:2], head_dim))


def operand_problems(
    name: str, tensor: Tensor, like: Tensor, dtype: torch.dtype, shape: Sequence[Size]
) -> Iterator[str]:
    """Yield why ``tensor`` is not a ``dtype`` operand of ``shape`` beside ``like``."""
    if tensor.dtype != dtype:
        yield f"{name} must have dtype {names([dtype])}, got {names([tensor.dtype])}"
    if tensor.device != like.device:
        yield f"{name} must be on {like.device}, got {tensor.device}"
    yield from shape_problems(name, tensor, shape)


def quantized_problems(
    query: Tensor,
    keys: tuple[Tensor, Tensor, Tensor],
    values: tuple[Tensor, Tensor, Tensor],
    attn_mask: Tensor | None,
    causal: str,
    scale: float | None,
    pv: str,
) -> Iterator[str]:
    """Yield why ``query`` cannot attend to quantized keys and values (codes, scales, mean)."""
    ranks = list(rank_problems(query=query, key_codes=keys[0], value_codes=values[0]))
    if ranks:
        yield from ranks
        return
    (b, hq, _, d), (_, h, m, _), dv = query.shape, keys[0].shape, values[0].shape[3]
    yield from (reason.message for reason in limits(query, query, query, attn_mask))
    yield from operand_problems("key_codes", keys[0], query, torch.int8, (b, h, m, d))
    yield from operand_problems("key_scales", keys[1], query, torch.float32, keys[1].shape)
    yield from operand_problems("key_mean", keys[2], query, torch.float32, (b, h, d))
    yield from operand_problems("value_codes", values[0], query, HALVES[pv], (b, h, m, dv))
    yield from operand_problems("value_scales", values[1], query, torch.float32, (b, h, dv))
    yield from operand_problems("value_mean", values[2], query, torch.float32, (b, h, dv))
    if known(dv < 1) or known(dv > MAX_HEAD_DIM):
        yield f"value_codes must have a head_dim between 1 and {MAX_HEAD_DIM}, got {dv}"
    yield from head_contradictions(hq, h)
    yield from mask_contradictions(query, m, attn_mask, causal)
    yield from scale_problems(scale)


def padded_head_dim(head_dim: Size, head_dim_v: Size) -> int:
    """Return how many channels a row of prepared keys, and one of values, has."""
    fits = (size for size in PADDED_HEAD_DIMS if head_dim <= size and head_dim_v <= size)
    return next(fits, PADDED_HEAD_DIMS[-1])  # wider ones are refused elsewhere


def prepared_pv(value_codes: Tensor) -> str:
    """Return the format of prepared values: their dtype tells."""
    return "bf16" if value_codes.dtype == torch.bfloat16 else "e4m3_fp16"


def prepared_operands(
    batch: Size, heads: Size, seqlen_k: Size, head_dim: Size, head_dim_v: Size, pv: str
) -> dict[str, tuple[torch.dtype, tuple[Size, ...]]]:
    """Return dtype and shape of each tensor that ``prepare_kv`` returns."""
    padded = padded_head_dim(head_dim, head_dim_v)
    blocks = (seqlen_k + KEY_BLOCK - 1) // KEY_BLOCK
    images = (batch, heads, blocks * (KEY_BLOCK // TILE), TILE * padded)
    groups = (batch, heads, (seqlen_k + VALUE_GROUP - 1) // VALUE_GROUP, padded)
    return {
        "key_codes": (torch.int8, images),
        "key_scales": (torch.float32, (batch, heads, blocks, 4)),
        "key_mean": (torch.float32, (batch, heads, head_dim)),
        "value_codes": (HALVES.get(pv, torch.uint8), images),
        "value_scales": (torch.float32, groups),
        "value_shift": (torch.float32, groups),
    }


def preparation_problems(key: Tensor, value: Tensor, smooth: str, pv: str) -> Iterator[str]:
    """Yield every reason why ``key`` and ``value`` cannot be prepared."""
    ranks = list(rank_problems(key=key, value=value))
    if ranks:
        yield from ranks
        return
    wanted = {"smooth": smooth, "pv": pv}
    yield from recipe_problems(dict.fromkeys(ALL_PREPARED, wanted), largest_head_dim(key, value))
    yield from quantizer_problems("key", key, None)
    yield from quantizer_problems("value", value, None)
    expected = (*key.shape[:3], value.shape[3])
    yield from operand_problems("value", value, key, key.dtype, expected)


def prepared_problems(
    query: Tensor,
    prepared: Mapping[str, Tensor],
    seqlen_k: Size,
    head_dim_v: Size,
    attn_mask: Tensor | None,
    causal: str,
    scale: float | None,
    exponential: str,
) -> Iterator[str]:
    """Yield why ``query`` cannot attend to what ``prepare_kv`` returned for ``seqlen_k`` tokens."""
    pv = prepared_pv(prepared["value_codes"])
    rows = [row for row in ALL_PREPARED if pv in SUPPORT[row].pv]
    sizes = recipe_problems({row: {"exponential": exponential} for row in rows})
    if known(seqlen_k < 0):
        sizes.append(f"seqlen_k must not be negative, got {seqlen_k}")
    if known(head_dim_v < 1) or known(head_dim_v > MAX_HEAD_DIM):
        sizes.append(f"head_dim_v must be between 1 and {MAX_HEAD_DIM}, got {head_dim_v}")
    sizes += rank_problems(query=query)
    if prepared["key_codes"].dim() != 4:
        got = list(prepared["key_codes"].shape)
        sizes.append(f"key_codes must be 4-D [batch, heads, tiles, codes], got {got}")
    if sizes:
        yield from sizes
        return
    yield from (reason.message for reason in limits(query, query, query, attn_mask))
    widest = max(largest_head_dim(query), head_dim_v)
    yield from recipe_problems({row: {} for row in rows}, widest)
    (b, hq, _, d), h = query.shape, prepared["key_codes"].shape[1]
    if not (known(d < 1) or known(d > MAX_HEAD_DIM)):
        for name, (dtype, shape) in prepared_operands(b, h, seqlen_k, d, head_dim_v, pv).items():
            yield from operand_problems(name, prepared[name], query, dtype, shape)
    yield from head_contradictions(hq, h)
    yield from mask_contradictions(query, seqlen_k, attn_mask, causal)
    yield from scale_problems(scale)
