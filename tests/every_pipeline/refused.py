"""Pipelines whose model cannot be captured, with a pattern of the message and the reason."""

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
}
