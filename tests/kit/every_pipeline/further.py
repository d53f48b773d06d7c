"""Further pipelines of families that stand elsewhere."""

import torch

from every_pipeline.images import changed, hole, of_kind
from every_pipeline.more_images import FLUX2_VAE
from every_pipeline.videos import MAGVIT, SKYREELS, WAN_CALL, Unchecked, a_video, chunks
from tiny_pipelines import (
    FLOW,
    SHIFTED,
    STRENGTH,
    UNIPC,
    WAN_VAE,
    TinyPipeline,
    an_image,
    call_of,
    guided_by,
    image_start,
    masked,
    pipeline_of,
    prompts,
    scheduler_of,
    sized,
)

IMAGE = an_image("image", 1)
ONE_IMAGE = an_image("image", 8, rows=1)
FROM = {"strength": STRENGTH}
COSMOS2 = scheduler_of("FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True)


PIPELINES: dict[str, TinyPipeline] = {
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
    "prx_pixel": TinyPipeline(
        pipeline_of("PRXPixelPipeline", FLOW, transformer=changed("PRXTransformer2DModel", in_channels=3)),
        call_of(prompts, masked(torch.bool), guided_by(), sized(1), use_resolution_binning=False),
    ),
    "skyreels_forcing_i2v": TinyPipeline(
        pipeline_of(
            "SkyReelsV2DiffusionForcingImageToVideoPipeline", UNIPC, transformer=SKYREELS, vae=WAN_VAE
        ),
        call_of(*WAN_CALL, chunks, ONE_IMAGE),
        calls=2,
    ),
}
