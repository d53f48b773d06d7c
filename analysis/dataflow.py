"""Who depends on whom: reachability as bit sets over one walk of the graph."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from graphcache.analysis.layout import Layout, layouts
from graphcache.ir.graph import Hoisted, InPort, Input, StepGraph

LATENT, TIMESTEP, CONSTANT = 1, 2, 4
"""What a value may depend on; 0 is a function of the weights alone."""

_KINDS = {"latent": LATENT, "timestep": TIMESTEP, "constant": CONSTANT}


def _kind(port: InPort) -> int:
    if isinstance(port, Hoisted):
        return CONSTANT
    return _KINDS[port.kind] if isinstance(port, Input) else LATENT


@dataclass(frozen=True)
class Dataflow:
    """Ancestors and descendants of every node, as bit sets over the nodes' order."""

    step: StepGraph

    @cached_property
    def nodes(self) -> list[fx.Node]:
        return list(self.step.graph.nodes)

    @cached_property
    def index(self) -> dict[fx.Node, int]:
        return {node: i for i, node in enumerate(self.nodes)}

    @cached_property
    def ancestors(self) -> dict[fx.Node, int]:
        """Everything a node is computed from, itself included."""
        found: dict[fx.Node, int] = {}
        for i, node in enumerate(self.nodes):
            bits = 1 << i
            for operand in node.all_input_nodes:
                bits |= found[operand]
            found[node] = bits
        return found

    @cached_property
    def descendants(self) -> dict[fx.Node, int]:
        """Everything computed from a node, itself included."""
        found: dict[fx.Node, int] = {}
        for node in reversed(self.nodes):
            bits = 1 << self.index[node]
            for user in node.users:
                bits |= found[user]
            found[node] = bits
        return found

    @cached_property
    def depends(self) -> dict[fx.Node, int]:
        """Which kinds of input reach a node: an or of LATENT, TIMESTEP and CONSTANT."""
        found = dict.fromkeys(self.nodes, 0)
        for port, node in self.step.ports():
            found[node] = _kind(port)
        for node in self.nodes:
            for operand in node.all_input_nodes:
                found[node] |= found[operand]
        return found

    @cached_property
    def latent(self) -> fx.Node:
        """The latents, or the first of several."""
        return next(n for port, n in self.step.ports() if isinstance(port, Input) and port.kind == "latent")

    @cached_property
    def layouts(self) -> dict[fx.Node, Layout]:
        """Which of the latents' axes the dimensions of each value run over, where that is known."""
        return layouts(self.nodes, self.latent)

    def reaches(self, source: fx.Node, target: fx.Node) -> bool:
        return bool(self.ancestors[target] >> self.index[source] & 1)

    def between(self, source: fx.Node, target: fx.Node) -> list[fx.Node]:
        """The nodes on the ways from source to target, both included."""
        return self.members(self.descendants[source] & self.ancestors[target])

    def members(self, bits: int) -> list[fx.Node]:
        found = []
        while bits:
            low = bits & -bits
            found.append(self.nodes[low.bit_length() - 1])
            bits ^= low
        return found

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        total = 0
        for node in nodes:
            total |= 1 << self.index[node]
        return total


def needed(results: Iterable[fx.Node]) -> set[fx.Node]:
    """What the results are computed from: plain reachability, no tag consulted.

    Stock dead-code elimination keeps attention that nobody reads, because ATen tags it as seeded
    randomness; a graph without effects has no use for that.
    """
    todo, seen = list(results), set[fx.Node]()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return seen
