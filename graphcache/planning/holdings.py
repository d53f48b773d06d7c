"""Which part of a site's value a rank holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from graphcache.analysis.shard_layout import Axis
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.ranks import Ranks


@dataclass(frozen=True)
class Cut:
    """Along which axis the ranks of one dimension of a mesh share a value out; None: each holds all of it."""

    ranks: Ranks
    axis: Axis | None


@dataclass(frozen=True)
class Holding:
    """This rank's part of a value of some shape: one cut after the other."""

    shape: tuple[int, ...]
    cuts: tuple[Cut, ...]

    @staticmethod
    def of(part: Sequence[int], cuts: Sequence[Cut]) -> "Holding":
        """By the shape of the part."""
        shape = [int(size) for size in part]
        for cut in reversed(cuts):
            if cut.axis is not None:
                if shape[cut.axis.dim] != cut.axis.outer * cut.axis.held:
                    raise GraphCacheError(
                        f"mesh=: a rank's part of a site is {tuple(part)}, which its cuts do not make; "
                        "report this as a fault of graphcache"
                    )
                shape[cut.axis.dim] = cut.axis.outer * cut.axis.length
        return Holding(tuple(shape), tuple(cuts))

    def counted(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the whole shape, with zeros for what an earlier rank holds too."""
        for cut in self.cuts:
            rank, axis = cut.ranks.rank, cut.axis
            if axis is None:
                whole = torch.zeros_like(whole) if rank else whole
            else:
                whole = _part(whole, axis, rank, 0 if rank else None)
        return whole

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """The entries of the whole's first dimension that the part has, in its order."""
        return self.entries(0)

    def entries(self, dim: int) -> tuple[int, ...]:
        """Those of any dimension."""
        found = torch.arange(self.shape[dim])
        for cut in self.cuts:
            if cut.axis is not None and cut.axis.dim == dim:
                found = _part(found, cut.axis.at(0), cut.ranks.rank)
        return tuple(found.tolist())


class Rows(NamedTuple):
    """The rows of a tensor: how many all ranks hold between them, and which of those this one has."""

    amount: int
    own: Sequence[int]

    @staticmethod
    def of(tensor: Tensor, held: Holding | None = None) -> "Rows":
        """Of a tensor that is whole, or a part."""
        amount = len(tensor) if tensor.dim() else 0
        return Rows(amount, range(amount)) if held is None else Rows(held.shape[0], held.rows)

    def of_samples(self, samples: int) -> "Rows":
        """The same where each of so many samples has as many rows, one after the other.

        Raises:
            GraphCacheError: the rank has more rows of one sample than of another.
        """
        whose = [row * samples // self.amount for row in self.own]
        own = [*dict.fromkeys(whose)]
        if whose != [sample for sample in own for _ in range(len(whose) // len(own))]:
            raise GraphCacheError(
                f"mesh=: a rank has the rows {whose} of {samples} samples, which cannot be told apart; "
                "profile without mesh="
            )
        return Rows(samples, own)


def samples_of(rows: Sequence[Rows], count: int) -> list[int] | None:
    """Of so many samples those that tensors have rows of, in their order.

    None where a tensor's first dimension is not the samples', once or twice.

    Raises:
        GraphCacheError: the tensors have rows of different samples, or of one more than of another.
    """
    if any(amount not in (count, 2 * count) for amount, _ in rows):
        return None
    found = [[row % count for row in own] for _, own in rows]
    kept = [*dict.fromkeys(found[0])]
    if any(samples != kept * (len(samples) // len(kept)) for samples in found):
        raise GraphCacheError(
            f"mesh=: a rank has rows of the samples {found}, which cannot be told apart; profile without "
            "mesh="
        )
    return kept


def _part(whole: Tensor, axis: Axis, rank: int, shared: int | None = None) -> Tensor:
    """A rank's part of a tensor; `shared` takes the place of what all ranks hold."""
    shape = [*whole.shape]
    groups = whole.reshape(*shape[: axis.dim], axis.outer, axis.length, *shape[axis.dim + 1 :])
    parts, offset = list[Tensor](), 0
    for segment in axis.segments:
        count = axis.local(segment)
        part = groups.narrow(axis.dim + 1, offset + segment.split * rank * count, count)
        parts.append(part if segment.split or shared is None else torch.full_like(part, shared))
        offset += segment.size
    return torch.cat(parts, axis.dim + 1).flatten(axis.dim, axis.dim + 1)
