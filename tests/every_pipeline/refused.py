"""Pipelines whose model cannot be captured, with a pattern of the message and the reason."""

from typing import Any

import torch

from every_pipeline.images import SD3, STARTS, of_kind
from tiny_pipelines import (
    FLOW,
    SHIFTED,
    STRENGTH,
    TinyPipeline,
    an_image,
    call_of,
    guided_by,
    image_vae,
    masked,
    pipeline_of,
    pooled,
    prompts,
    sized,
)
from zoo.expected import REFUSED, Refusal

SKIPPED = Refusal(
    r"mutation on a view chain", "an attention processor fills the diagonal of a part of its mask in place"
)


def glm(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    size = sized(1)(batch, guided, large)
    tokens = size["height"] * size["width"] // 4
    return {
        **prompts(batch, guided, large),
        "prior_token_ids": torch.arange(batch * tokens).reshape(batch, -1) % 7,
    }


PIPELINES: dict[str, tuple[TinyPipeline, Refusal]] = {
    "sd3_pag": (
        TinyPipeline(
            pipeline_of(
                "StableDiffusion3PAGPipeline", FLOW, transformer=SD3, pag_applied_layers=lambda: ["blocks.1"]
            ),
            call_of(prompts, pooled, guided_by(), sized(8)),
        ),
        SKIPPED,
    ),
    "sd3_pag_img2img": (
        TinyPipeline(
            pipeline_of(
                "StableDiffusion3PAGImg2ImgPipeline",
                FLOW,
                transformer=SD3,
                vae=image_vae(4),
                pag_applied_layers=lambda: ["blocks.1"],
            ),
            call_of(prompts, pooled, guided_by(), sized(1), an_image("image", 1), strength=STRENGTH),
            **STARTS,
        ),
        SKIPPED,
    ),
    "lumina2": (
        TinyPipeline(
            pipeline_of("Lumina2Pipeline", SHIFTED, transformer=of_kind("Lumina2Transformer2DModel")),
            call_of(prompts, masked(torch.int64), guided_by(), sized(8)),
        ),
        REFUSED["Lumina2Transformer2DModel"],
    ),
    "glm_image": (
        TinyPipeline(
            pipeline_of("GlmImagePipeline", FLOW, transformer=of_kind("GlmImageTransformer2DModel")),
            call_of(glm, guided_by(), sized(8)),
        ),
        Refusal(r"kv_caches is a GlmImageKVCache", "each call takes an object that holds keys and values"),
    ),
}
