"""Classifier-free guidance in a phase: the branches' difference is measured, or stands for a branch."""

from dataclasses import dataclass

import torch
from torch import fx

from graphcache.analysis.frequency import radius
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import CacheRead, CacheWrite, Input, Output, StepGraph, Table, value_of
from graphcache.ir.history import GUIDANCE, PREDICTION, History
from graphcache.ir.schedule import Action, Guided, Phase
from graphcache.passes.prune import pruned
from graphcache.passes.rewrite import Chain, Rewriter, wider

aten = torch.ops.aten

_APART = Guided(None, None)


@dataclass(frozen=True)
class Guide:
    """FasterCache's CFG-Cache (arXiv 2410.19355, section 3.3), without a Fourier transform.

    A step with both branches hands out the bands of u - c; one with the conditional branch alone returns
    c + a·low + b·high for the other, where c and u are the branches' results. Sums are taken in fp32 at
    least. The channels of a learned variance, which samplers drop, are the conditional branch's.
    """

    phase: Phase
    guided: Guided

    def __call__(self, step: StepGraph) -> StepGraph:
        results = _Results(step, guided=self.guided)
        for history, action in self.phase.actions:
            if history.site == PREDICTION:
                results.keep()
            elif history.site == GUIDANCE and action.kind == "forecast":
                results.answer(action, self.phase.half)
            elif history.site == GUIDANCE and action.stores:
                results.measure()
        return pruned(results.finished())


