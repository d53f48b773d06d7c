"""Image models in which the image attends to itself, and to a prompt or nothing."""

from typing import Any

import torch

from zoo import deciding_models as deciding
from zoo import diffusers_models as known
from zoo.case import index, noise, padded, reversed_unit, unit
from zoo.kind import HEAD_DIM, HEADS, POOLED, TEXT, TEXT_DIM, WIDTH, Kind, kind, text

IMAGE = (4, 8, 8)
HEADED = {"attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS}


def _hunyuan_dit(batch: int) -> dict[str, Any]:
    """Its prompt for T5 has a fixed length, since an attention pools it."""
    return {
        **text(batch),
        "text_embedding_mask": padded(batch, TEXT).long(),
        "encoder_hidden_states_t5": noise(batch, TEXT, TEXT_DIM, seed=2),
        "text_embedding_mask_t5": padded(batch, TEXT).long(),
        "image_meta_size": torch.full((batch, 6), 64.0),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (noise(1, 16, HEAD_DIM)[0], noise(1, 16, HEAD_DIM, seed=2)[0]),
    }


def _lumina(batch: int) -> dict[str, Any]:
    angles = noise(1, 10, 10, HEAD_DIM // 2)[0]
    return {
        **text(batch),
        "encoder_mask": padded(batch, TEXT).long(),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


def _omnigen(batch: int) -> dict[str, Any]:
    """A prompt of which no part is an image."""
    length = TEXT + 1 + 16
    return {
        "input_ids": torch.arange(batch * TEXT).reshape(batch, TEXT) % 10,
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(batch, length, length),
        "position_ids": torch.arange(length).expand(batch, -1),
        "return_dict": False,
    }


def _prior(batch: int) -> dict[str, Any]:
    return {**text(batch), "proj_embedding": noise(batch, 16, seed=2)}


KINDS: tuple[Kind, ...] = (
    Kind.of(known.DIT, "DiTTransformer2DModel"),
    Kind.of(known.PIXART, "PixArtTransformer2DModel"),
    Kind.of(known.SANA, "SanaTransformer2DModel"),
    Kind.of(deciding.LUMINA2, "Lumina2Transformer2DModel"),
    kind(
        "HunyuanDiT2DModel",
        {
            **HEADED,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": WIDTH,
            "num_layers": 4,
            "cross_attention_dim": TEXT_DIM,
            "cross_attention_dim_t5": TEXT_DIM,
            "pooled_projection_dim": POOLED,
            "text_len": TEXT,
            "text_len_t5": TEXT,
        },
        _hunyuan_dit,
        IMAGE,
    ),
    kind(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_attention_heads": HEADS,
            "num_kv_heads": HEADS,
            "multiple_of": 16,
            "cross_attention_dim": TEXT_DIM,
        },
        _lumina,
        IMAGE,
        clock=reversed_unit,
    ),
    kind(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "intermediate_size": 48,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 16,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
            "pos_embed_max_size": 16,
            "time_step_dim": 16,
        },
        _omnigen,
        IMAGE,
        clock=reversed_unit,
    ),
    kind(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "context_in_dim": TEXT_DIM,
            "hidden_size": WIDTH,
            "num_heads": HEADS,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        lambda batch: {**text(batch), "attention_mask": padded(batch, TEXT)},
        IMAGE,
        clock=unit,
    ),
    kind(
        "PriorTransformer",
        {**HEADED, "num_layers": 2, "embedding_dim": 16, "num_embeddings": TEXT, "additional_embeddings": 4},
        lambda batch: {**_prior(batch), "encoder_hidden_states": noise(batch, TEXT, 16)},
        (16,),
        clock=index,
    ),
    kind(
        "Transformer2DModel",
        {
            **HEADED,
            "in_channels": WIDTH,
            "num_layers": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": TEXT_DIM,
        },
        text,
        (WIDTH, 4, 4),
    ),
    kind(
        "DreamLiteTransformer2DModel",
        {
            **HEADED,
            "in_channels": WIDTH,
            "num_layers": 2,
            "norm_num_groups": 4,
            "cross_attention_dim": TEXT_DIM,
        },
        text,
        (WIDTH, 4, 4),
    ),
)
