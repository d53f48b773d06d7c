"""What steps that reuse the output would gain by more than one number for each value that is kept.

python -m examples.benchmark_corrections digits [--speedups 2 3 4] [--trained "3 bands" ...] [--json FILE]

The steps are those of the found plans; coefficients are fitted to other noise than the results are judged by.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.records import Cell, Column, add_json_option, report
from examples.samplers import EXAMPLES, Example, Item
from examples.sweep import mean_and_spread
from graphcache import Plan, Sampling
from graphcache.planning.tuning import decibel_rate
from graphcache.runtime.closeness import LEAST_ERROR, decibels, psnr

FITTED, TEST = 20_000, 40_000
"""First seeds of what coefficients are fitted to, and of what judges them."""
ENTRIES = 3
"""Values that are kept."""
RIDGE = 1e-7
"""By the mean square of what a coefficient weighs."""
COLUMNS = (
    Column("speed-up", "×", 1),
    Column("coefficients"),
    Column("numbers a step"),
    Column("off a step's error", "dB", 2),
    Column("result", "dB", 1),
    Column("off the result's error", "dB", 2),
    Column("trained through the sampler", "dB", 1),
)
PICTURE = "and a constant picture"
"""The mean of what is left, in each half of guidance."""
Kept = Sequence[Tensor]
"""Computed results, newest first, (2N, C, ..., H, W) with both branches of guidance."""
Terms = Callable[[Kept, Tensor], list[Tensor]]
"""What is weighed at a step, of what is kept and of the step's input."""


class Step(NamedTuple):
    """What a step was given and gave."""

    given: Tensor
    gave: Tensor


def kinds(patch: int, channels: int) -> dict[str, Terms]:
    """What the coefficients may stand for; of a model with patches of so many pixels and so many channels."""

    def each(split: Callable[[Tensor], list[Tensor]]) -> Terms:
        return lambda kept, given: [part for value in kept for part in split(value)]

    def beside(more: Callable[[Tensor, Tensor], list[Tensor]]) -> Terms:
        return lambda kept, given: [*kept, *more(kept[0], given)]

    of_channels: dict[str, Terms] = {
        "each channel": each(lambda value: _masked(value, 1, channels)),
        "and a matrix of channels": beside(lambda newest, given: _mixed(newest)),
    }
    return {
        "scalars": lambda kept, given: [*kept],
        "and the step's input": beside(lambda newest, given: [given]),
        "each half of guidance": each(lambda value: _masked(value, 0, 2)),
        **(of_channels if channels > 1 else {}),
        "2 bands": each(lambda value: bands(value, 2)),
        "3 bands": each(lambda value: bands(value, 3)),
        "4 bands": each(lambda value: bands(value, 4)),
        "4 parts of the picture": each(
            lambda value: [part for half in _masked(value, -2, 2) for part in _masked(half, -1, 2)]
        ),
        "each place in a patch": each(
            lambda value: [part for row in _strided(value, -2, patch) for part in _strided(row, -1, patch)]
        ),
        "and a constant": beside(lambda newest, given: [torch.ones_like(newest)]),
        PICTURE: lambda kept, given: [*kept],
    }


def bands(value: Tensor, count: int) -> list[Tensor]:
    """Radial bands of frequencies, each an octave but the lowest, that add up to the value."""
    height, width = value.shape[-2:]
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    radius = (rows.square() + columns.square()).sqrt()
    edges = torch.tensor([0.5 ** (count - number) for number in range(count - 1)])
    place = torch.bucketize(radius, edges, right=True)
    spectrum = torch.fft.rfft2(value)
    return [torch.fft.irfft2(spectrum * (place == band), s=(height, width)) for band in range(count)]


def _masked(value: Tensor, dim: int, count: int) -> list[Tensor]:
    """As many equal stretches of a dimension, each with zeros elsewhere."""
    place = torch.arange(value.shape[dim]) * count // value.shape[dim]
    return [_where(value, dim, place == number) for number in range(count)]


def _strided(value: Tensor, dim: int, count: int) -> list[Tensor]:
    place = torch.arange(value.shape[dim]) % count
    return [_where(value, dim, place == number) for number in range(count)]


def _where(value: Tensor, dim: int, mask: Tensor) -> Tensor:
    shape = [1] * value.dim()
    shape[dim] = len(mask)
    return value * mask.reshape(shape)


