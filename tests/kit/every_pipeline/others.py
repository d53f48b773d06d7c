"""Further inputs of families that stand elsewhere, and pipelines around UNets."""

from typing import Any

import diffusers
import torch

from every_pipeline.images import (
    CONTROLLED,
    DC_VAE,
    MASKED_VAE,
    SCM,
    embedded,
    embedded_pooled,
    hole,
    of_kind,
    plain_mask,
)
from every_pipeline.more_images import QWEN, QWEN_VAE, Z_IMAGE, listed, qwen
from every_pipeline.videos import HUNYUAN_VAE
from tiny_pipelines import (
    DDIM,
    FLOW,
    POOLED,
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
    model_of,
    pipeline_of,
    pooled,
    prompts,
    scheduler_of,
    set_on,
    sized,
    variant_of,
)
from zoo.case import noise, padded


def kandinsky(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    both = {
        "prompt_embeds_qwen": noise(batch, TEXT, TEXT_DIM),
        "prompt_embeds_clip": noise(batch, POOLED, seed=3),
        "prompt_cu_seqlens": torch.tensor([0, TEXT], dtype=torch.int32),
    }
    return {
        **both,
        **{f"negative_{name}": -value if "embeds" in name else value for name, value in both.items()},
    }


def two_prompts(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {
        **qwen(batch, guided, large),
        "prompt_embeds_2": noise(batch, 4, TEXT_DIM, seed=5),
        "prompt_embeds_mask_2": torch.zeros(batch, 4, dtype=torch.int64),
        "negative_prompt_embeds_2": noise(batch, 4, TEXT_DIM, seed=6),
        "negative_prompt_embeds_mask_2": torch.zeros(batch, 4, dtype=torch.int64),
    }


def control(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    mask = hole(batch, guided, large)["mask_image"]
    return {"control_image": noise(batch, 3, *mask.shape[2:], seed=5).sigmoid(), "control_mask": mask}


def xl(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {
        **prompts(batch, guided, large),
        "pooled_prompt_embeds": noise(batch, 16, seed=3),
        "negative_pooled_prompt_embeds": noise(batch, 16, seed=4),
    }


XL_UNET = model_of(
    "UNet2DConditionModel",
    82,
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=TEXT_DIM,
    attention_head_dim=(2, 4),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    transformer_layers_per_block=(1, 2),
    projection_class_embeddings_input_dim=64,
    norm_num_groups=4,
)
PIPELINES: dict[str, TinyPipeline] = {
    "hunyuan_image": TinyPipeline(
        pipeline_of(
            "HunyuanImagePipeline",
            FLOW,
            transformer=of_kind("HunyuanImageTransformer2DModel"),
            guider=lambda: diffusers.ClassifierFreeGuidance(4.0),
            ocr_guider=lambda: diffusers.ClassifierFreeGuidance(3.0),
        ),
        call_of(two_prompts, sized(32)),
    ),
    "kandinsky5_image": TinyPipeline(
        set_on(
            pipeline_of(
                "Kandinsky5T2IPipeline",
                FLOW,
                transformer=of_kind("Kandinsky5Transformer3DModel"),
                vae=image_vae(4),
            ),
            resolutions=[(64, 64)],
        ),
        call_of(kandinsky, guided_by(), sized(8)),
    ),
    "hunyuan_video_skyreels": TinyPipeline(
        pipeline_of(
            "HunyuanSkyreelsImageToVideoPipeline",
            scheduler_of("FlowMatchEulerDiscreteScheduler", shift=7.0),
            transformer=variant_of("hunyuan_video", 83, in_channels=8, out_channels=4, guidance_embeds=False),
            vae=HUNYUAN_VAE,
        ),
        call_of(
            prompts,
            pooled,
            lambda batch, guided, large: {
                "prompt_attention_mask": padded(batch, TEXT).long(),
                "negative_prompt_attention_mask": padded(batch, TEXT).flip(0).long(),
            },
            sized(8),
            an_image("image", 8, rows=1),
            num_frames=9,
        ),
    ),
    "flux_fill": TinyPipeline(
        pipeline_of(
            "FluxFillPipeline",
            SHIFTED,
            transformer=variant_of("flux", 84, in_channels=20, out_channels=8),
            vae=MASKED_VAE,
        ),
        call_of(
            embedded_pooled,
            sized(1),
            an_image("image", 1),
            hole,
        ),
    ),
    "flux_control_inpaint": TinyPipeline(
        pipeline_of("FluxControlInpaintPipeline", SHIFTED, transformer=CONTROLLED, vae=MASKED_VAE),
        call_of(
            embedded_pooled,
            sized(1),
            an_image("image", 1),
            an_image("control_image", 1),
            hole,
            strength=STRENGTH,
        ),
        start=image_start,
    ),
    "sana_sprint_img2img": TinyPipeline(
        pipeline_of(
            "SanaSprintImg2ImgPipeline",
            SCM,
            transformer=variant_of("sana", 85, guidance_embeds=True),
            vae=DC_VAE,
        ),
        call_of(
            embedded,
            plain_mask,
            guided_by(),
            lambda batch, guided, large: {
                "height": 32,
                "width": 32,
                "image": noise(batch, 3, 32, 32, seed=5).sigmoid(),
            },
            use_resolution_binning=False,
            intermediate_timesteps=None,
            strength=STRENGTH,
        ),
        start=image_start,
        left_out=1,
    ),
    "qwen_image_controlnet_inpaint": TinyPipeline(
        pipeline_of(
            "QwenImageControlNetInpaintPipeline",
            SHIFTED,
            transformer=QWEN,
            vae=QWEN_VAE,
            controlnet=model_of(
                "QwenImageControlNetModel",
                86,
                patch_size=1,
                in_channels=8,
                out_channels=8,
                num_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=TEXT_DIM,
                axes_dims_rope=(4, 6, 6),
                extra_condition_channels=4,
            ),
        ),
        call_of(qwen, guided_by("true_cfg_scale"), sized(1), control),
    ),
    "z_image_inpaint": TinyPipeline(
        pipeline_of("ZImageInpaintPipeline", SHIFTED, transformer=Z_IMAGE, vae=image_vae(4)),
        call_of(listed, guided_by(), sized(1), an_image("image", 1), hole, strength=STRENGTH),
        start=image_start,
    ),
    "stable_diffusion_xl": TinyPipeline(
        pipeline_of("StableDiffusionXLPipeline", DDIM, unet=XL_UNET, vae=image_vae(4)),
        call_of(xl, guided_by(), sized(1)),
        parts=("unet",),
    ),
    "stable_diffusion_xl_first_part": TinyPipeline(
        pipeline_of(
            "StableDiffusionXLPipeline",
            scheduler_of("EulerDiscreteScheduler"),
            unet=XL_UNET,
            vae=image_vae(4),
        ),
        call_of(xl, guided_by(), sized(1), denoising_end=0.5),
        parts=("unet",),
        left_out=2,
    ),
}
