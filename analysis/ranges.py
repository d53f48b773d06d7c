"""Ranges of blocks: what leaves them, and what would leave them if every branch inside were zero."""

from dataclasses import dataclass

from torch import fx

from graphcache.analysis import ops
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import Branch, StepGraph


@dataclass(frozen=True)
class RangeCut:
    """The residual adds of a range, and those of them whose value is read after it (one per stream)."""

    name: str
    merges: dict[str, str]
    leaving: tuple[str, ...]


def cut_range(step: StepGraph, name: str, first: int, last: int) -> RangeCut:
    """Find what a range of consecutive blocks hands on.

    Raises:
        PlanError: a branch inside the range is read outside it, so that skipping the range would not
            skip its work.
    """
    inside = [branch for branch in step.branches if first <= branch.block <= last]
    merges = {branch.merge: branch.stream for branch in inside}
    values = {branch.value: branch for branch in inside}
    read: set[str] = set()
    todo, seen = list(step.results()), set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name in merges:
            read.add(node.name)
            continue
        if node.name in values:
            raise _leak(name, values[node.name])
        todo.extend(node.all_input_nodes)
    order = [node.name for node in step.graph.nodes if node.name in read]
    return RangeCut(name, merges, tuple(order))


def _leak(name: str, branch: Branch) -> PlanError:
    return PlanError(
        f"{name} cannot be cached as one: {branch.name} inside it is also read outside; "
        "cache the branches instead, or choose other bounds"
    )


class Bypass:
    """Builds, in a graph, the values that streams would have if every branch of a range were zero."""

    def __init__(self, graph: fx.Graph, cut: RangeCut) -> None:
        self._graph = graph
        self._cut = cut
        nodes = {node.name: node for node in graph.nodes}
        self._stream = {nodes[merge]: nodes[stream] for merge, stream in cut.merges.items()}
        self._after = _descendants(graph, self._stream)
        self._made: dict[fx.Node, fx.Node] = {}

    def __call__(self, node: fx.Node) -> fx.Node:
        """The bypass of `node`; operations on the stream between blocks are copied.

        Raises:
            PlanError: the stream itself is projected inside the range.
        """
        if node in self._made:
            return self._made[node]
        if node in self._stream:
            result = self(self._stream[node])
        elif node not in self._after:
            result = node
        elif ops.is_product(node):
            raise PlanError(
                f"{self._cut.name} cannot be cached as one: {node.name} ({node.target}) projects the stream "
                "inside it; split the range there"
            )
        else:
            operands = {item: self(item) for item in node.all_input_nodes}
            with self._graph.inserting_after(node):
                result = self._graph.node_copy(node, operands.__getitem__)
        self._made[node] = result
        return result


def _descendants(graph: fx.Graph, roots: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in roots or any(item in found for item in node.all_input_nodes):
            found.add(node)
    return found
