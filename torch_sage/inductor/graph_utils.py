"""Planning new fx nodes: a value has its fake result at once and its nodes only when it is used.

A pattern must know shapes, dtypes and strides of the operands that it would feed to attention
before it may touch the graph, because a refused match leaves the graph byte-identical. So new
calls are staged as ``Planned`` values and become nodes in ``insert``.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_map, tree_map_only

aten = torch.ops.aten

Size: TypeAlias = "int | torch.SymInt"


class Planned:
    """A call that is not in the graph yet; arguments may be nodes or other planned calls."""

    def __init__(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Compute the fake result; nothing is inserted."""
        self.target = target
        self.args = args
        self.kwargs = kwargs
        self.node: Node | None = None
        fake_args, fake_kwargs = tree_map_only((Node, Planned), val, (args, kwargs))
        mode = detect_fake_mode((fake_args, fake_kwargs))
        with mode or nullcontext(), torch.no_grad():
            self.val = target(*fake_args, **fake_kwargs)


Value: TypeAlias = "Node | Planned"


def val(value: Value) -> Any:
    """Return the fake tensor, symbolic number or tuple of them that ``value`` stands for."""
    return value.val if isinstance(value, Planned) else value.meta["val"]


def tensor(value: Value) -> Tensor:
    """Return the fake tensor of ``value``."""
    result = val(value)
    assert isinstance(result, Tensor), f"{value} must be a tensor, got {type(result)}"
    return result


def is_tensor(value: object) -> bool:
    """Return whether ``value`` is a node or planned call with a (fake) tensor result."""
    return (
        isinstance(value, (Node, Planned))
        and (isinstance(value, Planned) or "val" in value.meta)
        and isinstance(val(value), Tensor)
    )


