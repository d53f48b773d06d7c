"""Ranks' parts in pieces: slices, concatenations, padding, and pieces that are written over a value."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.rows import taken_rows, written_rows
from graphcache.analysis.shard_layout import Axis, Segment, concatenated, joined
from graphcache.analysis.shard_operands import (
    Call,
    Held,
    Share,
    Unshared,
    aligned,
    axis_of,
    needed,
    refuse,
    shape_of,
)
from graphcache.ir.graph import value_of

aten = ops.aten


def joins(node: fx.Node, held: Held) -> Share:
    """A concatenation: along the parts, or of values split alike."""
    pieces: Any = node.args[0]
    shape = shape_of(node)
    dim = ops.dimension(node, 1, len(shape))
    axes = {piece: axis for piece in pieces if (axis := axis_of(piece, held)) is not None}
    if all(axis.dim != dim for axis in axes.values()):
        return aligned(node, pieces, held, free=dim)
    refuse(any(axis.dim != dim for axis in axes.values()))
    found = concatenated([axes.get(piece) or shape_of(piece)[dim] for piece in pieces], dim)
    return Share(found, {piece: axes.get(piece) for piece in pieces})


def sliced(node: fx.Node, held: Held) -> Share:
    """A slice, or one place of a dimension."""
    source: Any = node.args[0]
    axis: Axis = needed(source, held)
    dim = ops.dimension(node, 1, value_of(source).dim())
    if node.target is aten.select.int:
        refuse(dim == axis.dim)
        return Share(axis.at(axis.dim - (dim < axis.dim)), {source: axis})
    if dim != axis.dim:
        return Share(axis, {source: axis})
    taken = taken_rows(node)
    if taken is None:
        return _strided(node, axis, source)
    return _between(axis, source, *taken[2:])


def _strided(node: fx.Node, axis: Axis, source: fx.Node) -> Share:
    """Every so many entries, of parts that are each a multiple of that."""
    given: Any = (*node.args, *(0, 0, None, 1)[len(node.args) - 1 :])
    _, _, first, last, step = given
    refuse(node.target is not aten.slice.Tensor or not isinstance(first, int) or not isinstance(last, int))
    refuse(not isinstance(step, int) or not 0 <= first < step or last < shape_of(source)[axis.dim])
    refuse(any(axis.local(segment) % step or not axis.is_even(segment) for segment in axis.segments))
    segments = tuple(Segment(segment.size // step, segment.split) for segment in axis.segments)
    call: Call = aten.slice.Tensor, (source, axis.dim, first, 2**62, step), {}
    return Share(replace(axis, segments=segments), {source: axis}, call)


def _between(axis: Axis, source: fx.Node, first: int, last: int) -> Share:
    found, start, end = axis.taken(first, last), axis.place(first), axis.place(last)
    if found is None or start is None or end is None:
        raise Unshared(f"takes the entries {first} to {last}, which cut the part of a rank")
    call: Call = aten.slice.Tensor, (source, axis.dim, start, end), {}
    return Share(found if found.is_split else None, {source: axis}, call)


def pieces(node: fx.Node, held: Held) -> Share:
    """A value cut up into pieces, or all places of a dimension."""
    source: Any = node.args[0]
    axis: Axis = needed(source, held)
    if node.target is aten.unbind.int:
        dim = ops.dimension(node, 1, value_of(source).dim())
        refuse(dim == axis.dim)
        count = len(node.meta["val"])
        return Share((axis.at(axis.dim - (dim < axis.dim)),) * count, {source: axis})
    dim = ops.dimension(node, 2, value_of(source).dim())
    sizes = [int(piece.shape[dim]) for piece in node.meta["val"]]
    if dim != axis.dim:
        return Share((axis,) * len(sizes), {source: axis})
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    found = [axis.taken(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    places = [axis.place(end) for end in (0, *ends)]
    known = [place for place in places if place is not None]
    if len(known) < len(places) or any(piece is None for piece in found):
        raise Unshared("cuts the part of a rank")
    local = [end - start for start, end in pairwise(known)]
    axes = tuple(piece if piece and piece.is_split else None for piece in found)
    return Share(axes, {source: axis}, (aten.split_with_sizes.default, (source, local, dim), {}))


def written_over(node: fx.Node, held: Held) -> Share:
    """A piece written over a value's slice, or over one place of a dimension."""
    base, piece = (item for item in node.args[:2] if isinstance(item, fx.Node))
    dim = ops.dimension(node, 2, value_of(base).dim())
    selects = node.target is aten.select_scatter.default
    axis = axis_of(base, held)
    if axis is None:
        axis = needed(piece, held)
        axis = axis.at(axis.dim + (selects and axis.dim >= dim))
    if axis.dim == dim:
        return _run_over(node, base, piece, axis, held)
    inner = axis.at(axis.dim - (selects and dim < axis.dim))
    for item, expected in ((base, axis), (piece, inner)):
        own = axis_of(item, held)
        refuse(own is not None and (own.dim != expected.dim or not own.agrees(expected)))
    return Share(axis, {base: axis, piece: inner})


def _run_over(node: fx.Node, base: fx.Node, piece: fx.Node, axis: Axis, held: Held) -> Share:
    """A piece written over a run of the entries along the parts."""
    refuse(node.target is not aten.slice_scatter.default or axis_of(base, held) is None)
    first, last, step = written_rows(node)
    found, own = axis.taken(first, last), axis_of(piece, held)
    begin, end = axis.place(first), axis.place(last)
    refuse(step != 1 or found is None or begin is None or end is None)
    assert found is not None
    inner = found if found.is_split else None
    refuse(own is not None and (inner is None or own.dim != axis.dim or not own.agrees(inner)))
    call: Call = aten.slice_scatter.default, (base, piece, axis.dim, begin, end), {}
    return Share(axis, {base: axis, piece: inner}, call)


def padded(node: fx.Node, held: Held) -> Share:
    """Padding, also before or behind the parts."""
    source: Any = node.args[0]
    amounts: Any = node.args[1]
    axis: Axis = needed(source, held)
    before, after = [*amounts, *(0 for _ in range(2 * value_of(source).dim()))][
        2 * (value_of(source).dim() - 1 - axis.dim) :
    ][:2]
    mode = node.args[2] if len(node.args) > 2 and node.target is aten.pad.default else "constant"
    refuse(min(before, after) < 0 or (mode != "constant" and bool(before or after)))
    ends = [Segment(int(size), False) for size in (before, after)]
    segments = [segment for segment in (ends[0], *axis.spread, ends[1]) if segment.size]
    found = replace(axis, outer=1, segments=joined(segments)) if before or after else axis
    return Share(found, {source: axis})
