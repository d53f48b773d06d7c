"""FasterCache as a plan beside plain torch.compile and beside diffusers' FasterCacheConfig, in one run.

python -m examples.benchmark_fastercache [--model latte] [--width 32] [--presets latte generic]
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import FasterCacheConfig
from torch import nn

from examples.benchmark_models import Made, guided_cogvideox, guided_latte
from examples.records import TIMES, Cell, Column, add_json_option, report, time_rows
from graphcache import Plan
from graphcache.planning.bench import TimedGeneration, benchmark
from graphcache.presets import fastercache

MODELS: dict[str, Callable[..., Made]] = {"cogvideox": guided_cogvideox, "latte": guided_latte}
PRESETS = ("open-sora-1.2", "latte", "open-sora-plan-1.1", "cogvideox", "vchitect-2.0", "mochi", "generic")
FORMATS = {"cogvideox": "BFCHW", "latte": "BCFHW"}
HEAD_WIDTH = {256: 64, 32: 16}


class Hooked:
    """A model under diffusers' hooks, and what they hold and break."""

    def __init__(
        self, model: Any, plan: Plan, layout: str, timesteps: Sequence[float], compiled: bool = False
    ) -> None:
        self.model, self.now, self.peak = model, 0.0, 0
        self.first = timesteps[0]
        model.enable_cache(closest_config(plan, layout, lambda: self.now, timesteps))
        self.call: Any = torch.compile(model) if compiled else model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.now = float(kwargs["timestep"][0])
        if self.now == self.first:
            self.model._reset_stateful_cache()
        with self.model.cache_context("cond_uncond"):
            result = self.call(*args, **kwargs)
        self.peak = max(self.peak, _storage_bytes(_cached(self.model)))
        return result


def closest_config(
    plan: Plan, layout: str, timestep: Callable[[], float], timesteps: Sequence[float]
) -> FasterCacheConfig:
    """The schedule of a plan as near as diffusers' periods and ranges come, with the plan's constants.

    Its iterations count from 0, a period begins anew with them, and its attention computes wherever both
    branches run. `timesteps` are those of the generation, falling.
    """
    rows = {str(row.selector): row.actions for row in plan.rows}
    attention, guidance = rows["@self"], rows["guidance"]
    bands = next(dict(letter.options) for letter in plan.letters if letter.kind == "frequency")

    def after(step: int) -> float:
        """A timestep between those of a step and of the one before it."""
        if step <= 0 or step >= plan.steps:
            return 1001.0 if step <= 0 else -1.0
        return (timesteps[step - 1] + timesteps[step]) / 2

    features = next((i for i, action in enumerate(attention) if action != "#"), plan.steps)
    alone = next(i for i, action in enumerate(guidance) if action != "#")
    every = 3 if "ll" in attention or ".." in attention else 2
    refreshes = [i for i in range(alone, plan.steps) if guidance[i] == "#"]
    return FasterCacheConfig(
        spatial_attention_block_skip_range=every,
        temporal_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=(-1, after(features)),
        temporal_attention_timestep_skip_range=(-1, after(features)),
        unconditional_batch_skip_range=refreshes[1] - refreshes[0] if len(refreshes) > 1 else 5,
        unconditional_batch_timestep_skip_range=(-1, after(alone)),
        low_frequency_weight_update_timestep_range=(after(int(bands["low_until"])), 1001),
        high_frequency_weight_update_timestep_range=(-1, after(int(bands["high_from"]) - 1)),
        alpha_low_frequency=float(bands["low"]),
        alpha_high_frequency=float(bands["high"]),
        attention_weight_callback=lambda module: 0.5,
        tensor_format=layout,
        current_timestep_callback=timestep,
    )


def _cached(model: nn.Module) -> Iterator[Any]:
    """All that the hooks' states hold."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in (registry.hooks if registry else {}).values():
            state = getattr(hook, "state", None)
            if state is not None:
                yield from torch.utils._pytree.tree_leaves(list(vars(state).values()))


def _storage_bytes(leaves: Iterator[Any]) -> int:
    storages = {}
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            storages[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
    return sum(storages.values())


def compare(
    name: str, preset: str, width: int, rounds: int, rivals: bool, steps: int | None
) -> list[list[Cell]]:
    """Time one preset on one model: the rows, each beginning with both names."""
    heads = width // HEAD_WIDTH[width]
    model, inputs = MODELS[name](heads, HEAD_WIDTH[width])
    plan = fastercache(preset, steps or (50 if preset == "generic" else None), conditional="last")
    others: dict[str, Any] = {}
    if rivals:
        calls = TimedGeneration(inputs, "timestep", plan.steps).calls
        timesteps = [float(call["timestep"][0]) for call in calls]
        for compiled in (False, True):
            label = f"diffusers, {'compiled' if compiled else 'eager'}"
            fresh = MODELS[name](heads, HEAD_WIDTH[width])[0]
            fresh.load_state_dict(model.state_dict())
            others[label] = Hooked(fresh, plan, FORMATS[name], timesteps, compiled)
        others["plain, eager"] = model
    measured = benchmark(model, inputs, {"graphcache": plan}, rounds=rounds, beside=others)
    for timing in measured:
        if timing.phases:
            print(f"{timing.name}: {'; '.join(map(str, timing.phases))}")
    held = (
        replace(timing, peak_bytes=getattr(others.get(timing.name), "peak", timing.peak_bytes))
        for timing in measured
    )
    return [[name, preset, *row] for row in time_rows(tuple(held))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, nargs="*", default=list(MODELS))
    parser.add_argument(
        "--presets", nargs="*", default=list(PRESETS), help="none: that of the model's own name"
    )
    parser.add_argument("--width", type=int, choices=HEAD_WIDTH, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="instead of the published number")
    parser.add_argument("--rivals", action="store_true", help="time diffusers' hooks too")
    add_json_option(parser)
    arguments = parser.parse_args()
    rows: list[list[Cell]] = []
    for name in arguments.model:
        for preset in arguments.presets or [name]:
            rows += compare(
                name, preset, arguments.width, arguments.rounds, arguments.rivals, arguments.steps
            )
    report("FasterCache", (Column("model"), Column("preset"), *TIMES), rows, arguments.json)


if __name__ == "__main__":
    main()
