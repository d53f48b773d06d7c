"""Entries that an index names: taken from ranks' parts, or written into them."""

from typing import Any

import torch
from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.shard_layout import Axis, Segment
from graphcache.analysis.shard_operands import Held, Named, Share, axis_of, met, refuse, shape_of
from graphcache.ir.graph import value_of

aten = ops.aten

_COUNTED = frozenset(
    {
        aten.arange.default,
        aten.reshape.default,
        aten.view.default,
        aten.permute.default,
        aten.expand.default,
        aten.slice.Tensor,
        aten.add.Tensor,
        aten.clamp.default,
        aten.div.Tensor_mode,
        aten.remainder.Scalar,
    }
)
"""Of what indices are made that name the same entries at every step."""


def gathered(node: fx.Node, held: Held) -> Share:
    """Entries along one dimension, each from where the index says.

    Of entries that different ranks hold each rank gets a part of what is named, whoever holds it: an
    exchange of these alone.
    """
    source, given, index, *_ = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, fx.Node)
    assert isinstance(given, int)
    dim = given % value_of(source).dim()
    own, places = axis_of(source, held), axis_of(index, held)
    if places is not None and places.dim == dim:
        return Share(places, {source: None, index: places})
    if own is not None and own.dim == dim:
        refuse(places is not None)
        if shape_of(index) == shape_of(source) and _run(index, dim) == (0, shape_of(source)[dim]):
            return Share(own, {source: own}, (aten.alias.default, (source,), {}))
        count = shape_of(index)[dim]
        axis = Axis(dim, 1, (Segment(count, True),), own.ranks) if count > 1 else None
        return Share(axis, {source: own, index: None}, named=Named(own, True))
    axis = own or places
    assert axis is not None
    refuse(own is not None and places is not None and (own.dim != places.dim or not own.agrees(places)))
    refuse(shape_of(source)[axis.dim] != shape_of(index)[axis.dim])
    return Share(axis, {source: axis, index: axis})


def put(node: fx.Node, held: Held) -> Share:
    """Values written to where indices say, in place: each rank writes what lies in its part."""
    into, indices, values, *further = node.args
    assert isinstance(into, fx.Node)
    assert isinstance(indices, list | tuple)
    assert isinstance(values, fx.Node)
    axis = axis_of(into, held)
    if axis is None:
        return Share(None, dict.fromkeys(node.all_input_nodes))
    refuse(bool(further) or axis.dim >= len(indices) or not all(isinstance(i, fx.Node) for i in indices))
    given: list[Any] = list(indices)
    along = given[axis.dim]
    rank = max(value_of(index).dim() for index in given)
    wide = [dim for dim, size in enumerate(shape_of(along), -value_of(along).dim()) if size > 1]
    run = _run(along, wide[0]) if len(wide) == 1 else None
    found = axis.taken(run[0], sum(run)) if run else None
    if found is None:
        return Share(axis, {into: axis} | dict.fromkeys((*given, values)), named=Named(axis, True))
    place = wide[0]
    part = found.at(rank + place) if found.is_split else None
    behind = value_of(into).dim() - len(given)
    needs = {index: part and met(index, place, part) for index in given}
    needs |= {values: part and met(values, place - behind, part), into: axis}
    for item, need in needs.items():
        there = axis_of(item, held)
        refuse(there is not None and need is not None and (there.dim != need.dim or not there.agrees(need)))
    return Share(axis, needs, named=Named(axis, False))


def _run(index: fx.Node, dim: int) -> tuple[int, int] | None:
    """The first and the number of the entries that an index names one after the other along a dimension,
    alike in all others; None if it does not.
    """
    values = _known(ops.behind(index, frozenset({aten.expand.default})))
    if values is None or values.dim() != value_of(index).dim() or not values.numel():
        return None
    lines = values.movedim(dim, 0).flatten(1)
    count, first = lines.shape[0], int(lines[0, 0])
    if count != shape_of(index)[dim]:
        return None
    expected = torch.arange(first, first + count)[:, None]
    return (first, count) if bool((lines == expected).all()) else None


def _known(index: fx.Node) -> torch.Tensor | None:
    """The values of an index that depends on nothing."""
    if index.target not in _COUNTED:
        return None
    made = {item: _known(item) for item in index.all_input_nodes}
    if any(values is None for values in made.values()):
        return None
    args, kwargs = fx.map_arg((index.args, index.kwargs), made.__getitem__)
    target: Any = index.target
    with torch.device("cpu"):
        found: torch.Tensor = target(*args, **{name: kwargs[name] for name in kwargs if name != "device"})
    return found
