"""Images of digits: plans that reuse and forecast, and fewer steps of two schedulers."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.demo import picture
from examples.demo.measure import Judge
from examples.demo.methods import Method
from examples.demo.part import Part
from examples.digits.evaluate import SampleQuality, accuracy, balanced_labels, reference_images
from examples.digits.model import (
    Classifier,
    ddim_scheduler,
    dpm_solver_scheduler,
    load_classifier,
    load_model,
)
from examples.digits.sample import sample
from graphcache import Plan, presets
from graphcache.metrics import frechet_distance

STEPS = 50
INTERVAL = 3


def image_part(small: bool) -> Part:
    """The images' part with 64 digits, or 16 if `small`."""
    labels = balanced_labels(16 if small else 64)
    return Part(
        sample="image",
        plain=Method("uncached", load_model(), sample, ddim_scheduler, STEPS),
        plans=plans(),
        fewer={"fewer DDIM steps": ddim_scheduler, "DPM-Solver++": dpm_solver_scheduler},
        warm_up_steps=5,
        labels=labels,
        rounds=2 if small else 4,
        shown=2,
        judge=_judge(load_classifier(), labels),
        draw=picture.draw,
        files=("demo.png", "table.txt", "demo.json"),
    )


def plans() -> dict[str, Plan]:
    """The plans shown, by the name they have in the table."""
    return {
        "FORA": presets.fora(STEPS, interval=INTERVAL),
        "TaylorSeer": presets.taylorseer(STEPS, interval=INTERVAL, order=2),
        "TaylorSeer lite": presets.taylorseer(STEPS, interval=INTERVAL, order=2, lite=True),
    }


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
