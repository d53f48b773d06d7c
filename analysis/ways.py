"""Ways from a stream to what is added to it: which sums are `x + f(x)`, and which only look like it."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import LATENT, Dataflow
from graphcache.ir.graph import is_tensor, same_sizes, value_of


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


def unwrap(node: fx.Node) -> fx.Node:
    """A stream's value before views, casts and dropped dropout."""
    return ops.behind(node, ops.VIEWS | ops.COPIES)


def beginning(
    flow: Dataflow, node: fx.Node, found: Mapping[fx.Node, Residual], source: fx.Node | None = None
) -> fx.Node:
    """The value that a stream began with, before the residual adds on it and what else is added to it.

    `source` is a value known to be on a stream.
    """
    while node is not source:
        earlier = found[node].stream if node in found else _added_to(flow, node, {*found, source})
        if earlier is None:
            break
        node = _whole(earlier)
    return node


def _whole(node: fx.Node) -> fx.Node:
    return ops.behind(node, ops.VIEWS | ops.COPIES | ops.SLICES)


def _added_to(flow: Dataflow, node: fx.Node, streams: Set[fx.Node | None]) -> fx.Node | None:
    """The stream that a sum adds positions or an embedding to, if it is such a sum."""
    if node.target not in ops.ADDS:
        return None
    shape = value_of(node).shape
    wide = [
        item for item in node.all_input_nodes if is_tensor(item) and same_sizes(value_of(item).shape, shape)
    ]
    moving = [item for item in wide if flow.depends[item] & LATENT]
    if len(moving) > 1:
        moving = [item for item in moving if _whole(item) in streams]
    return moving[0] if len(moving) == 1 else None


def starts_inside(flow: Dataflow, source: fx.Node, node: fx.Node, found: Mapping[fx.Node, Residual]) -> bool:
    """Whether the stream that `node` adds to begins after `source`, within a branch from there.

    A text stream that is updated before the image attends to it lies between the two, but began before.
    """
    begun = beginning(flow, node, found, source)
    return begun is not source and flow.reaches(source, begun)


def is_branch(
    flow: Dataflow, total: fx.Node, source: fx.Node, branch: fx.Node, found: Mapping[fx.Node, Residual]
) -> bool:
    """Whether work of its own leads from the source to the branch, apart from other streams' residual adds.

    A value that several blocks add to a stream, and a late stream to which an early one is added again, are
    reached through the stream's own residual adds alone.
    """
    between = flow.between(source, branch)
    streams = {
        node
        for node in between
        if node in found and node is not source and not starts_inside(flow, source, node, found)
    }
    closed = {n for n in streams if _is_later(flow, source, found[n].stream) or _lives_on(n, total)}
    if _carries(source, branch, set(between), closed):
        return False
    worked = {source: False}
    for node in between:
        if node in closed or node in worked:
            continue
        before = [worked[item] for item in node.all_input_nodes if item in worked]
        if before:
            worked[node] = ops.is_product(node) or any(before)
    return worked.get(branch, False)


def _is_later(flow: Dataflow, source: fx.Node, stream: fx.Node) -> bool:
    return unwrap(stream) is not source and flow.reaches(source, stream)


def _carries(source: fx.Node, branch: fx.Node, between: set[fx.Node], streams: set[fx.Node]) -> bool:
    """Whether the branch is another value of a stream, normed or modulated: no product made it."""
    size = [value_of(branch).numel()]
    todo, seen = [branch], {source}
    while todo:
        node = todo.pop()
        if node in streams:
            return True
        if node in seen or ops.is_product(node):
            continue
        seen.add(node)
        todo.extend(
            item
            for item in node.all_input_nodes
            if item in between and is_tensor(item) and same_sizes([value_of(item).numel()], size)
        )
    return False


def _lives_on(node: fx.Node, total: fx.Node) -> bool:
    """Whether a result reads the node past the sum: in `r + mlp(norm(r + a(r)))` the inner sum ends there."""
    todo, seen = [node], {total}
    while todo:
        item = todo.pop()
        if item.op == "output":
            return True
        if item not in seen:
            seen.add(item)
            todo.extend(item.users)
    return False
