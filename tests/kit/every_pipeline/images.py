"""Pipelines of image models that share FLUX's, SD3's or PixArt's parts."""

from typing import Any

import torch

from tiny_pipelines import (
    CHROMA,
    DPM,
    FLOW,
    FLOW_DPM,
    FLUX_CONTROLNET,
    POOLED,
    SHIFTED,
    STRENGTH,
    TEXT,
    TEXT_DIM,
    TinyPipeline,
    an_image,
    another,
    area,
    call_of,
    guided_by,
    image_start,
    image_vae,
    masked,
    model_of,
    pipeline_of,
    pooled,
    prompts,
    scheduler_of,
    sized,
    variant_of,
)
from zoo import CASES
from zoo.case import noise
from zoo.classes import KINDS
from zoo.kind import HEAD_DIM, HEADS, WIDTH

SCM = scheduler_of("SCMScheduler")
FLUX = CASES["flux"].make
SD3 = CASES["sd3"].make


def hole(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    """Half of the image is to be made anew."""
    mask = torch.zeros(batch, 1, *sized(1)(batch, guided, large).values())
    mask[..., :4] = 1.0
    return {"mask_image": mask}


def whole_image(name: str) -> Any:
    """One image for all prompts."""
    return an_image(name, 1, rows=1)


def embedded(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"prompt_embeds": noise(batch, TEXT, TEXT_DIM)}


def embedded_pooled(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {**embedded(batch, guided, large), "pooled_prompt_embeds": noise(batch, POOLED, seed=3)}


def plain_mask(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"prompt_attention_mask": torch.ones(batch, TEXT, dtype=torch.int64)}


def of_kind(name: str) -> Any:
    """The tiny model of a class."""
    return KINDS[name].make


def changed(name: str, **changes: Any) -> Any:
    """The tiny model of a class with a changed configuration."""
    return another(KINDS[name].make, 50, **changes)


def in_32(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    """A control of 32 by 32 pixels or 64 by 32."""
    size = {"height": 64 if large else 32, "width": 32}
    return {**size, "control_image": noise(batch, 3, *size.values(), seed=5).sigmoid()}


FLUX_CALL = (prompts, pooled, guided_by("true_cfg_scale"), sized(1))
SD3_CALL = (prompts, pooled, guided_by(), sized(1))
STARTS = {"start": image_start}
FROM = {"strength": STRENGTH}
FILLED = variant_of("flux", 51, in_channels=20, out_channels=8)
CONTROLLED = variant_of("flux", 52, in_channels=16, out_channels=8)
MASKED_VAE = image_vae(2)
DC_VAE = model_of(
    "AutoencoderDC",
    57,
    latent_channels=4,
    attention_head_dim=2,
    encoder_block_types=("ResBlock",),
    decoder_block_types=("ResBlock",),
    encoder_block_out_channels=(8,),
    decoder_block_out_channels=(8,),
    encoder_layers_per_block=(1,),
    decoder_layers_per_block=(1,),
    encoder_qkv_multiscales=((),),
    decoder_qkv_multiscales=((),),
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    decoder_norm_types="rms_norm",
    decoder_act_fns="silu",
)
PAG_CALL = (prompts, masked(torch.int64), guided_by(), sized(8))

PIPELINES: dict[str, TinyPipeline] = {
    "flux_inpaint": TinyPipeline(
        pipeline_of("FluxInpaintPipeline", SHIFTED, transformer=FLUX, vae=MASKED_VAE),
        call_of(*FLUX_CALL, an_image("image", 1), hole, **FROM),
        **STARTS,
    ),
    "flux_control": TinyPipeline(
        pipeline_of("FluxControlPipeline", SHIFTED, transformer=CONTROLLED, vae=MASKED_VAE),
        call_of(embedded_pooled, sized(1), an_image("control_image", 1)),
    ),
    "flux_control_img2img": TinyPipeline(
        pipeline_of("FluxControlImg2ImgPipeline", SHIFTED, transformer=CONTROLLED, vae=MASKED_VAE),
        call_of(embedded_pooled, sized(1), an_image("image", 1), an_image("control_image", 1), **FROM),
        **STARTS,
    ),
    "flux_controlnet_img2img": TinyPipeline(
        pipeline_of(
            "FluxControlNetImg2ImgPipeline",
            SHIFTED,
            transformer=FLUX,
            vae=MASKED_VAE,
            controlnet=FLUX_CONTROLNET,
        ),
        call_of(embedded_pooled, sized(1), an_image("image", 1), an_image("control_image", 1), **FROM),
        **STARTS,
    ),
    "flux_controlnet_inpaint": TinyPipeline(
        pipeline_of(
            "FluxControlNetInpaintPipeline",
            SHIFTED,
            transformer=FLUX,
            vae=MASKED_VAE,
            controlnet=FLUX_CONTROLNET,
        ),
        call_of(embedded_pooled, sized(1), an_image("image", 1), an_image("control_image", 1), hole, **FROM),
        **STARTS,
    ),
    "flux_kontext_inpaint": TinyPipeline(
        pipeline_of("FluxKontextInpaintPipeline", SHIFTED, transformer=FLUX, vae=MASKED_VAE),
        call_of(*FLUX_CALL, area, an_image("image", 1), hole, _auto_resize=False, **FROM),
        **STARTS,
    ),
    "chroma_img2img": TinyPipeline(
        pipeline_of("ChromaImg2ImgPipeline", SHIFTED, transformer=CHROMA, vae=MASKED_VAE),
        call_of(prompts, masked(torch.bool), guided_by(), sized(1), an_image("image", 1), strength=0.7),
        **STARTS,
    ),
    "sd3_img2img": TinyPipeline(
        pipeline_of("StableDiffusion3Img2ImgPipeline", FLOW, transformer=SD3, vae=image_vae(4)),
        call_of(*SD3_CALL, an_image("image", 1), **FROM),
        **STARTS,
    ),
    "sd3_inpaint": TinyPipeline(
        pipeline_of(
            "StableDiffusion3InpaintPipeline",
            FLOW,
            transformer=variant_of("sd3", 56, in_channels=16, out_channels=16),
            vae=image_vae(16),
        ),
        call_of(*SD3_CALL, an_image("image", 1), hole, **FROM),
        **STARTS,
    ),
    "sd3_controlnet_inpaint": TinyPipeline(
        pipeline_of(
            "StableDiffusion3ControlNetInpaintingPipeline",
            FLOW,
            transformer=SD3,
            vae=image_vae(4),
            controlnet=model_of(
                "SD3ControlNetModel",
                55,
                sample_size=8,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                attention_head_dim=HEAD_DIM,
                num_attention_heads=HEADS,
                joint_attention_dim=TEXT_DIM,
                caption_projection_dim=WIDTH,
                pooled_projection_dim=POOLED,
                pos_embed_max_size=8,
                extra_conditioning_channels=1,
            ),
        ),
        call_of(*SD3_CALL, an_image("control_image", 1), lambda *a: {"control_mask": hole(*a)["mask_image"]}),
    ),
    "auraflow": TinyPipeline(
        pipeline_of("AuraFlowPipeline", FLOW, transformer=of_kind("AuraFlowTransformer2DModel")),
        call_of(prompts, masked(torch.int64), guided_by(), sized(8)),
    ),
    "pixart_sigma_pag": TinyPipeline(
        pipeline_of(
            "PixArtSigmaPAGPipeline",
            DPM,
            transformer=CASES["pixart"].make,
            pag_applied_layers=lambda: ["blocks.1"],
        ),
        call_of(*PAG_CALL, negative_prompt=None, use_resolution_binning=False),
    ),
    "sana_pag": TinyPipeline(
        pipeline_of(
            "SanaPAGPipeline",
            FLOW_DPM,
            transformer=CASES["sana"].make,
            pag_applied_layers=lambda: ["blocks.1"],
        ),
        call_of(
            prompts,
            masked(torch.int64),
            guided_by(),
            sized(32),
            negative_prompt=None,
            use_resolution_binning=False,
        ),
    ),
    "sana_sprint": TinyPipeline(
        pipeline_of("SanaSprintPipeline", SCM, transformer=variant_of("sana", 53, guidance_embeds=True)),
        call_of(
            embedded,
            plain_mask,
            guided_by(),
            sized(32),
            use_resolution_binning=False,
            intermediate_timesteps=None,
        ),
        left_out=1,
    ),
    "sana_controlnet": TinyPipeline(
        pipeline_of(
            "SanaControlNetPipeline",
            FLOW_DPM,
            transformer=CASES["sana"].make,
            controlnet=model_of(
                "SanaControlNetModel",
                54,
                in_channels=4,
                out_channels=4,
                num_attention_heads=HEADS,
                attention_head_dim=HEAD_DIM,
                num_layers=1,
                num_cross_attention_heads=HEADS,
                cross_attention_head_dim=HEAD_DIM,
                cross_attention_dim=WIDTH,
                caption_channels=TEXT_DIM,
                sample_size=8,
                patch_size=1,
            ),
            vae=DC_VAE,
        ),
        call_of(
            prompts,
            masked(torch.int64),
            guided_by(),
            in_32,
            negative_prompt=None,
            use_resolution_binning=False,
        ),
    ),
    "sd3_pag": TinyPipeline(
        pipeline_of(
            "StableDiffusion3PAGPipeline", FLOW, transformer=SD3, pag_applied_layers=lambda: ["blocks.1"]
        ),
        call_of(prompts, pooled, guided_by(), sized(8)),
    ),
    "sd3_pag_img2img": TinyPipeline(
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
}
