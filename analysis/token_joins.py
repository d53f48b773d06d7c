"""Tokens in pieces: slices, concatenations, padding, and pieces that are written over a value."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import fx

from graphcache.analysis import ops
from graphcache.analysis.rows import SPLITS, taken_rows, written_rows
from graphcache.analysis.token_layout import (
    Layout,
    TokenFactor,
    Window,
    is_marked,
    laid,
    marks,
    other,
    token_part,
)
from graphcache.analysis.token_operands import Followed, Known, Untokenised, aligned, refuse
from graphcache.ir.graph import value_of

aten = ops.aten


def sliced(node: fx.Node, known: Known) -> Followed:
    """A slice, one piece of a split, or one place of a dimension."""
    source: Any = node.args[0]
    pieces = node.target is operator.getitem
    call = source if pieces else node
    if pieces and call.target not in (*SPLITS, aten.unbind.int):
        raise Untokenised(node, f"is a result of {call.target}, which has no rule")
    source = call.args[0]
    layout = known.needed(node, source)
    dim = ops.dimension(call, 2 if call.target in SPLITS else 1, len(layout))
    if call.target in (aten.select.int, aten.unbind.int):
        refuse(node, is_marked(layout[dim]))
        return Followed((*layout[:dim], *layout[dim + 1 :]), {source: layout})
    size = int(value_of(node).shape[dim])
    if size == value_of(source).shape[dim] and taken_rows(node) is not None:
        return Followed(layout, {source: layout}, how="passed")
    if not is_marked(layout[dim]):
        return Followed((*layout[:dim], other(size), *layout[dim + 1 :]), {source: layout})
    taken = taken_rows(node)
    factor = _only_token(node, layout, dim, known)
    if taken is None:
        raise Untokenised(node, "takes its part in a way that is not known")
    _, _, begin, end = taken
    held = factor.held
    first, last = max(held.start, begin), min(held.start + held.count, end)
    if first >= last or size == 1:
        raise Untokenised(node, "takes a part that holds none of the site's tokens, or a single one")
    window = Window(first - begin, held.first + first - held.start, last - first)
    part = token_part(size, window, known.tokens)
    return Followed((*layout[:dim], (part,), *layout[dim + 1 :]), {source: layout}, how="passed")


def _only_token(node: fx.Node, layout: Layout, dim: int, known: Known) -> TokenFactor:
    """The factor of single tokens that is all of a dimension."""
    factors = layout[dim]
    refuse(node, len(factors) != 1 or factors[0].kind != "token" or factors[0].stride != 1)
    refuse(node, factors[0].window is None and factors[0].size != known.tokens)
    return factors[0]


@dataclass(frozen=True)
class _Part:
    """A piece, and the tokens that it gives to the result; the window starts in the result's entries."""

    node: fx.Node
    window: Window


def concatenated(node: fx.Node, known: Known) -> Followed:
    """A concatenation: of streams along the tokens, of a stream's pieces, or of channels."""
    pieces: Any = node.args[0]
    shape = value_of(node).shape
    dim = ops.dimension(node, 1, len(shape))
    own = [piece for piece in pieces if piece in known.layouts]
    if not own:
        known.needed(node, next(piece for piece in pieces if known.is_own(piece)))
    if not any(is_marked(known.layouts[piece][dim]) for piece in own):
        return aligned(node, pieces, known, free=(dim - len(shape),))
    parts, offset = list[_Part](), 0
    for piece in pieces:
        size = int(value_of(piece).shape[dim])
        if piece in known.layouts:
            held = _only_token(node, known.layouts[piece], dim, known).held
            parts.append(_Part(piece, replace(held, start=held.start + offset)))
        offset += size
    return _joined(node, dim, parts, known)


def written_over(node: fx.Node, known: Known) -> Followed:
    """A piece written over a value's slice, or over one place of a dimension."""
    base, piece = (item for item in node.args[:2] if isinstance(item, fx.Node))
    rank = value_of(node).dim()
    dim = ops.dimension(node, 2, rank)
    if node.target is aten.select_scatter.default:
        return _selected_over(node, dim, known)
    owner = base if base in known.layouts else piece
    if not is_marked(known.needed(node, owner)[dim]):
        return aligned(node, [base, piece], known, free=(dim - rank,))
    first, last, step = written_rows(node)
    refuse(node, step != 1)
    parts = list[_Part]()
    if base in known.layouts:
        held = _only_token(node, known.layouts[base], dim, known).held
        parts += [_Part(base, part) for part in _outside(held, first, last)]
    if piece in known.layouts:
        held = _only_token(node, known.layouts[piece], dim, known).held
        parts.append(_Part(piece, replace(held, start=held.start + first)))
    return _joined(node, dim, parts, known)


