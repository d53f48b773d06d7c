"""The plan that the demo finds for its own model: profile, search, tune."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

import graphcache
from examples.demo.progress import stage
from examples.samplers import Example
from graphcache import Plan, Profile
from graphcache.planning.search import Found, search
from graphcache.planning.tuning import tune, with_corrections

SAMPLES, SIZE = 2, 4
"""Generations that are profiled and tuned on, and samples in each."""


@dataclass(frozen=True)
class Searched:
    """A plan and what it was found by."""

    plan: Plan
    profile: Profile
    found: Found


def find(example: Example, speedup: float, iterations: int, folder: Path, console: Console) -> Searched:
    """Profile a model, search a plan `speedup` times as fast and tune it; profile and plan are written."""
    items = example.items(SAMPLES + 1, SIZE, 10_000)
    trained, held_out = items[:SAMPLES], items[SAMPLES:]
    with stage("profiling", SAMPLES, console) as advance:
        profile = graphcache.profile(
            example.model,
            trained,
            steps=example.steps,
            sampler=example.sampler(),
            conditional=example.conditional,
            path=folder / "profile.json",
            progress=lambda done, total: advance() if done else None,
        )
    found = search(profile, speedup=speedup)
    chosen = found.chosen
    console.print(
        f"{len(found.priced)} plans priced; chosen: {chosen.family}, {len(chosen.computed)} of "
        f"{example.steps} steps computed, {chosen.speedup:.2f} times fewer FLOPs"
    )
    plan = found.plan
    if iterations:
        with stage("tuning", iterations, console) as advance:
            tuned = tune(
                example.model,
                with_corrections(plan),
                trained,
                held_out,
                sampler=example.sampler(),
                iterations=iterations,
                progress=lambda now: advance(),
            )
        console.print(f"tuned: {tuned.before:.1f} dB before, {tuned.after:.1f} dB after, on held-out noise")
        plan = tuned.plan
    plan = replace(plan, graph=profile.provenance.graph)
    plan.save(folder / "plan.txt")
    return Searched(plan, profile, found)
