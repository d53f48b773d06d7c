"""Pipelines around the UNets of Stable Diffusion and Stable Diffusion XL."""

from typing import Any

from every_pipeline.images import hole
from every_pipeline.more_images import UNET
from every_pipeline.others import XL_UNET, xl
from tiny_pipelines import (
    DDIM,
    STRENGTH,
    TEXT_DIM,
    Built,
    TinyPipeline,
    an_image,
    another,
    call_of,
    guided_by,
    image_vae,
    model_of,
    pipeline_of,
    prompts,
    scheduler_of,
    sized,
    video_start,
)

CALL = (prompts, guided_by(), sized(1))
XL_CALL = (xl, guided_by(), sized(1))
IMAGE, CONTROL = an_image("image", 1), an_image("control_image", 1)
TOLD = {"parts": ("unet",)}
BEGUN = {**TOLD, "start": video_start}
CONDITIONED = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": TEXT_DIM,
    "norm_num_groups": 4,
    "conditioning_embedding_out_channels": (8,),
}
CONTROLNET = model_of("ControlNetModel", 91, attention_head_dim=4, **CONDITIONED)
XL_CONTROLNET = model_of(
    "ControlNetModel",
    92,
    attention_head_dim=(2, 4),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    transformer_layers_per_block=(1, 2),
    projection_class_embeddings_input_dim=64,
    **CONDITIONED,
)


def pag() -> list[str]:
    return ["mid"]


def built(kind: str, **components: Any) -> Built:
    """A pipeline of Stable Diffusion."""
    parts = {"unet": UNET, "vae": image_vae(4), "requires_safety_checker": False, **components}
    return pipeline_of(kind, parts.pop("scheduler", DDIM), **parts)


def built_xl(kind: str, **components: Any) -> Built:
    """A pipeline of Stable Diffusion XL."""
    return pipeline_of(kind, DDIM, **{"unet": XL_UNET, "vae": image_vae(4), **components})


PIPELINES: dict[str, TinyPipeline] = {
    "stable_diffusion_inpaint": TinyPipeline(
        built("StableDiffusionInpaintPipeline"), call_of(*CALL, IMAGE, hole), **TOLD
    ),
    "stable_diffusion_inpaint_of_nine": TinyPipeline(
        built("StableDiffusionInpaintPipeline", unet=another(UNET, 93, in_channels=9)),
        call_of(*CALL, IMAGE, hole),
        **TOLD,
    ),
    "stable_diffusion_pag": TinyPipeline(
        built("StableDiffusionPAGPipeline", pag_applied_layers=pag), call_of(*CALL), **TOLD
    ),
    "stable_diffusion_pag_img2img": TinyPipeline(
        built("StableDiffusionPAGImg2ImgPipeline", pag_applied_layers=pag),
        call_of(prompts, guided_by(), IMAGE, strength=STRENGTH),
        **BEGUN,
    ),
    "stable_diffusion_controlnet": TinyPipeline(
        built("StableDiffusionControlNetPipeline", controlnet=CONTROLNET), call_of(*CALL, IMAGE), **TOLD
    ),
    "stable_diffusion_controlnet_img2img": TinyPipeline(
        built("StableDiffusionControlNetImg2ImgPipeline", controlnet=CONTROLNET),
        call_of(*CALL, IMAGE, CONTROL, strength=STRENGTH),
        **BEGUN,
    ),
    "stable_diffusion_controlnet_inpaint": TinyPipeline(
        built("StableDiffusionControlNetInpaintPipeline", controlnet=CONTROLNET),
        call_of(*CALL, IMAGE, CONTROL, hole),
        **TOLD,
    ),
    "stable_diffusion_controlnet_pag": TinyPipeline(
        built("StableDiffusionControlNetPAGPipeline", controlnet=CONTROLNET, pag_applied_layers=pag),
        call_of(*CALL, IMAGE),
        **TOLD,
    ),
    "instruct_pix2pix": TinyPipeline(
        built("StableDiffusionInstructPix2PixPipeline", unet=another(UNET, 94, in_channels=8)),
        call_of(prompts, guided_by(), IMAGE),
        **TOLD,
    ),
    "latent_consistency": TinyPipeline(
        built(
            "LatentConsistencyModelPipeline",
            unet=another(UNET, 95, time_cond_proj_dim=8),
            scheduler=scheduler_of("LCMScheduler"),
        ),
        call_of(
            lambda *a: {"prompt_embeds": prompts(*a)["prompt_embeds"]}, sized(1), original_inference_steps=50
        ),
        **TOLD,
    ),
    "stable_diffusion_xl_img2img": TinyPipeline(
        built_xl("StableDiffusionXLImg2ImgPipeline"),
        call_of(xl, guided_by(), IMAGE, strength=STRENGTH),
        **BEGUN,
    ),
    "stable_diffusion_xl_inpaint": TinyPipeline(
        built_xl("StableDiffusionXLInpaintPipeline"),
        call_of(*XL_CALL, IMAGE, hole, strength=STRENGTH),
        **BEGUN,
    ),
    "stable_diffusion_xl_pag": TinyPipeline(
        built_xl("StableDiffusionXLPAGPipeline", pag_applied_layers=pag), call_of(*XL_CALL), **TOLD
    ),
    "stable_diffusion_xl_pag_img2img": TinyPipeline(
        built_xl("StableDiffusionXLPAGImg2ImgPipeline", pag_applied_layers=pag),
        call_of(xl, guided_by(), IMAGE, strength=STRENGTH),
        **BEGUN,
    ),
    "stable_diffusion_xl_controlnet": TinyPipeline(
        built_xl("StableDiffusionXLControlNetPipeline", controlnet=XL_CONTROLNET),
        call_of(*XL_CALL, IMAGE),
        **TOLD,
    ),
    "stable_diffusion_xl_controlnet_img2img": TinyPipeline(
        built_xl("StableDiffusionXLControlNetImg2ImgPipeline", controlnet=XL_CONTROLNET),
        call_of(*XL_CALL, IMAGE, CONTROL, strength=STRENGTH),
        **BEGUN,
    ),
    "stable_diffusion_xl_controlnet_pag": TinyPipeline(
        built_xl("StableDiffusionXLControlNetPAGPipeline", controlnet=XL_CONTROLNET, pag_applied_layers=pag),
        call_of(*XL_CALL, IMAGE),
        **TOLD,
    ),
}
