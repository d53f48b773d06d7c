"""A fused attention and MLP as two sites: their common output projection, cut by columns."""

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.dataflow import Dataflow
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import Branch, StepGraph, value_of
from graphcache.passes.rewrite import Rewriter

aten = ops.aten


@dataclass(frozen=True)
class Split:
    """Turn every `parallel` site into `parallel.attention` and `parallel.mlp`, whose sum it is.

    Equal to the whole up to rounding, not bit for bit.

    Raises:
        PlanError: a site's value is no linear layer of attention and MLP joined by their channels.
    """

    def __call__(self, step: StepGraph) -> StepGraph:
        rewriter, flow = Rewriter(step), Dataflow(step)
        branches: list[Branch] = []
        for branch in step.branches:
            branches += _halves(rewriter, flow, branch) if branch.role == "parallel" else [branch]
        return replace(rewriter.finished(), branches=tuple(branches))


def _halves(rewriter: Rewriter, flow: Dataflow, branch: Branch) -> list[Branch]:
    value = rewriter.nodes[branch.value]
    source: Any = value.args[0] if value.target is aten.linear.default else None
    pieces: Any = source.args[0] if source is not None and source.target is aten.cat.default else ()
    if len(pieces) != 2:
        raise PlanError(
            f"site {branch.name}: attention and MLP have no common linear layer that could be cut in two; "
            "write a row @parallel for both"
        )
    attended = [_is_attended(flow, piece.name) for piece in pieces]
    _, weight, *bias = value.args
    chain, first, parts = rewriter.after(value), 0, {}
    for piece, is_attention in zip(pieces, attended, strict=True):
        last = first + int(value_of(piece).shape[-1])
        columns = chain.emit(aten.slice.Tensor, weight, 1, first, last)
        parts[is_attention] = chain.emit(aten.linear.default, piece, columns, *(bias if not first else ()))
        first = last
    whole = chain.emit(aten.add.Tensor, *parts.values())
    value.replace_all_uses_with(whole)
    for replaced in (value, source):
        if not replaced.users:
            rewriter.graph.erase_node(replaced)
    result = []
    for name, part in (("attention", parts[True]), ("mlp", parts[False])):
        result.append(replace(branch, name=f"{branch.name}.{name}", role=f"parallel.{name}", value=part.name))
    return result


def _is_attended(flow: Dataflow, name: str) -> bool:
    """Whether attention goes into a value more directly than through the residual stream."""
    merges = {branch.merge for branch in flow.step.branches}
    todo: list[fx.Node] = [flow.step.nodes()[name]]
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in seen or node.name in merges:
            continue
        seen.add(node)
        if node.target in ops.ATTENTION or node.target in ops.CONTRACTIONS:
            return True
        todo += node.all_input_nodes
    return False
