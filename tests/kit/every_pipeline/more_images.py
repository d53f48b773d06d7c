"""Pipelines of image models that share little."""

from typing import Any

import torch
from PIL import Image

from every_pipeline.images import changed, embedded, hole, of_kind
from tiny_pipelines import (
    DDIM,
    FLOW,
    SHIFTED,
    STRENGTH,
    TEXT,
    TEXT_DIM,
    TinyPipeline,
    an_image,
    call_of,
    guided_by,
    image_start,
    image_vae,
    masked,
    model_of,
    pipeline_of,
    prompts,
    scheduler_of,
    sized,
    video_start,
)
from zoo import CASES
from zoo.case import noise, padded
from zoo.kind import HEAD_DIM, HEADS

QWEN_VAE = model_of(
    "AutoencoderKLQwenImage",
    71,
    base_dim=4,
    z_dim=2,
    dim_mult=[1],
    num_res_blocks=1,
    temperal_downsample=[],
    latents_mean=[0.0] * 2,
    latents_std=[1.0] * 2,
)
FLUX2_VAE = model_of(
    "AutoencoderKLFlux2",
    74,
    latent_channels=2,
    block_out_channels=(8,),
    down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",),
    norm_num_groups=4,
    layers_per_block=1,
)
QWEN = CASES["qwen_image"].make
Z_IMAGE = of_kind("ZImageTransformer2DModel")


