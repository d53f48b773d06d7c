"""Further pipelines of families that stand elsewhere, most of which are given an image."""

import diffusers
import torch

from every_pipeline.images import changed, hole, of_kind
from every_pipeline.more_images import FLUX2_VAE, QWEN, QWEN_VAE, qwen
from every_pipeline.others import kandinsky, two_prompts
from every_pipeline.videos import HUNYUAN_VAE, MAGVIT, SKYREELS, WAN_CALL, Unchecked, a_video, chunks
from tiny_pipelines import (
    FLOW,
    SHIFTED,
    STRENGTH,
    TEXT_DIM,
    UNIPC,
    WAN_VAE,
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
)

IMAGE = an_image("image", 1)
ONE_IMAGE = an_image("image", 8, rows=1)
FROM = {"strength": STRENGTH}
COSMOS2 = scheduler_of("FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True)
HUNYUAN_15_VAE = model_of(
    "AutoencoderKLHunyuanVideo15",
    96,
    latent_channels=4,
    block_out_channels=(8, 8),
    layers_per_block=1,
    spatial_compression_ratio=2,
    temporal_compression_ratio=1,
)


PIPELINES: dict[str, TinyPipeline] = {
    "hunyuan_video15": TinyPipeline(
        pipeline_of(
            "HunyuanVideo15Pipeline",
            FLOW,
            transformer=changed("HunyuanVideo15Transformer3DModel", in_channels=9, text_embed_2_dim=TEXT_DIM),
            vae=HUNYUAN_15_VAE,
            guider=lambda: diffusers.ClassifierFreeGuidance(4.0),
        ),
        call_of(two_prompts, sized(16), num_frames=5),
    ),
    "flux2_klein_inpaint": TinyPipeline(
        pipeline_of(
            "Flux2KleinInpaintPipeline",
            SHIFTED,
            transformer=changed("Flux2Transformer2DModel", guidance_embeds=False),
            vae=FLUX2_VAE,
        ),
        call_of(prompts, guided_by(), sized(2), an_image("image", 2), hole, **FROM),
        start=image_start,
    ),
    "cosmos2_image": TinyPipeline(
        pipeline_of(
            "Cosmos2TextToImagePipeline",
            COSMOS2,
            transformer=of_kind("CosmosTransformer3DModel"),
            vae=WAN_VAE,
            safety_checker=Unchecked,
        ),
        call_of(prompts, guided_by(), sized(8)),
        calls=2,
    ),
    "cosmos2_video": TinyPipeline(
        pipeline_of(
            "Cosmos2VideoToWorldPipeline",
            COSMOS2,
            transformer=changed("CosmosTransformer3DModel", in_channels=5),
            vae=WAN_VAE,
            safety_checker=Unchecked,
        ),
        call_of(prompts, guided_by(), sized(8), ONE_IMAGE, num_frames=9),
        calls=2,
    ),
    "easyanimate_inpaint": TinyPipeline(
        pipeline_of(
            "EasyAnimateInpaintPipeline",
            FLOW,
            transformer=changed("EasyAnimateTransformer3DModel", in_channels=9),
            vae=MAGVIT,
        ),
        call_of(prompts, masked(torch.int64), guided_by(), sized(8), a_video("video", 9), num_frames=9),
    ),
    "kandinsky5_i2v": TinyPipeline(
        pipeline_of(
            "Kandinsky5I2VPipeline",
            FLOW,
            transformer=of_kind("Kandinsky5Transformer3DModel"),
            vae=HUNYUAN_VAE,
        ),
        call_of(kandinsky, guided_by(), sized(8), ONE_IMAGE, num_frames=9),
    ),
    "longcat_image": TinyPipeline(
        pipeline_of(
            "LongCatImagePipeline",
            SHIFTED,
            transformer=of_kind("LongCatImageTransformer2DModel"),
            vae=image_vae(2),
        ),
        call_of(prompts, guided_by(), sized(2), enable_prompt_rewrite=False),
    ),
    "prx_pixel": TinyPipeline(
        pipeline_of("PRXPixelPipeline", FLOW, transformer=changed("PRXTransformer2DModel", in_channels=3)),
        call_of(prompts, masked(torch.bool), guided_by(), sized(1), use_resolution_binning=False),
    ),
    "qwen_image_edit": TinyPipeline(
        pipeline_of("QwenImageEditPipeline", SHIFTED, transformer=QWEN, vae=QWEN_VAE),
        call_of(qwen, guided_by("true_cfg_scale"), sized(2), an_image("image", 2)),
    ),
    "qwen_image_edit_inpaint": TinyPipeline(
        pipeline_of("QwenImageEditInpaintPipeline", SHIFTED, transformer=QWEN, vae=QWEN_VAE),
        call_of(qwen, guided_by("true_cfg_scale"), sized(1), IMAGE, hole, **FROM),
        start=image_start,
    ),
    "skyreels_forcing_i2v": TinyPipeline(
        pipeline_of(
            "SkyReelsV2DiffusionForcingImageToVideoPipeline", UNIPC, transformer=SKYREELS, vae=WAN_VAE
        ),
        call_of(*WAN_CALL, chunks, ONE_IMAGE),
        calls=2,
    ),
}
