"""A diffusion transformer that is affine in its latents, and samplers that are linear: effects are exact."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graphcache import Plan, transform
from inside import engine_of

DIM = 4


class LinearBlock(nn.Module):
    """Two residual branches without an activation; the first has a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(DIM, DIM)
        self.up = nn.Linear(DIM, 2 * DIM, bias=False)
        self.down = nn.Linear(2 * DIM, DIM, bias=False)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = x + gate * self.one(x)
        return x + self.down(self.up(x * gate))


class LinearDiT(nn.Module):
    """Tokens (batch, any number, DIM), one time per sample and one text vector per sample.

    `folds`: the blocks see the tokens as rows of one token, all of a sample after one another ("samples"), or
    all samples' first ones before their second ones ("tokens").
    """

    def __init__(self, depth: int = 3, folds: str | None = None) -> None:
        super().__init__()
        self.folds = folds
        self.time = nn.Linear(1, DIM)
        self.text = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(LinearBlock() for _ in range(depth))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        gate = torch.cos(4 * self.time(timestep[:, None]) + self.text(text))[:, None]
        batch, tokens, _ = x.shape
        if self.folds:
            gate = gate.expand(batch, tokens, DIM)
            x, gate = (self._folded(item).reshape(batch * tokens, 1, DIM) for item in (x, gate))
        for block in self.blocks:
            x = block(x, gate)
        if self.folds == "tokens":
            return x.reshape(tokens, batch, DIM).transpose(0, 1)
        return x.reshape(batch, tokens, DIM)

    def _folded(self, value: Tensor) -> Tensor:
        return value.transpose(0, 1) if self.folds == "tokens" else value

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """As diffusers' models have one; a transformed model puts its own in its place."""
        yield


def linear(depth: int = 3, folds: str | None = None) -> LinearDiT:
    """A model with fixed weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(depth)
        return LinearDiT(depth, folds).eval()


class Sampler:
    """Euler's steps from seeded noise (2, tokens, DIM), guided as `mode` says.

    `mode` is None, "first" or "last" for the conditional half of a doubled batch, or "calls" for two calls in
    cache contexts. `in_place`: inputs and results are changed. `fades`: the text changes at every step.
    `directions` are the gradients that came back to the results, one tensor each.
    """

    def __init__(
        self,
        mode: str | None = None,
        tokens: int = 3,
        dtype: torch.dtype = torch.float32,
        in_place: bool = False,
        fades: bool = False,
    ) -> None:
        self.mode, self.tokens, self.dtype = mode, tokens, dtype
        self.in_place, self.fades = in_place, fades
        self.runs = 0
        self.directions: list[Tensor] = []

    def __call__(self, model: Callable[..., Any], sample: int, steps: int) -> Tensor:
        self.runs += 1
        made = torch.Generator().manual_seed(sample)
        x = torch.randn(2, self.tokens, DIM, generator=made).to(self.dtype)
        text = torch.randn(2, DIM, generator=made).to(self.dtype)
        empty, time = torch.zeros_like(text), torch.empty(2, dtype=self.dtype)
        both = {"first": torch.cat([text, empty]), "last": torch.cat([empty, text])}
        for step in range(steps):
            if self.fades:
                text = self._faded(text)
                both = {half: self._faded(texts) for half, texts in both.items()}
            time = (time if self.in_place else time.clone()).fill_(1 - step / steps)
            if self.mode in both:
                halves = model(x.repeat(2, 1, 1), timestep=time.repeat(2), text=both[self.mode]).chunk(2)
                given, free = halves if self.mode == "first" else reversed(halves)
            elif self.mode == "calls":
                with model.cache_context("cond"):
                    given = model(x, timestep=time, text=text)
                with model.cache_context("uncond"):
                    free = model(x, timestep=time, text=empty)
            else:
                given = free = model(x, timestep=time, text=text)
            # halves of one result may not be changed in place
            in_place = self.in_place and self.mode == "calls"
            difference = given.sub_(free) if in_place else given - free
            change = (free + 1.5 * difference) / steps
            x = x.sub_(change) if self.in_place else x - change
        if x.requires_grad:
            x.register_hook(self.directions.append)
        return x

    def _faded(self, text: Tensor) -> Tensor:
        return text.mul_(0.8) if self.in_place else text * 0.8


class Replanned:
    """A transformed model whose plan can be replaced between generations; it is captured once."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model: Any = transform(model, Plan(steps))

    def under(self, plan: Plan) -> nn.Module:
        self.model.reset()
        engine_of(self.model).plans[plan.steps] = plan
        return self.model
