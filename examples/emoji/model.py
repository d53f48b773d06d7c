"""The text-to-image model and its noise schedule.

A diffusers `PixArtTransformer2DModel` on the pixels of 32x32 RGB pictures that predicts the velocity of a
rectified flow. Its text input is a name's words, each a learned vector, and zeros for the unconditional
branch of guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from torch import Tensor, nn

from examples.digits.model import load_weights
from examples.emoji.data import CHANNELS, IMAGE_SIZE, plain_name

WEIGHTS = Path(__file__).parent / "weights" / "pixart.safetensors"
NAMES = "names.txt"
"""Beside the weights: the names that the model was trained on, one in a line."""

BLOCKS = 10
HEADS = 5
HEAD_WIDTH = 32
PATCH_SIZE = 2
TOKENS = 8
CAPTION_CHANNELS = 64
TRAIN_TIMESTEPS = 1000
SHIFT = 3.0
"""Towards noise, at which the words settle the picture (arXiv 2403.03206, equation 23)."""


class EmojiModel(nn.Module):
    """The diffusion transformer and the vectors of the words in `names`.

    Attributes:
        transformer: called with latents (N, 3, 32, 32), `timestep` (N,) in (0, 1000],
            `encoder_hidden_states` (N, TOKENS, CAPTION_CHANNELS) and `added_cond_kwargs`; returns the
            velocity (noise minus data), of the latents' shape.
        names: what the model can draw.
        vocabulary: each word's row in `words`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.vocabulary = {
            word: row for row, word in enumerate(sorted({word for name in names for word in name.split()}))
        }
        self.words = nn.Embedding(len(self.vocabulary), CAPTION_CHANNELS)
        self.transformer = _build_transformer()

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Rows of the prompts' words, int64 (N, TOKENS); -1 throughout for an empty prompt.

        A prompt's words are repeated until all places are taken, so that none is padding.
        """
        return torch.tensor([self._rows(prompt) for prompt in prompts])

    def embed(self, tokens: Tensor) -> Tensor:
        """The text input of `tokens`, (N, TOKENS, CAPTION_CHANNELS); zeros where they are -1.

        Stored vectors are of length 1: so a rare word's moves as far in a step as its use demands.
        """
        vectors = self.words(tokens.clamp(min=0)) * CAPTION_CHANNELS**0.5
        return cast(Tensor, vectors * (tokens >= 0)[..., None])

    @torch.no_grad()
    def captions(self, prompts: Sequence[str]) -> Tensor:
        """The text input that asks for `prompts`, (N, TOKENS, CAPTION_CHANNELS)."""
        return self.embed(self.tokens(prompts))

    def forward(self, pictures: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        """The velocity at noisy pictures, of their shape."""
        velocity = self.transformer(
            hidden_states=pictures,
            encoder_hidden_states=self.embed(tokens),
            timestep=timestep,
            added_cond_kwargs=no_conditions(),
            return_dict=False,
        )[0]
        return cast(Tensor, velocity)

    def _rows(self, prompt: str) -> list[int]:
        words = plain_name(prompt).split()
        unknown = [word for word in words if word not in self.vocabulary]
        if unknown:
            raise ValueError(f"{prompt!r} has words that are in no emoji's name: {', '.join(unknown)}")
        if len(words) > TOKENS:
            raise ValueError(f"{prompt!r} has more than {TOKENS} words")
        return [self.vocabulary[words[place % len(words)]] if words else -1 for place in range(TOKENS)]


def build_model(names: Sequence[str]) -> EmojiModel:
    """The model for pictures of `names` with random weights, in eval mode."""
    return EmojiModel(names).eval()


def load_model(path: Path | str = WEIGHTS) -> EmojiModel:
    """The trained model in float32 and eval mode."""
    names = Path(path).with_name(NAMES).read_text(encoding="utf-8").splitlines()
    model = build_model(names)
    load_weights(model, path)
    return model


def no_conditions() -> dict[str, Any]:
    """What PixArt's pipelines pass as `added_cond_kwargs` to a model without conditions on the size."""
    return {"resolution": None, "aspect_ratio": None}


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler's method on the rectified flow, shifted as in training."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS, shift=SHIFT)


def _build_transformer() -> nn.Module:
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=BLOCKS,
        cross_attention_dim=HEADS * HEAD_WIDTH,
        sample_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        num_embeds_ada_norm=TRAIN_TIMESTEPS,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
        caption_channels=CAPTION_CHANNELS,
    )
    return cast(nn.Module, model)
