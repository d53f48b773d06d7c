"""A stand-in for the part of ComfyUI that nodes wrap: patchers, chains of wrappers, guidance, samplers.

It follows the interface as it is documented and used by nodes, and shares no code with ComfyUI.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

import torch
from torch import Tensor, nn

from tiny import TinyBlock

Options = dict[str, Any]
Wrappers = dict[str, dict[str, list[Callable[..., Any]]]]


def copied(value: Any) -> Any:
    """Dicts and lists anew, whatever they hold as it is."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


class Chain:
    """What wrappers are called with: calling it calls the next of them, and at the end the original."""

    def __init__(self, original: Callable[..., Any], owner: Any, options: Options, kind: str, idx: int = 0):
        self.original, self.class_obj, self.idx = original, owner, idx
        self.options, self.kind = options, kind
        keyed = options.get("wrappers", {}).get(kind, {})
        self.wrappers = [wrapper for wrappers in keyed.values() for wrapper in wrappers]

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if self.idx == len(self.wrappers):
            return self.original(*args, **kwargs)
        return self.wrappers[self.idx](self, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        following = Chain(self.original, self.class_obj, self.options, self.kind, self.idx + 1)
        return following.execute(*args, **kwargs)


class Denoiser(nn.Module):
    """A transformer with cross-read text, as an engine's models are: forward leads through wrappers."""

    def __init__(self, depth: int = 2, dim: int = 4) -> None:
        super().__init__()
        self.time = nn.Linear(1, dim, bias=False)
        self.text = nn.Linear(dim, dim, bias=False)
        self.blocks = nn.ModuleList(TinyBlock(dim) for _ in range(depth))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        control: Any = None,
        transformer_options: Options = {},  # noqa: B006
        **kwargs: Any,
    ) -> Tensor:
        chain = Chain(self._forward, self, transformer_options, "diffusion_model")
        return chain.execute(x, timestep, context, control, transformer_options, **kwargs)  # type: ignore[no-any-return]

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        control: Any = None,
        transformer_options: Options = {},  # noqa: B006
        **kwargs: Any,
    ) -> Tensor:
        gate = (self.time(timestep[:, None]) + self.text(context))[:, None]
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})
        transformer_options["total_blocks"] = len(self.blocks)
        for i, block in enumerate(self.blocks):
            transformer_options["block_index"] = i
            x = replaced[i](x, gate) if i in replaced else block(x, gate)
            if control is not None and control["output"][i] is not None:
                x = x + control["output"][i]
        return x * transformer_options.get("scale", 1.0)


class BaseModel(nn.Module):
    """Around the denoiser: noise levels become times, predictions denoised samples."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = denoiser

    def apply_model(
        self, x: Tensor, sigma: Tensor, options: Options, control: Any, context: Tensor
    ) -> Tensor:
        denoised = self.diffusion_model(
            x, sigma, context=context, control=control, transformer_options=dict(options)
        )
        return x - sigma[:, None, None] * denoised


class Patcher:
    """A loaded model with what nodes have put on it; clones share the model."""

    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.model_options: Options = {"transformer_options": {}}
        self.wrappers: Wrappers = {}

    def clone(self) -> "Patcher":
        made = Patcher(self.model)
        made.model_options, made.wrappers = copied(self.model_options), copied(self.wrappers)
        return made

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)


@dataclass(eq=False)
class Cond:
    """One conditioning: a text for the whole picture or for some of its tokens."""

    text: Tensor
    area: slice = field(default_factory=lambda: slice(None))
    control: Any = None
    start: float = float("inf")
    hook: Callable[[nn.Module], None] | None = None
    uuid: UUID = field(default_factory=uuid4)


Batched = bool | Callable[[int], bool]
"""Whether conditionings are evaluated in one batch where they can be, or at which of a run's steps."""


