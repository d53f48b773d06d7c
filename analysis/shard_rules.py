"""Rules of ATen operations: how a rank computes its part of a result from parts of the operands.

Every rule is exact, whatever the values are and whatever the dimension means that is split. An operation
without a rule needs its operands whole.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.rows import SPLITS
from graphcache.analysis.shard_joins import joins, padded, pieces, sliced, written_over
from graphcache.analysis.shard_layout import Axis, Segment
from graphcache.analysis.shard_named import gathered, put
from graphcache.analysis.shard_operands import (
    Held,
    Rule,
    Share,
    Unshared,
    aligned,
    axis_of,
    needed,
    refuse,
    shape_of,
)
from graphcache.ir.graph import value_of
from graphcache.libraries.torch_private import UNSAFE_VIEW, OpOverload

aten = ops.aten


def elementwise(node: fx.Node, held: Held) -> Share:
    return aligned(node, node.all_input_nodes, held)


def normed(node: fx.Node, held: Held) -> Share:
    """A norm over the last dimensions."""
    source, over, *_ = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(over, list | tuple)
    axis = needed(source, held)
    refuse(axis.dim >= value_of(source).dim() - len(over))
    return Share(axis, {item: axis if item is source else None for item in node.all_input_nodes})


def reduced(node: fx.Node, held: Held) -> Share:
    """A mean, sum, softmax or the like over given dimensions."""
    source: Any = node.args[0]
    axis = needed(source, held)
    rank = value_of(source).dim()
    dims = ops.reduced_dimensions(node, rank)
    refuse(axis.dim in dims)
    gone = 0 if value_of(node).dim() == rank else sum(dim < axis.dim for dim in dims)
    return Share(axis.at(axis.dim - gone), {source: axis})


def regrouped(node: fx.Node, held: Held) -> Share:
    """Dimensions split and merged, in their order."""
    source: Any = node.args[0]
    axis, result = needed(source, held), shape_of(node)
    found = axis.regrouped(shape_of(source), result)
    if found is None:
        raise Unshared(f"makes {tuple(result)} of {tuple(shape_of(source))}, which takes parts asunder")
    needs = dict.fromkeys(node.all_input_nodes) | {source: axis}
    return Share(found, needs, (aten.reshape.default, (source, found.shape(result)), {}))


def reordered(node: fx.Node, held: Held) -> Share:
    """Dimensions in another order, told by what becomes of sizes that differ."""
    source: Any = node.args[0]
    axis: Axis = needed(source, held)
    target: Any = node.target
    plain = torch.empty(tuple(range(2, 2 + value_of(source).dim())), device="meta")
    dim = list(target(plain, *node.args[1:], **node.kwargs).shape).index(axis.dim + 2)
    return Share(axis.at(dim), {source: axis})


def expanded(node: fx.Node, held: Held) -> Share:
    """Few entries, met as many: along whole dimensions."""
    source: Any = node.args[0]
    share = aligned(node, [source], held)
    assert isinstance(share.axis, Axis)
    needs = dict.fromkeys(node.all_input_nodes) | dict(share.needs)
    return replace(
        share, needs=needs, call=(aten.expand.default, (source, share.axis.shape(shape_of(node))), {})
    )


def repeated(node: fx.Node, held: Held) -> Share:
    """Repeats of whole dimensions, or of each entry."""
    source, given, *_ = node.args
    assert isinstance(source, fx.Node)
    axis = needed(source, held)
    if node.target is aten.repeat_interleave.self_int:
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        refuse(not isinstance(dim, int) or not isinstance(given, int))
        assert isinstance(dim, int)
        assert isinstance(given, int)
        if dim % value_of(source).dim() != axis.dim:
            return Share(axis, {source: axis})
        refuse(not all(map(axis.is_even, axis.segments)))
        segments = tuple(Segment(segment.size * given, segment.split) for segment in axis.segments)
        return Share(replace(axis, segments=segments), {source: axis})
    assert isinstance(given, list | tuple)
    rank = value_of(node).dim()
    dim = axis.dim + rank - value_of(source).dim()
    counts = [*(1 for _ in range(rank - len(given))), *given]
    return Share(replace(axis, dim=dim, outer=axis.outer * int(counts[dim])), {source: axis})


def stacked(node: fx.Node, held: Held) -> Share:
    """Pieces side by side along a dimension of their own."""
    pieces: Any = node.args[0]
    shape = shape_of(node)
    dim = ops.dimension(node, 1, len(shape))
    share = aligned(node, pieces, held, [*shape[:dim], *shape[dim + 1 :]])
    assert isinstance(share.axis, Axis)
    return replace(share, axis=share.axis.at(share.axis.dim + (share.axis.dim >= dim)))


def complex_pairs(node: fx.Node, held: Held) -> Share:
    """Pairs of numbers as complex ones, or back."""
    source: Any = node.args[0]
    axis = needed(source, held)
    refuse(node.target is aten.view_as_complex.default and axis.dim == value_of(source).dim() - 1)
    return Share(axis, {source: axis})


def displaced(node: fx.Node, held: Held) -> Share:
    """A roll or flip of whole dimensions."""
    source: Any = node.args[0]
    axis = needed(source, held)
    given: Any = node.args[1] if node.target is aten.flip.default else (node.args[2:] or [[]])[0]
    rank = value_of(source).dim()
    dims = range(rank) if not given else [given] if isinstance(given, int) else given
    refuse(axis.dim in [dim % rank for dim in dims])
    return Share(axis, {source: axis})


def copied_over(node: fx.Node, held: Held) -> Share:
    """A value written over another one, in place."""
    over: Any = node.args[0]
    if axis_of(over, held) is None:
        return Share(None, dict.fromkeys(node.all_input_nodes))
    return aligned(node, node.all_input_nodes, held)


def picked(node: fx.Node, held: Held) -> Share:
    """One of an operation's results."""
    source, place = node.args
    assert isinstance(source, fx.Node)
    axes = held.get(source)
    if not isinstance(axes, tuple):
        raise Unshared("is a result of an operation that has no rule")
    assert isinstance(place, int)
    return Share(axes[place], {})


