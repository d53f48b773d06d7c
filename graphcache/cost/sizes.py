"""The sizes of a call by name, and the same call at other sizes."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import islice
from typing import TypeVar

import torch

from graphcache.ir.call import CallSpec
from graphcache.ir.errors import CaptureError, GraphCacheError

BATCH = "batch"
Place = tuple[int, int]
"""A dimension of an input: the leaf's index, and which of its dimensions."""
Grown = Mapping[Place, Fraction]
"""By how much dimensions grow."""
_AXES: Mapping[int, Mapping[str, tuple[int, ...]]] = {
    3: {"tokens": (1, 2)},
    4: {"height": (2,), "width": (3,)},
    5: {"frames": (2, 1), "height": (3,), "width": (4,)},
}
"""Which dimensions of latents may have a size, by their number; channels are found where one is refused."""
_MOST_GUESSES = 10
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Example:
    """A call of a model: its tensors, and how they make up the arguments.

    Its sizes are `batch`, what the latents have of `tokens`, `frames`, `height` and `width`, and `text`, the
    second dimension of a three-dimensional constant input; further texts are named like their argument.
    """

    spec: CallSpec
    tensors: Sequence[torch.Tensor]

    @cached_property
    def latent(self) -> int:
        """The leaf that the sizes are read off."""
        return self.spec.latents[0]

    @cached_property
    def homes(self) -> Mapping[str, tuple[Place, ...]]:
        """Where each size is read off, the likely places first."""
        axes = _AXES.get(self.tensors[self.latent].dim(), {})
        homes: dict[str, tuple[Place, ...]] = {BATCH: ((self.latent, 0),)}
        homes |= {name: tuple((self.latent, dim) for dim in dims) for name, dims in axes.items()}
        names = iter(["text"])
        for index, tensor in enumerate(self.tensors):
            is_text = self.spec.kind(index) == "constant" and tensor.dim() == 3 and tensor.is_floating_point()
            if is_text and tensor.shape[1]:
                homes[next(names, self.spec.leaf_names[index])] = ((index, 1),)
        return homes

    def size(self, place: Place) -> int:
        return int(self.tensors[place[0]].shape[place[1]])

    def resized(
        self, sizes: Mapping[str, int], make: Callable[[list[torch.Tensor]], _Made]
    ) -> tuple[list[torch.Tensor], _Made]:
        """The call's tensors at these sizes, and what `make` gives for them.

        Which inputs grow with a size is tried: the first guess that `make` accepts is taken, at first for all
        sizes together, then for one after the other.

        Raises:
            CaptureError: a size is unknown, or `make` refuses every guess; the message says which size, and
                why the likeliest was refused.
        """
        for name, size in sizes.items():
            if name not in self.homes or size < 1:
                raise CaptureError(
                    f"{name}={size}: the sizes of this call are {', '.join(self.homes)}, each 1 or more"
                )
        changed = [name for name in self.homes if name in sizes]
        likely: dict[Place, Fraction] = {}
        for name in changed:
            likely = _product(likely, next(self._guesses(name, sizes[name])))
        with suppress(GraphCacheError):
            return self._made(likely, make)
        known: Grown = {}
        found = self._made(known, make)
        for name in changed:
            known, found = self._grown_by(name, sizes[name], known, make)
        return found

    def _grown_by(
        self, name: str, size: int, known: Grown, make: Callable[[list[torch.Tensor]], _Made]
    ) -> tuple[Grown, tuple[list[torch.Tensor], _Made]]:
        """The first guess of what grows with one size, beside what is known to, that is accepted."""
        reason: GraphCacheError | None = None
        for guess in self._guesses(name, size):
            grown = _product(known, guess)
            try:
                return grown, self._made(grown, make)
            except GraphCacheError as error:
                reason = reason or error
        raise CaptureError(f"{name}={size}: {reason}") from reason

    def _made(
        self, grown: Grown, make: Callable[[list[torch.Tensor]], _Made]
    ) -> tuple[list[torch.Tensor], _Made]:
        tensors = list(self.tensors)
        for (leaf, dim), ratio in grown.items():
            before, after = tensors[leaf].shape[dim], ratio * tensors[leaf].shape[dim]
            if after.denominator > 1:
                raise CaptureError(
                    f"{self.spec.leaf_names[leaf]} would have {after} entries instead of {before}"
                )
            # what stands together stays together: the halves of a batch, the real words before the padding
            rows = torch.arange(int(after), device=tensors[leaf].device) * before // int(after)
            tensors[leaf] = tensors[leaf].index_select(dim, rows)
        return tensors, make(tensors)

    def _guesses(self, name: str, size: int) -> Iterator[Grown]:
        """Which dimensions grow with a size, and by how much, the likely guesses first."""
        seen = set[frozenset[Place]]()
        for home in self.homes[name]:
            ratio = Fraction(size, self.size(home))
            if ratio == 1 and home != self.homes[name][0]:
                continue  # where nothing grows, nothing is tried: these may be channels
            for places in islice(map(frozenset, self._places(name, home)), _MOST_GUESSES):
                if places not in seen:
                    seen.add(places)
                    yield dict.fromkeys(sorted(places), ratio)

    def _places(self, name: str, home: Place) -> Iterator[set[Place]]:
        """A batch is in every input that could hold it, or else broadcasts; of other sizes an input may have
        the same by chance, so that as few as possible grow.
        """
        likely, folded = self._candidates(name, home)
        equal, multiple = self._by_argument(likely), self._by_argument(folded)
        if name != BATCH:
            yield {home}
            yield from ({home} | group for group in (*equal, *multiple))
        yield {home} | likely
        yield from ({home} | likely | group for group in multiple)
        yield {home} | likely | folded
        yield from ({home} | (likely - group) for group in equal)

    def _candidates(self, name: str, home: Place) -> tuple[set[Place], set[Place]]:
        """Dimensions of other inputs that have a size, and those that have a multiple of it."""
        size, batch = self.size(home), self.tensors[self.latent].shape[0]
        likely, folded = set(), set()
        for leaf, tensor in enumerate(self.tensors):
            for dim, other in enumerate(tensor.shape):
                is_outer = dim == 0 and other == batch
                if leaf == home[0] or (dim > 0 if name == BATCH else is_outer):
                    continue
                if other == size:
                    likely.add((leaf, dim))
                elif other and other % size == 0:
                    folded.add((leaf, dim))
        return likely, folded

    def _by_argument(self, places: set[Place]) -> list[set[Place]]:
        """A dimension of one argument's leaves grows in all of them or in none."""
        groups: dict[tuple[str, int], set[Place]] = {}
        for leaf, dim in sorted(places):
            argument = re.split(r"[.\[]", self.spec.leaf_names[leaf])[0]
            groups.setdefault((argument, dim), set()).add((leaf, dim))
        return list(groups.values())


def _product(one: Grown, other: Grown) -> dict[Place, Fraction]:
    """What grows by both, such as an image's tokens by its height and its width."""
    return {place: one.get(place, Fraction(1)) * other.get(place, Fraction(1)) for place in (*one, *other)}
