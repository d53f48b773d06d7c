"""ToCa as a plan: what a partial step costs, what whole runs gain, and how good the digits' images stay.

python -m examples.benchmark_toca [--parts partial runs quality] [--seeds 3]
"""

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import graphcache
from examples.benchmark_models import Made, compute_bound_dit, compute_bound_pixart, wide_pixart
from examples.digits.model import ddim_scheduler, load_model
from examples.digits.sample import sample
from graphcache import Plan, presets
from graphcache.compiler.compile import Backend
from graphcache.planning.bench import Timing, benchmark
from graphcache.planning.metrics import psnr
from graphcache.presets import clusca, duca, toca

STEPS = 50
SAMPLES = 20


def partial_plans(steps: int = 12) -> dict[str, Plan]:
    """Attention reused, MLPs on a budget of tokens, by what chooses them."""

    def plan(count: int, by: str) -> Plan:
        cycles = -(-steps // 4)
        reused, budget = ("#..." * cycles)[:steps], ("#aaa" * cycles)[:steps]
        rows = f"a = tokens {count} by {by}\n@self {reused}\n@cross {reused}\n@mlp {budget}"
        return Plan.parse(f"plan steps={steps}\n{rows}")

    chosen = {f"512 tokens by {by}": plan(512, by) for by in ("random", "entropy", "influence")}
    return {**chosen, "128 tokens by random": plan(128, "random")}


def run_plans(name: str) -> dict[str, Plan]:
    """A published plan by its own scores and at random."""
    fewer = {"a quarter of the queries": toca(name, queries=0.25)} if name == "dit" else {}
    return {"own scores": toca(name), **fewer, "random": toca(name, by="random")}


def time_plans(
    title: str, made: Made, plans: Mapping[str, Plan], rounds: int, backend: Backend = "inductor"
) -> None:
    """Time contenders on one model and print what each costs."""
    timings = benchmark(*made, plans, rounds=rounds, backend=backend)
    table = Table("", "ms a step", "times faster", "in FLOPs", "realised", "graphs", "peak KiB", title=title)
    for timing in timings:
        table.add_row(*_cells(timing))
    console = Console(width=110)
    console.print(table)
    for timing in timings:
        for phase in timing.phases:
            console.print(
                f"{timing.name}: {phase} ({phase.ms / phase.promised if phase.promised else 0:.2f}×)"
            )


def _cells(timing: Timing) -> tuple[str, ...]:
    ratios = ("" if value is None else f"{value:.3f}" for value in (timing.ideal, timing.realised))
    peak = "" if timing.peak_bytes is None else f"{timing.peak_bytes / 1024:.0f}"
    return timing.name, f"{timing.ms:.2f}", f"{timing.speedup:.3f}", *ratios, str(timing.graphs or ""), peak


def quality_plans() -> dict[str, Plan]:
    """Methods on the digits' model, in 50 steps."""
    return {
        "fora 3": presets.fora(STEPS, 3),
        "fora 2": presets.fora(STEPS, 2),
        "taylorseer 3": presets.taylorseer(STEPS, 3),
        "toca dit": toca("dit", STEPS, multiple=4),
        "toca dit, random": toca("dit", STEPS, by="random", multiple=4),
        "toca 3, half of the tokens": toca(STEPS, ratio=0.5, multiple=4),
        "duca 3, half of the tokens": duca(STEPS, 3, 0.5, multiple=4),
        "clusca 3": clusca(STEPS, 3, clusters=8),
    }


def images(model: Any, seed: int, steps: int = STEPS) -> Tensor:
    """Two samples of each digit."""
    labels = torch.arange(10).repeat(SAMPLES // 10)
    return sample(model, ddim_scheduler(), labels, steps=steps, seed=seed)


def compare_quality(seeds: range) -> None:
    """PSNR to the uncached images of the same noise, at each method's FLOPs, beside fewer steps."""
    plain = load_model()
    uncached = [images(plain, seed) for seed in seeds]
    table = Table("method", "in FLOPs", "PSNR dB", "by seed", "std over images", "worst image")
    made: dict[str, tuple[float, Callable[[int], Tensor]]] = {}
    for name, plan in quality_plans().items():
        model: Any = graphcache.transform(load_model(), plan)
        sample(model, ddim_scheduler(), torch.arange(10).repeat(SAMPLES // 10), steps=STEPS)
        made[name] = model.summary().branches[0].ideal_speedup, partial(images, model)
    for ideal in (1.5, 2.0, 2.5):
        steps = math.ceil(STEPS / ideal)
        made[f"{steps} steps"] = STEPS / steps, partial(images, plain, steps=steps)
    for name, (ideal, generate) in sorted(made.items(), key=lambda item: item[1][0]):
        scores = [psnr(generate(seed), uncached[seed]) for seed in seeds]
        each = torch.cat(scores)
        by_seed = " ".join(f"{float(score.mean()):.1f}" for score in scores)
        cells = (f"{statistics.fmean(each.tolist()):.1f}", by_seed, f"{float(each.std()):.1f}")
        table.add_row(name, f"{ideal:.2f}", *cells, f"{float(each.min()):.1f}")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("partial", "runs", "quality")
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if "partial" in arguments.parts:
        time_plans("PixArt, width 768, 1024 tokens", wide_pixart(), partial_plans(), arguments.rounds)
    if "runs" in arguments.parts:
        for name, size, made in (
            ("pixart-alpha", "12 blocks, 256 tokens", compute_bound_pixart()),
            ("dit", "12 blocks, 256 tokens", compute_bound_dit()),
            ("dit", "6 blocks, 1024 tokens", compute_bound_dit(blocks=6, side=64)),
        ):
            time_plans(f"{name}, {size}, width 384", made, run_plans(name), arguments.rounds)
    if "quality" in arguments.parts:
        compare_quality(range(arguments.seeds))


if __name__ == "__main__":
    main()
