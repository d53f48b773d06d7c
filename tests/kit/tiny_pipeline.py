"""The smallest pipeline: a loop over a scheduler's timesteps around a model in an attribute."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


class Pipeline:
    """Steps `denoise` over the scheduler's timesteps, or over all but the last ones."""

    def __init__(self, left_out: int = 0, **components: Any) -> None:
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.left_out = left_out
        self.options: dict[str, Any] = {}
        for name, component in components.items():
            setattr(self, name, component)

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.transformer(x, timestep=t, text=text)  # type: ignore[attr-defined,no-any-return]

    def __call__(self, steps: int) -> Tensor:
        made = torch.Generator().manual_seed(0)
        x, text = torch.randn(2, 3, 4, generator=made), torch.randn(2, 4, generator=made)
        self.scheduler.set_timesteps(steps, **self.options)
        timesteps = self.scheduler.timesteps[: len(self.scheduler.timesteps) - self.left_out]
        self._num_timesteps = len(timesteps)
        for t in timesteps:
            result = self.denoise(x, t.float().expand(2), text)
            x = self.scheduler.step(result, t, x, return_dict=False)[0]
        return x
