"""Residual branches, found by structure: a residual add is `x + f(x)`, whatever the modules are called."""

from dataclasses import dataclass

import networkx
from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import LATENT, Dataflow
from graphcache.ir.graph import is_tensor


@dataclass(frozen=True)
class Residual:
    """One residual add.

    `merge` adds `branch` to `stream`; `source` is the stream's value that the branch starts from (the
    stream itself before casts and views); `value` is what the branch produced before gate and casts.
    """

    merge: fx.Node
    stream: fx.Node
    branch: fx.Node
    source: fx.Node
    value: fx.Node


def residuals(flow: Dataflow) -> list[Residual]:
    """Every residual add on a stream of the graph, in execution order."""
    found: dict[fx.Node, Residual] = {}
    for node in flow.nodes:
        split = _split(flow, node, found)
        if split is None:
            continue
        stream, branch, source = split
        found[node] = Residual(node, stream, branch, source, _produced(flow, source, branch))
    return _outermost(flow, found)


def unwrap(node: fx.Node) -> fx.Node:
    """A stream's value before views, casts and dropped dropout."""
    return ops.behind(node, ops.VIEWS | ops.COPIES)


def _split(
    flow: Dataflow, node: fx.Node, found: dict[fx.Node, Residual]
) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(stream, branch, source) when the node is a residual add, else None."""
    for stream, branch in _operands(node):
        if not flow.depends[branch] & LATENT or not is_tensor(stream):
            continue
        source = _source(flow, stream, branch, found)
        if source is not None and any(ops.is_product(n) for n in flow.between(source, branch)):
            return stream, branch, source
    return None


def _operands(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """What of an add may be (stream, branch); of addcmul, gate and branch are the two factors."""
    nodes = [item for item in node.args if isinstance(item, fx.Node)]
    if node.target is ops.aten.addcmul.default:
        return [(nodes[0], nodes[1]), (nodes[0], nodes[2])]
    if node.target is not ops.aten.add.Tensor or len(nodes) != 2:
        return []
    left, right = nodes
    scaled = node.kwargs.get("alpha", 1) != 1
    return [(left, right)] if scaled else [(left, right), (right, left)]


def _source(
    flow: Dataflow, stream: fx.Node, branch: fx.Node, found: dict[fx.Node, Residual]
) -> fx.Node | None:
    """The value on the stream that the branch starts from; in `x + a(x) + b(x)` that is x for both."""
    for candidate in (stream, unwrap(stream)):
        if flow.reaches(candidate, branch):
            return candidate
    earlier = found.get(unwrap(stream))
    if earlier is not None and flow.reaches(earlier.source, branch):
        return earlier.source
    return None


def _produced(flow: Dataflow, source: fx.Node, branch: fx.Node) -> fx.Node:
    """Walk back from the add through gate, dropout, views, casts and a norm that belongs to the gate."""
    inside = flow.descendants[source]
    dominators: dict[fx.Node, fx.Node] | None = None
    node = branch
    while not (ops.is_product(node) or ops.is_slice(node)):
        operands = [item for item in node.all_input_nodes if inside >> flow.index[item] & 1]
        if len(operands) == 1:
            previous = operands[0]
        else:
            dominators = dominators or _immediate_dominators(flow, source, branch)
            previous = dominators[node]
            skipped = [n for n in flow.between(previous, node) if n not in (previous, node)]
            if any(ops.is_product(n) for n in skipped):
                return node
        if previous is source:
            return node
        node = previous
    return node


def _immediate_dominators(flow: Dataflow, source: fx.Node, target: fx.Node) -> dict[fx.Node, fx.Node]:
    members = flow.between(source, target)
    inside = set(members)
    graph: networkx.DiGraph[fx.Node] = networkx.DiGraph()
    graph.add_edges_from((node, user) for node in members for user in node.users if user in inside)
    return dict(networkx.immediate_dominators(graph, source))


def _outermost(flow: Dataflow, found: dict[fx.Node, Residual]) -> list[Residual]:
    """Drop a residual inside a branch (an MLP's own skip), and a skip around several of them."""
    merges = flow.bits(found)
    dropped: set[fx.Node] = set()
    for outer in found.values():
        inside = flow.descendants[outer.source] & flow.ancestors[outer.branch] & merges
        nested = [
            node
            for node in flow.members(inside)
            if node is not outer.merge
            and node is not outer.source
            and _starts_inside(flow, outer, node, found)
        ]
        if len(nested) > 1:
            dropped.add(outer.merge)
        else:
            dropped.update(nested)
    return [residual for residual in found.values() if residual.merge not in dropped]


def _starts_inside(flow: Dataflow, outer: Residual, node: fx.Node, found: dict[fx.Node, Residual]) -> bool:
    """Whether the stream that `node` adds to begins within the outer branch.

    A text stream that is updated before the image attends to it lies between the two, but began before.
    """
    base = node
    while base in found:
        base = ops.behind(found[base].stream, ops.VIEWS | ops.COPIES | ops.SLICES)
    return base is not outer.source and flow.reaches(outer.source, base)
