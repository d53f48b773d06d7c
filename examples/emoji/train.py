"""Train the emoji model: first on pictures of half the size, then on those of the full size.

``python -m examples.emoji.train --workdir .cache/emoji --device cuda``

An interrupted run continues from its last checkpoint and ends with the same weights.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits.model import save_weights
from examples.digits.train import LABEL_DROPOUT, BatchLoss, TrainingPlan, train
from examples.emoji.data import IMAGE_SIZE, Pictures, load_pictures
from examples.emoji.model import NAMES, SHIFT, TRAIN_TIMESTEPS, WEIGHTS, EmojiModel, build_model
from examples.moving_digits.model import shifted


def velocity_loss(pictures: Pictures, tokens: Tensor, batch_size: int, side: int) -> BatchLoss:
    """Squared error of the predicted velocity, at noise levels spread over each batch.

    A smaller picture's pixels are averages, in which noise is weaker. Its level is lower by as much, so that
    a timestep stands for the same ratio of signal to noise at any size.
    """

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        images, names = pictures.batch(batch_size, generator, side=side)
        position = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        time = shifted(position, SHIFT)
        share = shifted(time, side / IMAGE_SIZE).view(-1, 1, 1, 1)
        noise = torch.randn(images.shape, generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < LABEL_DROPOUT
        text = tokens[names].masked_fill(dropped[:, None], -1)
        with torch.autocast(images.device.type, torch.bfloat16):
            velocity = model((1 - share) * images + share * noise, time * TRAIN_TIMESTEPS, text)
        return F.mse_loss(velocity.float(), noise - images)

    return loss


def initialise(model: EmojiModel) -> None:
    """Start with every gated branch as the identity, an output of zero and text as large as the patches.

    Cross-attention adds its text ungated. With a default start that is a few per cent of the patches' size,
    and the words hardly matter for a long time.
    """
    nn.init.normal_(model.words.weight, std=model.words.embedding_dim**-0.5)
    for name, parameter in model.transformer.named_parameters():
        if name.startswith(("proj_out.", "adaln_single.linear.")) or name.endswith("scale_shift_table"):
            nn.init.zeros_(parameter)
        elif name.endswith("attn2.to_v.weight") or re.match(r"caption_projection\..*weight", name):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def main() -> None:
    arguments = _parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    pictures = load_pictures(arguments.workdir / "pictures.pt").to(arguments.device)
    torch.set_default_device(arguments.device)
    model = build_model(pictures.names).to(arguments.device)
    tokens = model.tokens(pictures.names)
    initialise(model)
    model.compile(dynamic=False)
    trained: nn.Module = model
    for name, side, plan in _stages(arguments):
        loss = velocity_loss(pictures, tokens, plan.batch_size, side)
        trained = train(trained, loss, plan, arguments.workdir / f"{name}.pt", name).averaged_model()
    save_weights(trained, arguments.weights)
    listing = "".join(f"{name}\n" for name in pictures.names)
    arguments.weights.with_name(NAMES).write_text(listing, encoding="utf-8")


def _stages(arguments: argparse.Namespace) -> list[tuple[str, int, TrainingPlan]]:
    """Name, size and plan of each stage; a stage begins with the averaged weights of the one before."""
    common: dict[str, Any] = {
        "ema_decay": arguments.ema_decay,
        "checkpoint_interval": 500,
        "seed": arguments.seed,
    }
    half = TrainingPlan(
        arguments.half_steps, batch_size=arguments.half_batch, peak_learning_rate=2e-3, **common
    )
    full = TrainingPlan(arguments.steps, batch_size=arguments.batch, peak_learning_rate=1.2e-3, **common)
    return [("half", IMAGE_SIZE // 2, half), ("full", IMAGE_SIZE, full)]


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the emoji model.")
    parser.add_argument("--workdir", type=Path, default=Path(".cache/emoji"), help="checkpoint folder")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="file of the final weights")
    parser.add_argument("--half-steps", type=int, default=1000, help="training steps at half the size")
    parser.add_argument("--half-batch", type=int, default=256, help="pictures of each of them")
    parser.add_argument("--steps", type=int, default=1550, help="training steps at the full size")
    parser.add_argument("--batch", type=int, default=256, help="pictures of each of them")
    parser.add_argument("--ema-decay", type=float, default=0.999, help="of the weights' average")
    parser.add_argument("--device", default="cpu", help="such as cuda; the defaults are hours on a CPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