def plan(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Planned:
    """Plan one call of an operator."""
    return Planned(target, args, kwargs)


def plan_graph(function: Callable[..., Any], *args: Any, decompositions: Any = None) -> Any:
    """Plan every operator that ``function`` calls on tensor ``args``; return what it returns.

    The function is traced on the fake values, so it sees exactly the shapes of this graph.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = [a for a in args if isinstance(a, (Node, Planned))]
    mode = detect_fake_mode([val(a) for a in inputs])

    def on_inputs(*tensors: Any) -> Any:
        feed = iter(tensors)
        return function(*(next(feed) if isinstance(a, (Node, Planned)) else a for a in args))

    # With torch's Python decompositions: those in C++ refuse symbolic sizes (matmul, torch 2.12).
    with mode or nullcontext(), torch.no_grad(), enable_python_dispatcher():
        traced = make_fx(on_inputs, decomposition_table=decompositions or {})(
            *(val(a) for a in inputs)
        )
        known: dict[Node, Any] = {}
        feed = iter(inputs)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(feed)
            elif node.op == "call_function":
                given = tree_map_only(Node, known.__getitem__, (node.args, node.kwargs))
                known[node] = Planned(node.target, *given)
            elif node.op == "output":
                return tree_map_only(Node, known.__getitem__, node.args[0])
            else:
                raise AssertionError(f"traced graph must be functional, got {node.format_node()}")
    raise AssertionError("traced graph must have an output")


def insert(graph: Graph, value: Any) -> Any:
    """Return the node of ``value``, created with what it needs at the graph's insertion point."""
    if not isinstance(value, Planned):
        return value
    if value.node is None:
        args = tree_map(lambda a: insert(graph, a), value.args)
        kwargs = tree_map(lambda a: insert(graph, a), value.kwargs)
        value.node = graph.call_function(value.target, args, kwargs)
        value.node.meta["val"] = value.val
    return value.node


def same(a: Size, b: Size) -> bool:
    """Return whether two sizes are known to be equal, without adding a guard."""
    return bool(statically_known_true(a == b))


def same_shape(a: Any, b: Any) -> bool:
    """Return whether two shapes are known to be equal, without adding a guard."""
    return len(a) == len(b) and all(map(same, a, b))


def size(value: Value, dim: int) -> Any:
    """Return the size of a dimension as an operator argument: an int or a planned number."""
    extent = tensor(value).shape[dim]
    return extent if isinstance(extent, int) else plan(aten.sym_size.int, value, dim)


def product(factors: list[Any]) -> Any:
    """Return the product of sizes as an operator argument."""
    result: Any = 1
    for factor in factors:
        if isinstance(result, int) and isinstance(factor, int):
            result = result * factor
        elif isinstance(result, int) and result == 1:
            result = factor
        else:
            result = plan(operator.mul, result, factor)
    return result


def is_training(graph: Graph) -> bool:
    """Return whether autograd will differentiate this graph: the joint graph takes tangents."""
    return any(
        node.op == "placeholder" and str(node.target).startswith("tangents") for node in graph.nodes
    )


def bound_arguments(node: Node) -> dict[str, Any]:
    """Return every argument of an operator call by its schema name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound: dict[str, Any] = {
        argument.name: argument.default_value
        for argument in schema.arguments
        if argument.has_default_value()
    }
    names = (argument.name for argument in schema.arguments)
    bound.update(zip(names, node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def has_strides(fake: Tensor, strides: Iterable[Size]) -> bool:
    """Return whether ``fake`` is known to have ``strides``; those of size-1 dimensions are moot."""
    return all(
        same(extent, 1) or same(a, b)
        for extent, a, b in zip(fake.shape, fake.stride(), strides, strict=True)
    )


def dense_strides(shape: Iterable[Size], order: Iterable[int]) -> list[Size]:
    """Return the strides of a gapless tensor whose dimensions lie in memory in ``order``."""
    sizes = list(shape)
    strides: list[Size] = [1] * len(sizes)
    step: Size = 1
    for dim in reversed(list(order)):
        strides[dim] = step
        step = step * sizes[dim]
    return strides


def memory_order(fake: Tensor) -> tuple[int, ...] | None:
    """Return the order of the dimensions of a gapless tensor in memory, or None if it has gaps."""
    for order in itertools.permutations(range(fake.dim())):
        if has_strides(fake, dense_strides(fake.shape, order)):
            return order
    return None


def output_order(fake: Tensor) -> str:
    """Return the op's ``output_order`` that gives these strides, or else the plain one."""
    return "bshd" if memory_order(fake) == (0, 2, 1, 3) else "bhsd"


def restride(value: Value, like: Tensor) -> Value | None:
    """Return ``value`` with the strides of ``like``, copied if need be; None if those have gaps."""
    if has_strides(tensor(value), like.stride()):
        return value
    order = memory_order(like)
    if order is None:
        return None
    inverse = [order.index(dim) for dim in range(len(order))]
    packed = plan(
        aten.clone.default,
        plan(aten.permute.default, value, list(order)),
        memory_format=torch.contiguous_format,
    )
    return plan(aten.permute.default, packed, inverse)


def erase_dead(graph: Graph, node: Node) -> None:
    """Erase ``node`` if nothing uses it, then what only it used; inputs stay."""
    if node._erased or node.users or node.op != "call_function":
        return
    # Fused attention is tagged as random for its dropout, which is 0 wherever it is replaced.
    if node.is_impure(impure_random=False):
        return
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for used in inputs:
        # Tracing leaves a getitem for every output of an operator, used or not.
        for pick in [u for u in used.users if u.target is operator.getitem and not u.users]:
            graph.erase_node(pick)
        erase_dead(graph, used)


def live_nodes(graph: Graph) -> set[Node]:
    """Return the nodes that the outputs or a side effect need.

    Export leaves dead conversions behind; they must not count as users of a score.
    """
    live: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in live or node.is_impure():
            live.add(node)
            live.update(node.all_input_nodes)
    return live


def erase_assertions(graph: Graph) -> None:
    """Erase export's assertions of what operators return, which follows from the graph.

    One precedes every conversion, such as that of a softmax back to half precision, where it would
    be another use of the attention weights. Assertions about the graph's inputs stay.
    """
    for node in call_functions(graph, aten._assert_tensor_metadata.default):
        asserted = node.args[0]
        if isinstance(asserted, Node) and asserted.op == "call_function":
            graph.erase_node(node)


def output_node(graph: Graph) -> Node:
    """Return the graph's output node."""
    node: Node = graph.output_node()
    return node


def call_functions(graph: Graph, *targets: Any) -> Iterator[Node]:
    """Yield the calls of ``targets`` in graph order."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in targets:
            yield node
