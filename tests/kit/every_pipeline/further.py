"""Further pipelines of families that stand elsewhere."""

from typing import Any

import diffusers
import torch

from every_pipeline.images import CHROMA, MASKED_VAE, changed, hole, of_kind
from every_pipeline.more_images import FLUX2_VAE, HUNYUAN_CALL, Z_IMAGE, listed
from every_pipeline.others import kandinsky
from every_pipeline.videos import HUNYUAN_VAE, MAGVIT, SKYREELS, WAN_CALL, Unchecked, a_video, chunks
from tiny_pipelines import (
    DDIM,
    FLOW,
    POOLED,
    SHIFTED,
    STRENGTH,
    TEXT,
    TEXT_DIM,
    UNIPC,
    WAN_VAE,
    Make,
    TinyPipeline,
    an_image,
    another,
    call_of,
    guided_by,
    image_start,
    image_vae,
    masked,
    model_of,
    pipeline_of,
    prompts,
    scheduler_of,
    set_on,
    sized,
)
from zoo.kind import HEAD_DIM, HEADS, WIDTH

IMAGE = an_image("image", 1)
ONE_IMAGE = an_image("image", 8, rows=1)
FROM = {"strength": STRENGTH}
COSMOS2 = scheduler_of("FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True)
# published configurations have what the class does not name
GUIDED_CHROMA = another(CHROMA, 35, guidance_embeds=False)
EIGHTFOLD_VAE = model_of(
    "AutoencoderKL",
    111,
    latent_channels=4,
    block_out_channels=(4, 4, 4, 4),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    norm_num_groups=4,
)
HUNYUAN_DIT_CONTROLNET = model_of(
    "HunyuanDiT2DControlNetModel",
    112,
    attention_head_dim=HEAD_DIM,
    num_attention_heads=HEADS,
    in_channels=4,
    patch_size=2,
    sample_size=8,
    hidden_size=WIDTH,
    transformer_num_layers=4,
    cross_attention_dim=TEXT_DIM,
    cross_attention_dim_t5=TEXT_DIM,
    pooled_projection_dim=POOLED,
    text_len=TEXT,
    text_len_t5=TEXT,
)


def z_image_controlnet(channels: int, **config: Any) -> Make:
    return model_of(
        "ZImageControlNetModel",
        113,
        **{"control_refiner_layers_places": [], **config},
        control_layers_places=[0, 1],
        control_in_dim=channels,
        dim=WIDTH,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
    )


def doubly_listed(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    """Prompts that are cut into parts, between which images may stand."""
    return {name: [[prompt] for prompt in value] for name, value in listed(batch, guided, large).items()}


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
    "chroma_inpaint": TinyPipeline(
        pipeline_of("ChromaInpaintPipeline", SHIFTED, transformer=GUIDED_CHROMA, vae=MASKED_VAE),
        call_of(prompts, masked(torch.bool), guided_by(), sized(1), IMAGE, hole, **FROM),
        start=image_start,
    ),
    "hunyuan_dit_controlnet": TinyPipeline(
        pipeline_of(
            "HunyuanDiTControlNetPipeline",
            DDIM,
            transformer=of_kind("HunyuanDiT2DModel"),
            vae=EIGHTFOLD_VAE,
            controlnet=HUNYUAN_DIT_CONTROLNET,
            requires_safety_checker=False,
        ),
        call_of(*HUNYUAN_CALL, an_image("control_image", 8), use_resolution_binning=False),
    ),
    "z_image_controlnet": TinyPipeline(
        pipeline_of(
            "ZImageControlNetPipeline",
            SHIFTED,
            transformer=Z_IMAGE,
            vae=image_vae(4),
            controlnet=z_image_controlnet(4),
        ),
        call_of(listed, guided_by(), sized(1), an_image("control_image", 1)),
    ),
    "z_image_controlnet_inpaint": TinyPipeline(
        pipeline_of(
            "ZImageControlNetInpaintPipeline",
            SHIFTED,
            transformer=Z_IMAGE,
            vae=image_vae(4),
            controlnet=z_image_controlnet(
                9, control_refiner_layers_places=[0], add_control_noise_refiner="control_noise_refiner"
            ),
        ),
        call_of(listed, guided_by(), sized(1), IMAGE, an_image("control_image", 1), hole),
    ),
    "z_image_omni": TinyPipeline(
        pipeline_of(
            "ZImageOmniPipeline",
            SHIFTED,
            transformer=changed("ZImageTransformer2DModel", siglip_feat_dim=16),
            vae=image_vae(4),
        ),
        call_of(doubly_listed, guided_by(), sized(1)),
    ),
    "motif_i2v": TinyPipeline(
        pipeline_of(
            "MotifVideoImage2VideoPipeline",
            FLOW,
            transformer=changed("MotifVideoTransformer3DModel", in_channels=9),
            vae=WAN_VAE,
            guider=lambda: diffusers.ClassifierFreeGuidance(4.0),
        ),
        call_of(prompts, masked(torch.int64), sized(8), ONE_IMAGE, prompt=None, num_frames=9),
    ),
    "kandinsky5_i2i": TinyPipeline(
        set_on(
            pipeline_of(
                "Kandinsky5I2IPipeline",
                FLOW,
                transformer=changed("Kandinsky5Transformer3DModel", visual_cond=True),
                vae=EIGHTFOLD_VAE,
            ),
            resolutions=[(64, 64)],
        ),
        call_of(kandinsky, guided_by(), sized(8), ONE_IMAGE),
    ),
    "kandinsky5_i2v": TinyPipeline(
        pipeline_of(
            "Kandinsky5I2VPipeline",
            FLOW,
            transformer=changed("Kandinsky5Transformer3DModel", visual_cond=True),
            vae=HUNYUAN_VAE,
        ),
        call_of(kandinsky, guided_by(), sized(8), ONE_IMAGE, num_frames=17),
    ),
    "skyreels_forcing_v2v": TinyPipeline(
        pipeline_of(
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline", UNIPC, transformer=SKYREELS, vae=WAN_VAE
        ),
        call_of(
            *WAN_CALL, a_video("video", 5), prompt=None, num_frames=9, base_num_frames=9, overlap_history=5
        ),
        calls=2,
    ),
}
