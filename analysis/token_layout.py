"""Where samples and tokens lie in a value: every dimension is a product of factors, the outermost first."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

Kind = Literal["other", "row", "token"]


@dataclass(frozen=True, slots=True)
class Window:
    """Entries of a factor that hold tokens: from `start` on the tokens `first`, `first` + 1, …, so many."""

    start: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class TokenFactor:
    """Part of a dimension: `size` entries that count rows, tokens, or anything else.

    From one entry to the next the number of the row or token grows by `stride`. With a `window`, which
    factors of single tokens have, the entries outside of it are no tokens of the site.
    """

    size: int
    kind: Kind = "other"
    stride: int = 1
    window: Window | None = None

    @property
    def held(self) -> Window:
        """The entries that hold tokens, of a factor of single tokens."""
        return self.window or Window(0, 0, self.size)

    def part(self, inner: int, size: int) -> "TokenFactor | None":
        """The entries that change every `inner` ones, so many of them; None if the window is cut up."""
        if inner == 1 and size == self.size:
            return self
        stride = 1 if self.kind == "other" else self.stride * inner
        return None if self.window else TokenFactor(size, self.kind, stride)

    def around(self, inner: "TokenFactor") -> "TokenFactor | None":
        """The two as one factor, if they are one."""
        fits = self.kind == inner.kind and not self.window and not inner.window
        if fits and (self.kind == "other" or self.stride == inner.stride * inner.size):
            return TokenFactor(self.size * inner.size, self.kind, inner.stride if self.kind != "other" else 1)
        return None


Dimension = tuple[TokenFactor, ...]
Layout = tuple[Dimension, ...]


def other(size: int) -> Dimension:
    """A dimension without rows and tokens."""
    return (TokenFactor(size),) if size != 1 else ()


def token_part(size: int, window: Window, tokens: int) -> TokenFactor:
    """A factor of single tokens, of which the window holds some or all."""
    return TokenFactor(size, "token", 1, None if window == Window(0, 0, size) and size == tokens else window)


def stream_layout(shape: Sequence[int]) -> Layout:
    """A stream's: rows outermost, then tokens along all dimensions up to the channels."""
    *outer, channels = shape
    rows, *tokens = outer if len(outer) > 1 else (1, *outer)
    layout, stride = list[Dimension](), 1
    for size in reversed(tokens):
        layout.insert(0, merged([TokenFactor(size, "token", stride)]))
        stride *= size
    sides = [merged([TokenFactor(rows, "row")])] if len(outer) > 1 else []
    return (*sides, *layout, other(channels))


def tokens_of(layout: Layout) -> tuple[int, int]:
    """Rows and tokens of a layout without windows."""
    counts = {"row": 1, "token": 1, "other": 1}
    for factor in (factor for dimension in layout for factor in dimension):
        counts[factor.kind] *= factor.size
    return counts["row"], counts["token"]


def merged(factors: Iterable[TokenFactor]) -> Dimension:
    """The same entries in as few factors as possible."""
    result: list[TokenFactor] = []
    for factor in factors:
        if factor.size == 1 and factor.window is None:
            continue
        whole = result[-1].around(factor) if result else None
        if whole is None:
            result.append(factor)
        else:
            result[-1] = whole
    return tuple(result)


def is_marked(dimension: Dimension, *kinds: Kind) -> bool:
    """Whether a dimension runs over rows or tokens, or over one of some kinds."""
    return any(factor.kind in (kinds or ("row", "token")) for factor in dimension)


def marks(layout: Layout) -> dict[int, Dimension]:
    """The dimensions that run over rows or tokens, by their place from the last (-1)."""
    rank = len(layout)
    return {dim - rank: found for dim, found in enumerate(layout) if is_marked(found)}


def laid(shape: Sequence[int], marked: Mapping[int, Dimension]) -> Layout:
    """The layout of a shape with these dimensions over rows and tokens."""
    rank = len(shape)
    return tuple(marked.get(dim - rank, other(int(size))) for dim, size in enumerate(shape))


def size_of(dimension: Dimension) -> int:
    """The entries of a dimension."""
    total = 1
    for factor in dimension:
        total *= factor.size
    return total


def chosen_size(factor: TokenFactor, tokens: int, count: int) -> int:
    """The entries that are left of a factor when `count` of the tokens are chosen.

    Where tokens lie along several factors, they all move to the one that varies most slowly.
    """
    if factor.kind != "token":
        return factor.size
    return count if factor.window or factor.stride * factor.size == tokens else 1


def chosen_shape(layout: Layout, tokens: int, count: int) -> list[int]:
    """The shape of a value that holds the chosen tokens alone."""
    sizes = [[chosen_size(factor, tokens, count) for factor in dimension] for dimension in layout]
    return [int(torch.Size(found).numel()) for found in sizes]


def whole_tokens(layout: Layout, tokens: int) -> bool:
    """Whether a value holds all tokens and nothing beside them."""
    windows = [factor.window for dimension in layout for factor in dimension if factor.window]
    return not windows and tokens_of(layout)[1] == tokens


def halved(layout: Layout, rows: int) -> Layout:
    """The layout of one half of the rows, which lie one half after the other."""
    (outermost, *rest), *dims = layout
    return ((replace(outermost, size=rows), *rest), *dims)


def viewed(layout: Layout, result: torch.Tensor) -> Layout | None:
    """The layout of a view of all elements of a contiguous tensor; None if it takes rows or tokens apart.

    Args:
        layout: of the contiguous tensor.
        result: its view, whose sizes and strides say where each dimension lies in it.
    """
    if not _is_whole(result):
        return None
    factors = merged(factor for dimension in layout for factor in dimension)
    distances, distance = list[tuple[int, TokenFactor]](), 1
    for factor in reversed(factors):
        distances.append((distance, factor))
        distance *= factor.size
    dims = [_along(*pair, distances) for pair in zip(result.shape, result.stride(), strict=True)]
    found = tuple(dim for dim in dims if dim is not None)
    return found if len(found) == len(dims) else None


def _is_whole(result: torch.Tensor) -> bool:
    """Whether a view has every element of what it views once."""
    pairs = sorted(
        (stride, size) for size, stride in zip(result.shape, result.stride(), strict=True) if size > 1
    )
    distance = 1
    for stride, size in pairs:
        if stride != distance:
            return False
        distance *= size
    return not result.storage_offset()


def _along(size: int, stride: int, distances: Sequence[tuple[int, TokenFactor]]) -> Dimension | None:
    """The factors that a dimension of this size and stride runs over."""
    found: list[TokenFactor] = []
    while size > 1:
        distance, factor = next((d, f) for d, f in distances if d <= stride < d * f.size)
        inner, odd = divmod(stride, distance)
        if odd or factor.size % inner:
            return None
        rest = factor.size // inner
        taken = min(rest, size)
        part = factor.part(inner, taken)
        if size % taken or rest % taken or part is None:
            return None
        found.insert(0, part)
        size, stride = size // taken, stride * taken
    return merged(found)
