"""What rules of operations ask and answer: which operands hold tokens, and where a result holds them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import fx

from graphcache.analysis.token_layout import Layout, is_marked, laid, marks, size_of
from graphcache.ir.graph import value_of

How = Literal["same", "passed", "shaped", "expanded", "joined"]


class Untokenised(Exception):
    """A node has no tokens to be chosen from; `node` says which."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(why)
        self.node = node


def refuse(node: fx.Node, mixes: bool) -> None:
    """Refuse an operation that combines several tokens."""
    if mixes:
        raise Untokenised(node, "mixes tokens or takes them apart")


@dataclass(frozen=True)
class Followed:
    """How the chosen tokens of a result are computed.

    `along` are operands of which the chosen tokens are taken, each in the layout in which the operation meets
    it; `whole` are met by the chosen tokens as they are. The operation is applied to them as it is (`same`),
    with the sizes of its result put in place (`shaped`, `expanded`), or not at all: its only operand's tokens
    are `passed` on, or each token is taken from one of several `parts` (`joined`), which hold the tokens from
    their number on.
    """

    layout: Layout
    along: Mapping[fx.Node, Layout]
    whole: tuple[fx.Node, ...] = ()
    how: How = "same"
    parts: tuple[tuple[fx.Node, int], ...] = ()


@dataclass
class Known:
    """The values that are made from the site's tokens: the layouts of those that could be followed."""

    rows: int
    tokens: int
    layouts: dict[fx.Node, Layout] = field(default_factory=dict)
    failed: dict[fx.Node, Untokenised] = field(default_factory=dict)

    def is_own(self, node: fx.Node) -> bool:
        return node in self.layouts or node in self.failed

    def of(self, node: fx.Node) -> Layout | None:
        """The layout of a value, None if it is not made from the site's tokens.

        Raises:
            Untokenised: it is, but they could not be followed.
        """
        if node in self.failed:
            raise self.failed[node]
        return self.layouts.get(node)

    def needed(self, node: fx.Node, source: fx.Node) -> Layout:
        """The layout of an operand that has to hold tokens."""
        layout = self.of(source)
        if layout is None:
            raise Untokenised(node, "gets the site's tokens by an operand that no rule follows")
        return layout


def aligned(
    node: fx.Node,
    items: Iterable[fx.Node],
    known: Known,
    shape: Sequence[int] | None = None,
    free: Sequence[int] = (),
) -> Followed:
    """Operands that stand upon each other, dimension by dimension from the last one.

    Args:
        node: the operation.
        items: its operands.
        known: what is followed.
        shape: of the result, if not the node's own.
        free: dimensions, counted from the last, in which operands and result need not agree.
    """
    sizes = [int(size) for size in (value_of(node).shape if shape is None else shape)]
    items = list(dict.fromkeys(items))
    own = {item: layout for item in items if (layout := known.of(item)) is not None}
    if not own:
        raise Untokenised(node, "gets the site's tokens by an operand that no rule follows")
    marked = marks(next(iter(own.values())))
    for layout in own.values():
        if marks(layout) != marked:
            raise Untokenised(node, "meets tokens along different dimensions")
    refuse(node, any(dim in free or sizes[dim] != size_of(found) for dim, found in marked.items()))
    layout = laid(sizes, marked)
    along, whole = dict[fx.Node, Layout](own), list[fx.Node]()
    for item in items:
        if item not in own:
            gathers = meets_tokens(value_of(item).shape, layout)
            met = layout if not free else _met(item, layout, free)
            along |= {item: met} if gathers else {}
            whole += [] if gathers else [item]
    return Followed(layout, along, tuple(whole))


def _met(item: fx.Node, layout: Layout, free: Sequence[int]) -> Layout:
    """The layout with an operand's own sizes in some dimensions."""
    shape, rank = value_of(item).shape, len(layout)
    sizes = [shape[dim] if dim in free else size_of(layout[dim]) for dim in range(-rank, 0)]
    return laid(sizes, marks(layout))


def meets_tokens(shape: Sequence[int], layout: Layout) -> bool:
    """Whether an operand of this shape has several entries along a dimension that runs over tokens."""
    rank = min(len(shape), len(layout))
    return any(shape[dim] != 1 and is_marked(layout[dim], "token") for dim in range(-rank, 0))
