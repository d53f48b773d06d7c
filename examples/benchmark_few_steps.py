"""Found plans for generations of few steps, beside still fewer steps at equal work.

python -m examples.benchmark_few_steps digits [--steps 8] [--json FILE]
"""

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from examples.records import Cell, Column, add_json_option, report
from examples.samplers import EXAMPLES, Example
from examples.sweep import mean_and_spread
from graphcache import GraphCacheError
from graphcache.planning.automatic import Parts, best
from graphcache.planning.convergence import converged
from graphcache.planning.sampling import Sampling
from graphcache.runtime.closeness import decibels

SAMPLES, TEST = 1_000, 3_000
"""First seeds of what `auto` is given, and of what judges its choice."""
COLUMNS = (
    Column("steps"),
    Column("speed-up", "×", 2),
    Column("contender"),
    Column("computed"),
    Column("to as many steps", "dB", 1),
    Column("to the converged solution", "dB", 1),
)


class FewSteps:
    """One example's generations of so many steps, on samples that nothing was fitted to."""

    def __init__(self, example: Example, steps: int, size: int, seeds: int, iterations: int) -> None:
        self.example, self.steps, self.iterations = example, steps, iterations
        self.sampling = Sampling.of(example.model, example.sampler(), conditional=example.conditional)
        self.samples = example.items(4, size, SAMPLES)
        self.test = example.items(seeds, size, TEST)
        self.uncached = self._generated(example.model, steps)
        self.exact = [converged(self.sampling, item, steps) for item in self.test]

    def rows(self, speedups: list[float]) -> list[list[Cell]]:
        """The uncached run; for every speed-up the plan, and as many evaluations by each solver."""
        found = [self._row(1.0, "uncached", f"{self.steps} of {self.steps}", self.uncached)]
        profile = self._parts(1.0).profiled()
        for speedup in speedups:
            parts = self._parts(speedup)
            try:
                searched = parts.searched(profile)
            except GraphCacheError as error:
                found.append([self.steps, speedup, str(error), None, None, None])
                continue
            near = parts.near(searched)
            trials = [parts.tried(item.family, item.plan) for item in near]
            family, plan = best(trials).family, best(trials).plan
            tuned = parts.tuned(plan)
            made = self._generated(self.sampling.planned(plan if tuned is None else tuned.plan), self.steps)
            item = next(item for item in near if item.family == family)
            count = f"{len(item.computed)} of {self.steps}"
            found.append(self._row(item.speedup, f"found, {family}", count, made))
            fewer = math.ceil(self.steps / item.speedup - 0.02)
            for solver in self.example.solvers:
                made = self._generated(self.example.model, fewer, solver)
                found.append(self._row(self.steps / fewer, f"fewer steps, {solver}", str(fewer), made))
        return found

    def _parts(self, speedup: float) -> Parts:
        return Parts(
            self.sampling,
            self.samples,
            self.steps,
            speedup,
            iterations=self.iterations,
            backend=None,
            detail="tokens",
            progress=lambda part, done, total: print(part, done, total),
        )

    def _generated(self, model: Any, steps: int, solver: str | None = None) -> list[Tensor]:
        with torch.no_grad():
            return [self.example.sampler(solver)(model, item, steps) for item in self.test]

    def _row(self, speedup: float, name: str, count: str, results: list[Tensor]) -> list[Cell]:
        uncached = None if results is self.uncached else mean_and_spread(decibels(results, self.uncached))
        return [self.steps, speedup, name, count, uncached, mean_and_spread(decibels(results, self.exact))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("example", choices=list(EXAMPLES))
    parser.add_argument("--steps", type=int, nargs="+", default=[8], help="of the uncached generations")
    parser.add_argument(
        "--speedups", type=float, nargs="+", default=[1.3, 1.55, 1.95], help="that are asked for"
    )
    parser.add_argument("--size", type=int, default=4, help="samples of one generation")
    parser.add_argument("--seeds", type=int, default=3, help="generations that judge")
    parser.add_argument("--iterations", type=int, default=40, help="of tuning")
    parser.add_argument("--threads", type=int, default=1)
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    example = EXAMPLES[arguments.example]()
    found: list[list[Cell]] = []
    for steps in arguments.steps:
        few = FewSteps(example, steps, arguments.size, arguments.seeds, arguments.iterations)
        found += few.rows(arguments.speedups)
    report(f"Few steps, {arguments.example}", COLUMNS, found, arguments.json)


if __name__ == "__main__":
    main()
