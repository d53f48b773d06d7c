"""A traced graph made flat and functional, without tracing it again."""

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn

from graphcache.ir.graph import fake_mode, is_tensor, value_of
from graphcache.libraries.torch_private import HigherOrderOperator, OpOverload, schema_of, storage_of

aten = torch.ops.aten
_INTO = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
"""For a view of a part: how a new part is put into the whole."""


class Unknown(Exception):
    """The graph changes something in a way that is not known here."""


def is_functional(graph: fx.Graph) -> bool:
    """Whether no operation of the graph changes its input, nor hides others."""
    return not any(_mutates(node) or isinstance(node.target, HigherOrderOperator) for node in graph.nodes)


def detached(graph: fx.Graph) -> None:
    """Turn `detach_`, which changes no value, into a `detach` that is read from there on."""
    for node in graph.find_nodes(op="call_function", target=aten.detach_.default):
        operand: Any = node.args[0]
        node.target = aten.detach.default
        operand.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: user > node)


def inlined(graph: fx.Graph) -> fx.Graph:
    """The graph with regions that switch autocast off made part of it, where it is off around them too."""
    if not any(_is_uncast(node) for node in graph.nodes):
        return graph
    flat = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if _is_uncast(node):
            inner: Any = _body(node).graph
            placeholders = inner.find_nodes(op="placeholder")
            env[node] = flat.graph_copy(
                inner, dict(zip(placeholders, map(env.__getitem__, node.args[5:]), strict=True))
            )
        elif node.target is operator.getitem and _is_uncast(node.args[0]):
            env[node] = env[node.args[0]][node.args[1]]
        else:
            env[node] = flat.node_copy(node, env.__getitem__)
    erase_unread(flat)
    return flat


def erase_unread(graph: fx.Graph) -> None:
    """Take out attributes that no node reads."""
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)


def _body(region: fx.Node) -> nn.Module:
    operand: Any = region.args[4]
    root: Any = region.graph.owning_module
    body: nn.Module = root.get_submodule(operand.target)
    return body


def _is_uncast(node: Any) -> bool:
    """Whether it runs a region that `torch.autocast(device, enabled=False)` surrounds, to no effect."""
    if not isinstance(node.target, HigherOrderOperator) or str(node.target) != "wrap_with_autocast":
        return False
    device, _, enabled, *_ = node.args
    return not enabled and not torch.is_autocast_enabled(device)


def functional(graph: fx.Graph) -> fx.Graph:
    """The same computation without in-place operations.

    Known are changes of a tensor that the graph made itself, whole or through a chain of slices and selects.

    Raises:
        Unknown: for anything else, such as a changed input or an inner graph.
    """
    result = _Functional(graph).graph
    result.eliminate_dead_code()
    return result


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable


