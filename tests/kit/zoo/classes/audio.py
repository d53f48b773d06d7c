"""Models of sound and of molecules, and transformers that are parts of other networks."""

from typing import Any

import torch

from zoo.case import noise, padded, unit
from zoo.kind import HEAD_DIM, HEADS, TEXT, TEXT_DIM, WIDTH, Kind, kind, text

HEADED = {"attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS}
LENGTH = 12


def _ace(batch: int) -> dict[str, Any]:
    return {
        **text(batch),
        "timestep_r": torch.zeros(batch),
        "context_latents": noise(batch, LENGTH, 16, seed=2),
    }


def _stable_audio(batch: int) -> dict[str, Any]:
    angles = noise(1, LENGTH + 1, HEAD_DIM // 2)[0]
    return {
        **text(batch),
        "global_hidden_states": noise(batch, 1, TEXT_DIM, seed=2),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }


def _longcat(batch: int) -> dict[str, Any]:
    return {
        **text(batch),
        "encoder_attention_mask": padded(batch, TEXT),
        "attention_mask": torch.ones(batch, LENGTH, dtype=torch.bool),
        "latent_cond": noise(batch, LENGTH, 8, seed=2),
    }


def _protein(batch: int) -> dict[str, Any]:
    real = torch.ones(batch, LENGTH, dtype=torch.bool)
    return {
        "local_latents_time": torch.full((batch,), 0.5),
        "padding_mask": real,
        "token_type": torch.zeros(batch, LENGTH, dtype=torch.long),
        "conditioning": {"is_in_context_conditioning": ~real, "supports_local_latent": real},
        "return_dict": False,
    }


KINDS: tuple[Kind, ...] = (
    kind(
        "AceStepTransformer1DModel",
        {
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 1,
            "head_dim": HEAD_DIM,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "encoder_hidden_size": TEXT_DIM,
            "sliding_window": 4,
        },
        _ace,
        (LENGTH, 8),
        clock=unit,
    ),
    kind(
        "StableAudioDiTModel",
        {
            **HEADED,
            "sample_size": LENGTH,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": HEAD_DIM,
            "time_proj_dim": 16,
            "global_states_input_dim": TEXT_DIM,
            "cross_attention_input_dim": TEXT_DIM,
        },
        _stable_audio,
        (8, LENGTH),
        clock=unit,
    ),
    kind(
        "StableAudio3DiTModel",
        {
            "io_channels": 8,
            "embed_dim": WIDTH,
            "depth": 2,
            "num_heads": HEADS,
            "cond_token_dim": TEXT_DIM,
            "global_cond_dim": 16,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 16,
            "ff_mult": 2.0,
            "num_memory_tokens": 3,
        },
        lambda batch: {
            **text(batch),
            "global_hidden_states": noise(batch, 16, seed=2),
            "encoder_attention_mask": padded(batch, TEXT),
        },
        (8, LENGTH),
        clock=unit,
    ),
    kind(
        "LongCatAudioDiTTransformer",
        {"dit_dim": WIDTH, "dit_depth": 2, "dit_heads": HEADS, "dit_text_dim": TEXT_DIM, "latent_dim": 8},
        _longcat,
        (LENGTH, 8),
        clock=unit,
    ),
    kind(
        "MiniMaxMusic3Transformer1DModel",
        {
            **HEADED,
            "in_channels": 8,
            "condition_dim": TEXT_DIM,
            "num_layers": 2,
            "ff_inner_dim": 48,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        lambda batch: text(batch, LENGTH),
        (8, LENGTH),
        clock=unit,
    ),
    kind(
        "MiniMaxMusic3RVQDepthDecoder",
        {
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_attention_heads": HEADS,
            "intermediate_size": 48,
            "audio_vocab_size": 16,
            "num_codebooks": 4,
        },
        lambda batch: {},
        (4, WIDTH),
        latent="inputs_embeds",
        timestep=None,
        says={"wait": "never"},
    ),
    kind(
        "RFD4ProteinaTransformer",
        {
            "nlayers": 2,
            "token_dim": WIDTH,
            "nheads": HEADS,
            "dim_cond": 16,
            "pair_repr_dim": 16,
            "latent_dim": 8,
            "token_type_emb_dim": 8,
            "cath_emb_dim": 8,
            "t_emb_dim": 16,
            "seq_sep_dim": 8,
            "xt_pair_dist_dim": 8,
            "tri_mult_c": 16,
            "num_sequence_classes": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type", "chain_centroid_xyz"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
        },
        _protein,
        (LENGTH, 3),
        latent="bb_ca",
        timestep="bb_ca_time",
        clock=unit,
        others={"local_latents": (LENGTH, 8)},
        says={"latents": ("bb_ca", "local_latents"), "timestep": "bb_ca_time"},
    ),
    kind(
        "T5FilmDecoder",
        {
            "input_dims": 8,
            "targets_length": LENGTH,
            "d_model": WIDTH,
            "num_layers": 2,
            "num_heads": HEADS,
            "d_kv": HEAD_DIM,
            "d_ff": 48,
        },
        lambda batch: {"encodings_and_masks": [(noise(batch, TEXT, WIDTH), torch.ones(batch, TEXT))]},
        (LENGTH, 8),
        latent="decoder_input_tokens",
        timestep="decoder_noise_time",
        clock=unit,
        says={"latents": "decoder_input_tokens", "timestep": "decoder_noise_time"},
    ),
    kind(
        "TransformerTemporalModel",
        {
            **HEADED,
            "in_channels": WIDTH,
            "num_layers": 2,
            "norm_num_groups": 4,
        },
        lambda batch: {"num_frames": 2, "return_dict": False},
        (WIDTH, 4, 4),
    ),
)
