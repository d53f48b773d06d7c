"""Diffusers transformers, called as their pipelines call them (diffusers 0.42).

Every `roles` table was read off the model's source: a residual add that a block makes on a stream counts one.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from torch import nn

from zoo.case import Case, index, noise, padded, randomise, thousand, unit

HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM
TEXT, TEXT_DIM, POOLED = 6, 24, 20
FRAMES = 3


def _maker(cls: str, seed: int, **config: Any) -> Callable[[], nn.Module]:
    """Construct `diffusers.<cls>`, looked up late because importing one model takes seconds."""

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(diffusers, cls)(**config)
        return randomise(model, seed)

    return make


def _dit_static(batch: int) -> dict[str, Any]:
    return {"class_labels": torch.arange(batch) * 3 + 1, "return_dict": False}


# BasicTransformerBlock with norm_type "ada_norm_zero" and no cross-attention: attn1 and ff, two adds a
# block.
DIT = Case(
    name="dit",
    make=_maker(
        "DiTTransformer2DModel",
        seed=1,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ),
    static=_dit_static,
    latent="hidden_states",
    shape=(4, 8, 8),
    timestep="timestep",
    clock=index,
    roles={"self": 2, "mlp": 2},
    blocks=2,
)


def _pixart_static(batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "encoder_attention_mask": padded(batch, TEXT).long(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


# BasicTransformerBlock with norm_type "ada_norm_single": attn1, attn2 (ungated, reads the projected
# caption, which no block updates) and ff, three adds a block.
PIXART = Case(
    name="pixart",
    make=_maker(
        "PixArtTransformer2DModel",
        seed=2,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=WIDTH,
        sample_size=8,
        patch_size=2,
        caption_channels=TEXT_DIM,
    ),
    static=_pixart_static,
    latent="hidden_states",
    shape=(4, 8, 8),
    timestep="timestep",
    clock=index,
    roles={"self": 2, "cross": 2, "mlp": 2},
    blocks=2,
)


def _sd3_static(batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "pooled_projections": noise(batch, POOLED, seed=2),
        "return_dict": False,
    }


# JointTransformerBlock: the image stream adds attn and ff, the text stream adds attn and ff_context. The
# last block is context_pre_only: its text stream is read by the attention and not updated.
SD3 = Case(
    name="sd3",
    make=_maker(
        "SD3Transformer2DModel",
        seed=3,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    ),
    static=_sd3_static,
    latent="hidden_states",
    shape=(4, 8, 8),
    timestep="timestep",
    clock=thousand,
    roles={"joint": 2, "joint.context": 1, "mlp": 2, "mlp.context": 1},
    blocks=2,
)


def _flux_static(batch: int) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return {
        "encoder_hidden_states": noise(batch, TEXT, TEXT_DIM),
        "pooled_projections": noise(batch, POOLED, seed=2),
        "guidance": torch.full((batch,), 3.5),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3),
        "return_dict": False,
    }


# Two double blocks: attn, ff on the image stream and attn, ff_context on the text stream; both text updates
# of the last double block live on in the single blocks. Two single blocks: the streams are concatenated,
# one add of proj_out(cat([attn, mlp])) on the concatenation, then split again: one site each. The text half
# of the last one is dropped, but the add is the same node as the image half's.
FLUX = Case(
    name="flux",
    make=_maker(
        "FluxTransformer2DModel",
        seed=4,
        patch_size=1,
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ),
    static=_flux_static,
    latent="hidden_states",
    shape=(16, 8),
    timestep="timestep",
    clock=unit,
    roles={"joint": 2, "joint.context": 2, "mlp": 2, "mlp.context": 2, "parallel": 2},
    blocks=4,
)


def _text_static(batch: int) -> dict[str, Any]:
    return {"encoder_hidden_states": noise(batch, TEXT, TEXT_DIM), "return_dict": False}


# Two spatial blocks (attn1, attn2 over the caption, ff) and two temporal ones, which have no
# cross-attention (attn1, ff). The temporal positions added before the first temporal block are no branch.
LATTE = Case(
    name="latte",
    make=_maker(
        "LatteTransformer3DModel",
        seed=5,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=WIDTH,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_DIM,
        video_length=FRAMES,
    ),
    static=_text_static,
    latent="hidden_states",
    shape=(4, FRAMES, 8, 8),
    timestep="timestep",
    clock=index,
    roles={"self.spatial": 2, "self.temporal": 2, "cross": 2, "mlp": 4},
    blocks=4,
)


def _cogvideox_static(batch: int) -> dict[str, Any]:
    rotary = get_3d_rotary_pos_embed(
        embed_dim=HEAD_DIM, crops_coords=((0, 0), (4, 4)), grid_size=(4, 4), temporal_size=FRAMES
    )
    return {**_text_static(batch), "image_rotary_emb": rotary}


# One attention and one ff over cat([text, video]) a block; each result is split and added to both streams.
# The text add after the last ff is dead. The text add after the last attention goes into the last ff, whose
# text rows a slice drops: it reaches the output by data flow, though not by value, and counts.
COGVIDEOX = Case(
    name="cogvideox",
    make=_maker(
        "CogVideoXTransformer3DModel",
        seed=6,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT_DIM,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    ),
    static=_cogvideox_static,
    latent="hidden_states",
    shape=(FRAMES, 4, 8, 8),
    timestep="timestep",
    clock=index,
    roles={"joint": 2, "joint.context": 2, "mlp": 2, "mlp.context": 1},
    blocks=2,
)


def _mochi_static(batch: int) -> dict[str, Any]:
    return {**_text_static(batch), "encoder_attention_mask": padded(batch, TEXT)}


# Image stream: norm2(attn) and norm4(ff), text stream: norm2_context(attn) and norm4_context(ff_context),
# each norm carrying the gate. The last block is context_pre_only.
MOCHI = Case(
    name="mochi",
    make=_maker(
        "MochiTransformer3DModel",
        seed=7,
        patch_size=2,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=16,
        max_sequence_length=TEXT,
    ),
    static=_mochi_static,
    latent="hidden_states",
    shape=(4, FRAMES, 8, 8),
    timestep="timestep",
    clock=thousand,
    roles={"joint": 2, "joint.context": 1, "mlp": 2, "mlp.context": 1},
    blocks=2,
)


# attn1 (gated), attn2 over the projected text (ungated), ffn (gated): three adds a block.
WAN = Case(
    name="wan",
    make=_maker(
        "WanTransformer3DModel",
        seed=8,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    ),
    static=_text_static,
    latent="hidden_states",
    shape=(4, FRAMES, 8, 8),
    timestep="timestep",
    clock=index,
    roles={"self": 2, "cross": 2, "mlp": 2},
    blocks=2,
)


def _hunyuan_static(batch: int) -> dict[str, Any]:
    return {
        **_text_static(batch),
        "encoder_attention_mask": padded(batch, TEXT).long(),
        "pooled_projections": noise(batch, POOLED, seed=2),
        "guidance": torch.full((batch,), 6000.0),
    }


# Double and single blocks as in FLUX: four adds a double block, all alive, one add on the concatenation a
# single block. The token refiner at the head of the text stream has two adds of its own (self-attention and
# ff) and is no block of the main stream, though its gates depend on the timestep.
HUNYUAN_VIDEO = Case(
    name="hunyuan_video",
    make=_maker(
        "HunyuanVideoTransformer3DModel",
        seed=9,
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED,
        rope_axes_dim=(4, 6, 6),
    ),
    static=_hunyuan_static,
    latent="hidden_states",
    shape=(4, FRAMES, 8, 8),
    timestep="timestep",
    clock=thousand,
    roles={"joint": 2, "joint.context": 2, "mlp": 2, "mlp.context": 2, "parallel": 2},
    blocks=4,
)


def _ltx_static(batch: int) -> dict[str, Any]:
    return {
        **_text_static(batch),
        "encoder_attention_mask": padded(batch, TEXT),
        "num_frames": FRAMES,
        "height": 4,
        "width": 4,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


# attn1 (gated), attn2 over the caption (ungated, its query not normalised), ff (gated): three adds a block.
LTX = Case(
    name="ltx",
    make=_maker(
        "LTXVideoTransformer3DModel",
        seed=10,
        in_channels=8,
        out_channels=8,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        num_layers=2,
        caption_channels=TEXT_DIM,
    ),
    static=_ltx_static,
    latent="hidden_states",
    shape=(FRAMES * 16, 8),
    timestep="timestep",
    clock=thousand,
    roles={"self": 2, "cross": 2, "mlp": 2},
    blocks=2,
)

ALLEGRO_HEAD_DIM = 12


def _allegro_rotary() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    t, h, w, times, rows, columns = get_3d_rotary_pos_embed_allegro(
        embed_dim=ALLEGRO_HEAD_DIM,
        crops_coords=((0, 0), (4, 4)),
        grid_size=(4, 4),
        temporal_size=FRAMES,
        interpolation_scale=(1.0, 1.0, 1.0),
    )
    positions = torch.cartesian_prod(times.long(), rows.long(), columns.long())
    grid = positions.transpose(0, 1).reshape(3, 1, -1).contiguous()
    return (t, h, w), tuple(grid)


def _allegro_static(batch: int) -> dict[str, Any]:
    return {
        **_text_static(batch),
        "encoder_attention_mask": padded(batch, TEXT).long(),
        "image_rotary_emb": _allegro_rotary(),
    }


# attn1 (gated), attn2 over the caption (ungated, its query not normalised), ff (gated): three adds a block.
ALLEGRO = Case(
    name="allegro",
    make=_maker(
        "AllegroTransformer3DModel",
        seed=11,
        patch_size=2,
        patch_size_t=1,
        num_attention_heads=HEADS,
        attention_head_dim=ALLEGRO_HEAD_DIM,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=HEADS * ALLEGRO_HEAD_DIM,
        sample_height=8,
        sample_width=8,
        sample_frames=FRAMES,
        caption_channels=TEXT_DIM,
    ),
    static=_allegro_static,
    latent="hidden_states",
    shape=(4, FRAMES, 8, 8),
    timestep="timestep",
    clock=thousand,
    roles={"self": 2, "cross": 2, "mlp": 2},
    blocks=2,
)


def _qwen_image_static(batch: int) -> dict[str, Any]:
    return {
        **_text_static(batch),
        "encoder_hidden_states_mask": padded(batch, TEXT),
        "img_shapes": [[(1, 4, 4)]] * batch,
    }


# Image stream: attn and img_mlp, text stream: attn and txt_mlp. The model returns the image stream alone,
# so both text adds of the last block are dead.
QWEN_IMAGE = Case(
    name="qwen_image",
    make=_maker(
        "QwenImageTransformer2DModel",
        seed=12,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 6, 6),
    ),
    static=_qwen_image_static,
    latent="hidden_states",
    shape=(16, 8),
    timestep="timestep",
    clock=unit,
    roles={"joint": 2, "joint.context": 1, "mlp": 2, "mlp.context": 1},
    blocks=2,
)


def _sana_static(batch: int) -> dict[str, Any]:
    return {**_text_static(batch), "encoder_attention_mask": padded(batch, TEXT).long()}


# attn1 (linear attention: two matrix products, no softmax), attn2 over the caption, ff (a gated convolution
# over the grid, an MLP by role): three adds a block.
SANA = Case(
    name="sana",
    make=_maker(
        "SanaTransformer2DModel",
        seed=13,
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT_DIM,
        sample_size=6,
        patch_size=1,
    ),
    static=_sana_static,
    latent="hidden_states",
    shape=(4, 6, 6),
    timestep="timestep",
    clock=thousand,
    roles={"self": 2, "cross": 2, "mlp": 2},
    blocks=2,
)


CASES = (
    DIT,
    PIXART,
    SD3,
    FLUX,
    LATTE,
    COGVIDEOX,
    MOCHI,
    WAN,
    HUNYUAN_VIDEO,
    LTX,
    ALLEGRO,
    QWEN_IMAGE,
    SANA,
)
