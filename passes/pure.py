"""A phase that writes into nothing: what cached values become is handed out."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphcache.analysis import ops
from graphcache.ir.graph import CacheRead, CacheWrite, StepGraph, value_of
from graphcache.passes.rewrite import Rewriter

aten = ops.aten


@dataclass(frozen=True)
class Pure:
    """Let what is written into cached values make new ones, which are further results.

    So the graph is a function of its inputs, which can be run again and has gradients. The results follow the
    others, one for each input that is written to, in their order.
    """

    def __call__(self, step: StepGraph) -> StepGraph:
        rewriter = Rewriter(step)
        ports = zip(rewriter.inputs, rewriter.graph.find_nodes(op="placeholder"), strict=True)
        written = {node: port for port, node in ports if isinstance(port, CacheRead) and port.changed}
        newest, origin = {node: node for node in written}, {node: node for node in written}
        for node in rewriter.graph.nodes:
            source: Any = node.args[0] if node.args else None
            if source in origin and node.target in ops.WRITES | ops.VIEWS:
                origin[node] = origin[source]
                if node.target in ops.WRITES:
                    newest[origin[node]] = node
            if node.target is aten.index_put_.default:
                node.target = aten.index_put.default
            elif node.target is aten.copy_.default:  # of a value as large as the entry
                node.target, node.args = aten.alias.default, (node.args[1],)
        for entry, port in written.items():
            rewriter.inputs[rewriter.inputs.index(port)] = CacheRead(port.history, port.part, port.entry)
            value = _shaped(rewriter, newest[entry], list(value_of(entry).shape))
            rewriter.write(CacheWrite(port.history, port.part), value)
        return rewriter.finished()


def _shaped(rewriter: Rewriter, node: fx.Node, shape: list[int]) -> fx.Node:
    if list(value_of(node).shape) == shape:
        return node
    return rewriter.emit(node, aten.reshape.default, node, shape)
