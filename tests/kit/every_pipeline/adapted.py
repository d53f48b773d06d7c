"""Pipelines around the UNets of Stable Diffusion with adapters, ControlNets of all kinds, or other inputs."""

from typing import Any

import transformers

from every_pipeline.images import embedded, hole
from every_pipeline.more_images import UNET
from every_pipeline.others import XL_UNET
from every_pipeline.unets import (
    BEGUN,
    CALL,
    CONDITIONED,
    CONTROL,
    CONTROLNET,
    IMAGE,
    TOLD,
    XL_CALL,
    XL_CONTROLNET,
    built,
    built_xl,
    pag,
)
from tiny_pipelines import (
    DDIM,
    STRENGTH,
    Built,
    TinyPipeline,
    an_image,
    another,
    call_of,
    guided_by,
    image_processor,
    image_vae,
    model_of,
    pipeline_of,
    pooled,
    prompts,
    scheduler_of,
    sized,
)
from zoo.case import noise, randomise

XL_UNION = model_of(
    "ControlNetUnionModel",
    201,
    attention_head_dim=(2, 4),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    transformer_layers_per_block=(1, 2),
    projection_class_embeddings_input_dim=64,
    num_trans_channel=8,
    num_trans_head=2,
    num_trans_layer=1,
    num_proj_channel=8,
    **CONDITIONED,
)
ADAPTER = model_of("T2IAdapter", 202, channels=[8, 16], num_res_blocks=1, downscale_factor=1)
XL_ADAPTER = another(ADAPTER, 204, adapter_type="full_adapter_xl", downscale_factor=2)
ATTENDING_FIRST = another(
    UNET,
    209,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)


def one_of_the_controls(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    """The image that the ControlNet for all kinds takes, and which kind it is."""
    return {"control_image": list(CONTROL(batch, guided, large).values()), "control_mode": [0]}


def image_vectors() -> Any:
    """An image encoder that gives one vector an image."""
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    return randomise(transformers.CLIPVisionModelWithProjection(config), 40)


def unchecked(kind: str, scheduler: Any = DDIM, **components: Any) -> Built:
    """A pipeline of Stable Diffusion that knows no safety checker."""
    return pipeline_of(kind, scheduler, **{"unet": UNET, "vae": image_vae(4), **components})


PIPELINES: dict[str, TinyPipeline] = {
    "stable_diffusion_pag_inpaint": TinyPipeline(
        built("StableDiffusionPAGInpaintPipeline", pag_applied_layers=pag),
        call_of(*CALL, IMAGE, hole, strength=STRENGTH),
        **BEGUN,
    ),
    "stable_diffusion_controlnet_pag_inpaint": TinyPipeline(
        built("StableDiffusionControlNetPAGInpaintPipeline", controlnet=CONTROLNET, pag_applied_layers=pag),
        call_of(*CALL, IMAGE, CONTROL, hole),
        **TOLD,
    ),
    "stable_diffusion_xl_pag_inpaint": TinyPipeline(
        built_xl("StableDiffusionXLPAGInpaintPipeline", pag_applied_layers=pag),
        call_of(*XL_CALL, IMAGE, hole, strength=STRENGTH),
        **BEGUN,
    ),
    "stable_diffusion_xl_controlnet_pag_img2img": TinyPipeline(
        built_xl(
            "StableDiffusionXLControlNetPAGImg2ImgPipeline", controlnet=XL_CONTROLNET, pag_applied_layers=pag
        ),
        call_of(*XL_CALL, IMAGE, CONTROL, strength=STRENGTH),
        **BEGUN,
    ),
    "stable_diffusion_xl_controlnet_inpaint": TinyPipeline(
        built_xl("StableDiffusionXLControlNetInpaintPipeline", controlnet=XL_CONTROLNET),
        call_of(*XL_CALL, IMAGE, CONTROL, hole, strength=STRENGTH),
        **BEGUN,
    ),
    "stable_diffusion_xl_union": TinyPipeline(
        built_xl("StableDiffusionXLControlNetUnionPipeline", controlnet=XL_UNION),
        call_of(*XL_CALL, one_of_the_controls),
        **TOLD,
    ),
    "stable_diffusion_xl_union_img2img": TinyPipeline(
        built_xl("StableDiffusionXLControlNetUnionImg2ImgPipeline", controlnet=XL_UNION),
        call_of(*XL_CALL, IMAGE, one_of_the_controls, strength=STRENGTH),
        **BEGUN,
    ),
    "stable_diffusion_xl_union_inpaint": TinyPipeline(
        built_xl("StableDiffusionXLControlNetUnionInpaintPipeline", controlnet=XL_UNION),
        call_of(*XL_CALL, IMAGE, one_of_the_controls, hole, strength=STRENGTH),
        **BEGUN,
    ),
    "stable_diffusion_xl_pix2pix": TinyPipeline(
        built_xl("StableDiffusionXLInstructPix2PixPipeline", unet=another(XL_UNET, 203, in_channels=8)),
        call_of(*XL_CALL, IMAGE),
        **TOLD,
    ),
    "stable_diffusion_adapter": TinyPipeline(
        built("StableDiffusionAdapterPipeline", unet=ATTENDING_FIRST, adapter=ADAPTER),
        call_of(*CALL, IMAGE),
        **TOLD,
    ),
    "stable_diffusion_xl_adapter": TinyPipeline(
        built_xl("StableDiffusionXLAdapterPipeline", adapter=XL_ADAPTER), call_of(*XL_CALL, IMAGE), **TOLD
    ),
    "stable_diffusion_depth": TinyPipeline(
        unchecked("StableDiffusionDepth2ImgPipeline", unet=another(UNET, 205, in_channels=5)),
        call_of(prompts, guided_by(), IMAGE, lambda *a: {"depth_map": noise(1, 8, 8)}, strength=STRENGTH),
        **BEGUN,
    ),
    "stable_diffusion_upscale": TinyPipeline(
        unchecked(
            "StableDiffusionUpscalePipeline",
            unet=another(UNET, 206, in_channels=7, num_class_embeds=1000),
            low_res_scheduler=scheduler_of("DDPMScheduler"),
            max_noise_level=350,
        ),
        call_of(prompts, guided_by(), IMAGE),
        **TOLD,
    ),
    "stable_diffusion_latent_upscale": TinyPipeline(
        unchecked(
            "StableDiffusionLatentUpscalePipeline",
            unet=another(UNET, 207, in_channels=8, time_cond_proj_dim=148, out_channels=5),
            scheduler=scheduler_of("EulerDiscreteScheduler"),
        ),
        call_of(prompts, pooled, guided_by(), an_image("image", 1, channels=4)),
        **TOLD,
    ),
    "stable_diffusion_image_variation": TinyPipeline(
        built(
            "StableDiffusionImageVariationPipeline",
            unet=another(UNET, 208, cross_attention_dim=16),
            image_encoder=image_vectors,
            feature_extractor=image_processor,
        ),
        call_of(guided_by(), sized(1), IMAGE),
        **TOLD,
    ),
    "latent_consistency_img2img": TinyPipeline(
        built(
            "LatentConsistencyModelImg2ImgPipeline",
            unet=another(UNET, 95, time_cond_proj_dim=8),
            scheduler=scheduler_of("LCMScheduler"),
        ),
        call_of(embedded, IMAGE, original_inference_steps=50, strength=STRENGTH),
        **TOLD,
    ),
}
