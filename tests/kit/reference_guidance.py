"""What guided generations must give: a reference interpreter for each branch, and the published Fourier form.

Both branches run one by one at half the batch, whatever the pipeline does, and the difference is kept as one
tensor that is split anew whenever it is read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graphcache.compiler.captured import Captured
from graphcache.ir.letter import Letter
from graphcache.ir.plan import Plan
from reference import Reference


def low_band(difference: Tensor, divisor: int) -> Tensor:
    """FasterCache's low frequencies: a disc around the centre of the frames' shifted spectrum."""
    height, width = difference.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(difference), dim=(-2, -1))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    radius = min(height, width) // divisor
    disc = (rows - height // 2) ** 2 + (columns - width // 2) ** 2 <= radius**2
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * disc, dim=(-2, -1))).real


def multipliers(letter: Letter | None, step: int, since: Sequence[int]) -> tuple[float, float]:
    """Of the low and the high band, by the words of the paper and of the released code; steps from 0."""
    if letter is None:
        return 1.0, 1.0
    options = dict(letter.options)
    low = high = 1.0
    for past in since if options["weighting"] == "released" else [step]:
        low *= options["low"] if past + 1 <= options["low_until"] else 1.0
        high *= options["high"] if past + 1 >= options["high_from"] else 1.0
    return low, high


@dataclass
class GuidedReference:
    """Answers a step's two branches; each is given its own flat inputs, the conditional ones first."""

    conditional: Reference
    other: Reference
    plan: Plan
    channels: int
    """Of the prediction; what follows is a learned variance."""
    channel_dim: int = 1
    frames: Callable[[Tensor], Tensor] = lambda prediction: prediction
    tokens: Callable[[Tensor], Tensor] = lambda frames: frames
    difference: Tensor | None = None
    since: list[int] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)

    @staticmethod
    def of(captured: Captured, plan: Plan, channels: int, **options: Any) -> "GuidedReference":
        alone = replace(
            plan, rows=tuple(row for row in plan.rows if not row.selector.is_guidance), preset=None
        )
        return GuidedReference(
            Reference(captured, alone), Reference(captured, alone), plan, channels, **options
        )

    @property
    def actions(self) -> str:
        return [row.actions for row in self.plan.rows if row.selector.is_guidance][-1]

    def __call__(self, conditional: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The results of both branches at this step."""
        return self.first(conditional), self.second(other)

    def first(self, inputs: Sequence[Tensor]) -> Tensor:
        """The conditional branch's result, which begins a step."""
        self.step = self.conditional.now
        self.ours = _tensor(self.conditional(inputs))
        return self.ours

    def second(self, inputs: Sequence[Tensor]) -> Tensor:
        """The unconditional branch's result at the same step."""
        if self.actions[self.step] == "#" or self.difference is None:
            self.runs.append(2)
            theirs = _tensor(self.other(inputs))
            self.difference = (theirs - self.ours).narrow(self.channel_dim, 0, self.channels)
            self.since = []
            return theirs
        self.runs.append(1)
        self.other.now += 1
        if self.actions[self.step] != ".":
            self.since.append(self.step)
        return self._answer(self.ours, self.step)

    def _answer(self, ours: Tensor, step: int) -> Tensor:
        letter = self.plan.letter(self.actions[step])
        low, high = multipliers(letter, step, self.since)
        assert self.difference is not None
        difference = self.frames(self.difference)
        smooth = low_band(difference, letter.option("divisor")) if letter else difference
        change = self.tokens(low * smooth + high * (difference - smooth))
        mean = ours.narrow(self.channel_dim, 0, self.channels) + change
        rest = ours.narrow(self.channel_dim, self.channels, ours.shape[self.channel_dim] - self.channels)
        return torch.cat([mean, rest], dim=self.channel_dim)


def _tensor(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    values = list(result.values()) if isinstance(result, Mapping) else list(result)
    return values[0]