def a_picture(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    size = sized(1)(batch, guided, large)
    return {"image": Image.new("RGB", (size["width"], size["height"]), (200, 100, 50))}


def listed(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    """Prompts of which each is a tensor of its own."""
    both = prompts(batch, guided, large)
    return {name: list(value) for name, value in both.items()}


def qwen(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {
        **prompts(batch, guided, large),
        "prompt_embeds_mask": padded(batch, TEXT),
        "negative_prompt_embeds_mask": padded(batch, TEXT).flip(0),
    }


def hunyuan(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    one = {**prompts(batch, guided, large), **masked(torch.int64)(batch, guided, large)}
    return {**one, **{f"{name}_2": value for name, value in one.items()}}


def layered(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(batch, TEXT, 2, TEXT_DIM),
        "prompt_embeds_mask": padded(batch, TEXT),
        "negative_prompt_embeds": noise(batch, TEXT, 2, TEXT_DIM, seed=2),
        "negative_prompt_embeds_mask": padded(batch, TEXT).flip(0),
    }


def glm(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    size = sized(1)(batch, guided, large)
    tokens = size["height"] * size["width"] // 4
    return {
        **prompts(batch, guided, large),
        "prior_token_ids": torch.arange(batch * tokens).reshape(batch, -1) % 7,
    }


HUNYUAN_CALL = (hunyuan, guided_by(), sized(8))
UNET = model_of(
    "UNet2DConditionModel",
    72,
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=TEXT_DIM,
    attention_head_dim=4,
    norm_num_groups=4,
)

PIPELINES: dict[str, TinyPipeline] = {
    "hunyuan_dit": TinyPipeline(
        pipeline_of("HunyuanDiTPipeline", DDIM, transformer=of_kind("HunyuanDiT2DModel")),
        call_of(*HUNYUAN_CALL, use_resolution_binning=False),
    ),
    "hunyuan_dit_pag": TinyPipeline(
        pipeline_of(
            "HunyuanDiTPAGPipeline",
            DDIM,
            transformer=of_kind("HunyuanDiT2DModel"),
            pag_applied_layers=lambda: ["blocks.1"],
        ),
        call_of(*HUNYUAN_CALL, use_resolution_binning=False),
    ),
    "lumina": TinyPipeline(
        pipeline_of("LuminaPipeline", FLOW, transformer=of_kind("LuminaNextDiT2DModel")),
        call_of(prompts, masked(torch.int64), guided_by(), sized(8), negative_prompt=None),
    ),
    "lumina2": TinyPipeline(
        pipeline_of("Lumina2Pipeline", SHIFTED, transformer=of_kind("Lumina2Transformer2DModel")),
        call_of(prompts, masked(torch.int64), guided_by(), sized(8)),
    ),
    "glm_image": TinyPipeline(
        pipeline_of("GlmImagePipeline", FLOW, transformer=of_kind("GlmImageTransformer2DModel")),
        call_of(glm, guided_by(), sized(8)),
    ),
    "cogview3": TinyPipeline(
        pipeline_of(
            "CogView3PlusPipeline",
            scheduler_of("CogVideoXDDIMScheduler"),
            transformer=of_kind("CogView3PlusTransformer2DModel"),
        ),
        call_of(prompts, guided_by(), sized(8)),
    ),
    "cogview4": TinyPipeline(
        pipeline_of("CogView4Pipeline", FLOW, transformer=of_kind("CogView4Transformer2DModel")),
        call_of(prompts, guided_by(), sized(8)),
    ),
    "cogview4_control": TinyPipeline(
        pipeline_of(
            "CogView4ControlPipeline",
            FLOW,
            transformer=changed("CogView4Transformer2DModel", in_channels=8),
            vae=image_vae(4),
        ),
        call_of(prompts, guided_by(), sized(2), an_image("control_image", 2)),
    ),
    "qwen_image_img2img": TinyPipeline(
        pipeline_of("QwenImageImg2ImgPipeline", SHIFTED, transformer=QWEN, vae=QWEN_VAE),
        call_of(qwen, guided_by("true_cfg_scale"), sized(1), an_image("image", 1), strength=STRENGTH),
        start=image_start,
    ),
    "qwen_image_inpaint": TinyPipeline(
        pipeline_of("QwenImageInpaintPipeline", SHIFTED, transformer=QWEN, vae=QWEN_VAE),
        call_of(qwen, guided_by("true_cfg_scale"), sized(1), an_image("image", 1), hole, strength=STRENGTH),
        start=image_start,
    ),
    "qwen_image_controlnet": TinyPipeline(
        pipeline_of(
            "QwenImageControlNetPipeline",
            SHIFTED,
            transformer=QWEN,
            vae=QWEN_VAE,
            controlnet=model_of(
                "QwenImageControlNetModel",
                73,
                patch_size=1,
                in_channels=8,
                out_channels=8,
                num_layers=1,
                attention_head_dim=HEAD_DIM,
                num_attention_heads=HEADS,
                joint_attention_dim=TEXT_DIM,
                axes_dims_rope=(4, 6, 6),
            ),
        ),
        call_of(qwen, guided_by("true_cfg_scale"), sized(1), an_image("control_image", 1)),
    ),
    "z_image": TinyPipeline(
        pipeline_of("ZImagePipeline", SHIFTED, transformer=Z_IMAGE), call_of(listed, guided_by(), sized(8))
    ),
    "z_image_img2img": TinyPipeline(
        pipeline_of("ZImageImg2ImgPipeline", SHIFTED, transformer=Z_IMAGE, vae=image_vae(4)),
        call_of(listed, guided_by(), sized(1), an_image("image", 1), strength=STRENGTH),
        start=image_start,
    ),
    "ovis_image": TinyPipeline(
        pipeline_of("OvisImagePipeline", SHIFTED, transformer=of_kind("OvisImageTransformer2DModel")),
        call_of(prompts, guided_by(), sized(8), negative_prompt=None),
    ),
    "bria": TinyPipeline(
        pipeline_of("BriaPipeline", FLOW, transformer=of_kind("BriaTransformer2DModel"), vae=image_vae(4)),
        call_of(prompts, guided_by(), sized(2)),
    ),
    "krea2": TinyPipeline(
        pipeline_of("Krea2Pipeline", SHIFTED, transformer=of_kind("Krea2Transformer2DModel")),
        call_of(layered, guided_by(), sized(8)),
    ),
    "ernie_image": TinyPipeline(
        pipeline_of("ErnieImagePipeline", FLOW, transformer=of_kind("ErnieImageTransformer2DModel")),
        call_of(listed, guided_by(), sized(8)),
    ),
    "prx": TinyPipeline(
        pipeline_of("PRXPipeline", FLOW, transformer=of_kind("PRXTransformer2DModel"), vae=image_vae(4)),
        call_of(prompts, masked(torch.bool), guided_by(), sized(1), use_resolution_binning=False),
    ),
    "nucleus_image": TinyPipeline(
        pipeline_of(
            "NucleusMoEImagePipeline", FLOW, transformer=of_kind("NucleusMoEImageTransformer2DModel")
        ),
        call_of(qwen, guided_by(), sized(8)),
    ),
    "joyimage_edit": TinyPipeline(
        pipeline_of("JoyImageEditPipeline", FLOW, transformer=of_kind("JoyImageEditTransformer3DModel")),
        call_of(qwen, guided_by(), sized(8)),
    ),
    "flux2": TinyPipeline(
        pipeline_of("Flux2Pipeline", SHIFTED, transformer=of_kind("Flux2Transformer2DModel"), vae=FLUX2_VAE),
        call_of(embedded, sized(2)),
    ),
    "flux2_klein": TinyPipeline(
        pipeline_of(
            "Flux2KleinPipeline",
            SHIFTED,
            transformer=changed("Flux2Transformer2DModel", guidance_embeds=False),
            vae=FLUX2_VAE,
        ),
        call_of(prompts, guided_by(), sized(2)),
    ),
    "stable_diffusion": TinyPipeline(
        pipeline_of(
            "StableDiffusionPipeline", DDIM, unet=UNET, vae=image_vae(4), requires_safety_checker=False
        ),
        call_of(prompts, guided_by(), sized(1)),
        parts=("unet",),
    ),
    "stable_diffusion_img2img": TinyPipeline(
        pipeline_of(
            "StableDiffusionImg2ImgPipeline", DDIM, unet=UNET, vae=image_vae(4), requires_safety_checker=False
        ),
        call_of(prompts, guided_by(), an_image("image", 1), strength=STRENGTH),
        start=video_start,
        parts=("unet",),
    ),
}
