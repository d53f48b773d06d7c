"""Models of the zoo at any sizes."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import graphcache
from graphcache import Plan
from graphcache.cost.pricing import Price
from seeding import own_numbers
from zoo import CASES, DECIDING
from zoo.case import padded

Call = dict[str, Any]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Subject:
    """A model, the sizes of its example, and its calls at any sizes, made without graphcache."""

    model: nn.Module
    sizes: Sizes
    static: Callable[[Sizes], Call]
    moving: Callable[[Sizes, int, float], Call]
    timestep: str

    def calls(self, sizes: Sizes, steps: int) -> Iterator[Call]:
        """Those of a generation, at sizes some of which may be the example's."""
        static = self.static({**self.sizes, **sizes})
        for step in range(steps):
            yield {**static, **self.moving({**self.sizes, **sizes}, step, 1 - step / steps)}

    def example(self) -> Call:
        return next(self.calls({}, 1))

    def priced(self, plans: Mapping[str, Plan], *at: Sizes, **options: Any) -> tuple[Price, ...]:
        return graphcache.price(
            self.model, self.example(), plans, at=at or ({},), timestep=self.timestep, **options
        )


def of_zoo(name: str, sizes: Sizes, shape: Callable[[Sizes], tuple[int, ...]], **texts: Any) -> Subject:
    """A model of the zoo; `texts` are arguments by the sizes beside those that depend on the batch alone."""
    case = {**CASES, **DECIDING}[name]

    def static(at: Sizes) -> Call:
        return case.static(at["batch"]) | {key: make(at) for key, make in texts.items()}

    def moving(at: Sizes, step: int, t: float) -> Call:
        latents = torch.randn(at["batch"], *shape(at), generator=torch.Generator().manual_seed(step))
        return {case.latent: latents, case.timestep: case.clock(t, at["batch"])}

    return Subject(case.make(), sizes, static, moving, case.timestep)


def text(width: int) -> Callable[[Sizes], Tensor]:
    return lambda at: torch.randn(at["batch"], at["text"], width)


def image(at: Sizes) -> tuple[int, ...]:
    return 4, at["height"], at["width"]


def clip(at: Sizes) -> tuple[int, ...]:
    return 4, at["frames"], at["height"], at["width"]


IMAGE = {"batch": 2, "height": 8, "width": 8, "text": 6}
CLIP = {**IMAGE, "frames": 3}
MAKERS: dict[str, Callable[[], Subject]] = {
    "pixart": lambda: of_zoo(
        "pixart",
        IMAGE,
        image,
        encoder_hidden_states=text(24),
        encoder_attention_mask=lambda at: padded(at["batch"], at["text"]).long(),
    ),
    "sd3": lambda: of_zoo("sd3", IMAGE, image, encoder_hidden_states=text(24)),
    "flux": lambda: of_zoo(
        "flux",
        {"batch": 2, "tokens": 16, "text": 6},
        lambda at: (at["tokens"], 8),
        encoder_hidden_states=text(24),
        txt_ids=lambda at: torch.zeros(at["text"], 3),
        img_ids=lambda at: torch.zeros(at["tokens"], 3),
    ),
    "wan": lambda: of_zoo("wan", CLIP, clip, encoder_hidden_states=text(24)),
    "qwen_image": lambda: of_zoo(
        "qwen_image",
        IMAGE,
        lambda at: (at["height"] * at["width"], 8),
        encoder_hidden_states=text(24),
        encoder_hidden_states_mask=lambda at: padded(at["batch"], at["text"]),
        img_shapes=lambda at: [[(1, at["height"], at["width"])]] * at["batch"],
    ),
    "mochi": lambda: of_zoo("mochi", {"batch": 2, "height": 8, "width": 8, "frames": 3}, clip),
    "cogvideox": lambda: of_zoo(
        "cogvideox",
        {"batch": 2, "height": 8, "width": 8, "frames": 3},
        lambda at: (at["frames"], 4, at["height"], at["width"]),
        image_rotary_emb=lambda at: tuple(
            torch.randn(at["frames"] * at["height"] * at["width"] // 4, 16) for _ in range(2)
        ),
    ),
    "lumina2": lambda: of_zoo("lumina2", {"batch": 2}, lambda at: DECIDING["lumina2"].shape),
    "hunyuan_video15": lambda: of_zoo(
        "hunyuan_video15", {"batch": 2}, lambda at: DECIDING["hunyuan_video15"].shape
    ),
}


@functools.cache
@own_numbers
def subject(name: str) -> Subject:
    return MAKERS[name]()


SIZES: dict[str, tuple[Sizes, Sizes]] = {
    "pixart": ({"height": 12, "width": 16}, {"batch": 3, "height": 4, "width": 20, "text": 5}),
    "sd3": ({"height": 6}, {"batch": 1, "text": 9}),
    "flux": ({"tokens": 36}, {"batch": 3, "tokens": 10, "text": 7}),
    "wan": ({"frames": 5, "height": 12}, {"batch": 1, "text": 4, "width": 4}),
    "mochi": ({"frames": 2, "height": 12}, {"batch": 1, "width": 10}),
    "cogvideox": ({"frames": 5}, {"batch": 1, "height": 12, "width": 4}),
    "lumina2": ({"batch": 1}, {"batch": 4}),
    "hunyuan_video15": ({"batch": 1}, {"batch": 4}),
}
