"""Residual branches, found by structure: a residual add is `x + f(x)`, whatever the modules are called."""

from collections.abc import Iterator

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import LATENT, Dataflow
from graphcache.analysis.spread import Spread
from graphcache.analysis.ways import Residual, is_branch, starts_inside, unwrap
from graphcache.ir.graph import LINEAR, PARTS, is_tensor, same_sizes, value_of

_SAME_ROWS = ops.VIEWS | ops.COPIES | ops.BROADCASTS


def residuals(flow: Dataflow, spread: Spread) -> list[Residual]:
    """Every residual add on a stream of the graph, in execution order."""
    found: dict[fx.Node, Residual] = {}
    for node in flow.nodes:
        split = _split(flow, node, found, spread)
        if split is None:
            continue
        stream, branch, source = split
        value = _scaled(_produced(flow, source, branch), branch)
        if value in found and unwrap(found[value].stream) is source:
            value = found[value].value  # x + gate * (x + f(x))
        found[node] = Residual(node, stream, branch, source, value)
    return _outermost(flow, found)


def _split(
    flow: Dataflow, node: fx.Node, found: dict[fx.Node, Residual], spread: Spread
) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(stream, branch, source) when the node is a residual add, else None."""
    for stream, branch in _operands(node):
        if not flow.depends[branch] & LATENT or not _can_be_stream(flow, stream, node, spread):
            continue
        for source in _sources(flow, stream, branch, found):
            if is_branch(flow, node, source, branch, found):
                return stream, branch, source
    return None


def _can_be_stream(flow: Dataflow, stream: fx.Node, node: fx.Node, spread: Spread) -> bool:
    """A stream is as large as the sum, has rows of its own for the tokens, and is added to no other stream.

    Shifts, biases, positions and embeddings of the time, shared by several blocks, are added to values that
    are not computed from them.
    """
    if not is_tensor(stream) or not same_sizes(value_of(stream).shape, value_of(node).shape):
        return False
    if spread(stream) and not spread.is_vector(stream):
        return False
    return bool(flow.depends[stream] & LATENT) or not _is_injected(flow, stream)


def _is_injected(flow: Dataflow, stream: fx.Node) -> bool:
    """Whether a value is added to one that depends on the latents and is not computed from it."""
    origin = ops.behind(stream, _SAME_ROWS)
    todo = [origin]
    while todo:
        value = todo.pop()
        for user in value.users:
            if user.target in _SAME_ROWS:
                todo.append(user)
            elif user.target in ops.ADDS and user.args[0] is not user.args[1]:
                others = [item for item in user.all_input_nodes if item is not value]
                if any(flow.depends[n] & LATENT and not flow.reaches(origin, n) for n in others):
                    return True
    return False


def _operands(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """What of an add may be (stream, branch); of addcmul, gate and branch are the two factors.

    What is subtracted is a branch, and so is what a stream is blended with.
    """
    nodes = [item for item in node.args if isinstance(item, fx.Node)]
    if node.target is ops.aten.addcmul.default:
        return [(nodes[0], nodes[1]), (nodes[0], nodes[2])]
    if node.target in ops.LERPS or (node.target is ops.aten.sub.Tensor and len(nodes) == 2):
        return [(nodes[0], nodes[1])]
    if node.target is not ops.aten.add.Tensor or len(nodes) != 2:
        return []
    left, right = nodes
    scaled = node.kwargs.get("alpha", 1) != 1
    return [(left, right)] if scaled else [(left, right), (right, left)]


def _sources(
    flow: Dataflow, stream: fx.Node, branch: fx.Node, found: dict[fx.Node, Residual]
) -> Iterator[fx.Node]:
    """The values on the stream that the branch may start from; in `x + a(x) + b(x)` that is x for both."""
    earlier = found.get(unwrap(stream))
    candidates = [stream, unwrap(stream), *([earlier.source] if earlier else [])]
    return (item for item in dict.fromkeys(candidates) if flow.reaches(item, branch))


def _produced(flow: Dataflow, source: fx.Node, branch: fx.Node) -> fx.Node:
    """Walk back from the add through gate, dropout, views, casts and a norm that belongs to the gate."""
    inside = flow.descendants[source]
    dominators: dict[fx.Node, fx.Node] | None = None
    node = branch
    while not (ops.is_product(node) or ops.is_slice(node) or ops.is_result_of_call(node)):
        operands = [item for item in node.all_input_nodes if inside >> flow.index[item] & 1]
        if len(operands) == 1:
            previous = operands[0]
        else:
            dominators = dominators or _immediate_dominators(flow, source, branch)
            previous = dominators[node]
            skipped = [n for n in flow.between(previous, node) if n not in (previous, node)]
            if any(ops.is_product(n) for n in skipped):
                return node
        if previous is source or not is_tensor(previous):
            return node
        node = previous
    return node


def _scaled(value: fx.Node, branch: fx.Node) -> fx.Node:
    """A product with what a quantised weight is made of, behind the scales and the bias that belong to it."""
    found, node = value, value
    is_quantised = bool(value.meta.get(LINEAR))
    while node is not branch and len(node.users) == 1:
        (user,) = node.users
        others = [item for item in user.all_input_nodes if item is not node]
        if user.target is ops.aten.mul.Tensor and any(map(_is_part, others)):
            found, is_quantised = user, True
        elif user.target is ops.aten.add.Tensor and is_quantised and all(n.op == "get_attr" for n in others):
            return user
        elif not (ops.is_view(user) or user.target in ops.COPIES):
            break
        node = user
    return found


def _is_part(node: fx.Node) -> bool:
    node = ops.behind(node, _SAME_ROWS)
    return node.op == "get_attr" and str(node.target).startswith(PARTS)


def _immediate_dominators(flow: Dataflow, source: fx.Node, target: fx.Node) -> dict[fx.Node, fx.Node]:
    members = flow.between(source, target)
    inside = set(members)
    import networkx

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
            and starts_inside(flow, outer.source, node, found)
        ]
        if len(nested) > 1:
            dropped.add(outer.merge)
        else:
            dropped.update(nested)
            dropped.update(n for n in flow.members(inside) if found[n].value is outer.value)
    return [residual for residual in found.values() if residual.merge not in dropped]
