"""Tiny diffusers pipelines with random weights and no text encoders: prompts come as embeddings.

An entry of `PIPELINES` runs as its users run it: the scheduler of the published weights, guidance, image or
video inputs. All cost a second or less for a generation of six steps.
"""

from typing import Any

import torch
from torch import Tensor

from tiny_pipelines import (
    CHROMA,
    COGVIDEOX_VAE,
    DDIM,
    DIT,
    DPM,
    FLOW,
    FLOW_DPM,
    FLUX_CONTROLNET,
    SD3_CONTROLNET,
    SHIFTED,
    STRENGTH,
    TEXT,
    TEXT_DIM,
    UNIPC,
    WAN_2,
    WAN_VAE,
    WAN_WITH_IMAGE,
    TinyPipeline,
    an_image,
    area,
    call_of,
    guided_by,
    image_encoder,
    image_processor,
    image_start,
    image_vae,
    labels,
    long_prompts,
    masked,
    pipeline_of,
    pooled,
    prompts,
    scheduler_of,
    short_negative_prompts,
    sized,
    variant_of,
    video_latents,
    video_start,
)
from zoo import CASES

__all__ = ["PIPELINES", "TEXT", "TEXT_DIM", "TinyPipeline", "generated_by"]

_PIXART_CALL = call_of(
    prompts, masked(torch.int64), guided_by(), sized(8), negative_prompt=None, use_resolution_binning=False
)
_FLUX_CALL = (prompts, pooled, guided_by("true_cfg_scale"))
_WAN_CALL = (prompts, guided_by(), sized(8))

