"""Recognizing Q or K that was normed and rotated: what it was before, and by what."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch._ops import OpOverload
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from torch_sage.inductor.graph_utils import Value, aten, is_tensor, same, tensor
from torch_sage.inductor.producers.index import (
    Index,
    Opaque,
    gathered,
    of_lanes,
    of_variable,
    offsets_of,
    same_form,
)
from torch_sage.inductor.producers.tables import (
    LANE,
    Half,
    laid_out,
    laid_out_rstd,
    laid_out_weight,
)
from torch_sage.inductor.producers.terms import Expansion, Read, Term, nodes_of
from torch_sage.inductor.producers.views import is_view, moves, source_of, through
from torch_sage.ops.checks import Size, known

# Computed by kernels that Inductor does not merge with what follows: their result is in memory.
_KERNELS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten._scaled_mm.default,
    aten.linear.default,
    aten.matmul.default,
}
_ARITHMETIC = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.addcmul.default,
    aten.div.Tensor,
    aten.neg.default,
}
_SQUARES = {aten.pow.Tensor_Scalar, aten.mul.Tensor, aten.square.default}


@dataclass(frozen=True, eq=False)
class Rotation:
    """Q or K as ``rotary.rotate`` makes it."""

    x: Value
    """[B, H, N, D], as it was projected."""

    pairing: str
    cos: tuple[Half, Half]
    sin: tuple[Half, Half]
    rstd: Value | None
    weight: Value | None
    eps: float | None

    replaced: tuple[Node, ...]
    """What is not needed any more, unless something else uses it."""

    kept: tuple[Node, ...]
    """What is needed still: from this ``rstd`` is computed."""


class _Entry(NamedTuple):
    """A factor of one lane."""

    sign: int
    read: Read
    position: int

    @property
    def key(self) -> tuple[object, ...]:
        return (self.sign, self.read.value, offsets_of(self.read.at, self.position))


def recognized(operand: Value) -> Rotation | None:
    """Return how ``operand``, [B, H, N, D], was made by a rotation, None if it was not seen to."""
    if not isinstance(tensor(operand).shape[3], int):
        return None
    for source in _sources(operand):
        try:
            return _rotation(operand, source)
        except Opaque:
            continue
    return None


def _sources(operand: Value) -> list[Node]:
    """Return what ``operand`` may be a rotation of: results in memory that it is computed from."""
    elements, todo = tensor(operand).numel(), [operand]
    seen: dict[Value, None] = {}
    while todo:
        value = todo.pop()
        if value in seen or not is_tensor(value):
            continue
        seen[value] = None
        if _is_in_memory(value):
            continue
        if is_view(value):
            todo.append(source_of(value))
        elif moves(value) or value.target in _ARITHMETIC:
            todo += tree_leaves((value.args, value.kwargs))
    # A table has fewer elements than Q or K of several heads; with one head, it is tried in vain.
    found = [
        value
        for value in seen
        if isinstance(value, Node)
        and _is_in_memory(value)
        and not known(tensor(value).numel() < elements)
    ]
    return sorted(found, key=lambda node: node.op == "placeholder")


def _is_in_memory(value: Value) -> bool:
    if isinstance(value, Node) and value.op != "call_function":
        return True
    target = value.target
    is_torchs = getattr(target, "namespace", None) in ("aten", "prims") or not isinstance(
        target, OpOverload
    )
    return target in _KERNELS or not is_torchs


def _rotation(operand: Value, source: Node) -> Rotation:
    extents = dict(zip("bhn", tensor(operand).shape, strict=False))
    head_dim = tensor(operand).shape[3]
    lanes = tuple(range(head_dim))
    expansion = Expansion(source, operand, extents)
    terms = expansion.terms(operand, _whole(extents, "bhn", head_dim), lanes)
    parts = [_parts(term, expansion) for term in terms]
    x, channels = _base(expansion, parts[0].source, head_dim)
    own: dict[int, _Entry] = {}
    other: dict[int, _Entry] = {}
    weights: dict[int, _Entry] = {}
    partners: dict[int, int] = {}
    for term, part in zip(terms, parts, strict=True):
        sources = channels.of(part.source, len(term.lanes))
        for position, (lane, channel) in enumerate(zip(term.lanes, sources, strict=True)):
            entry = _Entry(term.sign, part.table, position)
            if (own if channel == lane else other).setdefault(lane, entry) is not entry:
                raise Opaque
            if channel != lane:
                partners[lane] = channel
            if part.weight is not None:
                weight = _Entry(1, part.weight, position)
                if weights.setdefault(channel, weight).key != weight.key:
                    raise Opaque
    if not own.keys() == other.keys() == {*lanes} or len({p.factor_key for p in parts}) > 1:
        raise Opaque
    pairing = _pairing(partners, head_dim)
    firsts = [lane for lane in lanes if lane < partners[lane]]
    seconds = [partners[lane] for lane in firsts]
    against = {lane: entry._replace(sign=-entry.sign) for lane, entry in other.items()}
    factor = parts[0].factor
    eps = None if factor is None else _eps(expansion, factor, channels, head_dim)
    needs_factor = factor is not None and eps is None
    return Rotation(
        x=x,
        pairing=pairing,
        cos=(_half(own, firsts), _half(own, seconds)),
        sin=(_half(against, firsts), _half(other, seconds)),
        rstd=laid_out_rstd(factor) if factor is not None and needs_factor else None,
        weight=_weight(weights, parts, head_dim),
        eps=eps,
        replaced=tuple(value for value in expansion.through if isinstance(value, Node)),
        kept=tuple(nodes_of(factor.value)) if factor is not None and needs_factor else (),
    )


class _Parts(NamedTuple):
    """What one term is a product of."""

    source: Read
    table: Read
    weight: Read | None
    factor: Read | None

    @property
    def factor_key(self) -> tuple[object, ...] | None:
        return None if self.factor is None else _Entry(1, self.factor, 0).key


def _parts(term: Term, expansion: Expansion) -> _Parts:
    found: dict[str, Read] = {}
    for read in term.reads:
        if read.value is expansion.source:
            kind = "source"
        elif expansion.depends(read.value):
            kind = "factor"
        elif any(digit.variable == "n" for dim in read.at for digit in dim):
            kind = "table"
        else:
            kind = "weight"
        if found.setdefault(kind, read) is not read:
            raise Opaque
    if "source" not in found or "table" not in found:
        raise Opaque
    return _Parts(found["source"], found["table"], found.get("weight"), found.get("factor"))


def _whole(extents: Mapping[str, Size], order: str, head_dim: int) -> Index:
    """Return the index of a tensor with these dimensions, and all channels behind them."""
    outer = (of_variable(name, extents[name], head_dim) for name in order)
    return (*outer, of_lanes(range(head_dim), head_dim))


class _Channels(NamedTuple):
    """Which channel of Q or K, before the rotation, an element of the source is."""

    form: Index
    numbers: dict[tuple[int, ...], int]

    def of(self, read: Read, lanes: int) -> list[int]:
        """Return the channel that each lane reads."""
        found = [self.numbers.get(offsets_of(read.at, lane)) for lane in range(lanes)]
        if None in found or not same_form(read.at, self.form):
            raise Opaque
        return [channel for channel in found if channel is not None]


def _base(expansion: Expansion, read: Read, head_dim: int) -> tuple[Value, _Channels]:
    """Return the source as [B, H, N, D], a view of one that the graph has, and its channels."""
    extents = expansion.extents
    for base in (*expansion.bases, expansion.source):
        for order in itertools.permutations("bhn"):
            form = _arranged(base, "".join(order), extents, head_dim)
            if form is None:
                continue
            index = _index_in(expansion.source, base, form, head_dim)
            if index is None or not same_form(index, read.at):
                continue
            numbers = {offsets_of(index, lane): lane for lane in range(head_dim)}
            channels = _Channels(index, numbers)
            try:
                channels.of(read, 1)
            except Opaque:
                continue
            return laid_out(Read(base, form), (*"bhn", LANE)), channels
    raise Opaque


def _arranged(base: Value, order: str, extents: Mapping[str, Size], head_dim: int) -> Index | None:
    """Return the index of ``base`` if it has those dimensions, the last two perhaps as one."""
    index, shape = _whole(extents, order, head_dim), tensor(base).shape
    sizes = (*(extents[name] for name in order), head_dim)
    if len(shape) == 3 and order[2] == "h":
        index, sizes = (*index[:2], (*index[2], *index[3])), (*sizes[:2], sizes[2] * head_dim)
    if len(shape) != len(sizes) or not all(map(same, shape, sizes)):
        return None
    return index


def _index_in(source: Node, base: Value, index: Index, head_dim: int) -> Index | None:
    """Return the index in ``source`` of what ``base``, a view of it, has at ``index``."""
    lanes = tuple(range(head_dim))
    while base is not source:
        (part,) = through(base, index, lanes) or (None,)
        if part is None:
            return None
        base, index, _ = part
    return index


def _pairing(partners: Mapping[int, int], head_dim: int) -> str:
    half = head_dim // 2
    if all(partner == (lane + half) % head_dim for lane, partner in partners.items()):
        return "halves"
    if all(partner == lane ^ 1 for lane, partner in partners.items()):
        return "neighbours"
    raise Opaque


def _half(entries: Mapping[int, _Entry], lanes: Sequence[int]) -> Half:
    """Return the entries of some lanes as one read."""
    chosen = [entries[lane] for lane in lanes]
    signs, values = {e.sign for e in chosen}, {e.read.value for e in chosen}
    if len(signs) > 1 or len(values) > 1:
        raise Opaque
    index = gathered([(entry.read.at, entry.position) for entry in chosen])
    return Half(signs.pop(), Read(values.pop(), index))


def _weight(weights: Mapping[int, _Entry], parts: Sequence[_Parts], head_dim: int) -> Value | None:
    """Return what multiplies the channels, [H or 1, D]."""
    if not weights:
        return None
    if any(part.weight is None for part in parts):
        raise Opaque
    return laid_out_weight(_half(weights, range(head_dim)).read)


def _eps(expansion: Expansion, factor: Read, channels: _Channels, head_dim: int) -> float | None:
    """Return eps if ``factor`` is rsqrt(mean of the squares of all channels + eps), else None."""
    shifted = _call(factor.value, aten.rsqrt.default)
    mean = _call(shifted, aten.add.Tensor, aten.add.Scalar)
    square = _call(mean, aten.mean.dim)
    if square is None or shifted is None or mean is None:
        return None
    eps, (dim, *others) = shifted.args[1], mean.args[1]
    x = _call(square, *_SQUARES)
    is_square = square.args[1:] == ((2,) if square.target is aten.pow.Tensor_Scalar else ())
    is_square |= square.target is aten.mul.Tensor and square.args == (x, x)
    if x is None or others or not is_square or not isinstance(eps, (int, float)):
        return None
    rank = tensor(x).dim()
    keeps_dim = tensor(mean).dim() == rank
    dim %= rank
    outer = tuple(
        tuple(replace(digit, offsets=digit.offsets[:1] * head_dim) for digit in part)
        for part in factor.at
    )
    every = of_lanes(range(head_dim), head_dim)
    if not same(tensor(x).shape[dim], head_dim):
        return None
    index = (*outer[:dim], every, *outer[dim + keeps_dim :])
    try:
        terms = expansion.terms(x, index, tuple(range(head_dim)))
        for term in terms:
            if term.sign != 1 or [read.value for read in term.reads] != [expansion.source]:
                return None
            if channels.of(term.reads[0], len(term.lanes)) != [*term.lanes]:
                return None
    except Opaque:
        return None
    return float(eps) if sum(len(term.lanes) for term in terms) == head_dim else None


def _call(value: Value | None, *targets: object) -> Any:
    """Return the first argument of ``value`` if it calls one of ``targets``."""
    return value.args[0] if value is not None and value.target in targets else None
