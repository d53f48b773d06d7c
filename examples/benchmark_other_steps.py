"""Plans for fewer steps than were profiled, beside those that profiles at as many steps give.

python -m examples.benchmark_other_steps digits [--json FILE]
"""

import argparse
from collections.abc import Callable, Sequence

import torch

import graphcache
from examples.records import Cell, Column, add_json_option, report
from examples.samplers import EXAMPLES, Example, Item
from examples.sweep import mean_and_spread
from graphcache import Profile
from graphcache.planning.automatic import checker
from graphcache.planning.sampling import Sampling
from graphcache.runtime.closeness import psnr

SPEEDUPS = (1.5, 2.0, 3.0)
SHARES = (0.4, 0.6)
"""Of the profiled steps."""
PROFILED, JUDGED = 1_000, 3_000
"""First seeds of what is profiled and of what judges."""
COLUMNS = (
    Column("steps"),
    Column("speed-up", "×", 1),
    Column("profiled at as many", "dB", 2),
    Column("profiled at all", "dB", 2),
)


def rows(example: Example, size: int, seeds: int) -> list[list[Cell]]:
    """The plans' mean PSNR to the uncached run of as many steps, over generations of `size` samples."""
    sampling = Sampling.of(example.model, example.sampler(), conditional=example.conditional)
    samples, judges = example.items(2, size, PROFILED), example.items(seeds, size, JUDGED)

    def profiled(steps: int) -> Profile:
        return graphcache.profile(sampling, samples, steps=steps, detail="steps", probes=2)

    whole, found = profiled(example.steps), list[list[Cell]]()
    for steps in (round(share * example.steps) for share in SHARES):
        check, own = checker(sampling, samples[:1], steps), profiled(steps)
        for speedup in SPEEDUPS:
            plans = [
                graphcache.search(profile, steps=steps, speedup=speedup, check=check).plan
                for profile in (own, whole)
            ]
            reached = [mean_and_spread(quality(sampling, plan, judges)) for plan in plans]
            found.append([steps, speedup, *reached])
    return found


def quality(sampling: Sampling, plan: graphcache.Plan, items: list[Item]) -> list[float]:
    """Of each generation, PSNR to the uncached one in dB."""
    model = sampling.planned(plan)
    found = []
    for item in items:
        result, uncached = (sampling.generate(each, item, plan.steps) for each in (model, sampling.model))
        found.append(float(psnr(result, uncached).mean()))
    return found


def run(
    doc: str, title: str, columns: Sequence[Column], rows: Callable[[Example, int, int], list[list[Cell]]]
) -> None:
    """A command that makes a table for one of the examples."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("example", choices=list(EXAMPLES))
    parser.add_argument("--size", type=int, default=8, help="samples of one generation")
    parser.add_argument("--seeds", type=int, default=3, help="generations that judge")
    parser.add_argument("--threads", type=int, default=2)
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report(
        f"{title}, {arguments.example}",
        columns,
        rows(EXAMPLES[arguments.example](), arguments.size, arguments.seeds),
        arguments.json,
    )


if __name__ == "__main__":
    run(str(__doc__), "Plans for other numbers of steps", COLUMNS, rows)
