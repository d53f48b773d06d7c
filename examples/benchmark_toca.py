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
from torch import Tensor

import graphcache
from examples.benchmark_models import Made, compute_bound_dit, compute_bound_pixart, wide_pixart
from examples.digits.model import ddim_scheduler, load_model
from examples.digits.sample import sample
from examples.records import TIMES, Cell, Column, add_json_option, report, time_rows
from graphcache import Plan, presets
from graphcache.compiler.backends import Backend
from graphcache.planning.bench import benchmark
from graphcache.presets import clusca, duca, toca
from graphcache.runtime.closeness import psnr

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
    made: Made, plans: Mapping[str, Plan], rounds: int, backend: Backend = "inductor"
) -> list[list[Cell]]:
    """Time contenders on one model, print what steps of each kind cost, and return the rows."""
    timings = benchmark(*made, plans, rounds=rounds, backend=backend)
    for timing in timings:
        for phase in timing.phases:
            ratio = phase.ms / phase.promised if phase.promised else 0
            Console().print(f"{timing.name}: {phase} ({ratio:.2f}×)")
    return time_rows(timings)


def time_runs(rounds: int) -> list[list[Cell]]:
    """Published plans on models of their kind."""
    rows = []
    for name, size, made in (
        ("pixart-alpha", "12 blocks, 256 tokens", compute_bound_pixart()),
        ("dit", "12 blocks, 256 tokens", compute_bound_dit()),
        ("dit", "6 blocks, 1024 tokens", compute_bound_dit(blocks=6, side=64)),
    ):
        rows += [[f"{name}, {size}", *row] for row in time_plans(made, run_plans(name), rounds)]
    return rows


def quality_plans() -> dict[str, Plan]:
    """Methods on the digits' model, in 50 steps."""
    return {
        "`fora(50, 3)`": presets.fora(STEPS, 3),
        "`fora(50, 2)`": presets.fora(STEPS, 2),
        "`taylorseer(50, 3)`": presets.taylorseer(STEPS, 3),
        "`toca('dit')`, own scores": toca("dit", STEPS, multiple=4),
        "`toca('dit', by='random')`": toca("dit", STEPS, by="random", multiple=4),
        "`toca(50, ratio=0.5)`": toca(STEPS, ratio=0.5, multiple=4),
        "`duca(50, ratio=0.5)`": duca(STEPS, 3, 0.5, multiple=4),
        "`clusca(50, clusters=8)`": clusca(STEPS, 3, clusters=8),
    }


def images(model: Any, seed: int, steps: int = STEPS) -> Tensor:
    """Two samples of each digit."""
    labels = torch.arange(10).repeat(SAMPLES // 10)
    return sample(model, ddim_scheduler(), labels, steps=steps, seed=seed)


QUALITY = (
    Column("method"),
    Column("fewer FLOPs", "×", 2),
    Column("PSNR, seeds", "dB", 1),
    Column("std over images", "dB", 1),
    Column("worst image", "dB", 1),
)


def compare_quality(seeds: range) -> list[list[Cell]]:
    """PSNR to the uncached images of the same noise, at each method's FLOPs, beside fewer steps."""
    plain = load_model()
    uncached = [images(plain, seed) for seed in seeds]
    made: dict[str, tuple[float, Callable[[int], Tensor]]] = {}
    for name, plan in quality_plans().items():
        model: Any = graphcache.transform(load_model(), plan)
        sample(model, ddim_scheduler(), torch.arange(10).repeat(SAMPLES // 10), steps=STEPS)
        made[name] = model.summary().branches[0].ideal_speedup, partial(images, model)
    for ideal in (1.5, 2.0, 2.5):
        steps = math.ceil(STEPS / ideal)
        made[f"{steps} steps"] = STEPS / steps, partial(images, plain, steps=steps)
    rows: list[list[Cell]] = []
    for name, (ideal, generate) in sorted(made.items(), key=lambda item: item[1][0]):
        scores = [psnr(generate(seed), uncached[seed]) for seed in seeds]
        means, each = [float(score.mean()) for score in scores], torch.cat(scores)
        spread = [statistics.fmean(means), statistics.pstdev(means)]
        rows.append([name, ideal, spread, float(each.std()), float(each.min())])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("partial", "runs", "quality")
    parser.add_argument("--parts", nargs="*", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.json and len(arguments.parts) != 1:
        parser.error("a record holds one of the --parts")
    if "partial" in arguments.parts:
        rows = time_plans(wide_pixart(), partial_plans(), arguments.rounds)
        report("ToCa's partial steps", TIMES, rows, arguments.json)
    if "runs" in arguments.parts:
        report("ToCa's runs", (Column("model"), *TIMES), time_runs(arguments.rounds), arguments.json)
    if "quality" in arguments.parts:
        report("ToCa on digits", QUALITY, compare_quality(range(arguments.seeds)), arguments.json)


if __name__ == "__main__":
    main()
