"""Pipelines whose denoisers take turns by the timestep: linear models, so that effects are exact."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from linear import DIM, LinearDiT, linear

STEPS, FIRST = 8, 3
"""Of a generation, and of those the ones that are the first model's."""


class Relay:
    """The first model down to `boundary` of the way, the second from there on.

    `calls`: guidance by two calls in cache contexts. `directions` are the gradients that came back to the
    results, one tensor each; `called` the model of every call.
    """

    def __init__(
        self, first: LinearDiT, second: LinearDiT, boundary: float = 0.7, calls: bool = False
    ) -> None:
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.early, self.late = first, second
        self.boundary, self.calls = boundary, calls
        self.directions: list[Tensor] = []
        self.called: list[str] = []

    def chosen(self, time: float, boundary: float) -> list[str]:
        """The attributes of the models that a time calls."""
        return ["early" if time >= boundary else "late"]

    @torch.no_grad()
    def __call__(
        self, num_inference_steps: int, generator: Any, boundary: float | None = None, **_: Any
    ) -> tuple[Tensor]:
        x, text = (torch.randn(2, *size, DIM, generator=generator) for size in ((3,), ()))
        self.scheduler.set_timesteps(sigmas=[1 - i / num_inference_steps for i in range(num_inference_steps)])
        for t in self.scheduler.timesteps:
            results = []
            for name in self.chosen(float(t) / 1000, boundary or self.boundary):
                self.called.append(name)
                results.append(self.denoised(getattr(self, name), x, t, text))
            x = self.scheduler.step(sum(results), t, x)[0]
        if x.requires_grad:
            x.register_hook(self.directions.append)
        return (x,)

    def denoised(self, model: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        time = t.expand(len(x)) / 1000
        if not self.calls:
            return model(x, timestep=time, text=text)  # type: ignore[no-any-return]
        with model.cache_context("cond"):
            given = model(x, timestep=time, text=text)
        with model.cache_context("uncond"):
            free = model(x, timestep=time, text=0 * text)
        return free + 1.5 * (given - free)  # type: ignore[no-any-return]


def another(depth: int, seed: int = 50) -> LinearDiT:
    """A model like `linear(depth)` with other weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LinearDiT(depth).eval()


def relay(depth: int = 1, **options: Any) -> Relay:
    """Two models of equal graphs."""
    return Relay(linear(depth), another(depth), **options)
