"""What one profiled generation tells: Gram matrices, effects on the result, and drift by token and band."""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphcache.analysis.frequency import basis
from graphcache.analysis.handovers import turns
from graphcache.compiler.exchanges import is_first, total
from graphcache.ir.history import GUIDANCE, OUTPUT
from graphcache.ir.ranks import Ranks
from graphcache.planning.evaluation import Tensors
from graphcache.planning.holdings import Holding, Rows, samples_of
from graphcache.planning.moves import Moves
from graphcache.planning.profile import SampleProfile
from graphcache.planning.turns import Turns
from graphcache.runtime.session import CallSlot

SKETCH = 4096
"""Numbers that a value is reduced to before its products with those of other steps are taken."""


@dataclass
class Recording:
    """Observes one generation and its probes; arrays are indexed as those of `Profile`.

    Attributes:
        steps: evaluations of a branch.
        window: how many steps back effects are followed.
        probes: random vectors carried back.
        rows: samples in the result, the length of its first dimension; known after the generation.
        conditional: the half of a doubled batch that is the conditional branch's, or None.
        tokens: the share of the tokens of `sampled` sites that gradients are kept of, one at random out of
            every so many that lie side by side: products with them are right on the mean.
        sampled: the sites of which that holds.
        number: the sample's.
        device: of the values, once one was seen.
        drifts: whether tokens are looked at one by one.
        mesh: the ranks that share every evaluation. What they record is of their parts, and is added up once
            the generation has ended, and once all probes have come back.
    """

    steps: int
    window: int
    probes: int
    seed: int
    conditional: str | None
    tokens: float = 1.0
    sampled: Set[str] = frozenset()
    number: int = 0
    drifts: bool = True
    mesh: Sequence[Ranks] = ()
    device: torch.device | None = None
    rows: int = 1
    numbers: int = 0
    calls: int = 1
    probe: int = 0
    gram: dict[str, np.ndarray] = field(default_factory=dict)
    effects: dict[str, np.ndarray] = field(default_factory=dict)
    bands: np.ndarray | None = None
    handovers: tuple[int, ...] = ()
    _sketches: dict[tuple[str, CallSlot], dict[int, Tensor]] = field(default_factory=dict)
    _last: dict[tuple[str, CallSlot], Tensor] = field(default_factory=dict)
    _held: dict[tuple[str, CallSlot], list[tuple[int, Tensor]]] = field(default_factory=dict)
    _pairs: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _signs: dict[tuple[int, Holding | None], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _places: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.moves = Moves(self.steps, self.mesh)
        self._turns, self._turn = Turns(self.steps), turns(self.steps, ())

    def called(self, step: int, model: nn.Module) -> None:
        """An evaluation begins; the model that takes over has moved from nowhere."""
        if self._turns.called(step, model):
            self._forget()

    def saw(
        self, step: int, branch: CallSlot, site: str, values: Tensors, held: Sequence[Holding] = ()
    ) -> None:
        """Forwards: sketches for the Gram matrices, and how far each token moved."""
        parts: list[Any] = [*held] or [None] * len(values)
        sketch = torch.cat([self._sketch(*pair) for pair in zip(values, parts, strict=True)])
        self._sketches.setdefault((site, branch), {})[step] = sketch
        if self.drifts and len(values) == 1 and values[0].dim() == 3 and site != OUTPUT:
            count = values[0].shape[1] if not held else held[0].shape[1]
            picks = self.tokens < 1 and site in self.sampled
            some = self._some(count) if picks else None
            self.moves.saw(step, site, branch, values[0], some, parts[0])
        difference = self._difference(step, branch, values[0]) if site == OUTPUT else None
        if difference is not None:
            self._sketches.setdefault((GUIDANCE, ("", 0)), {})[step] = self._sketch(difference)
            self._spectrum(step, difference)

    def pulled(
        self,
        step: int,
        branch: CallSlot,
        site: str,
        values: Tensors,
        gradients: Tensors,
        rows: Sequence[Rows],
    ) -> None:
        """Backwards: products of the gradients at later steps with this step's value."""
        picked, weighted = self._picked(site, values), self._picked(site, gradients, weighted=True)
        samples = samples_of(rows, self.rows)
        value, gradient = (_by_sample(given, samples) for given in (picked, weighted))
        self._contract(site, branch, step, value, gradient, samples)
        if site == OUTPUT:
            self._pulled_guidance(step, branch, values[0], gradients[0])

    def _pulled_guidance(self, step: int, branch: CallSlot, output: Tensor, gradient: Tensor) -> None:
        difference = self._difference(step, branch, output)
        pulled = self._unconditional(branch, gradient)
        if pulled is not None:
            self._pairs.setdefault(-1 - step, {})["gradient"] = -pulled
        if difference is not None:
            self._pairs.setdefault(-1 - step, {})["difference"] = difference
        pair = self._pairs.get(-1 - step, {})
        if len(pair) == 2:
            del self._pairs[-1 - step]
            samples = samples_of([Rows.of(pair["gradient"])], self.rows)
            given, value = (_by_sample((pair[name],), samples) for name in ("gradient", "difference"))
            self._contract(GUIDANCE, ("", 0), step, value, given, samples)

    def turn(self, result: Tensor) -> None:
        """The generation has ended: take the products of all its steps.

        Raises:
            GraphCacheError: a step evaluated no model.
        """
        self.handovers = self._turns.handovers()
        self._turn = turns(self.steps, self.handovers)
        self.rows = int(result.shape[0])
        self.numbers = result.numel() // self.rows
        self.calls = len({branch for name, branch in self._sketches if name == OUTPUT})
        for (name, _), sketches in self._sketches.items():
            table = self.gram.setdefault(name, np.zeros((self.steps, self.steps)))
            for turn in range(len(self.handovers) + 1):
                steps = [step for step in sketches if self._turn[step] == turn]
                if steps:
                    stacked = total(torch.stack([sketches[step] for step in steps]), self.mesh).double()
                    table[np.ix_(steps, steps)] += (stacked @ stacked.T).cpu().numpy()
        self._sketches.clear()
        self._forget()
        self._pairs.clear()

    def _forget(self) -> None:
        """What comes next has moved from nowhere."""
        self._last.clear()
        self.moves.forget()

    def part(self) -> SampleProfile:
        """What was recorded, once all probes have come back."""
        effects = {name: table.astype(np.float32) for name, table in self._added(self.effects).items()}
        moves = max(1, self.steps - 1 - len(self.handovers))
        drift = {name: (moved / moves).astype(np.float32) for name, moved in self.moves.drift.items()}
        ranking = self.moves.ranking
        return SampleProfile(
            self.gram, effects, drift, ranking, self.bands, self.numbers, self.calls, self.handovers
        )

    def next_probe(self) -> None:
        """A probe has come back to the first step."""
        self.probe += 1
        self._held.clear()
        self._pairs.clear()
        self._places.clear()

    def _added(self, tables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All ranks' tables."""
        if not self.mesh:
            return tables
        flat = torch.from_numpy(np.concatenate([table.ravel() for table in tables.values()]))
        sums = total(flat.to(self.device), self.mesh).cpu()
        parts = torch.split_with_sizes(sums, [table.size for table in tables.values()])
        pairs = zip(tables.items(), parts, strict=True)
        return {name: part.numpy().reshape(table.shape) for (name, table), part in pairs}

    def _sketch(self, value: Tensor, held: Holding | None = None) -> Tensor:
        """The value itself where it is small, else its signed sums over random buckets (CountSketch).

        The sum of the ranks' sketches is that of the whole value.
        """
        flat = value.detach().flatten().float()
        self.device = flat.device
        if held is None and not is_first(self.mesh):
            return torch.zeros(min(SKETCH, flat.numel()), device=flat.device)
        if held is None and flat.numel() <= SKETCH:
            return flat
        key = flat.numel(), held
        if key not in self._signs:
            signs, buckets = self._drawn(flat.numel() if held is None else math.prod(held.shape))
            if held is not None:
                signs = held.counted(signs.reshape(held.shape)).flatten()
                buckets = held.counted(buckets.reshape(held.shape)).flatten()
            self._signs[key] = signs.to(flat.device), buckets.to(flat.device)
        signs, buckets = self._signs[key]
        size = min(SKETCH, flat.numel() if held is None else math.prod(held.shape))
        return torch.zeros(size, device=flat.device).index_add_(0, buckets, flat * signs)

    def _drawn(self, numbers: int) -> tuple[Tensor, Tensor]:
        """A sign and a bucket for each of so many numbers; few numbers have buckets of their own."""
        if numbers <= SKETCH:
            return torch.ones(numbers, dtype=torch.int8), torch.arange(numbers, dtype=torch.int32)
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (numbers,), generator=generator) * 2.0 - 1
        buckets = torch.randint(0, SKETCH, (numbers,), generator=generator)
        return signs.to(torch.int8), buckets.to(torch.int32)

    def _contract(
        self,
        name: str,
        branch: CallSlot,
        step: int,
        value: Tensor,
        gradient: Tensor,
        samples: list[int] | None,
    ) -> None:
        held = self._held.setdefault((name, branch), [])
        while held and (held[0][0] - step > self.window or self._turn[held[0][0]] != self._turn[step]):
            held.pop(0)
        held.append((step, gradient))
        table = self.effects.setdefault(name, np.zeros((self.steps, self.window + 1, self.probes, self.rows)))
        # several times as fast as one product with all of them stacked, which copies them
        products = torch.stack([torch.linalg.vecdot(item, value) for _, item in held])
        for (later, _), product in zip(held, products.double().cpu().numpy(), strict=True):
            table[later, later - step, self.probe, [0] if samples is None else samples] += product

    def _picked(self, site: str, tensors: Tensors, weighted: bool = False) -> Tensors:
        """A site's tensors at the tokens that are looked at; gradients stand for all of their neighbours."""
        if self.tokens >= 1 or site not in self.sampled:
            return tensors
        return tuple(
            [self._at_places(tensor, weighted) if tensor.dim() >= 3 else tensor for tensor in tensors]
        )

    def _at_places(self, tensor: Tensor, weighted: bool) -> Tensor:
        tokens = tensor.detach().flatten(1, -2)
        places, sizes = self._some(tokens.shape[1], self.mesh)
        found = tokens.index_select(1, places.to(tokens.device))
        return found * sizes.to(found)[:, None] if weighted else found

    def _some(self, count: int, mesh: Sequence[Ranks] = ()) -> tuple[Tensor, Tensor]:
        """Of so many tokens one out of every stretch, and the stretches' sizes: others for every probe, and
        on every rank of a mesh.
        """
        if (count, len(mesh)) not in self._places:
            amount = min(count, math.ceil(self.tokens * count))
            ends = torch.arange(amount + 1) * count // amount
            sizes = ends.diff()
            seed = (self.seed * 1_000_003 + self.number) * 1_003 + self.probe
            for ranks in mesh:
                seed = seed * ranks.count + ranks.rank
            chance = torch.rand(amount, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            self._places[count, len(mesh)] = ends[:-1] + (chance * sizes).long(), sizes
        return self._places[count, len(mesh)]

    def _difference(self, step: int, branch: CallSlot, output: Tensor) -> Tensor | None:
        """What the conditional branch adds, once both branches of a step are known."""
        output = output.detach().float()
        if self.conditional is not None:
            first, second = output.chunk(2)
            return first - second if self.conditional == "first" else second - first
        if branch[0] not in ("cond", "uncond"):
            return None
        pair = self._pairs.setdefault(step, {})
        pair[branch[0]] = output
        if len(pair) < 2:
            return None
        del self._pairs[step]
        return pair["cond"] - pair["uncond"]

    def _unconditional(self, branch: CallSlot, gradient: Tensor) -> Tensor | None:
        if self.conditional is not None:
            return gradient.chunk(2)[1 if self.conditional == "first" else 0]
        return gradient if branch[0] == "uncond" else None

    def _spectrum(self, step: int, difference: Tensor) -> None:
        """How far the difference's low and high band moved since the step before, relative to it."""
        if difference.dim() < 4:
            return
        before = self._last.get((GUIDANCE, ("", 0)))
        self._last[GUIDANCE, ("", 0)] = difference
        if before is None:
            return
        if self.bands is None:
            self.bands = np.zeros((self.steps, 2))
        moved, size = difference - before, difference.norm().clamp(min=1e-20)
        low = _low_band(moved)
        self.bands[step] += [float(low.norm() / size), float((moved - low).norm() / size)]


def _by_sample(tensors: Tensors, samples: list[int] | None) -> Tensor:
    """(samples, numbers), or (1, numbers) where these cannot be told apart."""
    if samples is None:
        return torch.cat([item.detach().flatten() for item in tensors])[None].float()
    count, parts = len(samples), []
    for tensor in tensors:
        folded = tensor.detach().reshape(len(tensor) // count, count, -1)
        parts.append(folded.transpose(0, 1).flatten(1))
    return (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]).float()


def _low_band(value: Tensor) -> Tensor:
    """The part of the frequencies below a fifth of the sides, by products with their real bases."""
    for dim in (-1, -2):
        side = int(value.shape[dim])
        table = basis(side, min(value.shape[-2:]) // 5).to(value)
        value = (value.transpose(dim, -1) @ table.T @ table).transpose(dim, -1)
    return value