def _mixed(value: Tensor) -> list[Tensor]:
    """Every channel in the place of every other one: all matrices, of whatever rank."""
    count = value.shape[1]
    alone = [_masked(value, 1, count)[channel].sum(dim=1, keepdim=True) for channel in range(count)]
    return [part for one in alone for part in _masked(one.expand_as(value), 1, count)]


class Corrected:
    """A model whose results are kept at computed steps, and weighed at the others.

    Attributes:
        weights: of the terms at every other step.
        pictures: what is added there, of each half of guidance.
    """

    def __init__(self, model: Any, actions: str, terms: Terms) -> None:
        self.model, self.actions, self.terms = model, actions, terms
        self.weights: dict[int, Tensor] = {}
        self.pictures: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []
        self.step = 0

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        step, self.step = self.step, (self.step + 1) % len(self.actions)
        if self.actions[step] == "#":
            result: Tensor = self.model(*args, **kwargs)[0]
            self.kept = [result, *(self.kept if step else ())][:ENTRIES]
            return (result,)
        given = args[0] if args else kwargs["hidden_states"]
        result = weighed(self.terms(self.kept, given), self.weights[step])
        if step in self.pictures:
            result = result + self.pictures[step].repeat_interleave(len(result) // 2, dim=0)
        return (result,)


def weighed(terms: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The sum of the terms, each times its weight."""
    total = terms[0] * weights[0]
    for term, weight in zip(terms[1:], weights[1:], strict=True):
        total = total + term * weight
    return total


class Bench:
    """One example, its uncached generations step by step, and the plans whose steps are taken."""

    def __init__(self, example: Example, size: int, fitted: int, judged: int) -> None:
        self.example = example
        self.sampling = Sampling.of(example.model, example.sampler(), conditional=example.conditional)
        self.items = [example.items(count, size, seed) for count, seed in ((fitted, FITTED), (judged, TEST))]
        made = [[self._recorded(item) for item in items] for items in self.items]
        (_, self.fitted), (self.references, self.judged) = (zip(*part, strict=True) for part in made)
        self.targets = [result for result, _ in made[0]]

    def _recorded(self, item: Item) -> tuple[Tensor, list[Step]]:
        """The uncached result, and every step."""
        steps = list[Step]()

        def model(*args: Any, **kwargs: Any) -> tuple[Tensor]:
            result = self.example.model(*args, **kwargs)[0]
            steps.append(Step(args[0] if args else kwargs["hidden_states"], result))
            return (result,)

        return self._generated(model, item), steps

    def _generated(self, model: Any, item: Item, gradients: bool = False) -> Tensor:
        return self.sampling.generate(model, item, self.example.steps, gradients=gradients)

    def rows(self, speedup: float, iterations: int, trained: Sequence[str]) -> Iterator[list[Cell]]:
        """The found plan, and its steps under every kind of coefficients."""
        plan = Plan.load(self.example.plans / f"{speedup}.txt")
        found = self._quality(self.sampling.planned(plan))
        yield [speedup, "found and tuned plan", None, None, mean_and_spread(found), None, None]
        actions = plan.rows[0].actions.replace("c", "#")
        config: Any = self.example.model.config
        scalars, error = list[float](), 0.0
        for name, terms in kinds(config.patch_size, config.in_channels).items():
            model = Corrected(self.example.model, actions, terms)
            self._fit(model, with_pictures=name == PICTURE)
            left, reached = self._left(model), self._quality(model)
            scalars, error = scalars or reached, error or left
            gain = mean_and_spread([a - b for a, b in zip(reached, scalars, strict=True)])
            numbers = len(next(reversed(model.weights.values())))
            through = self._trained(model, iterations) if name in trained else None
            first = name == "scalars"
            yield [
                speedup, name, numbers, None if first else _decibels(error / left), mean_and_spread(reached),
                None if first else gain, through,
            ]  # fmt: skip

    def _steps(self, model: Corrected, steps: Sequence[Step]) -> Iterator[tuple[int, list[Tensor], Tensor]]:
        """Every step that is not computed, its terms and what it should give, by an uncached generation."""
        kept = list[Tensor]()
        for number, (step, action) in enumerate(zip(steps, model.actions, strict=True)):
            if action == "#":
                kept = [step.gave, *kept][:ENTRIES]
            else:
                yield number, model.terms(kept, step.given), step.gave

    def _fit(self, model: Corrected, with_pictures: bool) -> None:
        """Each step's weights by least squares, over all samples that are fitted to."""
        for every in zip(*(self._steps(model, steps) for steps in self.fitted), strict=True):
            step = every[0][0]
            terms = torch.stack(
                [
                    torch.cat([given[place].flatten() for _, given, _ in every])
                    for place in range(len(every[0][1]))
                ]
            ).double()
            wanted = torch.cat([gave.flatten() for *_, gave in every]).double()
            scale = terms.square().mean(dim=1).sqrt().clamp(min=1e-12)
            terms = terms / scale[:, None]
            products = terms @ terms.T + RIDGE * terms.shape[1] * torch.eye(len(terms)).double()
            model.weights[step] = (torch.linalg.solve(products, terms @ wanted) / scale).float()
            if with_pictures:
                left = [gave - weighed(given, model.weights[step]) for _, given, gave in every]
                halves = zip(*(one.chunk(2) for one in left), strict=True)
                model.pictures[step] = torch.stack([torch.cat(half).mean(dim=0) for half in halves])

    def _left(self, model: Corrected) -> float:
        """The squared error of all such steps on the samples that judge."""
        total = 0.0
        for steps in self.judged:
            for step, terms, gave in self._steps(model, steps):
                result = weighed(terms, model.weights[step])
                if step in model.pictures:
                    result = result + model.pictures[step].repeat_interleave(len(result) // 2, dim=0)
                total += float((result - gave).square().sum())
        return total

    def _quality(self, model: Any) -> list[float]:
        return decibels((self._generated(model, item) for item in self.items[1]), self.references)

    def _trained(self, model: Corrected, iterations: int) -> list[float]:
        """Decibels once weights are trained through the sampler, in units of what each weighs."""
        start, scales = dict(model.weights), dict[int, Tensor]()
        for step, terms, _ in self._steps(model, self.fitted[0]):
            scales[step] = torch.stack([term.square().mean().sqrt().clamp(min=1e-6) for term in terms])
        moved = {step: torch.zeros_like(weights, requires_grad=True) for step, weights in start.items()}
        pictures = [picture.requires_grad_() for picture in model.pictures.values()]
        parameters = [*moved.values(), *pictures]
        for number in range(iterations):
            turn = number % len(self.items[0])
            model.weights = {step: start[step] + moved[step] / scales[step] for step in start}
            result = self._generated(model, self.items[0][turn], gradients=True)
            error = psnr(result, self.targets[turn], least=LEAST_ERROR).mean()
            found = torch.autograd.grad(-error, parameters)
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient
            if not number:
                optimiser = torch.optim.Adam(parameters, lr=decibel_rate(parameters), betas=(0.9, 0.95))
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            model.weights = {step: start[step] + moved[step] / scales[step] for step in start}
            return mean_and_spread(self._quality(model))


def _decibels(ratio: float) -> float:
    return float(10 * torch.log10(torch.tensor(ratio)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("example", choices=list(EXAMPLES))
    parser.add_argument("--speedups", type=float, nargs="+", default=[2.0, 3.0, 4.0], help="of found plans")
    parser.add_argument("--size", type=int, default=4, help="samples of one generation")
    parser.add_argument("--fitted", type=int, default=8, help="generations that are fitted to")
    parser.add_argument("--judged", type=int, default=4, help="generations that judge")
    parser.add_argument("--iterations", type=int, default=30, help="of training through the sampler")
    parser.add_argument("--trained", nargs="*", default=[], help="kinds of coefficients that are trained so")
    parser.add_argument("--threads", type=int, default=1)
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    example = EXAMPLES[arguments.example]()
    example.model.requires_grad_(False)
    bench = Bench(example, arguments.size, arguments.fitted, arguments.judged)
    found = list[list[Cell]]()
    for speedup in arguments.speedups:
        for row in bench.rows(speedup, arguments.iterations, arguments.trained):
            found.append(row if arguments.trained else row[:-1])
            print(row, flush=True)
    columns = COLUMNS if arguments.trained else COLUMNS[:-1]
    report(f"Further coefficients, {arguments.example}", columns, found, arguments.json)


if __name__ == "__main__":
    main()
