"""Quality on the trained video model: FasterCache, diffusers' hooks, PAB and fewer steps, clip by clip.

python -m examples.benchmark_video [--seeds 2] [--clips 10]
"""

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import graphcache
from examples.benchmark_fastercache import Hooked
from examples.moving_digits.model import flow_scheduler, load_model
from examples.moving_digits.sample import sample
from examples.records import Cell, Column, add_json_option, report
from graphcache import Plan, presets
from graphcache.planning.metrics import ssim
from graphcache.presets import fastercache
from graphcache.runtime.closeness import psnr

STEPS = 50
Generate = Callable[..., Tensor]
COLUMNS = (
    Column("method"),
    Column("fewer FLOPs", "×", 2),
    Column("PSNR, clips", "dB", 1),
    Column("worst clip", "dB", 1),
    Column("SSIM", None, 3),
)


def plans() -> dict[str, Plan]:
    """PAB with its own intervals, and with longer ones that save about what FasterCache does."""
    return {
        "`fastercache('latte')`": fastercache("latte", STEPS),
        "`fastercache(50)`": fastercache(STEPS),
        "`fastercache('latte', compact=True)`": fastercache("latte", STEPS, compact=True),
        "`pab(50)`": presets.pab(STEPS),
        "`pab`, intervals 8, 12, 16 to the end": presets.pab(
            STEPS, spatial=8, temporal=12, cross=16, start=0.1, stop=1.0
        ),
    }


def clips(model: Any, count: int, seed: int, steps: int = STEPS) -> Tensor:
    """One clip of each of the first digits."""
    return sample(model, flow_scheduler(), torch.arange(count), steps=steps, seed=seed)


def contenders(count: int) -> dict[str, tuple[float | None, Generate]]:
    """FLOPs-ideal speed-up and generator of each method; diffusers' hooks do what FasterCache's plan does."""
    made: dict[str, tuple[float | None, Generate]] = {}
    for name, plan in plans().items():
        model: Any = graphcache.transform(load_model(), plan)
        sample(model, flow_scheduler(), torch.arange(1), steps=STEPS)
        made[name] = model.summary().branches[0].ideal_speedup, partial(clips, model, count)
    saved = next(ideal for ideal, _ in made.values() if ideal)
    scheduler: Any = flow_scheduler()
    scheduler.set_timesteps(STEPS)
    hooked = Hooked(load_model(), fastercache("latte", STEPS), "BCFHW", scheduler.timesteps.tolist())
    made["diffusers' hooks, constants of Latte"] = None, partial(clips, hooked, count)
    fewer = math.ceil(STEPS / saved)
    made[f"{fewer} steps"] = STEPS / fewer, partial(clips, load_model(), count, steps=fewer)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--clips", type=int, choices=range(1, 11), default=10)
    add_json_option(parser)
    arguments = parser.parse_args()
    seeds, count = range(arguments.seeds), arguments.clips
    uncached = [clips(load_model(), count, seed) for seed in seeds]
    rows: list[list[Cell]] = []
    for name, (ideal, generate) in contenders(count).items():
        scores, likeness = [], []
        for seed in seeds:
            made = generate(seed)
            frames = made.flatten(0, 2)[:, None], uncached[seed].flatten(0, 2)[:, None]
            scores.append(psnr(*frames).view(count, -1).mean(1))
            likeness.append(ssim(*frames).mean())
        each = torch.cat(scores)
        spread = [float(each.mean()), float(each.std())]
        rows.append([name, ideal, spread, float(each.min()), statistics.fmean(map(float, likeness))])
        print(f"{name} done")
    report("Clips", COLUMNS, rows, arguments.json)


if __name__ == "__main__":
    main()
