"""Tiny diffusers pipelines with random weights and no text encoders: prompts come as embeddings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from zoo import CASES
from zoo.case import noise, padded, randomise

TEXT, TEXT_DIM, POOLED = 6, 24, 20


@dataclass(frozen=True)
class TinyPipeline:
    """How to build a pipeline, which of its transformer's modules end a branch, and how to call it.

    `arguments(batch, guided)` are those of `pipe(...)` beside the number of steps and the generator.
    `branches` are the transformer calls that a guided step makes; one means that guidance doubles the batch.
    """

    build: Callable[[], Any]
    branch_modules: str
    arguments: Callable[[int, bool], dict[str, Any]]
    branches: int = 1

    def make(self) -> Any:
        """A new pipeline; the weights are the same each time."""
        pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def generate(self, pipe: Any, steps: int, batch: int = 1, guided: bool = True) -> Tensor:
        """What a fixed seed gives: latents, or pixels where a pipeline always decodes."""
        generator = torch.Generator().manual_seed(0)
        arguments = self.arguments(batch, guided)
        result = pipe(**arguments, num_inference_steps=steps, generator=generator, return_dict=False)
        return result[0]


def _vae() -> nn.Module:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    return randomise(vae, seed=31)


def _dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    scheduler = diffusers.DDIMScheduler()
    return diffusers.DiTPipeline(randomise(transformer, seed=32), _vae(), scheduler)


def _dit_arguments(batch: int, guided: bool) -> dict[str, Any]:
    labels = [7 * row + 3 for row in range(batch)]
    return {"class_labels": labels, "guidance_scale": 4.0 if guided else 1.0, "output_type": "pt"}


def _pixart() -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtAlphaPipeline(None, None, None, CASES["pixart"].make(), scheduler)


def _pixart_arguments(batch: int, guided: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(batch, TEXT, TEXT_DIM),
        "prompt_attention_mask": padded(batch, TEXT).long(),
        "negative_prompt": None,
        "negative_prompt_embeds": noise(batch, TEXT, TEXT_DIM, seed=2),
        "negative_prompt_attention_mask": padded(batch, TEXT).long(),
        "guidance_scale": 4.5 if guided else 1.0,
        "use_resolution_binning": False,
        "output_type": "latent",
    }


def _flux() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler, None, None, None, None, None, CASES["flux"].make())


def _flux_arguments(batch: int, guided: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(batch, TEXT, TEXT_DIM),
        "pooled_prompt_embeds": noise(batch, POOLED, seed=2),
        "negative_prompt_embeds": noise(batch, TEXT, TEXT_DIM, seed=3),
        "negative_pooled_prompt_embeds": noise(batch, POOLED, seed=4),
        "true_cfg_scale": 4.0 if guided else 1.0,
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }


def _wan() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.WanPipeline(None, None, None, scheduler, CASES["wan"].make())


def _wan_arguments(batch: int, guided: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(batch, TEXT, TEXT_DIM),
        "negative_prompt_embeds": noise(batch, TEXT, TEXT_DIM, seed=2),
        "guidance_scale": 4.0 if guided else 1.0,
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "output_type": "latent",
    }


_FLUX_BRANCHES = r"transformer_blocks\.\d+\.(attn|ff|ff_context)|single_transformer_blocks\.\d+\.proj_out"

PIPELINES: dict[str, TinyPipeline] = {
    "dit": TinyPipeline(_dit, r"transformer_blocks\.\d+\.(attn1|ff)", _dit_arguments),
    "pixart": TinyPipeline(_pixart, r"transformer_blocks\.\d+\.(attn1|attn2|ff)", _pixart_arguments),
    "flux": TinyPipeline(_flux, _FLUX_BRANCHES, _flux_arguments, branches=2),
    "wan": TinyPipeline(_wan, r"blocks\.\d+\.(attn1|attn2|ffn)", _wan_arguments, branches=2),
}