PIPELINES: dict[str, TinyPipeline] = {
    # its size is fixed
    "dit": TinyPipeline(
        pipeline_of("DiTPipeline", DDIM, transformer=DIT, vae=image_vae(4)),
        call_of(labels, guided_by(), output_type="pt"),
        branch_modules=r"transformer_blocks\.\d+\.(attn1|ff)",
    ),
    "pixart": TinyPipeline(
        pipeline_of("PixArtAlphaPipeline", DPM, transformer=CASES["pixart"].make),
        _PIXART_CALL,
        branch_modules=r"transformer_blocks\.\d+\.(attn1|attn2|ff)",
    ),
    "pixart_sigma": TinyPipeline(
        pipeline_of("PixArtSigmaPipeline", DPM, transformer=CASES["pixart"].make),
        _PIXART_CALL,
    ),
    "sd3": TinyPipeline(
        pipeline_of("StableDiffusion3Pipeline", FLOW, transformer=CASES["sd3"].make),
        call_of(prompts, pooled, guided_by(), sized(8)),
    ),
    # a second call, with half the batch, at the steps in the middle
    "sd3_skip_layers": TinyPipeline(
        pipeline_of("StableDiffusion3Pipeline", FLOW, transformer=CASES["sd3"].make),
        call_of(
            prompts,
            pooled,
            guided_by(),
            sized(8),
            skip_guidance_layers=[0],
            skip_layer_guidance_start=0.2,
            skip_layer_guidance_stop=0.8,
        ),
    ),
    "sd3_controlnet": TinyPipeline(
        pipeline_of(
            "StableDiffusion3ControlNetPipeline",
            FLOW,
            transformer=CASES["sd3"].make,
            controlnet=SD3_CONTROLNET,
            vae=image_vae(4),
        ),
        call_of(prompts, pooled, guided_by(), sized(1), an_image("control_image", 1)),
    ),
    "flux": TinyPipeline(
        pipeline_of("FluxPipeline", FLOW, transformer=CASES["flux"].make),
        call_of(*_FLUX_CALL, sized(8)),
        branch_modules=r"transformer_blocks\.\d+\.(attn|ff|ff_context)|single_transformer_blocks\.\d+\.proj_out",
        branches=2,
    ),
    "flux_img2img": TinyPipeline(
        pipeline_of("FluxImg2ImgPipeline", SHIFTED, transformer=CASES["flux"].make, vae=image_vae(2)),
        call_of(*_FLUX_CALL, sized(1), an_image("image", 1), strength=STRENGTH),
        start=image_start,
    ),
    "flux_kontext": TinyPipeline(
        pipeline_of("FluxKontextPipeline", SHIFTED, transformer=CASES["flux"].make, vae=image_vae(2)),
        call_of(*_FLUX_CALL, sized(1), area, an_image("image", 1, channels=2)),
    ),
    "flux_controlnet": TinyPipeline(
        pipeline_of(
            "FluxControlNetPipeline",
            SHIFTED,
            transformer=CASES["flux"].make,
            controlnet=FLUX_CONTROLNET,
            vae=image_vae(2),
        ),
        call_of(*_FLUX_CALL, sized(1), an_image("control_image", 1)),
    ),
    "chroma": TinyPipeline(
        pipeline_of("ChromaPipeline", SHIFTED, transformer=CHROMA),
        call_of(prompts, masked(torch.bool), guided_by(), sized(8)),
    ),
    "qwen_image": TinyPipeline(
        pipeline_of("QwenImagePipeline", SHIFTED, transformer=CASES["qwen_image"].make),
        call_of(short_negative_prompts, guided_by("true_cfg_scale"), sized(8)),
    ),
    "sana": TinyPipeline(
        pipeline_of("SanaPipeline", FLOW_DPM, transformer=CASES["sana"].make),
        call_of(
            prompts,
            masked(torch.int64),
            guided_by(),
            sized(32),
            negative_prompt=None,
            use_resolution_binning=False,
        ),
    ),
    "latte": TinyPipeline(
        pipeline_of("LattePipeline", DDIM, transformer=CASES["latte"].make),
        call_of(prompts, guided_by(), sized(8), negative_prompt=None, video_length=3),
    ),
    "allegro": TinyPipeline(
        pipeline_of(
            "AllegroPipeline",
            scheduler_of("EulerAncestralDiscreteScheduler"),
            transformer=CASES["allegro"].make,
        ),
        call_of(prompts, masked(torch.int64), guided_by(), sized(8), negative_prompt=None, num_frames=9),
    ),
    "cogvideox": TinyPipeline(
        pipeline_of(
            "CogVideoXPipeline", scheduler_of("CogVideoXDDIMScheduler"), transformer=CASES["cogvideox"].make
        ),
        call_of(prompts, guided_by(), sized(8), num_frames=9),
    ),
    "cogvideox_i2v": TinyPipeline(
        pipeline_of(
            "CogVideoXImageToVideoPipeline",
            scheduler_of("CogVideoXDPMScheduler"),
            transformer=variant_of("cogvideox", 41, in_channels=8),
            vae=COGVIDEOX_VAE,
        ),
        call_of(prompts, guided_by(), sized(8), an_image("image", 8), num_frames=9),
    ),
    "cogvideox_v2v": TinyPipeline(
        pipeline_of(
            "CogVideoXVideoToVideoPipeline",
            scheduler_of("CogVideoXDPMScheduler"),
            transformer=CASES["cogvideox"].make,
        ),
        call_of(prompts, guided_by(), sized(8), video_latents(3, 4), strength=STRENGTH),
        start=video_start,
    ),
    # timesteps that rise
    "mochi": TinyPipeline(
        pipeline_of(
            "MochiPipeline",
            scheduler_of("FlowMatchEulerDiscreteScheduler", invert_sigmas=True),
            transformer=CASES["mochi"].make,
        ),
        call_of(prompts, masked(torch.bool), guided_by(), sized(8), num_frames=13),
    ),
    "hunyuan_video": TinyPipeline(
        pipeline_of(
            "HunyuanVideoPipeline",
            scheduler_of("FlowMatchEulerDiscreteScheduler", shift=7.0),
            transformer=CASES["hunyuan_video"].make,
        ),
        call_of(prompts, pooled, masked(torch.int64), guided_by("true_cfg_scale"), sized(8), num_frames=9),
    ),
    "ltx": TinyPipeline(
        pipeline_of("LTXPipeline", SHIFTED, transformer=CASES["ltx"].make),
        call_of(prompts, masked(torch.bool), guided_by(), sized(32), num_frames=17),
    ),
    "wan": TinyPipeline(
        pipeline_of("WanPipeline", FLOW, transformer=CASES["wan"].make),
        call_of(*_WAN_CALL, num_frames=5),
        branch_modules=r"blocks\.\d+\.(attn1|attn2|ffn)",
        branches=2,
    ),
    "wan_i2v": TinyPipeline(
        pipeline_of(
            "WanImageToVideoPipeline",
            UNIPC,
            transformer=WAN_WITH_IMAGE,
            vae=WAN_VAE,
            image_encoder=image_encoder,
            image_processor=image_processor,
        ),
        call_of(long_prompts, guided_by(), sized(8), an_image("image", 8, rows=1), num_frames=5),
    ),
    "wan_v2v": TinyPipeline(
        pipeline_of("WanVideoToVideoPipeline", UNIPC, transformer=CASES["wan"].make),
        call_of(*_WAN_CALL, video_latents(4, 3), strength=STRENGTH),
        start=video_start,
    ),
    "wan_two_transformers": TinyPipeline(
        pipeline_of(
            "WanPipeline",
            UNIPC,
            transformer=CASES["wan"].make,
            transformer_2=WAN_2,
            boundary_ratio=0.875,
        ),
        call_of(*_WAN_CALL, num_frames=5),
    ),
    # a timestep for each token
    "wan_ti2v_text": TinyPipeline(
        pipeline_of("WanPipeline", UNIPC, transformer=CASES["wan"].make, expand_timesteps=True),
        call_of(*_WAN_CALL, num_frames=5),
    ),
    "wan_ti2v_image": TinyPipeline(
        pipeline_of(
            "WanImageToVideoPipeline",
            UNIPC,
            transformer=CASES["wan"].make,
            vae=WAN_VAE,
            expand_timesteps=True,
        ),
        call_of(*_WAN_CALL, an_image("image", 8, rows=1), num_frames=5),
    ),
}


def generated_by(name: str, pipe: Any, steps: int) -> tuple[Tensor, int]:
    """What a transformed pipeline of this name gives, and how many values it reused: for another process."""
    pipe.set_progress_bar_config(disable=True)
    result = PIPELINES[name].generate(pipe, steps)
    return result, sum(step.reused for branch in pipe.transformer.summary().branches for step in branch.steps)
