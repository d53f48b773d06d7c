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
from rich.console import Console
from rich.table import Table
from torch import Tensor

import graphcache
from examples.benchmark_fastercache import Hooked
from examples.moving_digits.model import flow_scheduler, load_model
from examples.moving_digits.sample import sample
from graphcache import Plan, presets
from graphcache.planning.metrics import psnr, ssim
from graphcache.presets import fastercache

STEPS = 50
Generate = Callable[..., Tensor]


def plans() -> dict[str, Plan]:
    """PAB with its own intervals, and with longer ones that save about what FasterCache does."""
    return {
        "fastercache latte": fastercache("latte", STEPS),
        "fastercache generic": fastercache(STEPS),
        "fastercache latte, 8 bit": fastercache("latte", STEPS, compact=True),
        "pab": presets.pab(STEPS),
        "pab, longer": presets.pab(STEPS, spatial=8, temporal=12, cross=16, start=0.1, stop=1.0),
    }


def clips(model: Any, count: int, seed: int, steps: int = STEPS) -> Tensor:
    """One clip of each of the first digits."""
    return sample(model, flow_scheduler(), torch.arange(count), steps=steps, seed=seed)


def contenders(count: int) -> dict[str, tuple[float, Generate]]:
    """FLOPs-ideal speed-up and generator of each method; diffusers' hooks do what FasterCache's plan does."""
    made: dict[str, tuple[float, Generate]] = {}
    for name, plan in plans().items():
        model: Any = graphcache.transform(load_model(), plan)
        sample(model, flow_scheduler(), torch.arange(1), steps=STEPS)
        ideal = model.summary().branches[0].ideal_speedup
        made[name] = ideal, partial(clips, model, count)
    scheduler: Any = flow_scheduler()
    scheduler.set_timesteps(STEPS)
    hooked = Hooked(load_model(), fastercache("latte", STEPS), "BCFHW", scheduler.timesteps.tolist())
    latte = made["fastercache latte"][0]
    made["diffusers FasterCache"] = math.nan, partial(clips, hooked, count)
    fewer = math.ceil(STEPS / latte)
    made[f"{fewer} steps"] = STEPS / fewer, partial(clips, load_model(), count, steps=fewer)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--clips", type=int, choices=range(1, 11), default=10)
    arguments = parser.parse_args()
    seeds, count = range(arguments.seeds), arguments.clips
    console, plain = Console(width=100), load_model()
    uncached = [clips(plain, count, seed) for seed in seeds]
    table = Table("method", "in FLOPs", "PSNR dB", "by seed", "clips, std", "worst clip", "SSIM")
    for name, (ideal, generate) in contenders(count).items():
        scores, likeness = [], []
        for seed in seeds:
            made = generate(seed)
            frames = made.flatten(0, 2)[:, None], uncached[seed].flatten(0, 2)[:, None]
            scores.append(psnr(*frames).view(count, -1).mean(1))
            likeness.append(ssim(*frames).mean())
        each = torch.cat(scores)
        by_seed = " ".join(f"{float(score.mean()):.1f}" for score in scores)
        table.add_row(
            name,
            f"{ideal:.2f}",
            f"{float(each.mean()):.1f}",
            by_seed,
            f"{float(each.std()):.1f}",
            f"{float(each.min()):.1f}",
            f"{statistics.fmean(map(float, likeness)):.4f}",
        )
        console.print(f"{name} done")
    console.print(table)


if __name__ == "__main__":
    main()
