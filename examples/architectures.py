"""Published transformers in their own sizes, with weights that have no memory: what plans cost there.

python -m examples.architectures [--models FLUX.1-dev] [--json FILE]
graphcache price examples.architectures:flux_dev --plan taylorseer
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from torch import nn

import graphcache
from examples.records import Cell, Column, add_json_option, report
from graphcache import presets
from graphcache.ir.units import size, work

STEPS = 50
COLUMNS = (
    Column("model"),
    Column("latents"),
    Column("plan"),
    Column("work"),
    Column("of uncached", None, 2),
    Column("cached at most"),
)

Made = tuple[nn.Module, dict[str, Any]]


def _made(name: str, latents: tuple[int, ...], configuration: Mapping[str, Any], **inputs: Any) -> Made:
    """A model in bfloat16 on the device `meta` and its call; shapes stand for tensors."""
    with torch.device("meta"):
        model = getattr(diffusers, name)(**configuration).to(torch.bfloat16)
        tensors = {
            key: torch.empty(value) if isinstance(value, torch.Size) else value
            for key, value in inputs.items()
        }
        call = {"hidden_states": torch.empty(latents), "timestep": torch.empty(latents[0]), **tensors}
    call = {key: _cast(value) for key, value in call.items()}
    return model.eval(), {**call, "return_dict": False}


def _cast(value: Any) -> Any:
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(torch.bfloat16) if is_floating else value


def _of(*shape: int) -> torch.Size:
    return torch.Size(shape)


def dit_xl() -> Made:
    """256²."""
    configuration = {
        "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
        "num_layers": 28, "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000,
    }  # fmt: skip
    with torch.device("meta"):
        labels = torch.zeros(2, dtype=torch.int64)
    return _made("DiTTransformer2DModel", (2, 4, 32, 32), configuration, class_labels=labels)


def pixart(side: int) -> Made:
    configuration = {
        "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
        "num_layers": 28, "cross_attention_dim": 1152, "caption_channels": 4096, "sample_size": side,
        "use_additional_conditions": side > 64,
    }  # fmt: skip
    with torch.device("meta"):
        added = {"resolution": torch.empty(2, 2), "aspect_ratio": torch.empty(2, 1)}
    conditions = added if side > 64 else dict.fromkeys(added)
    text = _of(2, 120, 4096)
    return _made(
        "PixArtTransformer2DModel", (2, 4, side, side), configuration,
        encoder_hidden_states=text, added_cond_kwargs=conditions,
    )  # fmt: skip


def pixart_512() -> Made:
    return pixart(64)


def pixart_1024() -> Made:
    return pixart(128)


def sd35_large() -> Made:
    """1024²."""
    configuration = {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 38, "attention_head_dim": 64,
        "num_attention_heads": 38, "joint_attention_dim": 4096, "caption_projection_dim": 2432,
        "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
    }  # fmt: skip
    return _made(
        "SD3Transformer2DModel", (2, 16, 128, 128), configuration,
        encoder_hidden_states=_of(2, 333, 4096), pooled_projections=_of(2, 2048),
    )  # fmt: skip


def flux_dev() -> Made:
    """1024²."""
    return _made(
        "FluxTransformer2DModel", (1, 4096, 64), {"guidance_embeds": True},
        encoder_hidden_states=_of(1, 512, 4096), pooled_projections=_of(1, 768), guidance=_of(1),
        img_ids=_of(4096, 3), txt_ids=_of(512, 3),
    )  # fmt: skip


def qwen_image() -> Made:
    """1024², a prompt of 128 tokens."""
    return _made(
        "QwenImageTransformer2DModel", (1, 4096, 64), {},
        encoder_hidden_states=_of(1, 128, 3584), img_shapes=[[(1, 64, 64)]],
    )  # fmt: skip


def cogvideox_5b() -> Made:
    """49 frames of 480 × 720."""
    configuration = {
        "num_attention_heads": 48, "num_layers": 42, "text_embed_dim": 4096, "time_embed_dim": 512,
        "use_rotary_positional_embeddings": True,
    }  # fmt: skip
    with torch.device("meta"):
        rotary = (torch.empty(17550, 64), torch.empty(17550, 64))
    return _made(
        "CogVideoXTransformer3DModel", (2, 13, 16, 60, 90), configuration,
        encoder_hidden_states=_of(2, 226, 4096), image_rotary_emb=rotary,
    )  # fmt: skip


def wan(heads: int, layers: int, ffn: int) -> Made:
    """81 frames of 480 × 832."""
    configuration = {"num_attention_heads": heads, "num_layers": layers, "ffn_dim": ffn}
    text = _of(1, 512, 4096)
    return _made("WanTransformer3DModel", (1, 16, 21, 60, 104), configuration, encoder_hidden_states=text)


def wan_1b() -> Made:
    return wan(12, 30, 8960)


def wan_14b() -> Made:
    return wan(40, 40, 13824)


def hunyuan_video() -> Made:
    """129 frames of 720 × 1280."""
    with torch.device("meta"):
        mask = torch.ones(1, 256, dtype=torch.int64)
    return _made(
        "HunyuanVideoTransformer3DModel", (1, 16, 33, 90, 160), {},
        encoder_hidden_states=_of(1, 256, 4096), encoder_attention_mask=mask,
        pooled_projections=_of(1, 768), guidance=_of(1),
    )  # fmt: skip


def z_image() -> Made:
    """1024², a prompt of 128 tokens."""
    with torch.device("meta"):
        model = diffusers.ZImageTransformer2DModel().to(torch.bfloat16).eval()
        latents, text = torch.empty(16, 1, 128, 128), torch.empty(128, 2560)
        call = {"x": [_cast(latents)], "t": _cast(torch.empty(1)), "cap_feats": [_cast(text)]}
    return model, {**call, "return_dict": False}


def ltx_video() -> Made:
    """161 frames of 512 × 704."""
    return _made(
        "LTXVideoTransformer3DModel", (1, 7392, 128), {},
        encoder_hidden_states=_of(1, 128, 4096), encoder_attention_mask=_of(1, 128),
        num_frames=21, height=16, width=22,
    )  # fmt: skip


MODELS: Mapping[str, Callable[[], Made]] = {
    "DiT-XL/2": dit_xl,
    "PixArt-α 512²": pixart_512,
    "PixArt-α 1024²": pixart_1024,
    "SD3.5 large": sd35_large,
    "FLUX.1-dev": flux_dev,
    "Qwen-Image": qwen_image,
    "CogVideoX-5B": cogvideox_5b,
    "Wan 2.1 1.3B": wan_1b,
    "Wan 2.1 14B": wan_14b,
    "HunyuanVideo": hunyuan_video,
    "Z-Image": z_image,
    "LTX-Video": ltx_video,
}


def priced(name: str) -> list[list[Cell]]:
    """A row for each plan."""
    model, call = MODELS[name]()
    plans = {
        "compute": presets.compute(STEPS),
        "fora": presets.fora(STEPS),
        "taylorseer": presets.taylorseer(STEPS),
        "taylorseer, lite": presets.taylorseer(STEPS, lite=True),
    }
    return [
        [name, price.latents, price.plan, work(price.flops), price.share, size(price.peak_bytes)]
        for price in graphcache.price(model, call, plans)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    add_json_option(parser)
    arguments = parser.parse_args()
    rows = [row for name in arguments.models for row in priced(name)]
    report("At full size", COLUMNS, rows, arguments.json)


if __name__ == "__main__":
    main()
