"""Plans for other scales of guidance and other sizes than were profiled, beside those profiled there.

python -m examples.benchmark_other_settings digits [--json FILE]
"""

from typing import Any

import graphcache
from examples.benchmark_other_steps import JUDGED, PROFILED, quality, run
from examples.records import Cell, Column
from examples.samplers import Example
from examples.sweep import mean_and_spread
from graphcache import Profile
from graphcache.planning.automatic import checker
from graphcache.planning.sampling import Sampling

SPEEDUPS = (2.0, 3.0)
GUIDANCE, SIDES = (0.5, 2.0), (0.75, 1.5)
"""Shares of the profiled scale of guidance, and of the profiled height and width."""
COLUMNS = (
    Column("instead of what was profiled"),
    Column("speed-up", "×", 1),
    Column("profiled and checked here", "dB", 2),
    Column("profiled elsewhere, checked here", "dB", 2),
    Column("profiled and checked elsewhere", "dB", 2),
)


def rows(example: Example, size: int, seeds: int) -> list[list[Cell]]:
    """The plans' mean PSNR to the uncached run there, over generations of `size` samples."""
    samples, judges = example.items(2, size, PROFILED), example.items(seeds, size, JUDGED)

    def sampled(**changes: Any) -> Sampling:
        return Sampling.of(example.model, example.sampler(**changes), conditional=example.conditional)

    def profiled(sampling: Sampling) -> Profile:
        return graphcache.profile(sampling, samples, steps=example.steps, detail="steps", probes=2)

    scales = [round(share * example.guidance, 2) for share in GUIDANCE]
    sides = [round(share * example.side) for share in SIDES]
    settings = {f"guidance {scale}": sampled(guidance=scale) for scale in scales}
    settings |= {f"{side} × {side}": sampled(side=side) for side in sides}
    before = sampled()
    elsewhere, found = profiled(before), list[list[Cell]]()
    for name, here in settings.items():
        own = profiled(here)
        for speedup in SPEEDUPS:
            plans = [
                graphcache.search(
                    profile, speedup=speedup, check=checker(sampling, samples[:1], example.steps)
                ).plan
                for profile, sampling in ((own, here), (elsewhere, here), (elsewhere, before))
            ]
            reached = [mean_and_spread(quality(here, plan, judges)) for plan in plans]
            found.append([name, speedup, *reached])
    return found


if __name__ == "__main__":
    run(str(__doc__), "Plans for other settings", COLUMNS, rows)
