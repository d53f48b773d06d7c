"""A graph as stretches that run one after the other, so that what is within one need not outlive it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, fx

from graphcache.analysis.cost import computed_bytes, result_bytes
from graphcache.compiler.exchanges import DIFFERENTIABLE
from graphcache.compiler.flat import flattened
from graphcache.ir.graph import StepGraph


@dataclass(frozen=True)
class Stretch:
    """A function from values that were there before it to those that are read behind it.

    Attributes:
        call: takes the values that it `reads`, and returns those that it `gives`.
        reads: names of nodes, of which some are inputs of the whole graph.
        gives: names of its own nodes that later stretches read, or that the graph returns.
        bytes: of all that it computes, which is about what its gradients take.
    """

    call: Callable[..., Sequence[Tensor]]
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Stretches:
    """All stretches of a graph, in their order.

    Attributes:
        inputs: names of the graph's placeholders.
        results: names of the nodes that it returns.
        sizes: bytes of every value that one stretch gives and another one reads.
    """

    parts: tuple[Stretch, ...]
    inputs: tuple[str, ...]
    results: tuple[str, ...]
    sizes: dict[str, int]

    @staticmethod
    def of(step: StepGraph) -> "Stretches":
        """A graph, cut behind every residual add: there little more than the streams is read later."""
        module = flattened(step, {})
        ends = {branch.merge for branch in step.branches}
        nodes = [node for node in module.graph.nodes if node.op == "call_function"]
        places = [0, *(i + 1 for i, node in enumerate(nodes) if node.name in ends), len(nodes)]
        pieces = [nodes[first:last] for first, last in pairwise(places) if last > first]
        where = {node: number for number, piece in enumerate(pieces) for node in piece}
        inputs, results = ([node.name for node in some] for some in (step.placeholders(), step.results()))
        parts = [_made(module, piece, number, where, results) for number, piece in enumerate(pieces)]
        known = {node.name: result_bytes(node) for node in nodes}
        sizes = {name: known[name] for part in parts for name in part.reads if name in known}
        return Stretches(tuple(parts), tuple(inputs), tuple(results), sizes)

    def crossing(self) -> list[frozenset[str]]:
        """For every stretch the values from before it that it or a later one reads."""
        found, needed = list[frozenset[str]](), frozenset[str]()
        for part in reversed(self.parts):
            needed = (needed - {*part.gives}) | {name for name in part.reads if name in self.sizes}
            found.append(needed)
        return found[::-1]


def _made(
    module: fx.GraphModule,
    piece: Sequence[fx.Node],
    number: int,
    where: dict[fx.Node, int],
    returned: Sequence[str],
) -> Stretch:
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    used = dict.fromkeys(item for node in piece for item in node.all_input_nodes)
    outside = [node for node in used if where.get(node) != number]
    reads = [node for node in outside if node.op != "get_attr"]
    for node in reads:
        env[node] = graph.placeholder(node.name)
    for node in outside:
        if node.op == "get_attr":
            env[node] = graph.create_node("get_attr", node.target, name=node.name)
    for node in piece:
        target = DIFFERENTIABLE.get(node.target, node.target)
        made = env[node] = graph.create_node(node.op, target, name=node.name)
        made.args, made.kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
    later = {node for node in piece if any(where.get(user, -1) > number for user in node.users)}
    gives = [node for node in piece if node.name in returned or node in later]
    graph.output(tuple(env[node] for node in gives))
    call = fx.GraphModule(module, graph).forward
    names = [tuple([node.name for node in some]) for some in (reads, gives)]
    return Stretch(call, names[0], names[1], computed_bytes(piece))
