"""Which sizes of a call can be changed, found by trial: captures of a model at several of them."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch

from graphcache.analysis.symbolic import BATCH, CostError, Sized, solve
from graphcache.compiler.program import Program
from graphcache.ir.call import CallSpec
from graphcache.ir.errors import GraphCacheError
from graphcache.libraries.quiet import quiet_shapes
from graphcache.runtime.engine import Engine

Example = Mapping[str, Any] | tuple[Any, ...]
Place = tuple[int, int]
"""A dimension of an input: the leaf's index, and which of its dimensions."""

ALL = "all"
"""The name of an explicit call in which every symbol's size differs."""
_AXES: Mapping[int, Mapping[str, tuple[int, ...]]] = {
    3: {"tokens": (1, 2)},
    4: {"height": (2,), "width": (3,)},
    5: {"frames": (2, 1), "height": (3,), "width": (4,)},
}
"""Which dimensions of latents may have a size, by their number; channels are found where one is refused."""
_MOST_TRIALS = 10


@dataclass(frozen=True)
class _Varied:
    """A size that can be changed: `home` is where it is read off, `places` are what grows with it."""

    name: str
    home: Place
    places: frozenset[Place]


@dataclass(frozen=True)
class SizedProgram:
    """A model made ready to run at certain sizes, by symbol."""

    sizes: Mapping[str, int]
    program: Program


@dataclass(frozen=True)
class Found:
    """Captures, the base's first and last one in which all sizes differ.

    `fixed` are reasons why sizes stay, by symbol, and `base` the example's sizes, fixed ones included.
    """

    captures: tuple[SizedProgram, ...]
    fixed: Mapping[str, str]
    base: Mapping[str, int]


def vary(
    engine: Engine,
    example: Example,
    sizes: Mapping[str, tuple[int, int] | None] | None = None,
    calls: Mapping[str, Example] | None = None,
) -> Found:
    """Capture a model at an example's sizes and others; see `costing.cost_model`.

    Raises:
        CaptureError: the model cannot be captured with the example.
        CostError: a size or call is unknown, or the sizes do not change together.
    """
    search = _Search(engine, dict(sizes or {}))
    found = search.run(example, dict(calls or {}))
    special = [name for name in search.special if name not in (calls or {})]
    if not special:
        return found
    try:
        larger = _Search(engine, dict(sizes or {})).run(search.example_grown(special), dict(calls or {}))
    except GraphCacheError:
        return found
    if larger.fixed.keys() < found.fixed.keys():
        return replace(larger, base=found.base)
    return found


