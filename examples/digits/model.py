"""The digit models and their noise schedule.

The generator is a diffusers `DiTTransformer2DModel` that predicts the velocity (v-prediction) under the
cosine noise schedule; the classifier measures its samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.digits.data import IMAGE_SIZE, NUM_CLASSES

WEIGHTS = Path(__file__).parent / "weights"
DIT_WEIGHTS = WEIGHTS / "dit.safetensors"
CLASSIFIER_WEIGHTS = WEIGHTS / "classifier.safetensors"

NULL_LABEL = NUM_CLASSES
"""The label of the unconditional branch of classifier-free guidance."""

BLOCKS = 8
HEADS = 4
HEAD_WIDTH = 32
PATCH_SIZE = 2
TRAIN_TIMESTEPS = 1000
EMBEDDING_WIDTH = 64

_NOISE_SCHEDULE: dict[str, object] = {
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


def build_model() -> nn.Module:
    """A `DiTTransformer2DModel` with random weights, in eval mode.

    Called with latents (N, 1, 16, 16), `timestep` (N,) in [0, 1000) and `class_labels` (N,) in 0 to 10,
    where 10 is `NULL_LABEL`; returns the velocity, of the latents' shape. In train mode diffusers drops
    labels in each block on its own, so training also runs in eval mode and drops them beforehand.
    """
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=1,
        out_channels=1,
        num_layers=BLOCKS,
        dropout=0.0,
        sample_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        num_embeds_ada_norm=NUM_CLASSES,
    )
    return cast(nn.Module, model).eval()


def load_model(path: Path | str = DIT_WEIGHTS) -> nn.Module:
    """The trained diffusion transformer in float32 and eval mode."""
    model = build_model()
    load_weights(model, path)
    return model


class Classifier(nn.Module):
    """A small convolutional digit classifier on images (N, 1, 16, 16) in [-1, 1]."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv_stage(1, width),
            _conv_stage(width, 2 * width),
            nn.MaxPool2d(2),
            _conv_stage(2 * width, 2 * width),
            nn.MaxPool2d(2),
            _conv_stage(2 * width, EMBEDDING_WIDTH),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.embedding = nn.Linear(4 * EMBEDDING_WIDTH, EMBEDDING_WIDTH)
        self.head = nn.Linear(EMBEDDING_WIDTH, NUM_CLASSES)

    def embed(self, images: Tensor) -> Tensor:
        """Features for Fréchet distances, (N, EMBEDDING_WIDTH)."""
        return cast(Tensor, self.embedding(self.features(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, (N, NUM_CLASSES)."""
        return cast(Tensor, self.head(F.gelu(self.embed(images))))


def build_classifier() -> Classifier:
    """The classifier with random weights, in eval mode."""
    return Classifier().eval()


def load_classifier(path: Path | str = CLASSIFIER_WEIGHTS) -> Classifier:
    """The trained classifier in float32 and eval mode."""
    model = build_classifier()
    load_weights(model, path)
    return model


def ddim_scheduler() -> DDIMScheduler:
    """Deterministic DDIM (eta 0) on the training noise schedule."""
    return DDIMScheduler(**_NOISE_SCHEDULE, clip_sample=False, set_alpha_to_one=True)


def dpm_solver_scheduler() -> DPMSolverMultistepScheduler:
    """Second-order DPM-Solver++ on the training noise schedule."""
    return DPMSolverMultistepScheduler(
        **_NOISE_SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, lower_order_final=True
    )


def signal_and_noise_levels() -> tuple[Tensor, Tensor]:
    """Coefficients of image and noise at each training timestep, two tensors (TRAIN_TIMESTEPS,)."""
    scheduler: Any = ddim_scheduler()
    alphas_cumprod: Tensor = scheduler.alphas_cumprod
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def save_weights(model: nn.Module, path: Path | str, dtype: torch.dtype = torch.float16) -> None:
    """Store the state dict with floating-point tensors in `dtype`; the file appears whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    partial = target.with_name(target.name + ".partial")
    save_file(state, partial)
    partial.replace(target)


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Read what `save_weights` wrote; the model keeps its own dtypes."""
    model.load_state_dict(load_file(path))


def _conv_stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.GELU())
