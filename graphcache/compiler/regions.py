"""A phase in regions: stretches that repeat are compiled once, and called one after the other."""

import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from graphcache.analysis.repeats import Repeats, find_repeats
from graphcache.compiler.arrivals import Arrivals, Away
from graphcache.compiler.native import last_read
from graphcache.ir.graph import is_tensor, value_of
from graphcache.libraries.torch_private import OpOverload, schema_of

_COPYING = (torch.ops.aten.to, torch.ops.aten.contiguous)
"""What looks at its operand's memory only where there is nothing to do."""

Code = Callable[[fx.GraphModule, Sequence[Tensor]], Callable[..., Sequence[Tensor]]]
"""Finds or makes the code of a region for tensors like these."""


@dataclass(frozen=True)
class Region:
    """A stretch of a graph as a graph of its own: `inputs` and `results` are nodes of the whole."""

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]

    def fed(self, given: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        """For each input a tensor laid out as eager operations do; `given`: those of the whole graph."""
        return [given[node] if node in given else value_of(node) for node in self.inputs]


def regions(graph: fx.Graph) -> list[Region] | None:
    """A graph cut into regions, in order; None if nothing in it repeats, or not everything is a tensor's.

    Views are not handed from region to region: each makes its own of what they look at.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if graph.find_nodes(op="get_attr") or not all(map(_is_plain, calls)):
        return None
    found = find_repeats(calls)
    if not found:
        return None
    bounds = sorted({0, len(calls), *(b for item in found for b in _bounds(item))})
    stretches = [calls[low:high] for low, high in pairwise(bounds)]
    wanted = _handed_on(graph, stretches)
    alike = [range(bounds.index(item.first), bounds.index(item.first) + item.count) for item in found]
    for group in alike:
        union = {place for i in group for place in wanted[i]}
        for i in group:
            wanted[i] = union
    return [_region(stretch, sorted(places)) for stretch, places in zip(stretches, wanted, strict=True)]


def whole(graph: fx.Graph) -> list[Region]:
    """A graph as one region; none where it computes nothing."""
    return pieces(graph, {})


def pieces(graph: fx.Graph, units: Mapping[fx.Node, Hashable]) -> list[Region]:
    """A graph cut where it begins to read weights of another unit."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    bounds, met, unit = [0], set[fx.Node](), None
    for place, node in enumerate(calls):
        for weight in node.all_input_nodes:
            if weight in units and weight not in met:
                met.add(weight)
                if units[weight] != unit and bounds[-1] != place:
                    bounds.append(place)
                unit = units[weight]
    stretches = [calls[low:high] for low, high in pairwise([*bounds, len(calls)]) if high]
    wanted = _handed_on(graph, stretches)
    return [_region(stretch, sorted(places)) for stretch, places in zip(stretches, wanted, strict=True)]


def _bounds(item: Repeats) -> Iterator[int]:
    return (item.first + item.period * i for i in range(item.count + 1))


def _is_plain(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(node.target, OpOverload) or is_tensor(node) or isinstance(value, tuple)


def _is_view(node: fx.Node) -> bool:
    """Whether a node looks at one other's memory, by its schema, and is made again wherever it is read."""
    target: Any = node.target
    if target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    if not isinstance(target, OpOverload) or target.overloadpacket in _COPYING:
        return False
    if len(node.all_input_nodes) != 1:
        return False
    aliases = [result.alias_info for result in schema_of(target).returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """A view's chain down to what owns the memory, which comes last."""
    while _is_view(node):
        yield node
        node = node.all_input_nodes[0]
    yield node


def _handed_on(graph: fx.Graph, stretches: Sequence[Sequence[fx.Node]]) -> list[set[int]]:
    """For each stretch the places in it of what is read after it."""
    home = {node: (i, place) for i, nodes in enumerate(stretches) for place, node in enumerate(nodes)}
    found: list[set[int]] = [set() for _ in stretches]
    for i, nodes in enumerate(stretches):
        for node in nodes:
            for operand in node.all_input_nodes:
                *_, owner = _behind(operand) if home.get(operand, (i, 0))[0] != i else (operand,)
                where = home.get(owner)
                if where is not None and where[0] != i:
                    found[where[0]].add(where[1])
    for node in graph.output_node().all_input_nodes:
        if node in home:
            found[home[node][0]].add(home[node][1])
    return found


def _region(nodes: Sequence[fx.Node], places: Sequence[int]) -> Region:
    """A stretch as a graph; `places` in it are handed on."""
    inside, graph, env = set(nodes), fx.Graph(), dict[fx.Node, fx.Node]()
    outside = [operand for node in nodes for operand in node.all_input_nodes if operand not in inside]
    chains = [tuple(_behind(operand)) for operand in outside]
    inputs = list(dict.fromkeys(chain[-1] for chain in chains))
    views = dict.fromkeys(view for chain in chains for view in reversed(chain[:-1]))
    for node in inputs:
        env[node] = graph.placeholder(f"given_{len(env)}")
        env[node].meta.update(node.meta)
    for node in (*views, *nodes):
        env[node] = graph.create_node(node.op, node.target)
        env[node].args, env[node].kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node].meta.update(node.meta)
    results = tuple(nodes[place] for place in places)
    graph.output(tuple(env[node] for node in results))
    graph.lint()
    return Region(fx.GraphModule(nn.Module(), graph), tuple(inputs), results)


class InRegions:
    """Code of a graph's regions, called one after the other on a table of values.

    The code of a region is found, or made, in its first call, for the tensors that arrive there: that two
    regions are alike says nothing about the strides of what compiled code hands on. Weights that are `away`,
    by their places among the graph's inputs, are fetched for the region that reads them first while the one
    before runs, and forgotten behind the one that reads them last.
    """

    def __init__(
        self, graph: fx.Graph, parts: Sequence[Region], code: Code, away: Mapping[int, Away] | None = None
    ) -> None:
        self._parts, self._code, self._away = parts, code, away or {}
        nodes = [*graph.find_nodes(op="placeholder"), *(node for part in parts for node in part.results)]
        self._places = {node: place for place, node in enumerate(nodes)}
        self._size = len(nodes)
        results: Any = graph.output_node().args[0]
        self._results = self._at(results)
        self._calls: list[_Call] = []
        self._dropped = last_read([self._at((*part.inputs, *part.results)) for part in parts], self._results)
        self._wanted: dict[int, list[int]] = {}
        # what the graph returns as it is comes last
        first = {place: len(parts) for place in self._results if place in self._away}
        for i, part in reversed([*enumerate(parts)]):
            first |= {place: i for place in self._at(part.inputs) if place in self._away}
        for place, i in first.items():
            self._wanted.setdefault(i, []).append(place)

    def _at(self, nodes: Sequence[fx.Node]) -> list[int]:
        return [self._places[node] for node in nodes]

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        values: list[Any] = [*tensors, *[None] * (self._size - len(tensors))]
        calls = self._calls
        arrivals = Arrivals(self._wanted, self._away, values) if self._wanted else None
        for i, part in enumerate(self._parts):
            if arrivals is not None:
                arrivals.before(i)
            if i == len(calls):
                inputs = self._at(part.inputs)
                code = self._code(part.module, [values[place] for place in inputs])
                calls.append(_Call(code, inputs, self._at(part.results), self._dropped[i]))
            calls[i].run(values)
        if arrivals is not None:
            arrivals.before(len(self._parts))
        return tuple([values[place] for place in self._results])


class _Call(NamedTuple):
    code: Callable[..., Sequence[Tensor]]
    inputs: list[int]
    results: list[int]
    dropped: list[int]

    def run(self, values: list[Any]) -> None:
        made = self.code(*[values[place] for place in self.inputs])
        for place, value in zip(self.results, made, strict=True):
            values[place] = value
        for place in self.dropped:
            values[place] = None
