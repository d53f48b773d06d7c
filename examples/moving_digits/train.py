"""Train the video model on a CPU: first its spatial blocks on still frames, then all of it on clips.

``python -m examples.moving_digits.train --workdir .cache/moving_digits``

An interrupted run continues from its last checkpoint and ends with the same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits.data import load_split
from examples.digits.model import save_weights
from examples.digits.train import LABEL_DROPOUT, BatchLoss, TrainingPlan, train
from examples.moving_digits.data import FRAMES, Clips
from examples.moving_digits.model import SHIFT, TRAIN_TIMESTEPS, WEIGHTS, build_model, captions, shifted


def velocity_loss(clips: Clips, batch_size: int, frames: int) -> BatchLoss:
    """Squared error of the predicted velocity, at noise levels spread over each batch."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        videos, labels = clips.batch(batch_size, generator, frames=frames)
        position = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        level = shifted(position, SHIFT if frames > 1 else 1.0)
        noise = torch.randn(videos.shape, generator=generator)
        share = level.view(-1, 1, 1, 1, 1)
        dropped = torch.rand(batch_size, generator=generator) < LABEL_DROPOUT
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(
                (1 - share) * videos + share * noise,
                timestep=level * TRAIN_TIMESTEPS,
                encoder_hidden_states=captions(labels.masked_fill(dropped, -1)),
                enable_temporal_attentions=frames > 1,
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), noise - videos)

    return loss


def initialise(model: nn.Module) -> None:
    """Start with every gated branch as the identity, an output of zero and ten captions far apart.

    A caption is one token that each cross-attention adds to all of a frame, ungated: with a default start
    it is some 3 % of the patches' size there, and clips change their digit on the way.
    """
    for name, parameter in model.named_parameters():
        if name.startswith(("proj_out.", "adaln_single.linear.")) or name.endswith("scale_shift_table"):
            nn.init.zeros_(parameter)
        elif name == "caption_projection.linear_1.weight":
            nn.init.normal_(parameter)
        elif name == "caption_projection.linear_2.weight" or name.endswith("attn2.to_v.weight"):
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)


def main() -> None:
    arguments = _parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    clips = Clips(load_split("train", arguments.seed))
    model = build_model()
    initialise(model)
    model.compile(dynamic=False)
    for name, frames, plan in _stages(arguments):
        loss = velocity_loss(clips, plan.batch_size, frames)
        model = train(model, loss, plan, arguments.workdir / f"{name}.pt", name).averaged_model()
    arguments.weights.parent.mkdir(parents=True, exist_ok=True)
    save_weights(model, arguments.weights)


def _stages(arguments: argparse.Namespace) -> list[tuple[str, int, TrainingPlan]]:
    """Name, frames and plan of each stage; a stage begins with the averaged weights of the one before."""
    seed = arguments.seed
    stills = TrainingPlan(arguments.still_steps, batch_size=96, seed=seed)
    moving = TrainingPlan(
        arguments.steps, batch_size=8, peak_learning_rate=1.2e-3, checkpoint_interval=100, seed=seed
    )
    return [("stills", 1, stills), ("clips", FRAMES, moving)]


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the moving digits' model.")
    parser.add_argument(
        "--workdir", type=Path, default=Path(".cache/moving_digits"), help="checkpoint folder"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="file of the final weights")
    parser.add_argument("--still-steps", type=int, default=2500, help="training steps on single frames")
    parser.add_argument("--steps", type=int, default=2200, help="training steps on clips")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
