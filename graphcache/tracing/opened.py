"""Operations of other libraries, told apart by what they compute: analyses know PyTorch's alone.

One that is made of PyTorch's operations gives way to these. One that multiplies by a fixed matrix, such as a
product with packed weights, is marked as a linear layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from graphcache.ir.graph import LINEAR, fake_mode, is_tensor, layout, same_bits, value_of
from graphcache.libraries.torch_private import (
    FakeTensor,
    OpOverload,
    schema_of,
    tree_flatten,
    tree_unflatten,
)
from graphcache.tracing.functional import erase_unread

aten = torch.ops.aten
_PYTORCHS = frozenset(("aten", "prims", "prim", "profiler", "export", "graphcache"))
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUGH = 3e-2
"""Of lower precision: relative to the result's norm."""


def is_of_others(node: fx.Node) -> bool:
    """Whether it runs an operation of another library than PyTorch."""
    return isinstance(node.target, OpOverload) and node.target.namespace not in _PYTORCHS


def open_operations(graph: fx.Graph, held: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """Look into other libraries' operations. The graph is run once if it has any.

    Args:
        graph: is changed.
        held: what its attributes name.
        tensors: real inputs.
    """
    if any(map(is_of_others, graph.nodes)):
        looking = _Looking(graph, held)
        with torch.no_grad():
            looking.run(*tensors)
        for node, inner in looking.opened.items():
            _put(node, inner)
        erase_unread(graph)


class _Looking(fx.Interpreter):
    """Runs the graph, and notes what others' operations are; `opened` are those made of PyTorch's."""

    def __init__(self, graph: fx.Graph, held: Mapping[str, Any]) -> None:
        super().__init__(fx.GraphModule(dict(held), graph), graph=graph)
        self._held = held
        self.opened: dict[fx.Node, fx.Graph] = {}
        self._inner: dict[Any, fx.Graph | None] = {}
        self._linear: dict[Any, bool] = {}
        self._depends: set[fx.Node] = set()

    def fetch_attr(self, target: str) -> Any:
        return self._held[target]

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "placeholder" or not self._depends.isdisjoint(n.all_input_nodes):
            self._depends.add(n)
        result = super().run_node(n)
        if is_of_others(n):
            self._look(n, _Call.of(n.target, *self.fetch_args_kwargs_from_env(n)), result)
        return result

    def _look(self, node: fx.Node, call: "_Call", result: Any) -> None:
        if any(isinstance(tensor, FakeTensor) for tensor in call.tensors):
            return
        if call.key not in self._inner:
            self._inner[call.key] = _opened(call, result)
        inner = self._inner[call.key]
        if inner is not None:
            self.opened[node] = inner
        elif self._multiplies(node):
            if call.key not in self._linear:
                self._linear[call.key] = _is_linear(call, result)
            node.meta[LINEAR] = self._linear[call.key]

    def _multiplies(self, node: fx.Node) -> bool:
        """Whether it is given one tensor that depends on inputs, the first, and has one for a result."""
        given = [item in self._depends for item in node.all_input_nodes]
        return given[:1] == [True] and given.count(True) == 1 and len(given) > 1 and is_tensor(node)


class _Call:
    """An operation with its arguments; `tensors` are those among them."""

    def __init__(self, target: Any, leaves: Sequence[Any], structure: Any) -> None:
        self._target, self._leaves, self._structure = target, leaves, structure
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @staticmethod
    def of(target: Any, args: Any, kwargs: Any) -> "_Call":
        return _Call(target, *tree_flatten((args, kwargs)))

    @property
    def key(self) -> Any:
        """Equal for calls with arguments of the same kind."""
        told = [
            layout(item) if isinstance(item, Tensor) else (type(item), repr(item)) for item in self._leaves
        ]
        return self._target, str(self._structure), tuple(told)

    def __call__(self, *tensors: Tensor) -> Any:
        """The operation of others in the place of its first tensors."""
        rest = iter((*tensors, *self.tensors[len(tensors) :]))
        filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(filled, self._structure)
        return self._target(*args, **kwargs)


def _opened(call: _Call, result: Any) -> fx.Graph | None:
    """What an operation is made of, as a graph of its tensors; None where it has a kernel of its own."""
    run: Callable[..., tuple[Tensor, ...]] = lambda *tensors: _results(call(*tensors))  # noqa: E731
    try:
        traced = make_fx(run, tracing_mode="real")(*call.tensors)
        if not all(map(_is_plain, traced.graph.nodes)):
            return None
        for node in traced.graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default
        traced.recompile()
        found, expected = traced(*call.tensors), _results(result)
    except Exception:  # whatever is said by what cannot be traced
        return None
    same = len(found) == len(expected) and all(map(same_bits, found, expected))
    return traced.graph if same and [*map(layout, found)] == [*map(layout, expected)] else None


def _results(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _is_plain(node: fx.Node) -> bool:
    """Whether it may stand in the graph: a pure operation, of PyTorch's own."""
    if node.op in ("placeholder", "output"):
        return True
    is_pure = isinstance(node.target, OpOverload) and not schema_of(node.target).is_mutable
    return node.op == "call_function" and is_pure and not is_of_others(node)


def _is_linear(call: _Call, result: Tensor) -> bool:
    """Whether an operation multiplies its first tensor, along the last dimension, by a matrix.

    The matrix is what it makes of the unit vectors.
    """
    given = call.tensors[0]
    size, outer = given.shape[-1], [1] * (given.dim() - 2)
    if given.dim() < 2 or not result.is_floating_point() or result.shape[:-1] != given.shape[:-1]:
        return False
    try:
        units = torch.eye(size, device=given.device).to(given.dtype)
        matrix = call(units.view(*outer, size, size)).reshape(size, -1)
    except Exception:  # it takes no other number of rows, or no ones
        return False
    precise = torch.promote_types(result.dtype, torch.float32)
    error = (given.to(precise) @ matrix.to(precise) - result).norm()
    return bool(error <= _TOLERANCES.get(result.dtype, _ROUGH) * result.norm())


def _put(node: fx.Node, inner: fx.Graph) -> None:
    """Copy a graph to where a node stands, and let those who read the node read its results."""
    leaves, _ = tree_flatten((node.args, node.kwargs))
    given = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    env: dict[fx.Node, fx.Node] = dict(zip(inner.find_nodes(op="placeholder"), given, strict=True))
    with node.graph.inserting_before(node), fake_mode(value_of(given[0])):
        for item in inner.nodes:
            if item.op == "call_function":
                made = env[item] = node.graph.node_copy(item, env.__getitem__)
                args, kwargs = fx.map_arg((made.args, made.kwargs), lambda other: other.meta["val"])
                target: Any = made.target
                made.meta = {**node.meta, "val": target(*args, **kwargs)}
    results: Any = fx.map_arg(inner.output_node().args[0], env.__getitem__)
    if is_tensor(node):
        node.replace_all_uses_with(results[0])
    else:
        for user in list(node.users):
            place: Any = user.args[1]
            user.replace_all_uses_with(results[place])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
