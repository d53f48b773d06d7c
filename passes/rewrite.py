"""A copy of a graph under change, to which ports are added as values become inputs and outputs."""

from collections.abc import Callable, Sequence
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
        node.meta["val"] = _fake(target, args, kwargs)
        return node

    def copied(self, after: fx.Node, node: fx.Node) -> fx.Node:
        """The value in a storage of its own."""
        return self.emit(after, aten.clone.default, node, memory_format=torch.contiguous_format)

    def rows(self, after: fx.Node, node: fx.Node, half: int) -> fx.Node:
        """The first (0) or the second half of a value's outermost dimension."""
        count = int(value_of(node).shape[0]) // 2
        return self.emit(after, aten.slice.Tensor, node, 0, half * count, (half + 1) * count)

    def combine(self, like: fx.Node, entries: Sequence[fx.Node], group: int, made: set[fx.Node]) -> fx.Node:
        """The sum of the entries, newest first, weighted by a group's coefficients, in fp32 at least."""
        weights = self.coefficients(like, len(entries), group)
        dtype = value_of(like).dtype
        wide = wider(dtype)
        last = max([like, *(entry for entry in entries if entry.op != "placeholder")])

        def emit(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            nonlocal last
            last = self.emit(last, target, *args, **kwargs)
            made.add(last)
            return last

        total: fx.Node | None = None
        for i, entry in enumerate(entries):
            weight = emit(aten.select.int, weights, 0, i)
            term = emit(aten.mul.Tensor, entry if dtype == wide else _cast(emit, entry, wide), weight)
            total = term if total is None else emit(aten.add.Tensor, total, term)
        return last if dtype == wide else _cast(emit, last, dtype)

    def coefficients(self, like: fx.Node, count: int, group: int) -> fx.Node:
        """The input with a group's coefficients."""
        value = value_of(like)
        with fake_mode(value):
            empty = torch.empty(count, dtype=wider(value.dtype), device=value.device)
        return self.placeholder(Coefficients(group), empty)

    def finished(self) -> StepGraph:
        """The graph, with results of their own: a caller may change them in place."""
        bases = [ops.behind(node, ops.VIEWS | ops.SLICES) for node in self.results]
        kept = {base for port, base in zip(self.outputs, bases, strict=True) if isinstance(port, CacheWrite)}
        for i, (port, base) in enumerate(zip(self.outputs, bases, strict=True)):
            if isinstance(port, Output) and (base in kept or base.op in ("placeholder", "get_attr")):
                self.results[i] = self.copied(max((self.results[i], self.first)), self.results[i])
        self.graph.erase_node(self.graph.output_node())
        self.graph.output(tuple(self.results))
        return self.step.rebuilt(self.graph, inputs=tuple(self.inputs), outputs=tuple(self.outputs))


def wider(dtype: torch.dtype) -> torch.dtype:
    """In what sums are taken: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _cast(emit: Callable[..., fx.Node], node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return emit(aten._to_copy.default, node, dtype=dtype)


def _fake(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    nodes: list[fx.Node] = []
    fx.map_arg((tuple(args), kwargs), nodes.append)
    values, named = fx.map_arg((tuple(args), kwargs), lambda node: node.meta["val"])
    with fake_mode(value_of(nodes[0])):
        result: torch.Tensor = target(*values, **named)
    return result


def _name(port: InPort) -> str:
    if isinstance(port, CacheRead):
        site = "".join(c if c.isalnum() else "_" for c in port.site)
        return f"cache_{site}_{port.part}_{port.entry}"
    if isinstance(port, Table):
        return f"{port.kind}_{port.size}_{port.radius}"
    return f"coefficients_{port.group}" if isinstance(port, Coefficients) else str(port).replace(" ", "_")
