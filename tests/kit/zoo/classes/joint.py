"""Image models in which text and image attend to each other."""

from typing import Any

import torch

from zoo.case import noise, padded, unit
from zoo.kind import (
    HEAD_DIM,
    HEADS,
    POOLED,
    TEXT,
    TEXT_DIM,
    WIDTH,
    Kind,
    ids,
    kind,
    text,
)

IMAGE = (4, 8, 8)
TOKENS = (16, 8)
HEADED = {"attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS}
DOUBLE = {**HEADED, "num_layers": 2, "num_single_layers": 2}
FLUX_LIKE = {**DOUBLE, "patch_size": 1, "in_channels": 8, "joint_attention_dim": TEXT_DIM}
PARALLEL = r"|single_transformer_blocks\.\d+\.proj_out"
FLUX_MODULES = r"transformer_blocks\.\d+\.(attn|ff|ff_context)" + PARALLEL


def _flux(batch: int) -> dict[str, Any]:
    return {**text(batch), **ids(), "guidance": torch.full((batch,), 3.5)}


def _chroma(batch: int) -> dict[str, Any]:
    return {**text(batch), **ids(), "attention_mask": torch.ones(batch, TEXT + 16, dtype=torch.bool)}


def _fibo(batch: int) -> dict[str, Any]:
    layers = [noise(batch, TEXT, WIDTH // 2, seed=3 + layer) for layer in range(4)]
    return {**text(batch), **ids(), "text_encoder_layers": layers}


def _sized(batch: int) -> dict[str, Any]:
    size = torch.full((batch, 2), 64.0)
    return {**text(batch), "original_size": size, "target_size": size, "crop_coords": torch.zeros(batch, 2)}


def _glm(batch: int) -> dict[str, Any]:
    sized = _sized(batch)
    del sized["original_size"]
    return {
        **sized,
        "prior_token_id": torch.arange(batch * 16).reshape(batch, 16) % 7,
        "prior_token_drop": torch.zeros(batch, 16, dtype=torch.bool),
    }


def _hunyuan_image(batch: int) -> dict[str, Any]:
    return {**text(batch), "encoder_attention_mask": padded(batch, TEXT).long()}


def _joy_plus(batch: int) -> dict[str, Any]:
    return {
        **text(batch),
        "encoder_hidden_states_mask": padded(batch, TEXT).float(),
        "shape_list": [[(1, 2, 4), (1, 2, 4)]] * batch,
    }


KINDS: tuple[Kind, ...] = (
    kind(
        "AuraFlowTransformer2DModel",
        {
            **HEADED,
            "sample_size": 8,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "joint_attention_dim": TEXT_DIM,
            "caption_projection_dim": WIDTH,
            "pos_embed_max_size": 16,
        },
        text,
        IMAGE,
        clock=unit,
    ),
    kind(
        "BriaTransformer2DModel",
        {**FLUX_LIKE, "axes_dims_rope": [4, 6, 6]},
        lambda batch: {**text(batch), **ids()},
        TOKENS,
    ),
    kind(
        "BriaFiboTransformer2DModel",
        {**FLUX_LIKE, "axes_dims_rope": [4, 6, 6], "text_encoder_dim": WIDTH // 2},
        _fibo,
        TOKENS,
    ),
    kind(
        "ChromaTransformer2DModel",
        {
            **FLUX_LIKE,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 16,
            "approximator_layers": 2,
        },
        _chroma,
        TOKENS,
        clock=unit,
    ),
    kind(
        "CogView3PlusTransformer2DModel",
        {
            **HEADED,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": TEXT_DIM,
            "time_embed_dim": 16,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        _sized,
        IMAGE,
    ),
    kind(
        "CogView4Transformer2DModel",
        {
            **HEADED,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": TEXT_DIM,
            "time_embed_dim": 16,
            "condition_dim": 4,
            "rope_axes_dim": (8, 8),
        },
        _sized,
        IMAGE,
    ),
    kind(
        "Flux2Transformer2DModel",
        {
            **FLUX_LIKE,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda batch: {**text(batch), **ids(4), "guidance": torch.full((batch,), 3.5)},
        TOKENS,
        clock=unit,
    ),
    kind(
        "Flux3Transformer2DModel",
        {
            **DOUBLE,
            "in_channels": 8,
            "cond_in_channels": 8,
            "joint_attention_dim": TEXT_DIM,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda batch: {**text(batch), **ids(4)},
        TOKENS,
        clock=unit,
    ),
    kind(
        "GlmImageTransformer2DModel",
        {
            **HEADED,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "text_embed_dim": TEXT_DIM,
            "time_embed_dim": 16,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 8,
        },
        _glm,
        IMAGE,
    ),
    kind(
        "HunyuanImageTransformer2DModel",
        {
            **DOUBLE,
            "in_channels": 4,
            "out_channels": 4,
            "num_refiner_layers": 1,
            "text_embed_dim": TEXT_DIM,
            "rope_axes_dim": (8, 8),
        },
        _hunyuan_image,
        (4, 4, 4),
    ),
    kind(
        "JoyImageEditTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "text_dim": TEXT_DIM,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        text,
        (2, 4, 1, 8, 8),
    ),
    kind(
        "JoyImageEditPlusTransformer3DModel",
        {
            "in_channels": 4,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "text_dim": TEXT_DIM,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        _joy_plus,
        (16, 4, 1, 2, 2),
    ),
    kind(
        "LongCatImageTransformer2DModel",
        {**FLUX_LIKE, "pooled_projection_dim": POOLED, "axes_dims_rope": [4, 6, 6]},
        lambda batch: {**text(batch), **ids()},
        TOKENS,
        clock=unit,
    ),
    kind(
        "OvisImageTransformer2DModel",
        {**FLUX_LIKE, "out_channels": 8, "axes_dims_rope": (4, 6, 6)},
        lambda batch: {**text(batch), **ids()},
        TOKENS,
        clock=unit,
    ),
)