def _selected_over(node: fx.Node, dim: int, known: Known) -> Followed:
    """A value without the dimension, written over one place of it."""
    base, piece = (item for item in node.args[:2] if isinstance(item, fx.Node))
    owner = known.layouts.get(piece)
    layout = known.of(base) or (owner and (*owner[:dim], other(value_of(node).shape[dim]), *owner[dim:]))
    if layout is None:
        raise known.failed[piece]
    refuse(node, is_marked(layout[dim]))
    layout = laid([int(size) for size in value_of(node).shape], marks(layout))
    rest = (*layout[:dim], *layout[dim + 1 :])
    refuse(node, known.of(piece) not in (None, rest) or known.of(base) not in (None, layout))
    return Followed(layout, {base: layout, piece: rest})


def _outside(held: Window, first: int, last: int) -> list[Window]:
    """What is left of a window beside the entries from first to last."""
    end = held.start + held.count
    pieces = [(held.start, min(first, end)), (max(last, held.start), end)]
    return [Window(a, held.first + a - held.start, b - a) for a, b in pieces if a < b]


def _joined(node: fx.Node, dim: int, parts: Sequence[_Part], known: Known) -> Followed:
    """One window out of pieces that follow each other."""
    ordered = sorted(parts, key=lambda part: part.window.first)
    for one, following in pairwise(ordered):
        a, b = one.window, following.window
        if (a.start + a.count, a.first + a.count) != (b.start, b.first):
            raise Untokenised(node, "joins tokens in another order, or leaves some of them out")
    if not ordered:
        raise Untokenised(node, "holds none of the site's tokens that could be followed")
    first, count = ordered[0].window, sum(part.window.count for part in ordered)
    size = int(value_of(node).shape[dim])
    window = Window(first.start, first.first, count)
    factor = token_part(size, window, known.tokens)
    layouts = {part.node: known.layouts[part.node] for part in ordered}
    sides = {node_: (*found[:dim], *found[dim + 1 :]) for node_, found in layouts.items()}
    if len(set(sides.values())) > 1:
        raise Untokenised(node, "meets tokens along different dimensions")
    given = layouts[ordered[0].node]
    layout = (*given[:dim], (factor,), *given[dim + 1 :])
    if len(ordered) == 1:
        return Followed(layout, layouts, how="passed")
    places = tuple((part.node, part.window.first) for part in ordered)
    return Followed(layout, layouts, how="joined", parts=places)


def padded(node: fx.Node, known: Known) -> Followed:
    """Padding: of channels, or of the tokens' dimension, whose tokens stay what they are."""
    source: Any = node.args[0]
    amounts: Any = node.args[1]
    layout = known.needed(node, source)
    rank = len(layout)
    shape = value_of(node).shape
    moved = [
        dim for dim in range(rank) if shape[dim] != value_of(source).shape[dim] and is_marked(layout[dim])
    ]
    if not moved:
        refuse(node, any(is_marked(layout[rank - 1 - i // 2]) for i, n in enumerate(amounts) if n))
        return Followed(laid([int(size) for size in shape], marks(layout)), {source: layout})
    (dim, *more), (before, after) = moved, amounts[2 * (rank - 1 - moved[0]) :][:2]
    refuse(node, bool(more) or min(before, after) < 0 or any(_beside(amounts, rank - 1 - dim)))
    held = _only_token(node, layout, dim, known).held
    factor = token_part(int(shape[dim]), replace(held, start=held.start + before), known.tokens)
    return Followed((*layout[:dim], (factor,), *layout[dim + 1 :]), {source: layout}, how="passed")


def _beside(amounts: Sequence[int], place: int) -> list[int]:
    """The amounts of all dimensions but one."""
    return [*amounts[: 2 * place], *amounts[2 * place + 2 :]]