def by_kind(target: object) -> Rule | None:
    """The rule of an operation that says itself that it goes element by element."""
    tags = target.tags if isinstance(target, OpOverload) else ()
    if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        return elementwise
    return None


def table(rules: Sequence[tuple[Rule, Iterable[object]]]) -> dict[object, Rule]:
    return {target: rule for rule, targets in rules for target in targets}


RULES = table(
    [
        (elementwise, [*(ops.COPIES - {aten.type_as.default}), aten.alias.default, aten.detach.default]),
        (elementwise, [aten.contiguous.default, aten.complex.default, aten.polar.default]),
        (elementwise, [aten.real.default, aten.imag.default, aten.resolve_conj.default]),
        (elementwise, [aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default]),
        (elementwise, [aten.full_like.default]),
        (normed, [aten.layer_norm.default, aten.rms_norm.default]),
        (reduced, ops.REDUCTIONS),
        (regrouped, [aten.view.default, aten.reshape.default, UNSAFE_VIEW, aten.flatten.using_ints]),
        (regrouped, [aten.unflatten.int, aten.ravel.default, aten.squeeze.default, aten.squeeze.dim]),
        (regrouped, [aten.squeeze.dims, aten.unsqueeze.default, aten.view_as.default]),
        (reordered, [aten.permute.default, aten.transpose.int, aten.swapaxes.default]),
        (reordered, [aten.swapdims.default, aten.movedim.int, aten.movedim.intlist]),
        (reordered, [aten.moveaxis.int, aten.moveaxis.intlist, aten.t.default, aten.numpy_T.default]),
        (reordered, [aten.mT.default]),
        (expanded, [aten.expand.default, aten.broadcast_to.default, aten.expand_as.default]),
        (repeated, [aten.repeat.default, aten.tile.default, aten.repeat_interleave.self_int]),
        (stacked, [aten.stack.default]),
        (joins, [aten.cat.default, aten.concat.default]),
        (sliced, [aten.slice.Tensor, aten.narrow.default, aten.select.int]),
        (pieces, [*SPLITS, aten.unbind.int]),
        (written_over, [aten.slice_scatter.default, aten.select_scatter.default]),
        (padded, [aten.pad.default, aten.constant_pad_nd.default]),
        (complex_pairs, [aten.view_as_complex.default, aten.view_as_real.default]),
        (displaced, [aten.roll.default, aten.flip.default]),
        (picked, [operator.getitem]),
        (gathered, [aten.gather.default]),
        (put, [aten.index_put_.default]),
        (copied_over, [aten.copy_.default]),
    ]
)
