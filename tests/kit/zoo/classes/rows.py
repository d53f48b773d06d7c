"""Image models whose text and image are one row of tokens, and models with experts."""

from typing import Any

import torch

from zoo.case import noise, padded, reversed_unit, unit
from zoo.kind import HEAD_DIM, HEADS, POOLED, TEXT, TEXT_DIM, WIDTH, Kind, grid, kind, pooled, text

IMAGE = (4, 8, 8)
TOKENS = (16, 8)
HEADED = {"attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS}
DOUBLE = {**HEADED, "num_layers": 2, "num_single_layers": 2}


def _hidream(batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states_t5": noise(batch, TEXT, TEXT_DIM),
        "encoder_hidden_states_llama3": noise(4 * batch, TEXT, TEXT_DIM).unflatten(0, (4, batch)),
        **pooled(batch, "pooled_embeds"),
        "return_dict": False,
    }


def _ideogram(batch: int) -> dict[str, Any]:
    """Text and image tokens in one row: 3 marks text, 2 the image."""
    places = torch.cat([torch.arange(TEXT)[:, None].expand(-1, 3), grid(4, 4).long() + 65536])
    return {
        **text(batch, TEXT + 16),
        "position_ids": places.expand(batch, -1, -1),
        "segment_ids": torch.ones(batch, TEXT + 16, dtype=torch.long),
        "indicator": torch.tensor([3] * TEXT + [2] * 16).expand(batch, -1),
    }


def _krea(batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": noise(batch, TEXT, 2, TEXT_DIM),
        "encoder_attention_mask": padded(batch, TEXT),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid(4, 4)]),
        "return_dict": False,
    }


def _qwen21(batch: int) -> dict[str, Any]:
    """One slot in the text for four tokens of the image."""
    return {
        **text(batch),
        "encoder_hidden_states_mask": torch.ones(batch, TEXT, dtype=torch.long),
        "img_shapes": [[(1, 4, 4)]] * batch,
        "img_mask": torch.tensor([False] * TEXT + [True] * 4).expand(batch, -1),
    }


def _z_image(batch: int) -> dict[str, Any]:
    return {"cap_feats": list(noise(batch, TEXT, TEXT_DIM)), "return_dict": False}


def _fibo_2(batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": noise(batch, 2, TEXT, TEXT_DIM), "return_dict": False}


KINDS: tuple[Kind, ...] = (
    kind(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": WIDTH,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": HEADS,
            "cap_feat_dim": TEXT_DIM,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (16, 16, 16),
        },
        _fibo_2,
        IMAGE,
        clock=unit,
    ),
    kind(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "in_channels": 8,
            "out_channels": 8,
            "text_in_dim": TEXT_DIM,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda batch: {
            "text_bth": noise(batch, TEXT, TEXT_DIM),
            "text_lens": torch.tensor([5, 3])[:batch],
            "return_dict": False,
        },
        (8, 4, 4),
    ),
    kind(
        "HiDreamImageTransformer2DModel",
        {
            **DOUBLE,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "caption_channels": [TEXT_DIM, TEXT_DIM],
            "text_emb_dim": POOLED,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1, 2, 3),
            "force_inference_output": True,
        },
        _hidream,
        IMAGE,
        timestep="timesteps",
    ),
    kind(
        "Ideogram4Transformer2DModel",
        {
            **HEADED,
            "in_channels": 8,
            "num_layers": 2,
            "intermediate_size": 48,
            "adaln_dim": 16,
            "llm_features_dim": TEXT_DIM,
            "rope_theta": 10_000,
            "mrope_section": (4, 2, 2),
        },
        _ideogram,
        (TEXT + 16, 8),
        clock=reversed_unit,
    ),
    kind(
        "Krea2Transformer2DModel",
        {
            **HEADED,
            "in_channels": 8,
            "num_layers": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "timestep_embed_dim": 16,
            "text_hidden_dim": TEXT_DIM,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        _krea,
        TOKENS,
        clock=unit,
    ),
    kind(
        "NucleusMoEImageTransformer2DModel",
        {
            **HEADED,
            "patch_size": 2,
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 3,
            "joint_attention_dim": TEXT_DIM,
            "axes_dims_rope": (4, 6, 6),
            "mlp_ratio": 8.0,
            "num_experts": 4,
            "dense_moe_strategy": "leave_first_block_dense",
            "moe_intermediate_dim": 16,
            "capacity_factors": [2.0] * 3,
        },
        lambda batch: {
            **text(batch),
            "encoder_hidden_states_mask": padded(batch, TEXT),
            "img_shapes": [(1, 4, 4)] * batch,
        },
        TOKENS,
        clock=unit,
    ),
    kind(
        "QwenImage21Transformer2DModel",
        {
            **HEADED,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "context_in_dim": TEXT_DIM,
            "axes_dims_rope": (4, 6, 6),
        },
        _qwen21,
        TOKENS,
        clock=unit,
    ),
    kind(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": WIDTH,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": HEADS,
            "n_kv_heads": HEADS,
            "cap_feat_dim": TEXT_DIM,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 16, 16],
        },
        _z_image,
        (4, 1, 8, 8),
        latent="x",
        timestep="t",
        clock=reversed_unit,
        given=list,
    ),
)
