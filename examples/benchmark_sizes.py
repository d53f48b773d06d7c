"""Prompts, picture sizes and batches in any order: what is traced and compiled for them.

python -m examples.benchmark_sizes [--models FLUX SD3] [--json FILE]
"""

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from diffusers import (
    FluxTransformer2DModel,
    LatteTransformer3DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import nn

import graphcache
from examples.records import Cell, Column, add_json_option, report
from graphcache import presets
from graphcache.compiler import captured, code
from graphcache.tracing import symbolic

WIDTH = 32
PROMPTS = 20
SIDES = ((8, 8), (12, 8), (10, 14), (16, 16))
BATCHES = (1, 2, 3)
COLUMNS = (
    Column("model"),
    Column("traces after the prompts"),
    Column("graphs compiled after the prompts, a phase"),
    Column("traces in the end"),
    Column("graphs compiled in the end, a phase"),
    Column("the first call at a new size", "s", 2),
    Column("beside a warm one", "s", 3),
)

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of one generation."""

    batch: int
    text: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.height * self.width


def flux() -> tuple[nn.Module, Callable[[Sizes], Inputs]]:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )

    def inputs(at: Sizes) -> Inputs:
        ids = {"img_ids": torch.zeros(at.tokens, 3), "txt_ids": torch.zeros(at.text, 3)}
        return _packed(at) | {"pooled_projections": torch.randn(at.batch, WIDTH)} | ids

    return model, inputs


def sd3() -> tuple[nn.Module, Callable[[Sizes], Inputs]]:
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return model, lambda at: _pictured(at) | {"pooled_projections": torch.randn(at.batch, WIDTH)}


def pixart() -> tuple[nn.Module, Callable[[Sizes], Inputs]]:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=8,
        use_additional_conditions=False,
    )
    return model, lambda at: _pictured(at) | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def wan() -> tuple[nn.Module, Callable[[Sizes], Inputs]]:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
    )
    return model, lambda at: _pictured(at, frames=3)


def latte() -> tuple[nn.Module, Callable[[Sizes], Inputs]]:
    model = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=WIDTH,
        sample_size=16,
        patch_size=2,
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        caption_channels=WIDTH,
        video_length=3,
    )
    return model, lambda at: _pictured(at, frames=3)


def qwen_image() -> tuple[nn.Module, Callable[[Sizes], Inputs]]:
    model = QwenImageTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )

    def inputs(at: Sizes) -> Inputs:
        mask = torch.ones(at.batch, at.text, dtype=torch.bool)
        shapes = [[(1, at.height, at.width)]] * at.batch
        return _packed(at) | {"encoder_hidden_states_mask": mask, "img_shapes": shapes}

    return model, inputs


def lumina2() -> tuple[nn.Module, Callable[[Sizes], Inputs]]:
    model = Lumina2Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(96, 16, 16),
        cap_feat_dim=WIDTH,
    )
    mask = "encoder_attention_mask"
    return model, lambda at: _pictured(at) | {mask: torch.ones(at.batch, at.text, dtype=torch.bool)}


def _packed(at: Sizes) -> Inputs:
    return _called((at.batch, at.tokens, 4), at)


def _pictured(at: Sizes, frames: int | None = None) -> Inputs:
    place = (at.height, at.width) if frames is None else (frames, at.height, at.width)
    return _called((at.batch, 4, *place), at)


def _called(latents: tuple[int, ...], at: Sizes) -> Inputs:
    return {
        "hidden_states": torch.randn(latents),
        "encoder_hidden_states": torch.randn(at.batch, at.text, WIDTH),
    }


MODELS: Mapping[str, Callable[[], tuple[nn.Module, Callable[[Sizes], Inputs]]]] = {
    "FLUX": flux,
    "SD3": sd3,
    "PixArt": pixart,
    "Wan": wan,
    "Latte": latte,
    "Qwen-Image": qwen_image,
    "Lumina 2": lumina2,
}


def _counting(counts: list[int], place: int, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[place] += 1
        return function(*args, **kwargs)

    return call


@dataclass
class Made:
    """How much was traced and compiled: with sizes as they are, and with symbols."""

    traced: list[int] = field(default_factory=lambda: [0, 0])
    compiled: list[int] = field(default_factory=lambda: [0, 0])

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module, name, counts, place in (
                (captured, "capture", self.traced, 0),
                (symbolic, "capture", self.traced, 1),
                (code, "compiled", self.compiled, 0),
                (code, "inductor", self.compiled, 1),
            ):
                counting = _counting(counts, place, getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, counting))
            yield

    def cells(self, phases: int) -> list[Cell]:
        return ["{} + {}".format(*self.traced), "{:g} + {:g}".format(*(n / phases for n in self.compiled))]


def measured(name: str, steps: int = 4) -> list[Cell]:
    """A row: generations of a model at many sizes, in one process."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    plan = presets.taylorseer(steps, interval=2)
    cached: Any = graphcache.transform(model.eval(), plan, backend="inductor", signatures=64)
    draw, made, seconds = random.Random(0), Made(), list[list[float]]()
    texts = draw.sample(range(3, 78), PROMPTS)
    prompts = [Sizes(2, text, *SIDES[0]) for text in texts]
    others = [Sizes(batch, draw.randint(3, 77), *side) for batch in BATCHES for side in SIDES]
    draw.shuffle(others)
    cells: list[Cell] = []
    with torch.no_grad(), made.counted():
        for group in (prompts, others):
            for at in group:
                seconds.append(_generation(cached, inputs(at), at.batch, steps))
            cells += made.cells(2)
        # sizes that nothing is compiled for any more
        fresh = [Sizes(draw.choice((2, 3)), text, *SIDES[0]) for text in range(78, 84)]
        late = [_generation(cached, inputs(at), at.batch, steps) for at in fresh]
    return [
        name,
        *cells,
        statistics.median(run[0] for run in late),
        statistics.median(run[2] for run in late),
    ]


def _generation(model: Any, inputs: Inputs, batch: int, steps: int) -> list[float]:
    """Seconds of each step."""
    seconds = []
    for step in range(steps):
        begin = time.perf_counter()
        model(**inputs, timestep=torch.full((batch,), 1 - step / steps), return_dict=False)
        seconds.append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    add_json_option(parser)
    arguments = parser.parse_args()
    report("Any size", COLUMNS, [measured(name) for name in arguments.models], arguments.json)


if __name__ == "__main__":
    main()
