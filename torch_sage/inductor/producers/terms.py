"""An operand of attention as sums of products: of what it is made, for each of its channels.

Seen through are what moves elements, conversions, and multiplication, addition and negation of what
depends on a source. All else is only read: the source, what does not depend on it (tables of
cosines, weights of norms), and factors that are the same for all channels, such as the reciprocal
root mean square, however they depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from torch_sage.inductor.graph_utils import (
    Planned,
    Value,
    aten,
    bound_arguments,
    is_tensor,
    plan,
    same,
    tensor,
)
from torch_sage.inductor.producers.index import Dim, Index, Opaque, is_uniform, of_lanes, picked
from torch_sage.inductor.producers.views import (
    Part,
    broadcast,
    is_of_one,
    is_view,
    source_of,
    through,
)
from torch_sage.ops.checks import Size

# More reads than any rotation has; a graph that needs more is something else.
MOST_STEPS = 400

_SUMS: dict[Any, int] = {aten.add.Tensor: 1, aten.sub.Tensor: -1}


class Read(NamedTuple):
    """An element of a tensor for each lane."""

    value: Value
    at: Index


@dataclass(frozen=True, eq=False)
class Term:
    """``sign`` times the product of ``reads``, added to some of the lanes."""

    sign: int
    lanes: tuple[int, ...]
    reads: tuple[Read, ...]

    def only(self, lanes: Sequence[int]) -> Term:
        """Return the part for ``lanes``, in their order."""
        places = {lane: position for position, lane in enumerate(self.lanes)}
        positions = [places[lane] for lane in lanes]
        reads = tuple(Read(value, picked(index, positions)) for value, index in self.reads)
        return Term(self.sign, tuple(lanes), reads)


class Expansion:
    """Values as terms that read ``source`` and what goes with it."""

    def __init__(self, source: Node, root: Value, extents: Mapping[str, Size]) -> None:
        """Look at what lies between ``source`` and ``root``; ``extents`` of the variables."""
        self.source = source
        self.half = tensor(root).dtype
        self.extents = extents
        self.through: dict[Value, None] = {}
        """What was seen through, without views of the source."""
        self.bases: dict[Value, None] = {}
        """Views of the source that were met, those nearest to the root first."""
        self._dependent = _descendants(source, root)
        self._reciprocals: dict[Value, Planned] = {}
        self._steps = 0

    def depends(self, value: object) -> bool:
        """Return whether ``value`` is computed from the source."""
        if isinstance(value, Planned):
            return any(map(self.depends, nodes_of(value)))
        return value in self._dependent

    def terms(self, value: Value, index: Index, lanes: tuple[int, ...]) -> list[Term]:
        """Return what ``value`` is for ``lanes`` at ``index``.

        Raises:
            Opaque: if it is no sum of such products.
        """
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise Opaque
        if value is self.source:
            return [Term(1, lanes, (Read(value, index),))]
        if not self.depends(value):
            return self._coefficient(value, index, lanes)
        if self._is_base(value):
            self.bases[value] = None
        else:
            self.through[value] = None
        parts = through(value, index, lanes)
        if parts is not None:
            return [term for part in parts for term in self.terms(*part)]
        if is_uniform(index):
            return [self._factor(value, index, lanes)]
        if value.target is aten.neg.default:
            return _negated(self.terms(_argument(value, 0), index, lanes))
        if value.target in _SUMS:
            return self._sum(value, index, lanes)
        if value.target is aten.mul.Tensor and value.args[1] in (1, -1):  # a number
            terms = self._operand(value, 0, index, lanes)
            return terms if value.args[1] == 1 else _negated(terms)
        if value.target is aten.mul.Tensor:
            return self._product(value, (0, 1), index, lanes)
        if value.target is aten.addcmul.default and bound_arguments(value)["value"] == 1:  # type: ignore[arg-type]
            product = self._product(value, (1, 2), index, lanes)
            return self._operand(value, 0, index, lanes) + product
        if value.target is aten.div.Tensor:
            factor = self._reciprocal(_argument(value, 1), index, lanes)
            return _products(self._operand(value, 0, index, lanes), [factor])
        raise Opaque

    def _is_base(self, value: Value) -> bool:
        while value is not self.source and is_view(value):
            value = source_of(value)
        return value is self.source

    def _operand(
        self, value: Value, place: int, index: Index, lanes: tuple[int, ...]
    ) -> list[Term]:
        operand = _argument(value, place)
        sizes = tensor(operand).shape
        if not tensor(value).dtype.is_complex:
            return self.terms(operand, broadcast(index, sizes), lanes)
        if not tensor(operand).dtype.is_complex:
            raise Opaque
        return self.terms(operand, (*broadcast(index[:-1], sizes), index[-1]), lanes)

    def _sum(self, value: Value, index: Index, lanes: tuple[int, ...]) -> list[Term]:
        if bound_arguments(value).get("alpha", 1) != 1:  # type: ignore[arg-type]
            raise Opaque
        first, second = (self._operand(value, place, index, lanes) for place in (0, 1))
        return first + (second if _SUMS[value.target] == 1 else _negated(second))

    def _product(
        self, value: Value, places: tuple[int, int], index: Index, lanes: tuple[int, ...]
    ) -> list[Term]:
        if not tensor(value).dtype.is_complex:
            factors = (self._operand(value, place, index, lanes) for place in places)
            return _products(*factors)
        # The real part of a product is re re - im im, the imaginary one re im + im re.
        result: list[Term] = []
        for is_imaginary, positions in _by_part(index, len(lanes)).items():
            own = tuple(lanes[p] for p in positions)
            outer = picked(index[:-1], positions)
            parts = [(*outer, of_lanes([part] * len(own), 2)) for part in (0, 1)]
            a, b = ([self._operand(value, place, p, own) for p in parts] for place in places)
            if is_imaginary:
                result += _products(a[0], b[1]) + _products(a[1], b[0])
            else:
                result += _products(a[0], b[0]) + _negated(_products(a[1], b[1]))
        return result

    def _reciprocal(self, divisor: Value, index: Index, lanes: tuple[int, ...]) -> Term:
        own = broadcast(index, tensor(divisor).shape)
        while (parts := through(divisor, own, lanes)) is not None:
            if len(parts) > 1:
                raise Opaque
            divisor, own, _ = parts[0]
        if not self.depends(divisor) or not is_uniform(own):
            raise Opaque
        if divisor not in self._reciprocals:
            self._reciprocals[divisor] = plan(aten.reciprocal.default, divisor)
        return Term(1, lanes, (Read(self._reciprocals[divisor], own),))

    def _factor(self, value: Value, index: Index, lanes: tuple[int, ...]) -> Term:
        """Return a read of what depends on the source in any way, but not on the lane."""
        self.through.pop(value, None)
        return Term(1, lanes, (Read(value, index),))

    def _coefficient(self, value: Value, index: Index, lanes: tuple[int, ...]) -> list[Term]:
        """Return reads of the innermost tensor that is read along whole dimensions.

        What is put together of several stays so: it may be the table that the op takes.
        """
        if value.target is aten.neg.default:
            return _negated(self._coefficient(_argument(value, 0), index, lanes))
        if is_of_one(value):
            try:
                (part,) = through(value, index, lanes) or (None,)
            except Opaque:
                part = None
            if part is not None and self._is_plain(part):
                return self._coefficient(*part)
        return [Term(1, lanes, (Read(value, index),))]

    def _is_plain(self, part: Part) -> bool:
        kind = tensor(part.value).dtype
        if kind not in (torch.float32, self.half) and not kind.is_complex:
            return False
        return all(self._is_plain_dim(dim) for dim in part.at)

    def _is_plain_dim(self, dim: Dim) -> bool:
        variables = "".join(digit.variable for digit in dim)
        is_whole = all(
            not any(digit.offsets) and same(digit.extent, self.extents[digit.variable])
            for digit in dim
            if digit.variable
        )
        return is_whole and (len(dim) < 2 or (len(dim) == 2 and variables == "h"))


def _argument(value: Value, place: int) -> Value:
    argument = value.args[place] if place < len(value.args) else None
    if not isinstance(argument, (Node, Planned)) or not is_tensor(argument):
        raise Opaque  # a number
    return argument


def _by_part(index: Index, lanes: int) -> dict[int, list[int]]:
    (digit,) = index[-1] or (None,)
    if digit is None or digit.variable:
        raise Opaque
    groups: dict[int, list[int]] = {}
    for position, part in enumerate(digit.offsets):
        groups.setdefault(part, []).append(position)
    return groups


def _negated(terms: list[Term]) -> list[Term]:
    return [replace(term, sign=-term.sign) for term in terms]


def _products(first: list[Term], second: list[Term]) -> list[Term]:
    result = []
    for a in first:
        for b in second:
            shared = [lane for lane in a.lanes if lane in b.lanes]
            if shared:
                x, y = a.only(shared), b.only(shared)
                result.append(Term(x.sign * y.sign, x.lanes, x.reads + y.reads))
    return result


def nodes_of(value: object) -> Iterator[Node]:
    """Yield the nodes that ``value`` is, or that a planned call takes."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, Planned):
        for argument in tree_leaves((value.args, value.kwargs)):
            yield from nodes_of(argument)


def _descendants(source: Node, root: Value) -> set[Node]:
    """Return the nodes computed from ``source``, as far as the last one that ``root`` takes."""
    last = max(nodes_of(root))
    found, node = {source}, source
    while node is not last:
        node = node.next
        if any(used in found for used in node.all_input_nodes):
            found.add(node)
    return found
