"""Generations of all methods, interleaved, and what they say about time and quality."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from examples.demo.methods import Method, Progress
from examples.digits.evaluate import accuracy, reference_images
from examples.digits.model import Classifier
from graphcache.metrics import frechet_distance, psnr, ssim


@dataclass
class Runs:
    """One method's generations: seconds of each, and images by round."""

    seconds: list[float] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    peak_cache_bytes: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model_calls: of one generation.
        ms_per_image: median over rounds, in milliseconds.
        speedup: the uncached median divided by this one.
        ideal_speedup: the same ratio in FLOPs.
        psnr_db: to the uncached images of the same noise, mean; None for those themselves.
        ssim: likewise.
        frechet_distance: to held-out digits, in the classifier's embedding.
        accuracy: fraction that the classifier reads as the label asked for.
        peak_cache_mib: None without a cache.
    """

    method: str
    model_calls: int
    ms_per_image: float
    speedup: float
    ideal_speedup: float
    psnr_db: float | None
    ssim: float | None
    frechet_distance: float
    accuracy: float
    peak_cache_mib: float | None


def run_rounds(
    methods: Sequence[Method], labels: Tensor, rounds: int, seed: int, progress: Progress
) -> dict[str, Runs]:
    """Each round generates from its own noise with every method, in shuffled order."""
    runs = {method.name: Runs() for method in methods}
    for turn in range(rounds):
        for method in random.Random(seed + turn).sample(list(methods), len(methods)):
            start = time.perf_counter()
            images = method.generate(labels, seed + turn, progress)
            runs[method.name].seconds.append(time.perf_counter() - start)
            runs[method.name].images.append(images)
            runs[method.name].peak_cache_bytes = method.peak_cache_bytes
    return runs


@torch.no_grad()
def table_rows(
    methods: Sequence[Method],
    runs: dict[str, Runs],
    labels: Tensor,
    classifier: Classifier,
    progress: Progress,
) -> list[Row]:
    """Rows in the order of the methods, compared with the first."""
    reference = classifier.embed(reference_images()[0])
    baseline = runs[methods[0].name]
    rows = []
    for method in methods:
        rows.append(_row(method, runs[method.name], baseline, labels, classifier, reference))
        progress()
    return rows


def _row(
    method: Method, runs: Runs, baseline: Runs, labels: Tensor, classifier: Classifier, reference: Tensor
) -> Row:
    images, uncached = torch.cat(runs.images), torch.cat(baseline.images)
    seconds = statistics.median(runs.seconds)
    compared = runs is not baseline
    peak = runs.peak_cache_bytes
    return Row(
        method=method.name,
        model_calls=method.steps,
        ms_per_image=1e3 * seconds / len(labels),
        speedup=statistics.median(baseline.seconds) / seconds,
        ideal_speedup=method.ideal,
        psnr_db=float(psnr(images, uncached).mean()) if compared else None,
        ssim=float(ssim(images, uncached).mean()) if compared else None,
        frechet_distance=frechet_distance(classifier.embed(images), reference),
        accuracy=accuracy(classifier, images, labels.repeat(len(runs.images))),
        peak_cache_mib=None if peak is None else peak / 2**20,
    )
