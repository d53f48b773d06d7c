"""Pipelines for sound, and for clips that begin with a picture."""

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from every_pipeline.images import changed, of_kind
from every_pipeline.more_images import a_picture, qwen
from every_pipeline.videos import EDM, HUNYUAN_VAE, Unchecked
from every_pipeline.videos import HUNYUAN_CALL as HUNYUAN
from tiny_pipelines import (
    FLOW,
    SHIFTED,
    TEXT,
    TEXT_DIM,
    TinyPipeline,
    an_image,
    another,
    call_of,
    guided_by,
    masked,
    model_of,
    pipeline_of,
    prompts,
    scheduler_of,
    set_on,
    sized,
    variant_of,
)
from zoo.case import noise, padded

ONE_IMAGE = an_image("image", 8, rows=1)
AUDIO_3 = {
    "transformer": changed("StableAudio3DiTModel", global_cond_dim=TEXT_DIM),
    "vae": model_of(
        "AutoencoderSAME",
        405,
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(1,),
        encoder_strides=(1,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        dim_heads=8,
        sampling_rate=8,
    ),
    "duration_embedder": model_of("StableAudio3DurationEmbedder", 406, output_dim=TEXT_DIM, fourier_dim=8),
}
OOBLECK = model_of(
    "AutoencoderOobleck",
    402,
    encoder_hidden_size=4,
    downsampling_ratios=[1, 2],
    decoder_channels=4,
    decoder_input_channels=4,
    channel_multiples=[1, 1],
    sampling_rate=8,
)
PROJECTION = model_of(
    "StableAudioProjectionModel",
    403,
    text_encoder_dim=TEXT_DIM,
    conditioning_dim=TEXT_DIM,
    min_value=0,
    max_value=512,
)
LONGCAT_VAE = model_of(
    "LongCatAudioDiTVae",
    412,
    channels=4,
    c_mults=[1],
    strides=[2],
    latent_dim=8,
    encoder_latent_dim=16,
    downsampling_ratio=2,
    sample_rate=8,
)
HUNYUAN_15_VAE = model_of(
    "AutoencoderKLHunyuanVideo15",
    401,
    latent_channels=4,
    block_out_channels=(8, 8),
    layers_per_block=1,
    spatial_compression_ratio=2,
    temporal_compression_ratio=2,
)
HUNYUAN_15 = changed("HunyuanVideo15Transformer3DModel", in_channels=9, image_embed_dim=16)
COSMOS_VAE = model_of(
    "AutoencoderKLCosmos",
    404,
    latent_channels=4,
    encoder_block_out_channels=(8, 8, 8, 8),
    decode_block_out_channels=(8, 8, 8, 8),
    resolution=64,
    num_layers=1,
    latents_mean=None,
    latents_std=None,
)


class Passing(nn.Module):
    """Stands where prompts would be made ready for video and for sound: both get what is given."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, embeds: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor, ...]:
        return embeds, embeds, mask


def a_prompt(*_: Any) -> Tensor:
    return noise(1, TEXT, TEXT_DIM)


def a_prompt_of_five(*_: Any) -> tuple[Tensor, Tensor]:
    return noise(1, TEXT, TEXT_DIM), torch.tensor([5])


def picture_tokens(*_: Any, **__: Any) -> Tensor:
    return noise(1, 4, 16, seed=3)


def spoken(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    mask = padded(batch, TEXT).long()
    return {"prompt_embeds": noise(batch, TEXT, TEXT_DIM), "encoder_attention_mask": mask, "duration": 3.0}


def a_sound(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"audio": noise(1, 2, 24)}


def rough_latents(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"image": noise(batch, 4, 1, 8, 8, seed=5)}


def two_encoders(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    one = {
        "prompt_embeds": noise(batch, TEXT, TEXT_DIM),
        "prompt_embeds_mask": padded(batch, TEXT).long(),
        "prompt_embeds_2": noise(batch, 4, 16, seed=2),
        "prompt_embeds_mask_2": torch.ones(batch, 4, dtype=torch.long),
    }
    return {**one, **{f"negative_{name}": value.flip(1) for name, value in one.items()}}


def masked_negative(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"negative_prompt_attention_mask": padded(batch, TEXT).flip(0).long()}


def hunyuan_i2v(condition: str, channels: int) -> TinyPipeline:
    config = {"in_channels": channels, "out_channels": 4, "guidance_embeds": False}
    return TinyPipeline(
        pipeline_of(
            "HunyuanVideoImageToVideoPipeline",
            FLOW,
            transformer=variant_of("hunyuan_video", 83, image_condition_type=condition, **config),
            vae=HUNYUAN_VAE,
        ),
        call_of(*HUNYUAN, masked_negative, ONE_IMAGE, num_frames=9),
    )


LTX_2 = {
    "transformer": of_kind("LTX2VideoTransformer3DModel"),
    "connectors": Passing,
    "vae": model_of(
        "AutoencoderKLLTX2Video",
        415,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    ),
    "audio_vae": model_of(
        "AutoencoderKLLTX2Audio",
        416,
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        latent_channels=4,
        mel_bins=4,
        norm_type="pixel",
    ),
}
LTX_2_CALL = (prompts, masked(torch.int64), guided_by(), sized(16))
TWO_LATENTS = {"latents": ("hidden_states", "audio_hidden_states")}
ONE_CALL = {
    "num_frames": 17,
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
}
PIPELINES: dict[str, TinyPipeline] = {
    "stable_audio": TinyPipeline(
        set_on(
            pipeline_of(
                "StableAudioPipeline",
                scheduler_of("EDMDPMSolverMultistepScheduler"),
                transformer=changed("StableAudioDiTModel", global_states_input_dim=2 * TEXT_DIM),
                vae=OOBLECK,
                projection_model=PROJECTION,
            ),
            encode_prompt=a_prompt,
            rotary_embed_dim=8,
        ),
        call_of(guided_by(), prompt=""),
    ),
    "stable_audio_3": TinyPipeline(pipeline_of("StableAudio3Pipeline", FLOW, **AUDIO_3), call_of(spoken)),
    "stable_audio_3_from_audio": TinyPipeline(
        pipeline_of("StableAudio3AudioToAudioPipeline", FLOW, **AUDIO_3), call_of(spoken, a_sound)
    ),
    "longcat_audio": TinyPipeline(
        set_on(
            pipeline_of(
                "LongCatAudioDiTPipeline",
                scheduler_of("FlowMatchEulerDiscreteScheduler", invert_sigmas=True),
                transformer=of_kind("LongCatAudioDiTTransformer"),
                vae=LONGCAT_VAE,
            ),
            encode_prompt=a_prompt_of_five,
        ),
        call_of(guided_by(), prompt="", audio_duration_s=3.0),
    ),
    "hunyuan_video_15": TinyPipeline(
        set_on(
            pipeline_of(
                "HunyuanVideo15Pipeline",
                FLOW,
                transformer=HUNYUAN_15,
                vae=HUNYUAN_15_VAE,
                guider=lambda: diffusers.ClassifierFreeGuidance(4.0),
            ),
            vision_num_semantic_tokens=4,
        ),
        call_of(two_encoders, sized(2), num_frames=5),
    ),
    "hunyuan_video_15_i2v": TinyPipeline(
        set_on(
            pipeline_of(
                "HunyuanVideo15ImageToVideoPipeline",
                FLOW,
                transformer=another(HUNYUAN_15, 417, target_size=16),
                vae=HUNYUAN_15_VAE,
                guider=lambda: diffusers.ClassifierFreeGuidance(4.0),
            ),
            encode_image=picture_tokens,
        ),
        call_of(two_encoders, a_picture, num_frames=5),
    ),
    "framepack": TinyPipeline(
        set_on(
            pipeline_of(
                "HunyuanVideoFramepackPipeline",
                FLOW,
                transformer=of_kind("HunyuanVideoFramepackTransformer3DModel"),
                vae=HUNYUAN_VAE,
            ),
            encode_image=picture_tokens,
        ),
        call_of(*HUNYUAN, masked_negative, ONE_IMAGE, num_frames=9, latent_window_size=3, output_type="pt"),
    ),
    "hunyuan_image_refiner": TinyPipeline(
        pipeline_of(
            "HunyuanImageRefinerPipeline",
            FLOW,
            transformer=changed(
                "HunyuanImageTransformer2DModel",
                in_channels=8,
                out_channels=4,
                patch_size=(1, 1, 1),
                rope_axes_dim=(4, 6, 6),
                guidance_embeds=True,
            ),
        ),
        call_of(qwen, sized(16), rough_latents),
    ),
    "hunyuan_video_i2v_beside": hunyuan_i2v("latent_concat", 9),
    "hunyuan_video_i2v_within": hunyuan_i2v("token_replace", 4),
    "cosmos_video": TinyPipeline(
        pipeline_of(
            "CosmosVideoToWorldPipeline",
            EDM,
            transformer=changed("CosmosTransformer3DModel", in_channels=5),
            vae=COSMOS_VAE,
            safety_checker=Unchecked,
        ),
        call_of(prompts, guided_by(), sized(8), ONE_IMAGE, num_frames=9),
        calls=2,
    ),
    "ltx2": TinyPipeline(
        pipeline_of("LTX2Pipeline", SHIFTED, **LTX_2),
        call_of(*LTX_2_CALL, **ONE_CALL),
        calls=1,
        options=TWO_LATENTS,
    ),
    "ltx2_three_calls": TinyPipeline(
        pipeline_of("LTX2Pipeline", SHIFTED, **LTX_2),
        call_of(
            *LTX_2_CALL,
            num_frames=17,
            stg_scale=1.0,
            modality_scale=3.0,
            spatio_temporal_guidance_blocks=[1],
        ),
        calls=3,
        options=TWO_LATENTS,
    ),
    "ltx2_i2v": TinyPipeline(
        pipeline_of("LTX2ImageToVideoPipeline", SHIFTED, **LTX_2),
        call_of(*LTX_2_CALL, an_image("image", 16, rows=1), image_crf=0, **ONE_CALL),
        calls=1,
        options=TWO_LATENTS,
    ),
}
