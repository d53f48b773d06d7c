"""Minimum cuts through nodes: what to keep so that nothing else must be known."""

import networkx


class Network:
    """A graph whose nodes have capacities: what separates its sources from its sinks at the least cost."""

    _TIES = 1 << 32

    def __init__(self) -> None:
        self._graph: networkx.DiGraph[tuple[str, str]] = networkx.DiGraph()
        self._graph.add_nodes_from([("source", ""), ("sink", "")])

    def node(self, name: str, size: int | None, rank: int = 0) -> None:
        """One that costs `size`, or cannot be cut; of equal cuts that of the lowest ranks is taken."""
        limit = {} if size is None else {"capacity": size * self._TIES + rank}
        self._graph.add_edge(("in", name), ("out", name), **limit)

    def edge(self, before: str, after: str) -> None:
        self._graph.add_edge(("out", before), ("in", after))

    def source(self, name: str) -> None:
        self._graph.add_edge(("source", ""), ("in", name))

    def sink(self, name: str) -> None:
        self._graph.add_edge(("out", name), ("sink", ""))

    def cheapest(self) -> set[str]:
        """The nodes cut; of several such sets, the one nearest to the sinks."""
        _, (near, far) = networkx.minimum_cut(self._graph, ("source", ""), ("sink", ""))
        return {name for side, name in near if side == "in" and ("out", name) in far}
