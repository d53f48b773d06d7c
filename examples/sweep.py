"""What found plans are compared with: presets over their settings, and the best of each at equal time."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from examples.records import Cell, Column
from graphcache import Plan, presets

ALLOWANCE = 1.02
"""A rival's time, at most, by the found plan's."""


def swept(steps: int, conditional: str) -> Iterator[tuple[str, Plan]]:
    """Presets over their settings, by name."""
    for interval in (2, 3, 4, 5, 6):
        yield f"fora {interval}", presets.fora(steps, interval)
        for order in (1, 2):
            yield f"taylorseer {interval} O{order}", presets.taylorseer(steps, interval, order)
            lite = presets.taylorseer(steps, interval, order, lite=True)
            yield f"taylorseer {interval} O{order} lite", lite
        yield f"hicache {interval}", presets.hicache(steps, interval)
    yield "pab", presets.pab(steps)
    yield "pab long", presets.pab(steps, spatial=8, temporal=12, cross=16, start=0.1, stop=1.0)
    yield "fastercache", replace(presets.fastercache(steps), conditional=conditional)
    for ratio in (0.5, 0.8):
        yield f"toca {ratio}", presets.toca(steps, ratio=ratio)
        yield f"duca {ratio}", presets.duca(steps, ratio=ratio)
    yield "toca pixart-alpha", presets.toca("pixart-alpha", steps)
    yield "random pixart-alpha", presets.toca("pixart-alpha", steps, by="random")


def at_equal_time(
    quality: Mapping[str, Sequence[float]],
    speed: Mapping[str, float],
    speedups: Sequence[float],
    steps: int,
) -> tuple[list[Column], list[list[Cell]]]:
    """For every found plan the best setting of each rival that is as fast.

    Args:
        quality: decibels of each seed, by contender.
        speed: measured speed-ups; fewer steps, where they have none, are as fast as their number says.
        speedups: those that plans were found for.
        steps: of the uncached run.
    """

    def rate(name: str) -> float:
        fewer = steps / int(name.split()[0]) if " steps " in name else 0
        return speed.get(name, fewer)

    def best(names: Sequence[str], speedup: float) -> Cell:
        found = [name for name in names if name == f"tuned {speedup}"]
        least = speed[f"tuned {speedup}"] / ALLOWANCE
        fast = found or [name for name in names if not name.startswith("tuned") and rate(name) >= least]
        return max((mean_and_spread(quality[name]) for name in fast), default=None)

    groups: dict[str, list[str]] = {}
    for name in quality:
        setting, fewer, solver = name.partition(" steps ")
        groups.setdefault(f"fewer steps, {solver}" if fewer else setting.split()[0], []).append(name)
    columns = [Column("asked", "×", 1), Column("measured", "×", 2)]
    columns += [Column(group, "dB", 1) for group in groups]
    return columns, [
        [asked, speed[f"tuned {asked}"], *(best(names, asked) for names in groups.values())]
        for asked in speedups
    ]


def mean_and_spread(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values), statistics.pstdev(values)]
