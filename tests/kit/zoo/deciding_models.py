"""Diffusers transformers whose forward looks at the values of masks, embeddings and positions.

Every `roles` table was read off the model's source, as in `diffusers_models`.
"""

from typing import Any

import torch

from zoo.case import Case, noise, padded, reversed_unit, thousand, unit
from zoo.diffusers_models import HEAD_DIM, HEADS, POOLED, TEXT, TEXT_DIM, WIDTH, _maker

GLYPHS, GLYPH_DIM = 5, 20
PICTURES, PICTURE_DIM = 3, 12


def _text(batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "encoder_attention_mask": padded(batch, TEXT),
        "return_dict": False,
    }


def _two_texts(batch: int) -> dict[str, Any]:
    return {
        **_text(batch),
        "encoder_hidden_states_2": noise(batch, GLYPHS, GLYPH_DIM, seed=3),
        "encoder_attention_mask_2": padded(batch, GLYPHS),
    }


# It takes the lengths of the texts for sizes and counts the distinct ones. attn and feed_forward in the
# noise refiner and in the main layers, both on the image stream; the text's refiner is no site.
LUMINA2 = Case(
    name="lumina2",
    make=_maker(
        "Lumina2Transformer2DModel",
        seed=14,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(32, 16, 16),
        cap_feat_dim=TEXT_DIM,
    ),
    static=_text,
    latent="hidden_states",
    shape=(4, 8, 8),
    timestep="timestep",
    clock=reversed_unit,
    roles={"self": 2, "mlp": 2},
    blocks=2,
)


def _hunyuan_video15_static(batch: int) -> dict[str, Any]:
    return {**_two_texts(batch), "image_embeds": torch.zeros(batch, PICTURES, PICTURE_DIM)}


# It asks whether there is a picture, and sorts the tokens of each sample by the masks of three texts.
# attn, attn of the text, ff and ff of the text; nobody reads the last block's text.
HUNYUAN_VIDEO15 = Case(
    name="hunyuan_video15",
    make=_maker(
        "HunyuanVideo15Transformer3DModel",
        seed=15,
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=GLYPH_DIM,
        image_embed_dim=PICTURE_DIM,
        rope_axes_dim=(4, 6, 6),
        target_size=8,
    ),
    static=_hunyuan_video15_static,
    latent="hidden_states",
    shape=(4, 2, 4, 4),
    timestep="timestep",
    clock=thousand,
    roles={"joint": 2, "joint.context": 1, "mlp": 2, "mlp.context": 1},
    blocks=2,
)

# It sorts the tokens of two texts by their masks. A joint block, whose text goes on into a single one.
HUNYUAN_IMAGE = Case(
    name="hunyuan_image",
    make=_maker(
        "HunyuanImageTransformer2DModel",
        seed=16,
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=(1, 1),
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=GLYPH_DIM,
        rope_axes_dim=(8, 8),
    ),
    static=_two_texts,
    latent="hidden_states",
    shape=(4, 4, 4),
    timestep="timestep",
    clock=thousand,
    roles={"joint": 1, "joint.context": 1, "mlp": 1, "mlp.context": 1, "parallel": 1},
    blocks=2,
)


def _omnigen_static(batch: int) -> dict[str, Any]:
    length = TEXT + 1 + 16
    mask = torch.tril(torch.ones(batch, length, length)).long()
    mask[:, :, TEXT:] = 1
    return {
        "input_ids": torch.arange(batch * TEXT).view(batch, TEXT) % 11,
        "input_img_latents": [noise(1, 4, 4, 4, seed=7)],
        "input_image_sizes": {0: [[1, 5]]},
        "attention_mask": mask,
        "position_ids": torch.arange(length).expand(batch, -1).clone(),
        "return_dict": False,
    }


# It compares the largest position with the number that it was trained for. self_attn and mlp, two a layer.
OMNIGEN = Case(
    name="omnigen",
    make=_maker(
        "OmniGenTransformer2DModel",
        seed=17,
        in_channels=4,
        patch_size=2,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=WIDTH,
        num_layers=1,
        pad_token_id=0,
        vocab_size=16,
        max_position_embeddings=64,
        original_max_position_embeddings=32,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        pos_embed_max_size=16,
        time_step_dim=16,
    ),
    static=_omnigen_static,
    latent="hidden_states",
    shape=(4, 8, 8),
    timestep="timestep",
    clock=unit,
    roles={"self": 1, "mlp": 1},
    blocks=1,
)


def _framepack_static(batch: int) -> dict[str, Any]:
    return {
        **_text(batch),
        "pooled_projections": noise(batch, POOLED, seed=2),
        "image_embeds": noise(batch, PICTURES, PICTURE_DIM, seed=4),
        "guidance": torch.full((batch,), 6000.0),
        "indices_latents": torch.arange(16, 19),
        "latents_clean": noise(batch, 4, 2, 4, 4, seed=5),
        "indices_latents_clean": torch.tensor([0, 15]),
        "latents_history_2x": noise(batch, 4, 2, 4, 4, seed=6),
        "indices_latents_history_2x": torch.tensor([13, 14]),
        "latents_history_4x": noise(batch, 4, 4, 4, 4, seed=7),
        "indices_latents_history_4x": torch.arange(9, 13),
    }


# It makes attention's mask of the text's lengths, or cuts the one text to its length. As HunyuanVideo.
FRAMEPACK = Case(
    name="framepack",
    make=_maker(
        "HunyuanVideoFramepackTransformer3DModel",
        seed=18,
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=None,
        has_image_proj=True,
        image_proj_dim=PICTURE_DIM,
        has_clean_x_embedder=True,
    ),
    static=_framepack_static,
    latent="hidden_states",
    shape=(4, 3, 4, 4),
    timestep="timestep",
    clock=thousand,
    roles={"joint": 1, "joint.context": 1, "mlp": 1, "mlp.context": 1, "parallel": 1},
    blocks=2,
)

CASES = (LUMINA2, HUNYUAN_VIDEO15, HUNYUAN_IMAGE, OMNIGEN, FRAMEPACK)
