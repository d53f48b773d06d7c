"""A copy of a graph under change, to which ports are added as values become inputs and outputs."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.ir.graph import (
    CacheRead,
    CacheWrite,
    Coefficients,
    InPort,
    OutPort,
    Output,
    StepGraph,
    Table,
    fake_mode,
    value_of,
)
from graphcache.libraries.torch_private import TO_COPY, tree_leaves

aten = ops.aten


@dataclass
class Rewriter:
    """The step's graph, copied; `finished` makes a StepGraph of it again."""

    step: StepGraph
    graph: fx.Graph = field(init=False)
    nodes: dict[str, fx.Node] = field(init=False)
    inputs: list[InPort] = field(init=False)
    outputs: list[OutPort] = field(init=False)
    results: list[fx.Node] = field(init=False)
    loaded: dict[InPort, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph, env = self.step.copy()
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.inputs = list(self.step.inputs)
        self.outputs = list(self.step.outputs)
        self.results = [env[node] for node in self.step.results()]
        self.loaded = {port: env[node] for port, node in self.step.ports()}
        self.first = next(node for node in self.graph.nodes if node.op != "placeholder")

    def placeholder(self, port: InPort, value: torch.Tensor) -> fx.Node:
        """The input for a port, described by a fake tensor; the same one when asked again."""
        if port not in self.loaded:
            with self.graph.inserting_before(self.first):
                node = self.graph.placeholder(_name(port))
            node.meta["val"] = value
            self.inputs.append(port)
            self.loaded[port] = node
        return self.loaded[port]

    def write(self, port: OutPort, node: fx.Node) -> None:
        """Hand a value out beside the model's results."""
        self.outputs.append(port)
        self.results.append(node)

    def emit(self, after: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Call an operation, placed after a node."""
        with self.graph.inserting_after(after):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = _fake(target, args, kwargs, after)
        return node

    def renew(self, node: fx.Node) -> None:
        """Describe a node's result anew, whose operands or arguments are others."""
        node.meta["val"] = _fake(node.target, node.args, node.kwargs, node)

    def input(
        self,
        port: InPort,
        like: torch.Tensor,
        *,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> fx.Node:
        """The input for a port: contiguous, of the other tensor's shape and dtype unless given."""
        with fake_mode(like):
            size = like.shape if shape is None else shape
            empty = torch.empty(size, dtype=dtype or like.dtype, device=like.device)
        return self.placeholder(port, empty)

    def after(self, node: fx.Node) -> "Chain":
        """Operations to be emitted behind a node."""
        return Chain(self, node)

    def combine(self, like: fx.Node, entries: Sequence[fx.Node], group: int, made: set[fx.Node]) -> fx.Node:
        """The sum of the entries, newest first, weighted by a group's coefficients, in fp32 at least."""
        weights = self.coefficients(like, len(entries), group)
        dtype = value_of(like).dtype
        chain = Chain(self, max([like, *(entry for entry in entries if entry.op != "placeholder")]), made)
        total: fx.Node | None = None
        for i, entry in enumerate(entries):
            weight = chain.emit(aten.select.int, weights, 0, i)
            term = chain.emit(aten.mul.Tensor, chain.cast(entry, wider(dtype)), weight)
            total = term if total is None else chain.emit(aten.add.Tensor, total, term)
        assert total is not None
        return chain.cast(total, dtype)

    def coefficients(self, like: fx.Node, count: int, group: int) -> fx.Node:
        """The input with a group's coefficients."""
        value = value_of(like)
        return self.input(Coefficients(group), value, shape=(count,), dtype=wider(value.dtype))

    def finished(self) -> StepGraph:
        """The graph, with results of their own: a caller may change them in place."""
        bases = [ops.behind(node, ops.VIEWS | ops.SLICES) for node in self.results]
        kept = {base for port, base in zip(self.outputs, bases, strict=True) if isinstance(port, CacheWrite)}
        for i, (port, base) in enumerate(zip(self.outputs, bases, strict=True)):
            if isinstance(port, Output) and (base in kept or base.op in ("placeholder", "get_attr")):
                self.results[i] = self.after(max((self.results[i], self.first))).copied(self.results[i])
        self.graph.erase_node(self.graph.output_node())
        self.graph.output(tuple(self.results))
        return self.step.rebuilt(self.graph, inputs=tuple(self.inputs), outputs=tuple(self.outputs))


@dataclass
class Chain:
    """Operations that are emitted one behind the other; `made` collects them."""

    rewriter: Rewriter
    last: fx.Node
    made: set[fx.Node] = field(default_factory=set)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        self.last = self.rewriter.emit(self.last, target, *args, **kwargs)
        self.made.add(self.last)
        return self.last

    def several(self, target: Any, *args: Any, **kwargs: Any) -> tuple[fx.Node, fx.Node]:
        """The first two results of an operation that has several."""
        both = self.emit(target, *args, **kwargs)
        return self.emit(operator.getitem, both, 0), self.emit(operator.getitem, both, 1)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The value in a dtype; the node itself where it has that."""
        return node if value_of(node).dtype == dtype else self.emit(TO_COPY, node, dtype=dtype)

    def copied(self, node: fx.Node) -> fx.Node:
        """The value in a storage of its own."""
        return self.emit(aten.clone.default, node, memory_format=torch.contiguous_format)

    def rows(self, node: fx.Node, half: int) -> fx.Node:
        """The first (0) or the second half of a value's outermost dimension."""
        count = int(value_of(node).shape[0]) // 2
        return self.emit(aten.slice.Tensor, node, 0, half * count, (half + 1) * count)


def wider(dtype: torch.dtype) -> torch.dtype:
    """In what sums are taken: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _fake(target: Any, args: Sequence[Any], kwargs: dict[str, Any], beside: fx.Node) -> torch.Tensor:
    nodes: list[fx.Node] = []
    fx.map_arg((tuple(args), kwargs), nodes.append)
    values, named = fx.map_arg((tuple(args), kwargs), lambda node: node.meta["val"])
    nodes.append(beside)
    with fake_mode(tree_leaves(nodes[0].meta["val"])[0]):
        result: torch.Tensor = target(*values, **named)
    return result


def _name(port: InPort) -> str:
    if isinstance(port, CacheRead):
        site = "".join(c if c.isalnum() else "_" for c in str(port.history))
        return f"cache_{site}_{port.part}_{port.entry}"
    if isinstance(port, Table):
        return f"{port.kind}_{port.size}_{port.radius}"
    if isinstance(port, Coefficients):
        return f"coefficients_{port.group}"
    return "".join(c if c.isalnum() else "_" for c in str(port))
