"""Pipelines whose UNets know no Stable Diffusion: of pixels, of image vectors, of depth."""

from typing import Any

from every_pipeline.more_images import UNET, a_picture
from every_pipeline.unets import BEGUN, IMAGE, TOLD
from tiny_pipelines import (
    DDIM,
    STRENGTH,
    TEXT,
    TEXT_DIM,
    TinyPipeline,
    another,
    call_of,
    guided_by,
    image_vae,
    model_of,
    pipeline_of,
    prompts,
    scheduler_of,
    set_on,
    sized,
)
from zoo.case import noise

BLOCKS = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
PLAIN = model_of(
    "UNet2DModel",
    302,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=4,
    **BLOCKS,
)
SIMPLE = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 4,
    **BLOCKS,
}
PIXELS_BY_TEXT = model_of(
    "UNet2DConditionModel",
    411,
    in_channels=3,
    out_channels=6,
    cross_attention_dim=TEXT_DIM,
    encoder_hid_dim=TEXT_DIM,
    addition_embed_type="text",
    addition_embed_type_num_heads=2,
    **SIMPLE,
)
BY_IMAGE_VECTOR = model_of(
    "UNet2DConditionModel",
    409,
    out_channels=8,
    cross_attention_dim=16,
    encoder_hid_dim=16,
    encoder_hid_dim_type="image_proj",
    addition_embed_type="image",
    **SIMPLE,
)
VQ = model_of("VQModel", 304, block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=8)
DDPM = scheduler_of("DDPMScheduler")


def rows(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"batch_size": batch, "output_type": "pt"}


def image_vectors(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"image_embeds": noise(batch, 16), "negative_image_embeds": noise(batch, 16, seed=2)}


def marigold(kind: str, prediction: str) -> TinyPipeline:
    unet = another(UNET, 308, in_channels=8)
    build = pipeline_of(kind, DDIM, unet=unet, vae=image_vae(4), prediction_type=prediction)
    return TinyPipeline(
        set_on(build, empty_text_embedding=noise(1, TEXT, TEXT_DIM)),
        call_of(a_picture, processing_resolution=0, output_type="pt"),
        **TOLD,
    )


IF = {"unet": PIXELS_BY_TEXT, "requires_safety_checker": False}
KANDINSKY = {"unet": BY_IMAGE_VECTOR, "movq": another(VQ, 310, latent_channels=4)}
KANDINSKY_CALL = (image_vectors, guided_by(), sized(1))
FROM = {"strength": STRENGTH}
PIPELINES: dict[str, TinyPipeline] = {
    "ddpm": TinyPipeline(pipeline_of("DDPMPipeline", DDPM, unet=PLAIN), call_of(rows), **TOLD),
    "ddim": TinyPipeline(pipeline_of("DDIMPipeline", DDIM, unet=PLAIN), call_of(rows), **TOLD),
    "consistency": TinyPipeline(
        pipeline_of("ConsistencyModelPipeline", scheduler_of("CMStochasticIterativeScheduler"), unet=PLAIN),
        call_of(rows),
        **TOLD,
    ),
    "latent_super_resolution": TinyPipeline(
        pipeline_of("LDMSuperResolutionPipeline", DDIM, unet=another(PLAIN, 303, in_channels=6), vqvae=VQ),
        call_of(IMAGE, output_type="pt"),
        **TOLD,
    ),
    "marigold_depth": marigold("MarigoldDepthPipeline", "depth"),
    "marigold_normals": marigold("MarigoldNormalsPipeline", "normals"),
    "deepfloyd_if": TinyPipeline(
        pipeline_of("IFPipeline", DDPM, **IF),
        call_of(prompts, guided_by(), sized(1), output_type="pt"),
        **TOLD,
    ),
    "deepfloyd_if_img2img": TinyPipeline(
        pipeline_of("IFImg2ImgPipeline", DDPM, **IF),
        call_of(prompts, guided_by(), IMAGE, **FROM, output_type="pt"),
        **BEGUN,
    ),
    "kandinsky22": TinyPipeline(
        pipeline_of("KandinskyV22Pipeline", DDPM, **KANDINSKY), call_of(*KANDINSKY_CALL), **TOLD
    ),
    "kandinsky22_img2img": TinyPipeline(
        pipeline_of("KandinskyV22Img2ImgPipeline", DDPM, **KANDINSKY),
        call_of(*KANDINSKY_CALL, IMAGE, **FROM),
        **BEGUN,
    ),
}
