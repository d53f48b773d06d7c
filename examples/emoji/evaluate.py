"""How many of the emoji model's pictures are closest to the emoji that they were asked for.

``python -m examples.emoji.evaluate --cache .cache/emoji/pictures.pt``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.emoji.data import CANVAS_SIZE, IMAGE_SIZE, Pictures, load_pictures
from examples.emoji.model import WEIGHTS, EmojiModel, flow_scheduler, load_model
from examples.emoji.sample import sample

BATCH = 32
CACHE = Path(".cache/emoji/pictures.pt")


def generate(model: EmojiModel, names: Sequence[str], steps: int, seed: int = 0) -> Tensor:
    """A picture for each name, (N, 3, IMAGE_SIZE, IMAGE_SIZE)."""
    made = []
    for first in range(0, len(names), BATCH):
        text = model.captions(names[first : first + BATCH])
        made.append(sample(model.transformer, flow_scheduler(), text, steps=steps, seed=seed + first))
    return torch.cat(made)


def ranks(pictures: Tensor, emoji: Tensor, asked: Tensor) -> Tensor:
    """How many emoji are closer to each picture than the asked one, by squared error over pixels, (N,)."""
    distances = torch.cdist(pictures.flatten(1), emoji.flatten(1))
    own = distances.gather(1, asked[:, None])
    return (distances < own).sum(1)


def ranks_among(drawn: Pictures, made: Tensor, names: Sequence[str]) -> Tensor:
    """Those of pictures that were made for the names of drawn emoji."""
    emoji = F.avg_pool2d(drawn.canvases.float() / 127.5 - 1, CANVAS_SIZE // IMAGE_SIZE)
    return ranks(made, emoji, torch.tensor([drawn.names.index(name) for name in names]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--count", type=int, default=256, help="names, drawn at random")
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    pictures, model = load_pictures(arguments.cache), load_model(arguments.weights)
    asked = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[: arguments.count]
    names = [pictures.names[place] for place in asked]
    found = ranks_among(pictures, generate(model, names, arguments.steps), names)
    share = [float((found < most).float().mean()) for most in (1, 5)]
    print(
        f"closest of {len(pictures)} emoji: the asked one for {share[0]:.0%}, one of five for {share[1]:.0%}"
    )


if __name__ == "__main__":
    main()
