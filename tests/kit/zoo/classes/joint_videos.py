"""Video models in which text and video attend to each other."""

from typing import Any

import torch

from zoo import diffusers_models as known
from zoo.case import index, noise, padded, thousand
from zoo.kind import (
    FRAMES,
    HEAD_DIM,
    HEADS,
    POOLED,
    TEXT,
    TEXT_DIM,
    WIDTH,
    Kind,
    kind,
    pooled,
    text,
)

HEADED = {"attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS}
VIDEO = (4, FRAMES, 8, 8)
LAYERED = {**HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 2}
HUNYUAN = {
    **LAYERED,
    "num_refiner_layers": 1,
    "text_embed_dim": TEXT_DIM,
    "rope_axes_dim": (4, 6, 6),
}
KANDINSKY = {"time_dim": 16, "model_dim": 48, "ff_dim": 64, "num_visual_blocks": 2, "axes_dims": (4, 4, 4)}


def _masked(batch: int) -> dict[str, Any]:
    return {**text(batch), "encoder_attention_mask": padded(batch, TEXT).long()}


def _hunyuan_15(batch: int) -> dict[str, Any]:
    """Two prompts and an image; all zeros mean that there is no image."""
    return {
        **_masked(batch),
        "encoder_hidden_states_2": noise(batch, 4, 16, seed=2),
        "encoder_attention_mask_2": torch.ones(batch, 4, dtype=torch.long),
        "image_embeds": torch.zeros(batch, 4, 16),
    }


def _framepack(batch: int) -> dict[str, Any]:
    """Three histories, of one frame, of two and of sixteen."""
    return {
        **_masked(batch),
        **pooled(batch),
        "image_embeds": noise(batch, 4, 16, seed=3),
        "guidance": torch.full((batch,), 6000.0),
        "indices_latents": torch.arange(FRAMES),
        "latents_clean": noise(batch, 4, 1, 8, 8, seed=4),
        "indices_latents_clean": torch.zeros(1, dtype=torch.long),
        "latents_history_2x": noise(batch, 4, 2, 8, 8, seed=5),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": noise(batch, 4, 4, 8, 8, seed=6),
        "indices_latents_history_4x": torch.arange(4),
    }


def _kandinsky_5(batch: int) -> dict[str, Any]:
    return {
        **text(batch),
        **pooled(batch),
        "visual_rope_pos": [torch.arange(FRAMES), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(TEXT),
    }


def _kandinsky_6(batch: int) -> dict[str, Any]:
    return {**text(batch), **pooled(batch)}


def _cosmos(batch: int) -> dict[str, Any]:
    return {**text(batch), "fps": 24}


def _cosmos_3(batch: int) -> dict[str, Any]:
    """Two tokens of text, then one for each place of a video of one frame."""
    places = torch.arange(2, 18)
    return {
        "input_ids": torch.tensor([1, 2]),
        "text_indexes": torch.arange(2),
        "position_ids": torch.arange(18).expand(3, -1),
        "und_len": 2,
        "sequence_length": 18,
        "vision_token_shapes": [(1, 4, 4)],
        "vision_sequence_indexes": places,
        "vision_mse_loss_indexes": places,
        "vision_noisy_frame_indexes": [torch.tensor([0])],
        "return_dict": False,
    }


def _minimax(batch: int) -> dict[str, Any]:
    """Text, then sound, then video in one row; 1, 2 and 0 mark them, and sound has a time of its own."""
    rows, audio = TEXT + 5 + 8, torch.arange(TEXT, TEXT + 5)
    tags = torch.tensor([1] * TEXT + [2] * 5 + [0] * 8)
    return {
        **text(batch),
        "timestep_indices": (tags == 2).long(),
        "token_tags": tags,
        "position_ids": torch.arange(rows, dtype=torch.float32)[:, None].expand(-1, 3),
        "video_indices": torch.arange(TEXT + 5, rows),
        "audio_indices": audio,
        "text_indices": torch.arange(TEXT),
    }


def _consisid(batch: int) -> dict[str, Any]:
    return {
        **text(batch),
        "id_cond": noise(batch, 16, seed=2),
        "id_vit_hidden": [noise(batch, 4, 16, seed=3)],
    }


KINDS: tuple[Kind, ...] = (
    Kind.of(known.SD3, "SD3Transformer2DModel"),
    Kind.of(known.FLUX, "FluxTransformer2DModel"),
    Kind.of(known.QWEN_IMAGE, "QwenImageTransformer2DModel"),
    Kind.of(known.LATTE, "LatteTransformer3DModel"),
    Kind.of(known.COGVIDEOX, "CogVideoXTransformer3DModel"),
    Kind.of(known.MOCHI, "MochiTransformer3DModel"),
    Kind.of(known.HUNYUAN_VIDEO, "HunyuanVideoTransformer3DModel"),
    Kind.of(known.ALLEGRO, "AllegroTransformer3DModel"),
    kind(
        "ConsisIDTransformer3DModel",
        {
            **LAYERED,
            "time_embed_dim": 16,
            "text_embed_dim": TEXT_DIM,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": TEXT,
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 16,
            "LFE_vit_dim": 16,
            "LFE_depth": 1,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 2,
            "LFE_output_dim": 21,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        _consisid,
        (FRAMES, 4, 8, 8),
        clock=index,
    ),
    kind(
        "CosmosTransformer3DModel",
        {
            **LAYERED,
            "mlp_ratio": 2.0,
            "text_embed_dim": TEXT_DIM,
            "adaln_lora_dim": 8,
            "max_size": (4, 8, 8),
            "concat_padding_mask": False,
        },
        _cosmos,
        VIDEO,
        clock=thousand,
    ),
    kind(
        "Cosmos3OmniTransformer",
        {
            "head_dim": HEAD_DIM,
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": HEADS,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "rope_axes_dim": [2, 3, 3],
            "vocab_size": 16,
        },
        _cosmos_3,
        (2, 1, 4, 4),
        latent="vision_tokens",
        says={"latents": "vision_tokens", "timestep": "vision_timesteps"},
        timestep="vision_timesteps",
        clock=lambda t, batch: torch.full((16,), t * 1000.0),
        batch=1,
        given=lambda latents: [latents],
    ),
    kind(
        "EasyAnimateTransformer3DModel",
        {
            **LAYERED,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "mmdit_layers": 2,
            "time_embed_dim": 16,
            "text_embed_dim": TEXT_DIM,
        },
        text,
        VIDEO,
    ),
    kind(
        "HunyuanVideo15Transformer3DModel",
        {**HUNYUAN, "text_embed_2_dim": 16, "image_embed_dim": 16, "target_size": 8},
        _hunyuan_15,
        VIDEO,
    ),
    kind(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **HUNYUAN,
            "num_single_layers": 2,
            "pooled_projection_dim": POOLED,
            "has_image_proj": True,
            "image_proj_dim": 16,
            "has_clean_x_embedder": True,
        },
        _framepack,
        VIDEO,
    ),
    kind(
        "Kandinsky5Transformer3DModel",
        {**KANDINSKY, "in_text_dim": TEXT_DIM, "in_text_dim2": POOLED, "num_text_blocks": 1},
        _kandinsky_5,
        (FRAMES, 8, 8, 4),
    ),
    kind(
        "Kandinsky6Transformer3DModel",
        {
            **KANDINSKY,
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": TEXT_DIM,
            "in_text_dim2": POOLED,
            "num_text_blocks": 1,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
        },
        _kandinsky_6,
        (FRAMES, 8, 8, 9),
        others={"audio_hidden_states": (5, 4)},
        says={"latents": ("hidden_states", "audio_hidden_states")},
    ),
    kind(
        "Kandinsky6SRTransformer3DModel",
        {**KANDINSKY, "in_visual_dim": 4, "out_visual_dim": 8, "model_dim": 24, "patch_size": (1, 2, 2)},
        lambda batch: {"return_dict": False},
        (2, 16, 16, 9),
    ),
    kind(
        "MiniMaxH3Transformer3DModel",
        {
            **HEADED,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": TEXT_DIM,
            "freq_dim": 8,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _minimax,
        (8, 16),
        clock=lambda t, batch: torch.tensor([t, t * t]),
        others={"audio_hidden_states": (5, 6)},
        says={"latents": ("hidden_states", "audio_hidden_states")},
    ),
    kind(
        "MotifVideoTransformer3DModel",
        {
            **LAYERED,
            "num_single_layers": 2,
            "text_embed_dim": TEXT_DIM,
            "rope_axes_dim": (4, 6, 6),
        },
        _masked,
        VIDEO,
    ),
)
