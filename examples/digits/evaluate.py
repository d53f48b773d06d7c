"""Measure samples with the digit classifier: accuracy, and a Fréchet distance in its embedding.

``python -m examples.digits.evaluate --image digits.png``
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from examples.digits.data import IMAGE_SIZE, NUM_CLASSES, load_split
from examples.digits.model import (
    CLASSIFIER_WEIGHTS,
    DIT_WEIGHTS,
    Classifier,
    ddim_scheduler,
    dpm_solver_scheduler,
    load_classifier,
    load_model,
)
from examples.digits.sample import sample
from graphcache.planning.metrics import frechet_distance

REFERENCE_COUNT = 4096


@dataclass(frozen=True)
class SampleQuality:
    """Quality of a set of images.

    Attributes:
        accuracy: fraction that the classifier reads as the label asked for.
        frechet_distance: to held-out digits in the classifier's embedding (squared embedding units).
    """

    accuracy: float
    frechet_distance: float


def balanced_labels(count: int) -> Tensor:
    """0, 1, ..., 9, 0, ... as int64 (count,)."""
    return torch.arange(count) % NUM_CLASSES


def reference_images(count: int = REFERENCE_COUNT, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Augmented held-out digits: images (count, 1, IMAGE_SIZE, IMAGE_SIZE) and labels (count,)."""
    return load_split("held_out").batch(count, torch.Generator().manual_seed(seed))


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Fraction of `images` (N, 1, IMAGE_SIZE, IMAGE_SIZE) classified as `labels` (N,)."""
    return float((classifier(images).argmax(dim=1) == labels).float().mean())


@torch.no_grad()
def sample_quality(
    classifier: Classifier, images: Tensor, labels: Tensor, reference: Tensor | None = None
) -> SampleQuality:
    """Judge `images` (N, 1, IMAGE_SIZE, IMAGE_SIZE) in [-1, 1] that were asked to show `labels` (N,).

    `reference`: images that the distance is to; by default `reference_images()`.
    """
    if reference is None:
        reference, _ = reference_images()
    distance = frechet_distance(classifier.embed(images), classifier.embed(reference))
    return SampleQuality(accuracy(classifier, images, labels), distance)


def save_grid(images: Tensor, path: Path | str, *, columns: int = NUM_CLASSES, zoom: int = 4) -> None:
    """Write images (N, 1, IMAGE_SIZE, IMAGE_SIZE) in [-1, 1] row by row as one greyscale PNG.

    Args:
        columns: images per row; rows left incomplete are dropped.
        zoom: side of a pixel in the file.
    """
    rows = images.shape[0] // columns
    tiles = images[: rows * columns].reshape(rows, columns, IMAGE_SIZE, IMAGE_SIZE)
    canvas = tiles.permute(0, 2, 1, 3).reshape(rows * IMAGE_SIZE, columns * IMAGE_SIZE)
    pixels = ((canvas.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    Image.fromarray(np.kron(pixels, np.ones((zoom, zoom), dtype=np.uint8))).save(path)


def _generate(arguments: argparse.Namespace, labels: Tensor) -> Tensor:
    scheduler: Any = ddim_scheduler() if arguments.scheduler == "ddim" else dpm_solver_scheduler()
    model = load_model(arguments.weights)
    with Progress(transient=True) as bar:
        task = bar.add_task("sampling", total=arguments.steps)
        return sample(
            model,
            scheduler,
            labels,
            steps=arguments.steps,
            guidance=arguments.guidance,
            seed=arguments.seed,
            progress=lambda done, _: bar.update(task, completed=done),
        )


def main() -> None:
    arguments = _parse_arguments()
    console = Console()
    classifier = load_classifier(arguments.classifier)
    held_out = accuracy(classifier, *reference_images())
    console.print(f"classifier on augmented held-out digits: {held_out:.2%}")
    labels = balanced_labels(arguments.count)
    images = _generate(arguments, labels)
    quality = sample_quality(classifier, images, labels)
    console.print(
        f"{arguments.scheduler}, {arguments.steps} steps, guidance {arguments.guidance}: "
        f"accuracy {quality.accuracy:.2%}, Fréchet distance {quality.frechet_distance:.3f}"
    )
    if arguments.image is not None:
        save_grid(images, arguments.image)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure samples of the digit model.")
    parser.add_argument("--weights", type=Path, default=DIT_WEIGHTS)
    parser.add_argument("--classifier", type=Path, default=CLASSIFIER_WEIGHTS)
    parser.add_argument("--scheduler", choices=["ddim", "dpm-solver"], default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", type=Path, help="PNG grid of the samples, one class per column")
    return parser.parse_args()


if __name__ == "__main__":
    main()
