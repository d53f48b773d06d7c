"""Plans for other scales of guidance than were profiled, beside those that profiles at these scales give.

python -m examples.benchmark_other_guidance digits [--json FILE]
"""

import graphcache
from examples.benchmark_other_steps import JUDGED, PROFILED, quality, run
from examples.records import Cell, Column
from examples.samplers import Example
from examples.sweep import mean_and_spread
from graphcache import Profile
from graphcache.planning.automatic import checker
from graphcache.planning.sampling import Sampling

SPEEDUPS = (2.0, 3.0)
SHARES = (0.5, 2.0)
"""Of the profiled scale."""
COLUMNS = (
    Column("guidance", "", 2),
    Column("speed-up", "×", 1),
    Column("profiled and checked here", "dB", 2),
    Column("profiled elsewhere, checked here", "dB", 2),
    Column("profiled and checked elsewhere", "dB", 2),
)


def rows(example: Example, size: int, seeds: int) -> list[list[Cell]]:
    """The plans' mean PSNR to the uncached run at the same scale, over generations of `size` samples."""
    samples, judges = example.items(2, size, PROFILED), example.items(seeds, size, JUDGED)

    def sampled(scale: float) -> Sampling:
        return Sampling.of(example.model, example.sampler(guidance=scale), conditional=example.conditional)

    def profiled(sampling: Sampling) -> Profile:
        return graphcache.profile(sampling, samples, steps=example.steps, detail="steps", probes=2)

    before = sampled(example.guidance)
    elsewhere, found = profiled(before), list[list[Cell]]()
    for scale in (round(share * example.guidance, 2) for share in SHARES):
        here = sampled(scale)
        own = profiled(here)
        for speedup in SPEEDUPS:
            plans = [
                graphcache.search(
                    profile, speedup=speedup, check=checker(sampling, samples[:1], example.steps)
                ).plan
                for profile, sampling in ((own, here), (elsewhere, here), (elsewhere, before))
            ]
            reached = [mean_and_spread(quality(here, plan, judges)) for plan in plans]
            found.append([scale, speedup, *reached])
    return found


if __name__ == "__main__":
    run(str(__doc__), "Plans for other scales of guidance", COLUMNS, rows)
