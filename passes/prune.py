"""Remove what no result needs."""

from dataclasses import dataclass

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import needed
from graphcache.ir.graph import StepGraph


@dataclass(frozen=True)
class Prune:
    """Plain reachability: attention that nobody reads goes too, and so do inputs that nobody reads."""

    def __call__(self, step: StepGraph) -> StepGraph:
        graph, env = step.copy()
        sweep(graph)
        alive = set(graph.nodes)
        inputs = []
        for port, old in step.ports():
            node = env[old]
            if node.users:
                inputs.append(port)
            else:
                graph.erase_node(node)
                alive.discard(node)
        names = {node.name for node in alive}
        branches = tuple(b for b in step.branches if {b.value, b.merge, b.stream} <= names)
        return step.rebuilt(graph, inputs=tuple(inputs), branches=branches)


def sweep(graph: fx.Graph) -> None:
    """Erase all operations and weights that neither the output nor a cache entry needs; placeholders stay.

    A value that nobody reads at this step may be written into an entry that a later step reads.
    """
    writes = (node for node in graph.nodes if node.target in ops.WRITES)
    alive = needed([graph.output_node(), *writes])
    for node in reversed(list(graph.nodes)):
        if node not in alive and node.op != "placeholder":
            graph.erase_node(node)
