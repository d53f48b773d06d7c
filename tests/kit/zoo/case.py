"""What a model of the zoo is: how to make it, how to call it, and which branches its source has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A tiny diffusion transformer with random weights.

    `static(batch)` builds the arguments that stay the same objects through one generation, `call` adds the
    latents and the time of one step. Time runs from 1 (noise) to 0 (data); `clock` turns it into the tensor
    that the model's own pipeline would pass.
    """

    name: str
    make: Callable[[], nn.Module]
    static: Callable[[int], dict[str, Any]]
    latent: str
    shape: tuple[int, ...]
    timestep: str
    clock: Callable[[float, int], Tensor]
    roles: Mapping[str, int]
    blocks: int

    def latents(self, batch: int = 2, seed: int = 0) -> Tensor:
        """Unit-normal latents; a larger batch begins with the rows of a smaller one."""
        return noise(batch, *self.shape, seed=seed)

    def call(self, static: Mapping[str, Any], latents: Tensor, t: float) -> dict[str, Any]:
        """All keyword arguments of one step."""
        return {**static, self.latent: latents, self.timestep: self.clock(t, latents.shape[0])}

    def kwargs(self, batch: int = 2, seed: int = 0, t: float = 0.5) -> dict[str, Any]:
        """All keyword arguments of one step, everything newly built."""
        return self.call(self.static(batch), self.latents(batch, seed), t)

    def prediction(self, output: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The part of the model's output that has the latents' shape (a learned variance is left out)."""
        tensor = output if isinstance(output, Tensor) else output[0]
        return tensor[:, : self.shape[0]]


def index(t: float, batch: int) -> Tensor:
    """Discrete schedules: an int64 step of 0..999."""
    return torch.full((batch,), round(t * 999), dtype=torch.int64)


def thousand(t: float, batch: int) -> Tensor:
    """Flow matching: a float in (0, 1000]."""
    return torch.full((batch,), t * 1000.0)


def unit(t: float, batch: int) -> Tensor:
    """Flow matching, divided by the pipeline: a float in (0, 1]."""
    return torch.full((batch,), t)


def reversed_unit(t: float, batch: int) -> Tensor:
    """Lumina: 0 is noise and 1 is data."""
    return torch.full((batch,), 1.0 - t)


def noise(batch: int, *shape: int, seed: int = 1) -> Tensor:
    """A fixed random input; a larger batch begins with the rows of a smaller one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(batch)])


def padded(batch: int, length: int) -> Tensor:
    """A text mask: True for real tokens, every row with some padding at its end."""
    valid = torch.tensor([length - 1 - 2 * (row % 2) for row in range(batch)])
    return torch.arange(length)[None] < valid[:, None]


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter, so that no branch is dead: many models begin with gates and tables of zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, values))
    return model.eval()


def _scaled(name: str, values: Tensor) -> Tensor:
    if values.ndim == 1:
        return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
    if name.endswith(("weight", "kernel")):
        fan_in = values[0].numel()
        return values * min(max(fan_in**-0.5, 0.05), 0.2)
    return 0.2 * values
