"""Pipelines that edit pictures of a fixed large size, or make their prompts' embeddings themselves."""

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from every_pipeline.images import changed, embedded, hole, of_kind
from every_pipeline.more_images import FLUX2_VAE, QWEN, qwen
from tiny_pipelines import (
    FLOW,
    SHIFTED,
    STRENGTH,
    TEXT,
    TEXT_DIM,
    WAN_VAE,
    TinyPipeline,
    call_of,
    guided_by,
    image_start,
    image_vae,
    model_of,
    pipeline_of,
    scheduler_of,
    set_on,
    sized,
)
from zoo.case import noise, padded
from zoo.kind import WIDTH, grid


class Averaging(nn.Module):
    """Stands where a VAE would encode pictures of 1024 by 1024: latents are means over 128 by 128 pixels."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.temperal_downsample = [True] * 7
        self.config = SimpleNamespace(
            z_dim=channels,
            latent_channels=channels,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            scaling_factor=1.0,
            shift_factor=0.0,
            block_out_channels=[1] * 8,
        )

    def encode(self, images: Tensor) -> SimpleNamespace:
        means = functional.avg_pool2d(images.flatten(0, -4), 128).unflatten(0, images.shape[:-3])
        return SimpleNamespace(latents=means[:, :1].expand(-1, self.channels, *means.shape[2:]))


class WithoutProcessor:
    """Stands where text and pictures would be made ready for a text encoder."""

    image_processor = None


def a_photo(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    return {"image": Image.linear_gradient("L").convert("RGB")}


def longcat(prompt: str, **_: Any) -> tuple[Tensor, Tensor]:
    """Other embeddings for other prompts, and the places of their tokens."""
    return noise(1, TEXT, TEXT_DIM, seed=len(prompt)), torch.zeros(TEXT, 3)


def fibo(**_: Any) -> tuple[Any, ...]:
    """Both prompts' embeddings, the places of their tokens, masks, and what each layer has made of them."""
    embeds, mask = noise(2, 1, TEXT, TEXT_DIM), torch.ones(1, TEXT)
    layers = list(noise(4, 1, TEXT, WIDTH // 2, seed=3))
    return *embeds, torch.zeros(1, TEXT, 3), mask, mask, layers, [-layer for layer in layers]


def in_layers(batch: int, guided: bool, large: bool) -> dict[str, Any]:
    embeds = noise(batch, 2, TEXT, TEXT_DIM)
    masks = dict.fromkeys(("prompt_embeds_mask", "negative_prompt_embeds_mask"), padded(batch, TEXT))
    return {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds, **masks}


def ideogram(grid_h: int, grid_w: int, **_: Any) -> tuple[Tensor, ...]:
    """Text and image tokens in one row: 3 marks text, 2 the image."""
    image = grid_h * grid_w
    places = torch.cat([torch.arange(TEXT)[:, None].expand(-1, 3), grid(grid_h, grid_w).long() + 65536])
    marks = torch.tensor([[3] * TEXT + [2] * image])
    return noise(1, TEXT + image, TEXT_DIM), places[None], torch.ones_like(marks), marks


def dreamlite(**_: Any) -> tuple[Tensor, Tensor]:
    return noise(2, TEXT, TEXT_DIM), torch.ones(2, TEXT)


def prior(*_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return noise(2, 16), noise(2, TEXT, 16), torch.ones(2, TEXT, dtype=torch.bool)


LONGCAT = changed("LongCatImageTransformer2DModel", in_channels=64)
FIBO = of_kind("BriaFiboTransformer2DModel")
DREAMLITE = model_of(
    "DreamLiteUNetModel",
    407,
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=TEXT_DIM,
    attention_head_dim=8,
    down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
    up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"),
)
TINY_VAE = model_of(
    "AutoencoderTiny",
    408,
    encoder_block_out_channels=(8,),
    decoder_block_out_channels=(8,),
    num_encoder_blocks=(1,),
    num_decoder_blocks=(1,),
)
EDIT = {"prompt": '{"edit_instruction": ""}'}


def pictures_of(channels: int) -> Any:
    return lambda: Averaging(channels)


QWEN_CALL = (qwen, guided_by("true_cfg_scale"), a_photo)
PIPELINES: dict[str, TinyPipeline] = {
    "qwen_image_edit": TinyPipeline(
        pipeline_of("QwenImageEditPipeline", SHIFTED, transformer=QWEN, vae=pictures_of(2)),
        call_of(*QWEN_CALL),
    ),
    "qwen_image_edit_inpaint": TinyPipeline(
        pipeline_of("QwenImageEditInpaintPipeline", SHIFTED, transformer=QWEN, vae=pictures_of(2)),
        call_of(*QWEN_CALL, hole, strength=STRENGTH),
        start=image_start,
    ),
    "qwen_image_edit_plus": TinyPipeline(
        pipeline_of("QwenImageEditPlusPipeline", SHIFTED, transformer=QWEN, vae=pictures_of(2)),
        call_of(*QWEN_CALL),
    ),
    "longcat_image": TinyPipeline(
        set_on(
            pipeline_of("LongCatImagePipeline", SHIFTED, transformer=LONGCAT, vae=image_vae(16)),
            encode_prompt=longcat,
        ),
        call_of(guided_by(), sized(2), prompt="a", enable_prompt_rewrite=False),
    ),
    "longcat_image_edit": TinyPipeline(
        set_on(
            pipeline_of(
                "LongCatImageEditPipeline",
                SHIFTED,
                transformer=LONGCAT,
                vae=pictures_of(16),
                text_processor=WithoutProcessor,
            ),
            encode_prompt=longcat,
        ),
        call_of(guided_by(), a_photo, prompt="a"),
    ),
    "bria_fibo": TinyPipeline(
        set_on(pipeline_of("BriaFiboPipeline", SHIFTED, transformer=FIBO, vae=WAN_VAE), encode_prompt=fibo),
        call_of(guided_by(), sized(16), prompt="{}"),
    ),
    "bria_fibo_edit": TinyPipeline(
        set_on(
            pipeline_of("BriaFiboEditPipeline", SHIFTED, transformer=FIBO, vae=WAN_VAE), encode_prompt=fibo
        ),
        call_of(guided_by(), sized(16), **EDIT),
    ),
    "bria_fibo_2": TinyPipeline(
        pipeline_of(
            "BriaFibo2Pipeline", SHIFTED, transformer=of_kind("BriaFibo2Transformer2DModel"), vae=FLUX2_VAE
        ),
        call_of(in_layers, guided_by(), sized(1)),
    ),
    "flux2_klein_kv": TinyPipeline(
        pipeline_of(
            "Flux2KleinKVPipeline",
            SHIFTED,
            transformer=changed("Flux2Transformer2DModel", guidance_embeds=False),
            vae=FLUX2_VAE,
        ),
        call_of(embedded, sized(2)),
    ),
    "ideogram4": TinyPipeline(
        set_on(
            pipeline_of(
                "Ideogram4Pipeline",
                FLOW,
                transformer=of_kind("Ideogram4Transformer2DModel"),
                unconditional_transformer=of_kind("Ideogram4Transformer2DModel"),
                vae=FLUX2_VAE,
            ),
            encode_prompt=ideogram,
        ),
        call_of(guided_by(), sized(1), prompt="", guidance_schedule=None, max_sequence_length=TEXT),
        parts=("transformer", "unconditional_transformer"),
    ),
    "dreamlite": TinyPipeline(
        set_on(
            pipeline_of("DreamLitePipeline", SHIFTED, unet=DREAMLITE, vae=TINY_VAE, text_encoder=TINY_VAE),
            encode_prompt=dreamlite,
        ),
        call_of(guided_by(), sized(1), prompt=""),
        parts=("unet",),
    ),
    "kandinsky22_prior": TinyPipeline(
        set_on(
            pipeline_of(
                "KandinskyV22PriorPipeline",
                scheduler_of("UnCLIPScheduler", prediction_type="sample", clip_sample_range=5.0),
                prior=of_kind("PriorTransformer"),
            ),
            _encode_prompt=prior,
            get_zero_embed=torch.zeros,
        ),
        call_of(guided_by(), prompt="", output_type="pt"),
        parts=("prior",),
    ),
}