class _Functional:
    """Copies node by node; `env` maps old nodes to what holds their value at this point.

    A node that shares memory with a changed one leaves `env`, and is computed again when next read.
    """

    def __init__(self, old: fx.Graph) -> None:
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.sharing: dict[int, list[fx.Node]] = defaultdict(list)
        for node in old.nodes:
            if isinstance(node.target, HigherOrderOperator):
                raise Unknown(node)
            if _mutates(node):
                self._change(node)
            else:
                self.env[node] = self.graph.node_copy(node, self._now)
            for storage in _storages(node):
                self.sharing[storage].append(node)

    def _now(self, node: fx.Node) -> fx.Node:
        if node not in self.env:
            whole: Any = node.args[0]
            self.env[node] = self._now(whole) if _mutates(node) else self.graph.node_copy(node, self._now)
        return self.env[node]

    def _change(self, node: fx.Node) -> None:
        view: Any = node.args[0]
        if not isinstance(view, fx.Node) or not is_tensor(view):
            raise Unknown(node)
        memory = _storage(value_of(view))
        base, *others = self.sharing[memory]
        if base.op != "call_function" or not is_tensor(base) or not all(_views(o, memory) for o in others):
            raise Unknown(node)
        changed = self._changed(node, view)
        whole = self._put(node, base, view, changed)
        if value_of(whole).stride() != value_of(base).stride():
            raise Unknown(node)  # views of the base are views of the same layout
        for other in others:
            self.env.pop(other, None)
        self.env[base] = whole

    def _changed(self, node: fx.Node, view: fx.Node) -> fx.Node:
        """What `node` makes of `view`."""
        if node.target is not aten.fill_diagonal_.default:
            return self._call(node, _out_of_place(node), view, *node.args[1:], **node.kwargs)
        _, fill, *wraps = node.args
        if value_of(view).dim() != 2 or any(wraps):
            raise Unknown(node)
        diagonal = self._made(node, aten.diagonal.default, view)
        filled = self._call(node, aten.fill.Scalar, diagonal, fill)
        return self._call(node, aten.diagonal_scatter.default, view, filled)

    def _put(self, node: fx.Node, base: fx.Node, view: fx.Node, part: fx.Node) -> fx.Node:
        """`base` with `part` where `view` looks."""
        while view is not base:
            whole: Any = view.args[0]
            if not is_tensor(whole):
                raise Unknown(view)
            if _is_reshaped(view, whole):
                part = self._made(node, aten.reshape.default, part, list(value_of(whole).shape))
            elif _geometry(view) != _geometry(whole):
                if view.target not in _INTO:
                    raise Unknown(view)
                part = self._call(node, _INTO[view.target], whole, part, *view.args[1:], **view.kwargs)
            view = whole
        return part

    def _call(
        self, node: fx.Node, target: OpOverload, operand: fx.Node, *args: Any, **kwargs: Any
    ) -> fx.Node:
        """A new operation whose result has the shape and type of its first operand."""
        made = self._made(node, target, operand, *args, **kwargs)
        before, after = value_of(operand), value_of(made)
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise Unknown(node)  # in place, the result is cast
        return made

    def _made(self, node: fx.Node, target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        """A new operation in the place of `node`, on the values that old nodes have now.

        Nodes that are new already stay.
        """
        args, kwargs = fx.map_arg((args, kwargs), lambda n: n if n.graph is self.graph else self._now(n))
        made = self.graph.call_function(target, args, kwargs)
        made.meta.update(node.meta)
        fakes: Any = fx.map_arg((args, kwargs), value_of)
        with fake_mode(fakes[0][0]):
            made.meta["val"] = target(*fakes[0], **fakes[1])
        return made


def _geometry(node: fx.Node) -> tuple[Any, ...]:
    value = value_of(node)
    return value.dtype, value.shape, value.stride(), value.storage_offset()


def _is_reshaped(view: fx.Node, whole: fx.Node) -> bool:
    """Whether it holds the same elements in the same order, in another shape."""
    one, other = value_of(view), value_of(whole)
    return (
        one.shape != other.shape
        and (one.dtype, one.numel()) == (other.dtype, other.numel())
        and one.is_contiguous()
        and other.is_contiguous()
    )


def _out_of_place(node: fx.Node) -> OpOverload:
    """The operation that gives as its result what this one writes into its first operand."""
    target: Any = node.target
    schema = schema_of(target)
    packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
    written = [bool(argument.alias_info and argument.alias_info.is_write) for argument in schema.arguments]
    if packet is None or written != [True] + [False] * (len(written) - 1):
        raise Unknown(node)
    wanted = _arguments(target)
    for name in packet.overloads():
        found: OpOverload = getattr(packet, name)
        if not schema_of(found).is_mutable and _arguments(found) == wanted:
            return found
    raise Unknown(node)


def _arguments(target: OpOverload) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in schema_of(target).arguments]


def _views(node: fx.Node, memory: int) -> bool:
    return any(memory in _storages(operand) for operand in node.all_input_nodes)


def _storages(node: fx.Node) -> set[int]:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return {_storage(tensor) for tensor in values if isinstance(tensor, torch.Tensor)}


def _storage(tensor: torch.Tensor) -> int:
    return storage_of(tensor.untyped_storage())