@dataclass
class _Results(Rewriter):
    """A copy of the step whose results are read and replaced; what is added stands at its end."""

    guided: Guided = _APART

    def __post_init__(self) -> None:
        super().__post_init__()
        self.end: Chain = self.after(self.graph.output_node().prev)
        self.predictions = [i for i, port in enumerate(self.outputs) if isinstance(port, Output)]
        self.bands = 1 if self.guided.divisor is None else 2

    def keep(self) -> None:
        """Hand out copies of the results."""
        for part, index in enumerate(self.predictions):
            self.write(CacheWrite(History(PREDICTION), part), self.end.copied(self.results[index]))

    def measure(self) -> None:
        """Hand out the bands of the difference between the branches."""
        for part, index in enumerate(self.predictions):
            conditional, other = self._branches(self.results[index], part)
            variance = self._variance(conditional)
            terms = (self._wide(self._mean(node, variance)) for node in (other, conditional))
            difference = self.end.emit(aten.sub.Tensor, *terms)
            for band, node in enumerate(self._split(difference)):
                self.write(CacheWrite(History(GUIDANCE), part * self.bands + band), self.end.copied(node))

    def answer(self, action: Action, half: bool) -> None:
        """Return what stands for the unconditional branch; `half`: behind or before the conditional one's."""
        for part, index in enumerate(self.predictions):
            result = self.results[index]
            conditional = result if half else self._load(PREDICTION, part, result)
            variance = self._variance(conditional)
            other = self._recombined(self._mean(conditional, variance), part, action.group)
            if variance:
                dim, count = variance
                rest = self.end.emit(aten.slice.Tensor, conditional, dim, count, 2 * count)
                other = self.end.emit(aten.cat.default, [other, rest], dim)
            if half:
                order = [conditional, other] if self.guided.conditional == "first" else [other, conditional]
                other = self.end.emit(aten.cat.default, order)
            self.results[index] = other

    def _recombined(self, conditional: fx.Node, part: int, group: int) -> fx.Node:
        total = self._wide(conditional)
        weights = self.coefficients(conditional, self.bands, group)
        for band in range(self.bands):
            entry = self._load(GUIDANCE, part * self.bands + band, total)
            weight = self.end.emit(aten.select.int, weights, 0, band)
            total = self.end.emit(aten.add.Tensor, total, self.end.emit(aten.mul.Tensor, entry, weight))
        return self.end.cast(total, value_of(conditional).dtype)

    def _branches(self, result: fx.Node, part: int) -> tuple[fx.Node, fx.Node]:
        """The conditional and the unconditional branch's result, where both are known."""
        if self.guided.conditional is None:
            return self._load(PREDICTION, part, result), result
        first, second = (self.end.rows(result, half) for half in (0, 1))
        return (first, second) if self.guided.conditional == "first" else (second, first)

    def _variance(self, prediction: fx.Node) -> tuple[int, int] | None:
        """The dimension and half the size of channels of which the second half is a learned variance."""
        latents = next(
            node for port, node in self.step.ports() if isinstance(port, Input) and port.kind == "latent"
        )
        pairs = list(zip(value_of(prediction).shape, value_of(latents).shape, strict=False))
        other = [dim for dim, (ours, theirs) in enumerate(pairs) if dim and ours != theirs]
        same_rank = value_of(prediction).dim() == value_of(latents).dim()
        if not same_rank or len(other) != 1 or pairs[other[0]][0] != 2 * pairs[other[0]][1]:
            return None
        return other[0], int(pairs[other[0]][1])

    def _mean(self, prediction: fx.Node, variance: tuple[int, int] | None) -> fx.Node:
        """The prediction without the channels of its variance."""
        if variance is None:
            return prediction
        dim, count = variance
        return self.end.emit(aten.slice.Tensor, prediction, dim, 0, count)

    def _split(self, difference: fx.Node) -> list[fx.Node]:
        """The low and the high band in the difference's shape; it alone when the plan splits nothing."""
        if self.guided.divisor is None:
            return [difference]
        low = self._low_band(difference)
        return [low, self.end.emit(aten.sub.Tensor, difference, low)]

    def _low_band(self, difference: fx.Node) -> fx.Node:
        frames = self._frames(difference)
        height, width = map(int, value_of(frames).shape[-2:])
        kept = radius(height, width, self.guided.divisor or 1)
        rows, columns = (
            self._table(Table("basis", size, kept), (2 * kept + 1, size), frames) for size in (height, width)
        )
        disc = self._table(Table("disc", 2 * kept + 1, kept), (2 * kept + 1, 2 * kept + 1), frames)
        transposed = self.end.emit(aten.transpose.int, columns, 0, 1)
        spectrum = self.end.emit(
            aten.matmul.default, self.end.emit(aten.matmul.default, rows, frames), transposed
        )
        spectrum = self.end.emit(aten.mul.Tensor, spectrum, disc)
        back = self.end.emit(aten.matmul.default, self.end.emit(aten.transpose.int, rows, 0, 1), spectrum)
        low = self.end.emit(aten.matmul.default, back, columns)
        return low if frames is difference else self._tokens(low, value_of(difference).shape)

    def _frames(self, difference: fx.Node) -> fx.Node:
        """The difference with height and width as its last dimensions."""
        shape, grid = tuple(value_of(difference).shape), self.guided.grid
        if len(shape) in (4, 5) and grid is None:
            return difference
        if len(shape) != 3 or grid is None or grid[0] * grid[1] * grid[2] != shape[1]:
            raise PlanError(_grid_advice(shape, grid))
        frames = self.end.emit(aten.view.default, self.end.copied(difference), [shape[0], *grid, shape[2]])
        return self.end.emit(aten.permute.default, frames, [0, 1, 4, 2, 3])

    def _tokens(self, frames: fx.Node, shape: torch.Size) -> fx.Node:
        moved = self.end.emit(aten.permute.default, frames, [0, 1, 3, 4, 2])
        return self.end.emit(aten.view.default, self.end.copied(moved), list(shape))

    def _table(self, port: Table, shape: tuple[int, int], like: fx.Node) -> fx.Node:
        return self.input(port, value_of(like), shape=shape)

    def _load(self, site: str, part: int, like: fx.Node) -> fx.Node:
        return self.input(CacheRead(History(site), part, 0), value_of(like))

    def _wide(self, node: fx.Node) -> fx.Node:
        return self.end.cast(node, wider(value_of(node).dtype))


def _grid_advice(shape: tuple[int, ...], grid: tuple[int, int, int] | None) -> str:
    given = "no grid=" if grid is None else f"grid={'x'.join(map(str, grid))}"
    if len(shape) == 3:
        return (
            f"row guidance: the model returns {shape[1]} packed tokens of {shape[2]} channels and the plan "
            f"has {given}; name their frames, height and width, as in grid=1x64x64 of the plan's header or "
            "dataclasses.replace(plan, grid=(1, 64, 64))"
        )
    return f"row guidance: the model returns {tuple(shape)}, no packed tokens, and the plan has {given}"
