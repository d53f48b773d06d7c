"""The examples' models with their samplers, as profiling takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor, nn

from examples import digits, emoji, moving_digits
from examples.digits.evaluate import SampleQuality, sample_quality
from examples.digits.model import Classifier, ddim_scheduler, dpm_solver_scheduler, load_classifier
from examples.digits.model import load_model as load_digits
from examples.digits.sample import sample as sample_digits
from examples.emoji.data import load_pictures
from examples.emoji.evaluate import CACHE, ranks_among
from examples.emoji.model import flow_scheduler as emoji_scheduler
from examples.emoji.model import load_model as load_emoji
from examples.emoji.sample import sample as sample_emoji
from examples.moving_digits.evaluate import clip_quality
from examples.moving_digits.model import flow_scheduler as clip_scheduler
from examples.moving_digits.model import load_model as load_clips
from examples.moving_digits.sample import sample as sample_clips

Item = tuple[Tensor, int]
"""What a generation is asked for (labels or captions, one a sample), and the seed of its noise."""


@dataclass(frozen=True)
class Example:
    """A trained model and everything that profiling it takes.

    Attributes:
        steps: of an uncached generation.
        conditional: the half of the doubled batch that is the conditional branch's.
        solvers: schedulers for fewer steps, by name; the first is the model's own.
        requests: number of samples and seed -> what to generate.
        plans: folder of the plans that were searched and tuned for this model.
        judge: requests and the samples made for them -> what they look like, in numbers by name; None where
            there is no judge.
    """

    model: nn.Module
    steps: int
    conditional: str
    solvers: dict[str, Callable[[], Any]]
    sample: Callable[..., Tensor]
    requests: Callable[[int, int], Tensor]
    plans: Path
    judge: Callable[[Sequence[Item], Tensor], dict[str, float]] | None = None

    @property
    def guidance(self) -> float:
        """The scale of classifier-free guidance."""
        scale: float = inspect.signature(self.sample).parameters["guidance"].default
        return scale

    @property
    def side(self) -> int:
        """Height and width of what the model was trained for."""
        side: int = inspect.signature(self.sample).parameters["side"].default
        return side

    def sampler(
        self, solver: str | None = None, guidance: float | None = None, side: int | None = None
    ) -> Callable[[nn.Module, Item, int], Tensor]:
        """Runs a model with one of the solvers, by default its own, at a scale of guidance and a size."""
        name = solver or next(iter(self.solvers))
        make = self.solvers[name]

        def run(model: nn.Module, item: Item, steps: int) -> Tensor:
            options = {"guidance": guidance or self.guidance, "side": side or self.side}
            generate = inspect.unwrap(self.sample)
            result: Tensor = generate(model, make(), item[0], steps=steps, seed=item[1], **options)
            return result

        run.__qualname__ = name  # a profile's provenance is to name the solver
        return run

    def items(self, count: int, size: int, seed: int) -> list[Item]:
        """So many generations of `size` samples each, with seeds from `seed` on."""
        return [(self.requests(size, seed + number), seed + number) for number in range(count)]


def _classified(
    quality: Callable[[Classifier, Tensor, Tensor], SampleQuality],
) -> Callable[[Sequence[Item], Tensor], dict[str, float]]:
    """A judge that shows samples to the digits' classifier."""

    def judge(items: Sequence[Item], samples: Tensor) -> dict[str, float]:
        found = quality(load_classifier(), samples, torch.cat([labels for labels, _ in items]))
        return {"accuracy": found.accuracy, "Fréchet": found.frechet_distance}

    return judge


def _labels(count: int, seed: int) -> Tensor:
    return (torch.arange(count) * 3 + seed) % 10


def digits_example() -> Example:
    """Images of digits: a DiT, 50 DDIM steps."""
    return Example(
        load_digits(),
        50,
        "first",
        {"DDIM": ddim_scheduler, "DPM-Solver++": dpm_solver_scheduler},
        sample_digits,
        _labels,
        _folder(digits),
        _classified(sample_quality),
    )


def clips_example() -> Example:
    """Clips of a moving digit: a Latte, 50 Euler steps."""
    return Example(
        load_clips(),
        50,
        "last",
        _flow_solvers(clip_scheduler),
        sample_clips,
        _labels,
        _folder(moving_digits),
        _classified(clip_quality),
    )


def emoji_example() -> Example:
    """Pictures for words: a PixArt, 30 Euler steps."""
    model = load_emoji()

    def names(count: int, seed: int) -> list[str]:
        chosen = torch.randperm(len(model.names), generator=torch.Generator().manual_seed(seed))[:count]
        return [model.names[place] for place in chosen]

    def requests(count: int, seed: int) -> Tensor:
        return model.captions(names(count, seed))

    def nearest(items: Sequence[Item], pictures: Tensor) -> dict[str, float]:
        asked = [name for request, seed in items for name in names(len(request), seed)]
        ranks = ranks_among(load_pictures(CACHE), pictures, asked)
        return {"closest to the asked one": float((ranks == 0).float().mean())}

    return Example(
        model.transformer,
        30,
        "last",
        _flow_solvers(emoji_scheduler),
        sample_emoji,
        requests,
        _folder(emoji),
        nearest,
    )


EXAMPLES: dict[str, Callable[[], Example]] = {
    "digits": digits_example,
    "clips": clips_example,
    "emoji": emoji_example,
}


def _flow_solvers(own: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """Euler's method as in training, and the same flow by two better solvers."""
    shift = float(own().config.shift)
    options: dict[str, Any] = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
    }
    return {
        "Euler": own,
        "DPM-Solver++": lambda: DPMSolverMultistepScheduler(**options),
        "UniPC": lambda: UniPCMultistepScheduler(**options),
    }


def _folder(package: Any) -> Path:
    return Path(package.__file__).parent / "plans"
