"""Linear layers of whose channels only some are read compute these alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.ir.graph import StepGraph, value_of
from graphcache.libraries.torch_private import FakeTensor
from graphcache.passes.prune import sweep
from graphcache.passes.rewrite import Rewriter

aten = ops.aten

_CUTS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}
_WORTH = {"cpu": 1 << 20, "cuda": 16 << 20}
"""Bytes of unread weights between two parts for which one more product pays. On a GPU that is what is read
while it is launched (5 µs at 3 TB/s); neither number was measured."""


@dataclass(frozen=True)
class _Piece:
    """One part of the channels, and where it begins and ends."""

    node: fx.Node
    first: int
    last: int


@dataclass(frozen=True)
class Narrow:
    """Read only the rows of weights that matter where a layer's result is cut up and parts of it go unread.

    Modulation is such a layer: of shifts, scales and gates a reused branch reads the gate alone. Parts that
    lie apart get a product each where the rows between them are many. Equal to the whole layer up to the
    rounding of its product.
    """

    def __call__(self, step: StepGraph) -> StepGraph:
        rewriter, values = Rewriter(step), {branch.value for branch in step.branches}
        for node in rewriter.graph.find_nodes(op="call_function", target=aten.linear.default):
            pieces = _read(node)
            if any(piece.node.name in values for piece in pieces):
                continue
            runs = list(_runs(node, pieces))
            if sum(run[-1].last - run[0].first for run in runs) < value_of(node).shape[-1]:
                for run in runs:
                    _narrow(rewriter, node, run)
        sweep(rewriter.graph)
        return rewriter.finished()


def _read(node: fx.Node) -> list[_Piece]:
    """The parts of a layer's channels that are read, in their order; none where it is read otherwise."""
    cut: Any = next(iter(node.users), None)
    if len(node.users) != 1 or cut.target not in _CUTS or not isinstance(_weight(node), FakeTensor):
        return []
    ndim = value_of(node).ndim
    dim = cut.args[2] if len(cut.args) > 2 else 0
    if dim % ndim != ndim - 1:
        return []
    sizes = [part.shape[-1] for part in cut.meta["val"]]
    ends = list(accumulate(sizes))
    parts: Any = sorted((user.args[1], user) for user in cut.users)
    return [_Piece(part, ends[i] - sizes[i], ends[i]) for i, part in parts]


def _weight(node: fx.Node) -> torch.Tensor:
    weight: Any = node.args[1]
    return value_of(weight)


def _runs(node: fx.Node, pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """The parts that share a product."""
    weight = _weight(node)
    worth = _WORTH.get(weight.device.type, _WORTH["cuda"])
    run: list[_Piece] = []
    for piece in pieces:
        if run and (piece.first - run[-1].last) * weight[0].nbytes >= worth:
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _narrow(rewriter: Rewriter, node: fx.Node, run: Sequence[_Piece]) -> None:
    """Give the parts of a run a product of their own."""
    first, last = run[0].first, run[-1].last
    source, *weights = node.args
    chain = rewriter.after(node)
    rows = [chain.emit(aten.slice.Tensor, weight, 0, first, last) for weight in weights if weight is not None]
    result = chain.emit(aten.linear.default, source, *rows)
    for piece in run:
        part = result
        if len(run) > 1:
            part = chain.emit(aten.slice.Tensor, result, -1, piece.first - first, piece.last - first)
        piece.node.replace_all_uses_with(part)
