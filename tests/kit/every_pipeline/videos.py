"""Pipelines of video models that share Wan's, LTX's, CogVideoX's or HunyuanVideo's parts."""

from typing import Any

import diffusers
import torch
from torch import nn

from every_pipeline.images import changed, of_kind
from tiny_pipelines import (
    COGVIDEOX_VAE,
    FLOW,
    FLOW_DPM,
    SHIFTED,
    TEXT,
    TEXT_DIM,
    UNIPC,
    WAN_VAE,
    TinyPipeline,
    an_image,
    call_of,
    guided_by,
    image_encoder,
    image_processor,
    long_prompts,
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

WAN_CALL = (prompts, guided_by(), sized(8))
SKYREELS = of_kind("SkyReelsV2Transformer3DModel")
LTX_VAE = model_of(
    "AutoencoderKLLTXVideo",
    61,
    latent_channels=8,
    block_out_channels=(8, 8, 8, 8),
    decoder_block_out_channels=(8, 8, 8, 8),
    layers_per_block=(1, 1, 1, 1, 1),
    decoder_layers_per_block=(1, 1, 1, 1, 1),
    patch_size=1,
    patch_size_t=1,
)
HUNYUAN_VAE = model_of(
    "AutoencoderKLHunyuanVideo",
    62,
    latent_channels=4,
    block_out_channels=(8, 8, 8, 8),
    layers_per_block=1,
    norm_num_groups=4,
)
MAGVIT = model_of(
    "AutoencoderKLMagvit",
    65,
    latent_channels=4,
    block_out_channels=[8, 8, 8, 8],
    layers_per_block=1,
    norm_num_groups=4,
    spatial_group_norm=False,
)
HUNYUAN_CALL = (prompts, pooled, masked(torch.int64), guided_by("true_cfg_scale"), sized(8))
EDM = scheduler_of(
    "EDMEulerScheduler",
    sigma_min=0.002,
    sigma_max=80,
    sigma_data=0.5,
    sigma_schedule="karras",
    prediction_type="epsilon",
    rho=7.0,
    final_sigmas_type="sigma_min",
)


class Unchecked(nn.Module):
    """Stands where a package that is not installed would look at words and pictures."""

    dtype, device = torch.float32, torch.device("cpu")

    def check_text_safety(self, prompt: str) -> bool:
        return True


WITH_IMAGE = {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 32}


def a_video(name: str, frames: int) -> Any:
    def video(batch: int, guided: bool, large: bool) -> dict[str, Any]:
        size = sized(8)(batch, guided, large).values()
        return {name: noise(1, frames, 3, *size, seed=7).sigmoid()}

    return video


def in_32(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    """An image of 32 by 32 pixels or 64 by 32."""
    size = {"height": 64 if large else 32, "width": 32}
    return {**size, "image": noise(1, 3, *size.values(), seed=5).sigmoid()}


def chunks(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"prompt": None, "num_frames": 9, "base_num_frames": 9}


PIPELINES: dict[str, TinyPipeline] = {
    "skyreels": TinyPipeline(
        pipeline_of("SkyReelsV2Pipeline", UNIPC, transformer=SKYREELS), call_of(*WAN_CALL, num_frames=5)
    ),
    "skyreels_forcing": TinyPipeline(
        pipeline_of("SkyReelsV2DiffusionForcingPipeline", UNIPC, transformer=SKYREELS, vae=WAN_VAE),
        call_of(*WAN_CALL, chunks),
        calls=2,
    ),
    "wan_vace": TinyPipeline(
        pipeline_of(
            "WanVACEPipeline",
            UNIPC,
            transformer=changed("WanVACETransformer3DModel", vace_in_channels=72),
            vae=WAN_VAE,
        ),
        call_of(*WAN_CALL, num_frames=5),
    ),
    "lucy_edit": TinyPipeline(
        pipeline_of(
            "LucyEditPipeline",
            UNIPC,
            transformer=variant_of("wan", 63, in_channels=8),
            vae=WAN_VAE,
            expand_timesteps=True,
        ),
        call_of(*WAN_CALL, a_video("video", 5), num_frames=5),
    ),
    "chronoedit": TinyPipeline(
        pipeline_of(
            "ChronoEditPipeline",
            UNIPC,
            transformer=changed("ChronoEditTransformer3DModel", **WITH_IMAGE),
            vae=WAN_VAE,
            image_encoder=image_encoder,
            image_processor=image_processor,
        ),
        call_of(long_prompts, guided_by(), sized(8), an_image("image", 8, rows=1), num_frames=5),
    ),
    "skyreels_i2v": TinyPipeline(
        pipeline_of(
            "SkyReelsV2ImageToVideoPipeline",
            UNIPC,
            transformer=changed("SkyReelsV2Transformer3DModel", **WITH_IMAGE),
            vae=WAN_VAE,
            image_encoder=image_encoder,
            image_processor=image_processor,
        ),
        call_of(long_prompts, guided_by(), sized(8), an_image("image", 8, rows=1), num_frames=5),
    ),
    "anyflow": TinyPipeline(
        pipeline_of(
            "AnyFlowPipeline",
            scheduler_of("FlowMapEulerDiscreteScheduler"),
            transformer=of_kind("AnyFlowTransformer3DModel"),
            vae=WAN_VAE,
        ),
        call_of(*WAN_CALL, num_frames=5),
    ),
    "ltx_i2v": TinyPipeline(
        pipeline_of("LTXImageToVideoPipeline", SHIFTED, transformer=CASES["ltx"].make, vae=LTX_VAE),
        call_of(prompts, masked(torch.bool), guided_by(), in_32, num_frames=17),
    ),
    "ltx_condition": TinyPipeline(
        pipeline_of("LTXConditionPipeline", FLOW, transformer=CASES["ltx"].make, vae=LTX_VAE),
        call_of(prompts, masked(torch.bool), guided_by(), in_32, num_frames=17),
    ),
    "cogvideox_control": TinyPipeline(
        pipeline_of(
            "CogVideoXFunControlPipeline",
            scheduler_of("CogVideoXDDIMScheduler"),
            transformer=variant_of("cogvideox", 64, in_channels=8),
            vae=COGVIDEOX_VAE,
        ),
        call_of(
            prompts,
            guided_by(),
            sized(8),
            a_video("control_video", 9),
        ),
    ),
    "easyanimate": TinyPipeline(
        pipeline_of(
            "EasyAnimatePipeline",
            FLOW,
            transformer=of_kind("EasyAnimateTransformer3DModel"),
            vae=MAGVIT,
        ),
        call_of(prompts, masked(torch.int64), guided_by(), sized(8), num_frames=9),
    ),
    "sana_video": TinyPipeline(
        pipeline_of(
            "SanaVideoPipeline", FLOW_DPM, transformer=of_kind("SanaVideoTransformer3DModel"), vae=WAN_VAE
        ),
        call_of(
            prompts,
            masked(torch.int64),
            guided_by(),
            sized(8),
            negative_prompt=None,
            use_resolution_binning=False,
            frames=9,
        ),
    ),
    "sana_i2v": TinyPipeline(
        pipeline_of(
            "SanaImageToVideoPipeline",
            FLOW_DPM,
            transformer=of_kind("SanaVideoTransformer3DModel"),
            vae=WAN_VAE,
        ),
        call_of(
            prompts,
            masked(torch.int64),
            guided_by(),
            sized(8),
            an_image("image", 8, rows=1),
            negative_prompt=None,
            use_resolution_binning=False,
            frames=9,
        ),
    ),
    "cosmos": TinyPipeline(
        pipeline_of(
            "CosmosTextToWorldPipeline",
            EDM,
            transformer=of_kind("CosmosTransformer3DModel"),
            safety_checker=Unchecked,
        ),
        call_of(prompts, guided_by(), sized(8), num_frames=9),
        calls=2,
    ),
    "kandinsky5": TinyPipeline(
        pipeline_of(
            "Kandinsky5T2VPipeline",
            FLOW,
            transformer=of_kind("Kandinsky5Transformer3DModel"),
            vae=HUNYUAN_VAE,
        ),
        call_of(
            lambda batch, guided, large: {
                "prompt_embeds_qwen": noise(batch, TEXT, TEXT_DIM),
                "prompt_embeds_clip": noise(batch, 20, seed=3),
                "negative_prompt_embeds_qwen": noise(batch, TEXT, TEXT_DIM, seed=2),
                "negative_prompt_embeds_clip": noise(batch, 20, seed=4),
                "prompt_cu_seqlens": torch.tensor([0, TEXT], dtype=torch.int32),
                "negative_prompt_cu_seqlens": torch.tensor([0, TEXT], dtype=torch.int32),
            },
            guided_by(),
            sized(8),
            num_frames=9,
        ),
    ),
    "motif": TinyPipeline(
        pipeline_of(
            "MotifVideoPipeline",
            FLOW,
            transformer=changed("MotifVideoTransformer3DModel", in_channels=9),
            vae=WAN_VAE,
            guider=lambda: diffusers.ClassifierFreeGuidance(4.0),
        ),
        call_of(prompts, masked(torch.int64), sized(8), num_frames=9),
    ),
}
