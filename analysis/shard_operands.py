"""What rules of operations say: which part of a result a rank computes, and what of its operands it needs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphcache.analysis.shard_layout import Axis
from graphcache.ir.graph import value_of


class Unshared(Exception):
    """An operation cannot be computed from the ranks' parts of its operands."""


Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""An operation with its arguments."""
Placed = Axis | tuple[Axis | None, ...] | None
"""Along which axis a value is split, or each of an operation's several results; None: it is whole."""


@dataclass(frozen=True)
class Named:
    """Entries of a value along its axis, as an index says them by their places in the whole.

    `elsewhere`: some of them may be other ranks'.
    """

    axis: Axis
    elsewhere: bool


@dataclass(frozen=True)
class Share:
    """How a rank computes its part of a result.

    `axis` says where the part lies, None for a result that is whole on all ranks; of an operation with
    several results there is one for each. `needs` are the operands by what has to be there of each: a part,
    or all (None). `call` are the operation and arguments that give the part, where they are others than the
    node's own. What takes or writes entries that an index names has `named` ones.
    """

    axis: Placed
    needs: Mapping[fx.Node, Axis | None] = field(default_factory=dict)
    call: Call | None = None
    named: Named | None = None


Held = Mapping[fx.Node, Placed]
"""Where the parts of values lie; those of whole values are None, or left out."""
Rule = Callable[[fx.Node, Held], Share]


def axis_of(node: fx.Node, held: Held) -> Axis | None:
    """The axis of a tensor."""
    found = held.get(node)
    return None if isinstance(found, tuple) else found


def needed(node: fx.Node, held: Held) -> Axis:
    """The axis of an operand that has to be split."""
    axis = axis_of(node, held)
    if axis is None:
        raise Unshared("gets a part by an operand that no rule follows")
    return axis


def shape_of(node: fx.Node) -> list[int]:
    return [int(size) for size in value_of(node).shape]


def refuse(mixes: bool) -> None:
    if mixes:
        raise Unshared("combines what different ranks hold")


def aligned(
    node: fx.Node,
    items: Iterable[fx.Node],
    held: Held,
    shape: Sequence[int] | None = None,
    free: int | None = None,
) -> Share:
    """Operands that stand upon each other, dimension by dimension from the last one.

    Args:
        node: the operation.
        items: its operands.
        held: what is split.
        shape: of the result, if not the node's own.
        free: a dimension of the result in which operands need not agree.
    """
    shape = shape_of(node) if shape is None else shape
    items = list(dict.fromkeys(items))
    axes = {item: axis for item in items if (axis := axis_of(item, held)) is not None}
    if not axes:
        raise Unshared("gets a part by an operand that no rule follows")
    first, given = next(iter(axes.items()))
    place = given.dim - value_of(first).dim()
    result = given.at(place + len(shape))
    for item, axis in axes.items():
        refuse(axis.dim - value_of(item).dim() != place or not axis.agrees(given))
    refuse(result.dim < 0 or result.dim == free or shape[result.dim] != result.outer * result.length)
    return Share(result, {item: met(item, place, result) for item in items})


def met(item: fx.Node, place: int, axis: Axis) -> Axis | None:
    """What an operand has to be where others are split in the dimension at this place from the last."""
    shape = value_of(item).shape
    dim = len(shape) + place
    return None if dim < 0 or shape[dim] == 1 else axis.at(dim)
