"""Remove what no result needs."""

from dataclasses import replace

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import needed
from graphcache.ir.graph import StepGraph


def pruned(step: StepGraph) -> StepGraph:
    """The step without what no result needs; `step.graph`, which is its maker's own, changes in place.

    Plain reachability: attention that nobody reads goes too, and so do inputs that nobody reads.
    """
    graph = step.graph
    sweep(graph)
    inputs = []
    for port, node in list(step.ports()):
        if node.users:
            inputs.append(port)
        else:
            graph.erase_node(node)
    names = {node.name for node in graph.nodes}
    branches = tuple(b for b in step.branches if {b.value, b.merge, b.stream} <= names)
    return replace(step, inputs=tuple(inputs), branches=branches)


def sweep(graph: fx.Graph) -> None:
    """Erase all operations and weights that neither the output nor a cache entry needs; placeholders stay.

    A value that nobody reads at this step may be written into an entry that a later step reads.
    """
    writes = (node for node in graph.nodes if node.target in ops.WRITES)
    alive = needed([graph.output_node(), *writes])
    for node in reversed(list(graph.nodes)):
        if node not in alive and node.op != "placeholder":
            graph.erase_node(node)
