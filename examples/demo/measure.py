"""Generations of all methods, interleaved, and what they say about time and quality."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from examples.demo.methods import Method
from examples.demo.progress import Progress
from examples.digits.evaluate import SampleQuality
from graphcache.planning.metrics import ssim
from graphcache.runtime.closeness import psnr

Judge = Callable[[Tensor], SampleQuality]
"""Judges the samples of all rounds."""


@dataclass
class Runs:
    """One method's generations: seconds of each, and samples by round."""

    seconds: list[float] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    peak_cache_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table. A sample is an image or a clip.

    Attributes:
        model_calls: of one generation.
        ms_per_sample: median over rounds, in milliseconds.
        speedup: the uncached median divided by this one.
        ideal_speedup: the same ratio in FLOPs.
        psnr_db: to the uncached frames of the same noise, mean; None for those themselves.
        ssim: likewise.
        frechet_distance: to held-out digits, in the classifier's embedding; None of clips.
        accuracy: fraction that the classifier reads as the label asked for; None of clips.
        peak_cache_mib: None without a cache.
    """

    method: str
    model_calls: int
    ms_per_sample: float
    speedup: float
    ideal_speedup: float
    psnr_db: float | None
    ssim: float | None
    frechet_distance: float | None
    accuracy: float | None
    peak_cache_mib: float | None


def run_rounds(
    methods: Sequence[Method], labels: Tensor, rounds: int, seed: int, progress: Progress
) -> dict[str, Runs]:
    """Each round generates from its own noise with every method, in shuffled order."""
    runs = {method.name: Runs() for method in methods}
    for turn in range(rounds):
        for method in random.Random(seed + turn).sample(list(methods), len(methods)):
            start = time.perf_counter()
            samples = method.generate(labels, seed + turn, progress)
            runs[method.name].seconds.append(time.perf_counter() - start)
            runs[method.name].samples.append(samples)
            runs[method.name].peak_cache_bytes = method.peak_cache_bytes
    return runs


@torch.no_grad()
def table_rows(
    methods: Sequence[Method], runs: dict[str, Runs], judge: Judge | None, progress: Progress
) -> list[Row]:
    """Rows in the order of the methods, compared with the first."""
    baseline = runs[methods[0].name]
    rows = []
    for method in methods:
        rows.append(_row(method, runs[method.name], baseline, judge))
        progress()
    return rows


def _row(method: Method, runs: Runs, baseline: Runs, judge: Judge | None) -> Row:
    samples = torch.cat(runs.samples)
    frames, uncached = _frames(samples), _frames(torch.cat(baseline.samples))
    seconds = statistics.median(runs.seconds)
    compared = runs is not baseline
    quality = judge(samples) if judge else None
    peak = runs.peak_cache_bytes
    return Row(
        method=method.name,
        model_calls=method.steps,
        ms_per_sample=1e3 * seconds / len(runs.samples[0]),
        speedup=statistics.median(baseline.seconds) / seconds,
        ideal_speedup=method.ideal,
        psnr_db=float(psnr(frames, uncached).mean()) if compared else None,
        ssim=float(ssim(frames, uncached).mean()) if compared else None,
        frechet_distance=quality.frechet_distance if quality else None,
        accuracy=quality.accuracy if quality else None,
        peak_cache_mib=None if peak is None else peak / 2**20,
    )


def _frames(samples: Tensor) -> Tensor:
    """Images (N, C, H, W), or clips (N, C, T, H, W) frame by frame: (N·T, C, H, W)."""
    return samples if samples.dim() == 4 else samples.transpose(1, 2).flatten(0, 1)
