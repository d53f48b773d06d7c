"""Pictures of what words say: a plan found for the model, and token budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from examples import emoji
from examples.demo import picture
from examples.demo.methods import Method
from examples.demo.part import Extent, Part
from examples.emoji.model import flow_scheduler, load_model
from examples.emoji.sample import sample
from graphcache import Plan, presets

STEPS = 30
PLANS = Path(emoji.__file__).parent / "plans"
"""Found for this model by `examples.benchmark_search`."""
PROMPTS = (
    "red apple",
    "green apple",
    "tomato",
    "strawberry",
    "sun",
    "full moon",
    "red heart",
    "blue heart",
    "cat face",
    "panda",
    "fox",
    "octopus",
    "rose",
    "cactus",
    "pizza",
    "soccer ball",
)


def word_part(extent: Extent, folder: Path, console: Console) -> Part:
    """The part of pictures from words, with 8 prompts: 4 if it is small, 16 with presets."""
    plans = {"searched": Plan.load(PLANS / "2.0.txt")}
    if extent.presets:
        plans["ToCa"] = presets.toca(STEPS, ratio=0.5)
    model = load_model()
    captions = model.captions(PROMPTS)

    def draw(transformer: Any, scheduler: Any, prompts: Tensor, **options: Any) -> Tensor:
        return sample(transformer, scheduler, captions[prompts], **options)

    return Part(
        sample="picture",
        plain=Method("uncached", model.transformer, draw, flow_scheduler, STEPS),
        plans=plans,
        fewer={"fewer steps": flow_scheduler},
        warm_up_steps=STEPS,
        labels=torch.arange(len(PROMPTS))[:: extent.choose(4, 2, 1)],
        rounds=extent.choose(1, 2, 2),
        shown=len(plans),
        judge=None,
        draw=picture.draw,
        files=("words.png", "words.txt", "words.json"),
    )
