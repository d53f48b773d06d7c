"""Transformer classes: how to make a tiny one and how to call it; what is expected stands in `expected`."""

import functools
import importlib
import inspect
import pkgutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers.models.transformers
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from zoo.case import Case, noise, randomise, thousand

HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM
TEXT, TEXT_DIM, POOLED = 6, 24, 20
FRAMES = 3


def _itself(latents: Tensor) -> Any:
    return latents


@dataclass(frozen=True)
class Kind:
    """A class of denoisers, its tiny stand-in and the calls of a generation.

    `fixed(batch)` are the arguments that stay the same objects through a generation; `given` makes of a
    tensor of noise what the model takes for latents; `others` are the shapes of further latents. `says` is
    what `transform` has to be told about the class, since no name of its arguments does.
    """

    name: str
    make: Callable[[], nn.Module]
    fixed: Callable[[int], dict[str, Any]]
    latent: str
    shape: tuple[int, ...]
    timestep: str | None
    clock: Callable[[float, int], Any]
    batch: int = 2
    given: Callable[[Tensor], Any] = _itself
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    says: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(case: Case, name: str) -> "Kind":
        """The same of a model that the other tests of the zoo know more about."""
        return Kind(name, case.make, case.static, case.latent, case.shape, case.timestep, case.clock)

    def generation(self, steps: int) -> list[dict[str, Any]]:
        """The keyword arguments of each step; the latents are new noise, whatever the step before gave."""
        fixed = self.fixed(self.batch)
        return [{**fixed, **self._moving(step, 1 - step / steps)} for step in range(steps)]

    def _moving(self, step: int, t: float) -> dict[str, Any]:
        moving = {self.latent: self.given(noise(self.batch, *self.shape, seed=step))}
        for name, shape in self.others.items():
            moving[name] = noise(self.batch, *shape, seed=100 + step)
        if self.timestep is not None:
            moving[self.timestep] = self.clock(t, self.batch)
        return moving


def kind(
    name: str,
    config: Mapping[str, Any],
    fixed: Callable[[int], dict[str, Any]],
    shape: tuple[int, ...],
    *,
    latent: str = "hidden_states",
    timestep: str | None = "timestep",
    clock: Callable[[float, int], Any] = thousand,
    **more: Any,
) -> Kind:
    """A class of which the zoo knows no more than this."""

    def make() -> nn.Module:
        seed = zlib.crc32(name.encode()) % 1000
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = installed()[name](**config)
        return randomise(model.float(), seed)

    return Kind(name, make, fixed, latent, shape, timestep, clock, **more)


@functools.cache
def installed() -> dict[str, type[nn.Module]]:
    """Every model class that the installed diffusers has among its transformers."""
    package = diffusers.models.transformers
    modules = [
        importlib.import_module(item.name)
        for item in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    ]
    return {
        name: found
        for module in modules
        for name, found in vars(module).items()
        if inspect.isclass(found) and issubclass(found, ModelMixin) and found.__module__ == module.__name__
    }


def text(batch: int, length: int = TEXT, width: int = TEXT_DIM) -> dict[str, Any]:
    """A prompt for each sample, and no class of its own around the result."""
    return {"encoder_hidden_states": noise(batch, length, width), "return_dict": False}


def pooled(batch: int, name: str = "pooled_projections") -> dict[str, Any]:
    return {name: noise(batch, POOLED, seed=2)}


def grid(*sides: int, axes: int = 3) -> Tensor:
    """Positions of the points of a grid, one row each, in the last of so many axes."""
    positions = torch.cartesian_prod(*(torch.arange(float(side)) for side in sides)).reshape(-1, len(sides))
    return torch.nn.functional.pad(positions, (axes - len(sides), 0))


def ids(axes: int = 3, sides: Sequence[int] = (4, 4)) -> dict[str, Any]:
    """Positions of text and image tokens."""
    return {"txt_ids": torch.zeros(TEXT, axes), "img_ids": grid(*sides, axes=axes)}
