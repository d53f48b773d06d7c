"""The family that `auto` chooses, beside every other one that comes near, each tuned in full.

python -m examples.benchmark_families digits [--speedups 3 4] [--json FILE]
"""

import argparse
import math
from pathlib import Path
from statistics import fmean

import torch

import graphcache
from examples.records import Cell, Column, add_json_option, report
from examples.samplers import EXAMPLES, Example, Item
from examples.sweep import mean_and_spread
from graphcache import Plan
from graphcache.planning.automatic import Parts, best, checker
from graphcache.planning.candidates import Candidate, candidates
from graphcache.planning.sampling import Sampling
from graphcache.runtime.closeness import decibels

SAMPLES, TEST = 1_000, 3_000
"""First seeds of what `auto` is given, and of what judges its choice."""
WIDE = 2.0
"""Families are tuned in full whose estimated error is at most so many times the least one."""
COLUMNS = (
    Column("speed-up", "×", 1),
    Column("family"),
    Column("computed"),
    Column("estimated", "dB", 1),
    Column("run", "dB", 1),
    Column("tuned shortly", "dB", 1),
    Column("tuned in full", "dB", 1),
    Column("chosen"),
)


def rows(example: Example, arguments: argparse.Namespace) -> list[list[Cell]]:
    """Of every speed-up the families by their estimates; decibels of results to the uncached run's."""
    sampling = Sampling.of(example.model, example.sampler(), conditional=example.conditional)
    samples = example.items(4, arguments.size, SAMPLES)
    test = example.items(arguments.seeds, arguments.size, TEST)
    found = list[list[Cell]]()
    for speedup in arguments.speedups:
        parts = Parts(
            sampling,
            samples,
            example.steps,
            speedup,
            iterations=arguments.iterations,
            backend=None,
            detail="tokens",
            progress=lambda part, done, total: print(part, done, total),
        )
        if not arguments.profile.exists():
            arguments.profile.parent.mkdir(parents=True, exist_ok=True)
            parts.profiled(arguments.profile)
        found += _families(parts, graphcache.load_profile(arguments.profile), test)
    return found


def _families(parts: Parts, profile: graphcache.Profile, test: list[Item]) -> list[list[Cell]]:
    searched = parts.searched(profile)
    near = parts.near(searched)
    trials = {item.family: parts.tried(item.family, item.plan) for item in near}
    now = best(list(trials.values())).family
    check = checker(parts.sampling, parts.trained[:2], parts.steps)
    found = list[list[Cell]]()
    # one that was near only when it was run stands below
    shown = {item.family: item for item in (*_by_estimate(profile, parts.speedup), *near)}
    for item in shown.values():
        tried = trials.get(item.family)
        tuned = parts.tuned(item.plan if tried is None else tried.plan)
        quality = _quality(parts, item.plan if tuned is None else tuned.plan, test)
        chosen = ["before"] * (item.family == searched.chosen.family) + ["now"] * (item.family == now)
        run = _decibels(check(item.plan))
        shortly = None if tried is None else fmean(tried.decibels)
        count = f"{len(item.computed)} of {parts.steps}"
        estimate = _decibels(item.error)
        found.append([parts.speedup, item.family, count, estimate, run, shortly, quality, ", ".join(chosen)])
        print(found[-1], flush=True)
    return found


def _by_estimate(profile: graphcache.Profile, speedup: float) -> list[Candidate]:
    """The best plan of every family that comes near."""
    fast = sorted((item for item in candidates(profile) if item.speedup >= speedup), key=lambda i: i.error)
    first: dict[str, Candidate] = {}
    for item in fast:
        if item.error <= WIDE * fast[0].error:
            first.setdefault(item.family, item)
    return list(first.values())


def _quality(parts: Parts, plan: Plan, items: list[Item]) -> list[float]:
    sampling, model = parts.sampling, parts.sampling.planned(plan)
    results, uncached = (
        [sampling.generate(each, item, plan.steps) for item in items] for each in (model, sampling.model)
    )
    return mean_and_spread(decibels(results, uncached))


def _decibels(error: float) -> float:
    """Of a root mean square error, with a range of 2."""
    return 20 * math.log10(2 / error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("example", choices=list(EXAMPLES))
    parser.add_argument(
        "--speedups", type=float, nargs="+", default=[3.0, 4.0], help="that plans are made for"
    )
    parser.add_argument("--size", type=int, default=4, help="samples of one generation")
    parser.add_argument("--seeds", type=int, default=3, help="generations that judge")
    parser.add_argument("--iterations", type=int, default=8, help="of tuning in full")
    parser.add_argument(
        "--profile", type=Path, default=Path(".cache/families.json"), help="taken up, or made"
    )
    parser.add_argument("--threads", type=int, default=1)
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    made = rows(EXAMPLES[arguments.example](), arguments)
    report(f"Chosen families, {arguments.example}", COLUMNS, made, arguments.json)


if __name__ == "__main__":
    main()