@dataclass
class _Search:
    """Finds which inputs grow with each size, by capturing the model with some of them changed."""

    engine: Engine
    wanted: dict[str, tuple[int, int] | None]
    found: dict[str, _Varied] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    captures: dict[str, Program] = field(default_factory=dict)
    base: dict[str, int] = field(default_factory=dict)
    at: dict[str, int] = field(default_factory=dict)
    special: dict[str, _Varied] = field(default_factory=dict)

    def run(self, example: Example, calls: dict[str, Example]) -> Found:
        self.tensors = self._tensors(example)
        self.program = self.engine.prepare(example)
        self.spec = self.program.captured.call
        latent = self.spec.sole_latent(self.tensors, "a cost model")
        self._vary(BATCH, [(latent, 0)], calls)
        for name, dims in self._axes.items():
            self._vary(name, [(latent, dim) for dim in dims], calls)
        for name, place in self._texts():
            self._vary(name, [place], calls)
        unknown = sorted((calls.keys() | self.wanted.keys()) - {ALL, *self.base})
        if unknown:
            raise CostError(f"there is no size {', '.join(unknown)}; the model has {', '.join(self.base)}")
        names = [name for name in self.base if name in self.found]
        whole = {name: self.base[name] for name in names}
        samples = [SizedProgram(whole, self.program)]
        samples += [SizedProgram({**whole, name: self.at[name]}, self.captures[name]) for name in names]
        if names:
            samples.append(self._together(names, calls))
        return Found(tuple(samples), self.fixed, self.base)

    def _tensors(self, example: Example) -> list[torch.Tensor]:
        binder = self.engine.binder
        args = () if isinstance(example, Mapping) else example
        kwargs = dict(example) if isinstance(example, Mapping) else {}
        return binder.signature(binder.bind(args, kwargs))[1]

    def _texts(self) -> Iterator[tuple[str, Place]]:
        """The lengths of texts: of constant (rows, length, channels) inputs that grow with nothing else."""
        names = iter(["text"])
        for index, tensor in enumerate(self.tensors):
            is_text = self.spec.kind(index) == "constant" and tensor.dim() == 3 and tensor.is_floating_point()
            taken = any((index, 1) in varied.places for varied in self.found.values())
            if is_text and not taken and tensor.shape[1] > 1:
                yield next(names, self.spec.leaf_names[index]), (index, 1)

    def _vary(self, name: str, homes: Sequence[Place], calls: Mapping[str, Example]) -> None:
        """Find how a size changes, or record why it stays."""
        home = homes[0]
        self.base[name] = self._size(home)
        if name in self.wanted and self.wanted[name] is None:
            self.fixed[name] = "it was given as fixed"
            return
        if name in calls:
            self._given(name, home, calls[name])
            return
        reason: GraphCacheError | None = None
        for home in homes:
            self.base[name] = self._size(home)
            guesses = map(frozenset, self._hypotheses(name, home))
            for places in itertools.islice(dict.fromkeys(guesses), _MOST_TRIALS):
                varied = _Varied(name, home, places)
                try:
                    self._try(varied)
                except GraphCacheError as error:
                    reason = error if self._is_new(name, varied, error) else reason or error
                else:
                    self.special.pop(name, None)
                    return
        self.base[name] = self._size(homes[0])
        self.fixed[name] = str(reason)

    def _is_new(self, name: str, varied: _Varied, error: GraphCacheError) -> bool:
        """Remember the first guess with which the model runs, though it runs other operations."""
        if name in self.special or not isinstance(error, CostError):
            return False
        self.special[name] = varied
        return True

    def example_grown(self, names: Sequence[str]) -> dict[str, Any]:
        """The example with these sizes doubled."""
        grown = {self.special[name]: 2 * self._size(self.special[name].home) for name in names}
        return _arguments(self.spec, self._grown(grown))

    def _size(self, place: Place) -> int:
        return int(self.tensors[place[0]].shape[place[1]])

    def _further(self, name: str) -> tuple[int, int]:
        """The sizes for the capture in which this one alone changes, and for the one in which all do."""
        base = self.base[name]
        return self.wanted.get(name) or (2 * base, 3 * base)

    def _try(self, varied: _Varied) -> None:
        size = self._further(varied.name)[0]
        self.found[varied.name] = varied
        try:
            self._accept(varied, size, self._captured({varied.name: size}).program)
        except GraphCacheError:
            del self.found[varied.name]
            raise

    def _given(self, name: str, home: Place, call: Example) -> None:
        """Take over an explicit call; what grows with the size is read off it."""
        tensors = self._tensors(call)
        changed = {
            (i, dim)
            for i, (mine, theirs) in enumerate(zip(self.tensors, tensors, strict=False))
            for dim in range(min(mine.dim(), theirs.dim()))
            if mine.shape[dim] != theirs.shape[dim]
        }
        homes = [place for place in sorted(changed) if place[0] == home[0]] or [home]
        size = int(tensors[homes[0][0]].shape[homes[0][1]])
        if size == self._size(homes[0]):
            raise CostError(f"the call for {name} has the example's size, {size}; give one where it differs")
        self.base[name] = self._size(homes[0])
        self._accept(_Varied(name, homes[0], frozenset(changed)), size, self.engine.prepare(call))

    def _accept(self, varied: _Varied, size: int, program: Program) -> None:
        """Keep a capture if the model runs the same operations in it."""
        base = {varied.name: self.base[varied.name]}
        steps = self.program.captured.step, program.captured.step
        solve([Sized(base, steps[0]), Sized({varied.name: size}, steps[1])])
        self.found[varied.name], self.captures[varied.name] = varied, program
        self.at[varied.name] = size

    def _hypotheses(self, name: str, home: Place) -> Iterator[set[Place]]:
        """Which dimensions grow with a size, the likely guesses first.

        A batch is in every input that could hold it, or else broadcasts; of other sizes an input may have the
        same by chance, so that as few as possible grow.
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
        size, streams = self._size(home), self._streams()
        likely, folded = set(), set()
        for leaf, tensor in enumerate(self.tensors):
            for dim, other in enumerate(tensor.shape):
                is_outer = dim == 0 and self._is_batched(leaf)
                if leaf == home[0] or (is_outer if name != BATCH else dim > 0):
                    continue
                if other == size:
                    likely.add((leaf, dim))
                elif other % size == 0 and (name == BATCH or (name in self._axes and other in streams)):
                    folded.add((leaf, dim))
        return likely, folded

    @property
    def _axes(self) -> Mapping[str, Sequence[int]]:
        return _AXES.get(self.tensors[self.spec.latents[0]].dim(), {})

    def _streams(self) -> set[int]:
        """Numbers of tokens that the latents' streams have."""
        step = self.program.captured.step
        nodes = step.nodes()
        shapes = (nodes[branch.value].meta["val"].shape for branch in step.branches if not branch.context)
        return {int(shape[1]) for shape in shapes if len(shape) == 3}

    def _is_batched(self, leaf: int) -> bool:
        batch = self.found.get(BATCH)
        return batch is not None and (leaf, 0) in batch.places

    def _by_argument(self, places: set[Place]) -> list[set[Place]]:
        """Leaves of one argument grow together or not at all."""
        groups: dict[str, set[Place]] = {}
        for place in sorted(places):
            groups.setdefault(re.split(r"[.\[]", self.spec.leaf_names[place[0]])[0], set()).add(place)
        return list(groups.values())

    def _grown(self, sizes: Mapping[_Varied, int]) -> list[torch.Tensor]:
        """The example's inputs with some sizes changed: their values are repeated."""
        ratios: dict[Place, Fraction] = {}
        for varied, size in sizes.items():
            for place in varied.places:
                ratios[place] = ratios.get(place, Fraction(1)) * Fraction(size, self.base[varied.name])
        tensors = list(self.tensors)
        for (leaf, dim), ratio in ratios.items():
            count = ratio * tensors[leaf].shape[dim]
            if count.denominator > 1:
                raise CostError(
                    f"{self.spec.leaf_names[leaf]} would have {count} entries; choose other sizes"
                )
            places = torch.arange(int(count), device=tensors[leaf].device) % tensors[leaf].shape[dim]
            tensors[leaf] = tensors[leaf].index_select(dim, places)
        return tensors

    def _together(self, names: Sequence[str], calls: Mapping[str, Example]) -> SizedProgram:
        """The capture in which all sizes change: it tells sums from products, and checks all expressions."""
        try:
            if ALL in calls:
                tensors = self._tensors(calls[ALL])
                homes = {name: self.found[name].home for name in names}
                sizes = {name: int(tensors[leaf].shape[dim]) for name, (leaf, dim) in homes.items()}
                return SizedProgram(sizes, self.engine.prepare(calls[ALL]))
            try:
                return self._captured({name: self._further(name)[1] for name in names})
            except GraphCacheError:
                # tables may end before the third size; the second ones still tell sums from products
                return self._captured({name: self.at[name] for name in names})
        except GraphCacheError as error:
            raise CostError(
                f"{', '.join(names)} cannot change together: {error}; give calls={{'{ALL}': ...}}, or leave "
                "a size as it is with sizes={name: None}"
            ) from error

    def _captured(self, sizes: Mapping[str, int]) -> SizedProgram:
        grown = self._grown({self.found[name]: size for name, size in sizes.items()})
        with quiet_shapes():
            return SizedProgram(sizes, self.engine.prepare(_arguments(self.spec, grown)))


def _arguments(spec: CallSpec, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
    """All arguments of a call, by name."""
    args, kwargs = spec.arguments(tensors)
    positional = [name for name in spec.template if name in spec.positional_only]
    return dict(zip(positional, args, strict=True)) | kwargs
