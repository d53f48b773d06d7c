"""Models that `graphcache bench` times: random weights, real diffusers classes, CPU-sized.

Each factory returns (model, keyword arguments of one call).
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    LatteTransformer3DModel,
    PixArtTransformer2DModel,
)
from torch import nn

import graphcache

Made = tuple[nn.Module, dict[str, Any]]


def launch_bound_flux() -> Made:
    """FLUX of hidden width 32 with 4 double and 8 single blocks: every kernel is shorter than its launch."""
    return _flux(heads=2, head_width=16, blocks=(4, 8), tokens=16, text=8)


def _flux(heads: int, head_width: int, blocks: tuple[int, int], tokens: int, text: int) -> Made:
    torch.manual_seed(0)
    width = heads * head_width
    model: nn.Module = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=blocks[0],
        num_single_layers=blocks[1],
        attention_head_dim=head_width,
        num_attention_heads=heads,
        joint_attention_dim=width,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(head_width // 4, head_width // 4, head_width // 2),
    )
    inputs = {
        "hidden_states": torch.randn(1, tokens, 4),
        "encoder_hidden_states": torch.randn(1, text, width),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.ones(1),
        "img_ids": torch.randn(tokens, 3).round(),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((1,), 3.5),
        "return_dict": False,
    }
    return model.eval(), inputs


def device_sized_pixart() -> Made:
    """PixArt of 8 blocks of hidden width 1152 on 4096 tokens, batch 2: some of a 1024² model for a GPU."""
    return _pixart(heads=18, blocks=8, side=128, batch=2)


def device_sized_flux() -> Made:
    """FLUX's width of 3072 and 1024²'s 4096 + 512 tokens, with 2 of 19 double and 4 of 38 single blocks."""
    return _flux(heads=24, head_width=128, blocks=(2, 4), tokens=4096, text=512)


def on_cuda(made: Made) -> Made:
    """In bfloat16 on a CUDA device; times and positions keep their precision."""
    model, inputs = made

    def moved(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        exact = name == "timestep" or name.endswith("_ids") or not value.is_floating_point()
        return value.to("cuda", None if exact else torch.bfloat16)

    return model.to("cuda", torch.bfloat16), {name: moved(name, value) for name, value in inputs.items()}


def compute_bound_pixart() -> Made:
    """PixArt of 12 blocks of hidden width 384 on 256 tokens, batch 2: time is FLOPs."""
    return _pixart(heads=6, blocks=12, side=32, batch=2)


def wide_pixart() -> Made:
    """PixArt of 4 blocks of hidden width 768 on 1024 tokens: what a partial step costs."""
    return _pixart(heads=12, blocks=4, side=64, batch=1)


def many_tokens_pixart() -> Made:
    """PixArt of 2 blocks of hidden width 768 on 2304 tokens, for several devices."""
    return _pixart(heads=12, blocks=2, side=96, batch=1)


def many_tokens_dit() -> Made:
    """DiT of 4 blocks of hidden width 384 on 2304 tokens, batch 2, for several devices."""
    return compute_bound_dit(blocks=4, side=96)


def _pixart(heads: int, blocks: int, side: int, batch: int) -> Made:
    torch.manual_seed(0)
    width = 64 * heads
    model: nn.Module = PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=blocks,
        cross_attention_dim=width,
        caption_channels=width,
        sample_size=side,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": torch.randn(batch, 4, side, side),
        "encoder_hidden_states": torch.randn(batch, 32, width),
        "timestep": torch.full((batch,), 999),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return model.eval(), inputs


def compute_bound_dit(blocks: int = 12, side: int = 32) -> Made:
    """DiT of hidden width 384 on (side / 2)² tokens, batch 2: time is FLOPs."""
    torch.manual_seed(0)
    model: nn.Module = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        num_layers=blocks,
        sample_size=side,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, side, side),
        "timestep": torch.full((2,), 999),
        "class_labels": torch.tensor([1, 1000]),
        "return_dict": False,
    }
    return model.eval(), inputs


def guided_cogvideox(heads: int, head_width: int, blocks: int = 12, side: int = 16) -> Made:
    """CogVideoX on side² tokens of four frames and 32 of text, both branches of guidance as one batch."""
    torch.manual_seed(0)
    model: nn.Module = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_width,
        in_channels=4,
        out_channels=4,
        num_layers=blocks,
        time_embed_dim=64,
        text_embed_dim=64,
        sample_width=side,
        sample_height=side,
        sample_frames=13,
        max_text_seq_length=32,
    )
    return model.eval(), _guided_inputs(side)


def guided_latte(heads: int, head_width: int) -> Made:
    """Latte of 12 blocks, spatial and temporal, on 256 tokens; both branches of guidance as one batch."""
    torch.manual_seed(0)
    width = heads * head_width
    model: nn.Module = LatteTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_width,
        in_channels=4,
        out_channels=8,
        num_layers=6,
        cross_attention_dim=width,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=64,
        video_length=4,
    )
    return model.eval(), _guided_inputs()


def _guided_inputs(side: int = 16) -> dict[str, Any]:
    """Four channels by four frames, or frames by channels; both branches have the same latents."""
    latents = torch.randn(1, 4, 4, side, side)
    return {
        "hidden_states": torch.cat([latents, latents]),
        "encoder_hidden_states": torch.randn(2, 32, 64),
        "timestep": torch.full((2,), 999),
        "return_dict": False,
    }


def deep_dit() -> Made:
    """DiT with XL/2's 28 blocks, narrow: for the time that capture and passes take."""
    torch.manual_seed(0)
    model: nn.Module = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=28,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.full((2,), 999),
        "class_labels": torch.tensor([1, 2]),
        "return_dict": False,
    }
    return model.eval(), inputs


def first_block_cache(model: Any) -> Callable[..., Any]:
    """diffusers' FirstBlockCache that never skips, compiled: its machinery alone."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.0))
    compiled: Callable[..., Any] = torch.compile(model)

    def call(**kwargs: Any) -> Any:
        with model.cache_context("cond"):
            return compiled(**kwargs)

    return call


def dbcache(model: Any) -> Callable[..., Any]:
    """cache-dit's DBCache that never skips, compiled: its machinery alone."""
    import cache_dit

    cache_dit.enable_cache(
        cache_dit.BlockAdapter(
            transformer=model,
            blocks=[model.transformer_blocks, model.single_transformer_blocks],
            forward_pattern=[cache_dit.ForwardPattern.Pattern_1, cache_dit.ForwardPattern.Pattern_1],
        ),
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=0.0,
            max_warmup_steps=0,
            num_inference_steps=20,
        ),
    )
    return torch.compile(model)


def compute_with_cpp_wrapper(model: nn.Module) -> Callable[..., Any]:
    """The all-compute plan of 50 steps with Inductor's C++ wrapper."""
    backend = {"backend": "inductor", "options": {"cpp_wrapper": True}}
    return graphcache.transform(model, graphcache.presets.compute(50), backend=backend)
