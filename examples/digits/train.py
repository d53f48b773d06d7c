"""Train the digit classifier and the diffusion transformer on one CPU core.

``python -m examples.digits.train --workdir .cache/digits``

An interrupted run continues from its last checkpoint and ends with the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from examples.digits.data import Augmentation, Digits, load_split
from examples.digits.model import (
    CLASSIFIER_WEIGHTS,
    DIT_WEIGHTS,
    NULL_LABEL,
    TRAIN_TIMESTEPS,
    WEIGHTS,
    build_classifier,
    build_model,
    save_weights,
    signal_and_noise_levels,
)

BatchLoss = Callable[[nn.Module, torch.Generator], Tensor]

LABEL_DROPOUT = 0.1
CLASSIFIER_AUGMENTATION = Augmentation(rotation=12.0, shift=1.2, scale=0.12, shear=0.15, thickness=0.1)


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to train; `ema_decay` is the limit of a decay that starts near zero."""

    steps: int
    batch_size: int = 64
    peak_learning_rate: float = 1.5e-3
    warmup_fraction: float = 0.05
    weight_decay: float = 0.01
    ema_decay: float = 0.998
    checkpoint_interval: int = 250
    seed: int = 0


class TrainingState:
    """All that a run needs to continue: weights, their average, optimiser, learning rate, random numbers."""

    def __init__(self, model: nn.Module, plan: TrainingPlan) -> None:
        self.model = model
        self.plan = plan
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=plan.peak_learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay
        )
        self.learning_rate = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            max_lr=plan.peak_learning_rate,
            total_steps=plan.steps,
            pct_start=plan.warmup_fraction,
            cycle_momentum=False,
        )
        self.generator = torch.Generator(torch.get_default_device()).manual_seed(plan.seed)
        self.step = 0
        self.loss = 0.0

    def advance(self, batch_loss: BatchLoss) -> None:
        """One optimiser step."""
        loss = batch_loss(self.model, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.learning_rate.step()
        self.step += 1
        self._update_average()
        smoothing = min(0.99, self.step / (self.step + 1))
        self.loss = smoothing * self.loss + (1 - smoothing) * loss.item()

    def save(self, path: Path) -> None:
        """Write a checkpoint; the file is replaced whole."""
        partial = path.with_name(path.name + ".partial")
        torch.save(self._contents(), partial)
        partial.replace(path)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint written under the same plan."""
        contents = torch.load(path, weights_only=True)
        if contents["plan"] != repr(self.plan):
            raise ValueError(f"{path} was written under another plan: {contents['plan']}")
        self.model.load_state_dict(contents["model"])
        self.average = contents["average"]
        self.optimizer.load_state_dict(contents["optimizer"])
        self.learning_rate.load_state_dict(contents["learning_rate"])
        self.generator.set_state(contents["generator"].cpu())
        self.step = contents["step"]
        self.loss = contents["loss"]

    def averaged_model(self) -> nn.Module:
        """The model with its averaged weights; ends the training of this state."""
        self.model.load_state_dict(self.average)
        return self.model

    def _contents(self) -> dict[str, Any]:
        return {
            "plan": repr(self.plan),
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "loss": self.loss,
        }

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.plan.ema_decay, (1 + self.step) / (10 + self.step))
        current = self.model.state_dict()
        for name, value in current.items():
            self.average[name].lerp_(value, 1 - decay)


def train(
    model: nn.Module, batch_loss: BatchLoss, plan: TrainingPlan, checkpoint: Path, title: str
) -> TrainingState:
    """Run `plan`, or what is left of it, and return the final state."""
    state = TrainingState(model, plan)
    if checkpoint.exists():
        state.restore(checkpoint)
    with _progress_bar() as progress:
        task = progress.add_task(title, total=plan.steps, completed=state.step, loss=state.loss)
        while state.step < plan.steps:
            state.advance(batch_loss)
            progress.update(task, completed=state.step, loss=state.loss)
            if state.step % plan.checkpoint_interval == 0 or state.step == plan.steps:
                state.save(checkpoint)
                progress.console.print(f"{title}: step {state.step}, loss {state.loss:.4f}")
    return state


def classifier_loss(digits: Digits, batch_size: int) -> BatchLoss:
    """Cross-entropy on augmented digits."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        images, labels = digits.batch(batch_size, generator, CLASSIFIER_AUGMENTATION)
        return F.cross_entropy(model(images), labels, label_smoothing=0.05)

    return loss


def velocity_loss(digits: Digits, batch_size: int) -> BatchLoss:
    """Squared error of the predicted velocity, at timesteps spread evenly over each batch."""
    signal, noise_level = signal_and_noise_levels()

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        images, labels = digits.batch(batch_size, generator)
        timesteps = stratified_timesteps(batch_size, generator)
        noise = torch.randn(images.shape, generator=generator)
        a, s = signal[timesteps].view(-1, 1, 1, 1), noise_level[timesteps].view(-1, 1, 1, 1)
        dropped = torch.rand(batch_size, generator=generator) < LABEL_DROPOUT
        class_labels = labels.masked_fill(dropped, NULL_LABEL)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(
                a * images + s * noise, timestep=timesteps, class_labels=class_labels, return_dict=False
            )[0]
        return F.mse_loss(velocity.float(), a * noise - s * images)

    return loss


def stratified_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """One uniform timestep from each of `count` equal parts of the schedule, int64 (count,)."""
    position = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (position * TRAIN_TIMESTEPS).long().clamp(max=TRAIN_TIMESTEPS - 1)


def initialise(model: nn.Module) -> None:
    """Start every block as the identity: zero modulation and a zero output layer."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith("norm1.linear") or name.startswith("proj_out_")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def train_classifier(digits: Digits, plan: TrainingPlan, workdir: Path, weights: Path) -> None:
    """Train the classifier and store its averaged weights."""
    torch.manual_seed(plan.seed)
    loss = classifier_loss(digits, plan.batch_size)
    state = train(build_classifier(), loss, plan, workdir / "classifier.pt", "classifier")
    save_weights(state.averaged_model(), weights)


def train_dit(digits: Digits, plan: TrainingPlan, workdir: Path, weights: Path) -> None:
    """Train the diffusion transformer and store its averaged weights."""
    torch.manual_seed(plan.seed)
    model = build_model()
    initialise(model)
    loss = velocity_loss(digits, plan.batch_size)
    state = train(model, loss, plan, workdir / "dit.pt", "dit")
    save_weights(state.averaged_model(), weights)


def main() -> None:
    arguments = _parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    digits = load_split("train", arguments.seed)
    classifier_plan = TrainingPlan(
        arguments.classifier_steps, peak_learning_rate=3e-3, ema_decay=0.99, seed=arguments.seed
    )
    train_classifier(digits, classifier_plan, arguments.workdir, arguments.weights / CLASSIFIER_WEIGHTS.name)
    plan = TrainingPlan(arguments.steps, seed=arguments.seed)
    train_dit(digits, plan, arguments.workdir, arguments.weights / DIT_WEIGHTS.name)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the digit models.")
    parser.add_argument("--workdir", type=Path, default=Path(".cache/digits"), help="checkpoint folder")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the final weights")
    parser.add_argument("--steps", type=int, default=3700, help="training steps of the diffusion transformer")
    parser.add_argument("--classifier-steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )


if __name__ == "__main__":
    main()
