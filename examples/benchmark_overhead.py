"""What stands outside the graphs: microseconds a step of the runner, milliseconds a generation of the watch.

python -m examples.benchmark_overhead
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

import graphcache
from examples.benchmark_models import Made, launch_bound_flux
from examples.records import Cell, Column, add_json_option, report
from graphcache.compiler.watch import Watch
from graphcache.planning.bench import TimedGeneration, runner_overhead
from graphcache.runtime.schedulers import read_timestep
from graphcache.tracing.homes import Homes

STEPS = 30


class Driven(TimedGeneration):
    """A generation as a pipeline makes it: its scheduler counts, its calls have a context."""

    def __init__(self, inputs: Any) -> None:
        super().__init__(inputs, "timestep", STEPS)
        self.scheduler = SimpleNamespace(num_inference_steps=STEPS, begin_index=0)

    def launch(self, model: Any) -> list[float]:
        self.scheduler.timesteps = torch.arange(STEPS)
        times = []
        for step, kwargs in enumerate(self.calls):
            self.scheduler.step_index = step
            start = time.perf_counter()
            with model.cache_context("cond"):
                model(**kwargs)
            times.append(time.perf_counter() - start)
        return times


def pixart_of_28_blocks() -> Made:
    """As many modules as PixArt-XL/2 has, each of them tiny."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=28, in_channels=4, out_channels=4,
        cross_attention_dim=16, caption_channels=16, sample_size=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.ones(1),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return model.eval(), inputs


def runner(made: Made, driven: bool, **options: Any) -> float:
    """Microseconds a step, everything but what the graphs do."""
    model, inputs = made
    cached: Any = graphcache.transform(model, graphcache.presets.fora(STEPS), **options)
    generation = Driven(inputs) if driven else TimedGeneration(inputs, "timestep", STEPS)
    scheduler = generation.scheduler if isinstance(generation, Driven) else None
    with torch.no_grad(), cached.session(scheduler) if driven else nullcontext():
        generation.run(cached)
        return runner_overhead(cached, generation, rounds=21)


def watch() -> float:
    """Milliseconds of the watch over an unchanged FLUX.1's 57 blocks."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=19, num_single_layers=38, num_attention_heads=2, attention_head_dim=16,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
    watched = Watch(model.eval(), Homes(model))
    return 1e3 * timed(lambda: watched.has_other_structure() or watched.has_other_surface())


def timed(call: Callable[[], Any], times: int = 200) -> float:
    """Median seconds."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[Cell]] = []
    for name, made in (
        ("a step of a FLUX of 12 blocks", launch_bound_flux()),
        ("a step of a PixArt of 28 blocks", pixart_of_28_blocks()),
    ):
        rows.append([f"{name}, bare module", runner(made, False)])
        rows.append([f"{name}, scheduler, context and session", runner(made, True)])
        rows.append([f"{name}, everything watched", runner(made, False, watch="everything")])
    rows.append(["a generation: the watch over a FLUX of 57 blocks", 1e3 * watch()])
    rows.append(["reading a timestep on the CPU", 1e6 * timed(lambda: read_timestep(torch.ones(2)))])
    report("Outside the graphs", (Column("what"), Column("time", "µs", 1)), rows, arguments.json)


if __name__ == "__main__":
    main()
