"""Video models of the families of Wan, Sana and LTX."""

from typing import Any

import torch

from zoo import diffusers_models as known
from zoo.case import index, noise, padded
from zoo.kind import FRAMES, HEAD_DIM, HEADS, TEXT, TEXT_DIM, WIDTH, Kind, installed, kind, text

HEADED = {"attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS}
VIDEO = (4, FRAMES, 8, 8)
LAYERED = {**HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 2}
WAN = {**LAYERED, "text_dim": TEXT_DIM, "freq_dim": 32, "ffn_dim": 64, "rope_max_seq_len": 32}
LTX2 = {
    **LAYERED,
    "cross_attention_dim": WIDTH,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": HEADS,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "caption_channels": TEXT_DIM,
    "rope_double_precision": False,
}
WAN_MODULES = r"blocks\.\d+\.(attn1|attn2|ffn)"


def _with_frames(batch: int) -> dict[str, Any]:
    """A chunk of two frames behind another of two."""
    return {
        **text(batch),
        "r_timestep": torch.zeros(batch, 4),
        "chunk_partition": [2, 2],
    }


def _frames_time(t: float, batch: int) -> torch.Tensor:
    return torch.full((batch, 4), t * 1000.0)


def _helios(batch: int) -> dict[str, Any]:
    """Three histories, of which each has one frame or four."""
    lengths = {"short": 1, "mid": 1, "long": 4}
    histories = {f"latents_history_{name}": noise(batch, 4, n, 8, 8, seed=n) for name, n in lengths.items()}
    places = {f"indices_latents_history_{name}": torch.ones(batch, n) for name, n in lengths.items()}
    return {**text(batch), "indices_hidden_states": torch.ones(batch, FRAMES), **histories, **places}


def _ltx2(batch: int) -> dict[str, Any]:
    return {
        **text(batch),
        "audio_encoder_hidden_states": noise(batch, TEXT, TEXT_DIM, seed=3),
        "encoder_attention_mask": padded(batch, TEXT),
        "num_frames": FRAMES,
        "height": 4,
        "width": 4,
        "audio_num_frames": 5,
        "fps": 25.0,
    }


def _sana_wm(batch: int) -> dict[str, Any]:
    """A camera that moves forward: its pose as a matrix, then its lens."""
    poses = torch.eye(4).repeat(batch, FRAMES, 1, 1)
    poses[..., 2, 3] = torch.arange(FRAMES) * 0.1
    lens = torch.tensor([8.0, 8.0, 4.0, 4.0]).expand(batch, FRAMES, 4)
    return {
        "encoder_hidden_states": noise(batch, 1, TEXT, TEXT_DIM),
        "encoder_attention_mask": padded(batch, TEXT).long(),
        "camera_conditions": torch.cat([poses.flatten(-2), lens], dim=-1),
        "chunk_plucker": noise(batch, 8, FRAMES, 8, 8, seed=2),
        "return_dict": False,
    }


def _refiner(batch: int) -> dict[str, Any]:
    model = installed()["SanaWMLTX2RefinerTransformer3DModel"](**LTX2)
    places = model.build_rotary_emb_for_absolute_positions(
        batch_size=batch, frame_positions=[0, 1, 2], height=4, width=4, device=torch.device("cpu"), fps=24.0
    )
    return {**text(batch), "encoder_attention_mask": padded(batch, TEXT).float(), "video_rotary_emb": places}


def _animate(batch: int) -> dict[str, Any]:
    """Poses of all frames but the first, and one face of 8 by 8 pixels for each frame of the video."""
    return {
        **text(batch),
        "encoder_hidden_states_image": noise(batch, 4, 16, seed=2),
        "pose_hidden_states": noise(batch, 4, FRAMES - 1, 8, 8, seed=3),
        "face_pixel_values": noise(batch, 3, 5, 16, 16, seed=4),
    }


def _animate_2(batch: int) -> dict[str, Any]:
    """The pass that writes the reference's keys and values into a cache."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "encoder_hidden_states": list(noise(batch, TEXT, TEXT_DIM)),
        "condition_latents": list(noise(batch, 4, 2, 8, 8, seed=2)),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 32,
        "offset_grid_sizes": torch.tensor([[2, 4, 4]]),
        "return_dict": False,
    }


def _vace(batch: int) -> dict[str, Any]:
    return {**text(batch), "control_hidden_states": noise(batch, 8, FRAMES, 8, 8, seed=2)}


KINDS: tuple[Kind, ...] = (
    Kind.of(known.WAN, "WanTransformer3DModel"),
    Kind.of(known.LTX, "LTXVideoTransformer3DModel"),
    kind(
        "AnyFlowTransformer3DModel",
        {**WAN},
        lambda batch: {**text(batch), "r_timestep": torch.zeros(batch, FRAMES)},
        (FRAMES, 4, 8, 8),
        clock=lambda t, batch: torch.full((batch, FRAMES), t * 1000.0),
    ),
    kind(
        "AnyFlowFARTransformer3DModel",
        {**WAN},
        _with_frames,
        (4, 4, 8, 8),
        clock=_frames_time,
    ),
    kind("ChronoEditTransformer3DModel", {**WAN}, text, VIDEO, clock=index),
    kind(
        "HeliosTransformer3DModel",
        {**{name: value for name, value in WAN.items() if name != "rope_max_seq_len"}, "rope_dim": (4, 6, 6)},
        _helios,
        VIDEO,
        clock=index,
    ),
    kind("SkyReelsV2Transformer3DModel", {**WAN}, text, VIDEO, clock=index),
    kind("WanVACETransformer3DModel", {**WAN, "vace_layers": [0, 1], "vace_in_channels": 8}, _vace, VIDEO),
    kind(
        "WanAnimateTransformer3DModel",
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        _animate,
        (12, FRAMES, 8, 8),
        clock=index,
    ),
    kind(
        "WanAnimate2Transformer3DModel",
        {
            "text_len": 8,
            "in_dim": 8,
            "dim": WIDTH,
            "ffn_dim": 64,
            "freq_dim": 32,
            "text_dim": TEXT_DIM,
            "out_dim": 4,
            "num_heads": HEADS,
            "num_layers": 2,
            "use_img_emb": False,
        },
        _animate_2,
        (4, 2, 8, 8),
        batch=1,
        given=list,
    ),
    kind(
        "LTX2VideoTransformer3DModel",
        LTX2,
        _ltx2,
        (FRAMES * 16, 4),
        others={"audio_hidden_states": (5, 4)},
        says={"latents": ("hidden_states", "audio_hidden_states")},
    ),
    kind(
        "SanaWMLTX2RefinerTransformer3DModel",
        LTX2,
        _refiner,
        (FRAMES * 16, 4),
        clock=lambda t, batch: torch.full((batch, FRAMES * 16), t * 1000.0),
    ),
    kind(
        "SanaVideoTransformer3DModel",
        {
            **LAYERED,
            "num_cross_attention_heads": HEADS,
            "cross_attention_head_dim": HEAD_DIM,
            "cross_attention_dim": WIDTH,
            "caption_channels": TEXT_DIM,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        lambda batch: {**text(batch), "encoder_attention_mask": padded(batch, TEXT).long()},
        VIDEO,
    ),
    kind(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "softmax_every_n": 2,
            "linear_head_dim": HEAD_DIM,
            "caption_channels": TEXT_DIM,
            "mlp_ratio": 2.0,
            "chunk_plucker_channels": 8,
            "chunk_plucker_post_attn_blocks": 2,
        },
        _sana_wm,
        VIDEO,
        clock=lambda t, batch: torch.full((batch, 1, FRAMES), t * 1000.0),
    ),
)
