"""Where the ranks' parts lie in a value that each rank holds a part of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Segment:
    """Entries that follow each other: all ranks hold them, or if `split` each an equal part, in order.

    Of a number that does not divide, as of chosen tokens, the last entry stands again in the last parts.
    """

    size: int
    split: bool


@dataclass(frozen=True, slots=True)
class Axis:
    """The one dimension of a value along which ranks hold parts of it.

    The dimension runs `outer` times over the segments. A rank's value has its part of each split segment and
    all of the others, in the same order; every other dimension is whole.
    """

    dim: int
    outer: int
    segments: tuple[Segment, ...]
    ranks: int

    @staticmethod
    def of(dim: int, size: int, ranks: int) -> "Axis | None":
        """A dimension of which each rank has an equal part; None if there is none."""
        return Axis(dim, 1, (Segment(size, True),), ranks) if size > 1 and size % ranks == 0 else None

    def local(self, segment: Segment) -> int:
        """How many entries of a segment a rank holds."""
        return -(-segment.size // self.ranks) if segment.split else segment.size

    def is_even(self, segment: Segment) -> bool:
        """Whether every entry of a segment stands in one part alone, or in each of them."""
        return not segment.split or segment.size % self.ranks == 0

    @property
    def length(self) -> int:
        """Entries of all segments."""
        return sum(segment.size for segment in self.segments)

    @property
    def held(self) -> int:
        """Those of them that a rank holds."""
        return sum(map(self.local, self.segments))

    def shape(self, whole: Sequence[int]) -> list[int]:
        """The shape of a rank's part of a value of this shape."""
        sizes = [int(size) for size in whole]
        sizes[self.dim] = self.outer * self.held
        return sizes

    def at(self, dim: int) -> "Axis":
        return replace(self, dim=dim)

    @property
    def spread(self) -> tuple[Segment, ...]:
        """All segments of the dimension, one after the other."""
        return self.segments * self.outer

    @property
    def is_split(self) -> bool:
        """Whether ranks hold different entries at all."""
        return any(segment.split for segment in self.segments)

    def agrees(self, other: "Axis") -> bool:
        """Whether both say the same of a dimension's entries."""
        return joined(self.spread) == joined(other.spread)

    def taken(self, first: int, last: int) -> "Axis | None":
        """The dimension's entries from first to last: an axis without split segments if all ranks hold them
        all, None if they cut a split segment.
        """
        if first % self.length == 0 and last > first and (last - first) % self.length == 0:
            return replace(self, outer=(last - first) // self.length)
        found, offset = list[Segment](), 0
        for segment in self.spread:
            start, end = max(first, offset), min(last, offset + segment.size)
            if start < end:
                if segment.split and end - start != segment.size:
                    return None
                found.append(Segment(end - start, segment.split))
            offset += segment.size
        return replace(self, outer=1, segments=joined(found))

    def place(self, entry: int) -> int | None:
        """Where a rank's part has what begins with this entry; None if that is within a split segment."""
        offset = before = 0
        for segment in self.spread:
            if entry == offset:
                return before
            if entry < offset + segment.size and not segment.split:
                return before + entry - offset
            offset, before = offset + segment.size, before + self.local(segment)
        return before if entry == offset else None

    def regrouped(self, shape: Sequence[int], result: Sequence[int]) -> "Axis | None":
        """The axis of a view, by where its dimensions lie in the order of all entries; None if the view
        takes a rank's part apart.
        """
        left = math.prod(shape[: self.dim]) * self.outer
        right = math.prod(shape[self.dim + 1 :])
        before = 1
        for dim, size in enumerate(result):
            outer, odd = divmod(left, before)
            if size > 1 and not odd and size % outer == 0 and size > outer:
                after = math.prod(result[dim + 1 :])
                return self._scaled(dim, outer, right, after)
            before *= size
        return None

    def _scaled(self, dim: int, outer: int, times: int, by: int) -> "Axis | None":
        segments = []
        for segment in self.segments:
            size, odd = divmod(segment.size * times, by)
            found = Segment(size, segment.split)
            if odd or (times != by and not (self.is_even(segment) and self.is_even(found))):
                return None
            segments.append(found)
        return Axis(dim, outer, tuple(segments), self.ranks)


def joined(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """The same segments, whole ones that follow each other as one."""
    found: list[Segment] = []
    for segment in segments:
        if found and not segment.split and not found[-1].split:
            found[-1] = Segment(found[-1].size + segment.size, False)
        else:
            found.append(segment)
    return tuple(found)


def concatenated(parts: Sequence["Axis | int"], dim: int) -> Axis:
    """The axis of a concatenation along it; numbers are the sizes of parts that all ranks hold."""
    axes = [part for part in parts if isinstance(part, Axis)]
    if len(axes) == len(parts) and all(axis.segments == axes[0].segments for axis in axes):
        return replace(axes[0], outer=sum(axis.outer for axis in axes))
    segments = list[Segment]()
    for part in parts:
        segments += part.spread if isinstance(part, Axis) else [Segment(part, False)]
    return Axis(dim, 1, joined(segments), axes[0].ranks)
