"""Images of digits: a plan found for the model, a published one, and fewer steps of two schedulers."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from examples.demo import picture, searched
from examples.demo.measure import Judge
from examples.demo.methods import Method
from examples.demo.part import Extent, Part
from examples.digits.evaluate import SampleQuality, accuracy, balanced_labels, reference_images
from examples.digits.model import (
    Classifier,
    ddim_scheduler,
    dpm_solver_scheduler,
    load_classifier,
)
from examples.digits.sample import sample
from examples.samplers import digits_example
from graphcache import presets
from graphcache.planning.metrics import frechet_distance

STEPS = 50
SPEEDUP = 3.0


def image_part(extent: Extent, folder: Path, console: Console) -> Part:
    """The images' part; its own plan is found first."""
    labels = balanced_labels(extent.choose(16, 20, 30))
    example = digits_example()
    found = searched.find(example, SPEEDUP, extent.choose(4, 16, 16), folder, console)
    return Part(
        sample="image",
        plain=Method("uncached", example.model, sample, ddim_scheduler, STEPS),
        plans={
            "searched and tuned": found.plan,
            "TaylorSeer": presets.taylorseer(STEPS, interval=3, order=2),
        },
        fewer={"fewer DDIM steps": ddim_scheduler, "DPM-Solver++": dpm_solver_scheduler},
        warm_up_steps=STEPS,
        labels=labels,
        rounds=extent.choose(2, 3, 3),
        shown=1,
        judge=_judge(load_classifier(), labels),
        draw=picture.draw,
        files=("demo.png", "table.txt", "demo.json"),
        searched=found,
    )


@torch.no_grad()
def _judge(classifier: Classifier, labels: Tensor) -> Judge:
    """Compares images of all rounds with held-out digits and with what they were asked to show."""
    reference = classifier.embed(reference_images()[0])

    def judge(images: Tensor) -> SampleQuality:
        asked = labels.repeat(len(images) // len(labels))
        return SampleQuality(
            accuracy(classifier, images, asked), frechet_distance(classifier.embed(images), reference)
        )

    return judge