class Guider:
    """Classifier-free guidance over a patcher: what a sampler calls for the denoised samples."""

    def __init__(
        self, patcher: Patcher, conds: Sequence[Sequence[Cond]], scale: float = 2.0, batched: Batched = True
    ) -> None:
        self.model_patcher, self.model_options = patcher, patcher.model_options
        self.conds, self.scale, self.batched, self.step = conds, scale, batched, 0

    def sample(self, x: Tensor, sampler: Callable[..., Tensor], sigmas: Tensor) -> Tensor:
        before = self.model_options
        self.model_options = copied(before)
        inner = self.model_options.setdefault("transformer_options", {})
        inner["wrappers"] = copied(self.model_patcher.wrappers)
        self.step = 0
        try:
            chain = Chain(self.outer_sample, self, inner, "outer_sample")
            return chain.execute(x, sampler, sigmas)  # type: ignore[no-any-return]
        finally:
            self.model_options = before

    def outer_sample(self, x: Tensor, sampler: Callable[..., Tensor], sigmas: Tensor) -> Tensor:
        options = copied(self.model_options)
        options["transformer_options"]["sample_sigmas"] = sigmas

        def denoised(x: Tensor, sigma: Tensor) -> Tensor:
            return self.predict(x, sigma.expand(len(x)), options["transformer_options"])

        return sampler(denoised, x, sigmas)

    def predict(self, x: Tensor, sigma: Tensor, options: Options) -> Tensor:
        together = self.batched if isinstance(self.batched, bool) else self.batched(self.step)
        self.step += 1
        jobs = [
            (kind, cond)
            for kind, conds in enumerate(self.conds)
            for cond in conds
            if float(sigma[0]) <= cond.start
        ]
        sums, counts = [torch.zeros_like(x) for _ in self.conds], [torch.zeros_like(x) for _ in self.conds]
        while jobs:
            alike = [job for job in reversed(jobs) if _alike(job[1], jobs[0][1])]
            batch = alike if together else [jobs[0]]
            jobs = [job for job in jobs if job not in batch]
            for (kind, cond), part in zip(batch, self.evaluate(x, sigma, options, batch), strict=True):
                sums[kind][:, cond.area] += part
                counts[kind][:, cond.area] += 1
        positive, negative = (total / count for total, count in zip(sums, counts, strict=True))
        return negative + self.scale * (positive - negative)

    def evaluate(
        self, x: Tensor, sigma: Tensor, options: Options, batch: Sequence[tuple[int, Cond]]
    ) -> Sequence[Tensor]:
        first, model = batch[0][1], self.model_patcher.model
        if first.hook is not None:
            first.hook(model.diffusion_model)
        told = copied(options)
        told["cond_or_uncond"] = [kind for kind, _ in batch]
        told["uuids"] = [cond.uuid for _, cond in batch]
        told["sigmas"] = sigma
        context = torch.cat([cond.text.expand(len(x), -1) for _, cond in batch])
        control = None if first.control is None else first.control(x, sigma)
        stacked = torch.cat([x[:, cond.area] for _, cond in batch])
        result = model.apply_model(stacked, torch.cat([sigma] * len(batch)), told, control, context)
        return result.chunk(len(batch))


def _alike(one: Cond, other: Cond) -> bool:
    same = one.control is other.control and one.hook is other.hook
    return same and one.area == other.area


def euler(denoised: Callable[..., Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    for now, following in itertools.pairwise(sigmas):
        x = x + (x - denoised(x, now)) / now * (following - now)
    return x


def heun(denoised: Callable[..., Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    """A second evaluation at the noise level that the next step begins with."""
    for now, following in itertools.pairwise(sigmas):
        slope = (x - denoised(x, now)) / now
        ahead = x + slope * (following - now)
        if following > 0:
            slope = (slope + (ahead - denoised(ahead, following)) / following) / 2
        x = x + slope * (following - now)
    return x


def midpoint(denoised: Callable[..., Tensor], x: Tensor, sigmas: Tensor) -> Tensor:
    """A second evaluation between the noise levels of the schedule."""
    for now, following in itertools.pairwise(sigmas):
        between = (now + following) / 2
        half = x + (x - denoised(x, now)) / now * (between - now)
        x = x + (half - denoised(half, between)) / between * (following - now)
    return x


def levels(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1)


def loaded() -> Patcher:
    """A model with fixed weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return Patcher(BaseModel(Denoiser()).eval())


def noise(seed: int = 0) -> Tensor:
    return torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(seed))


def texts(*seeds: int) -> list[Cond]:
    return [Cond(torch.randn(1, 4, generator=torch.Generator().manual_seed(100 + seed))) for seed in seeds]
