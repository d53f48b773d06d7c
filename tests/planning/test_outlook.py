"""What `auto` will take is foreseen from a graph, with weights or without."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from graphcache import GraphCacheError, profile, tune
from graphcache.cost.pricing import without_weights
from graphcache.ir.roles import UNNAMED
from graphcache.planning.outlook import Outlook
from graphcache.planning.sampling import Sampling
from linear import Sampler, linear

STEPS = 6
PLENTY = 1 << 30
SAMPLING = Sampling.of(linear(), Sampler(tokens=16))


def outlook(model: Any = None, inputs: Any = None, memory: int = PLENTY, **options: Any) -> Outlook:
    inputs = inputs or SAMPLING.first_call(1, STEPS)
    program = without_weights(model or SAMPLING.model, inputs, UNNAMED)
    counts = {"profiled": 2, "trained": 2, "judges": 1, "iterations": 3, "memory": memory, **options}
    return Outlook(program, STEPS, 2.0, 1, timed=False, **counts)


def flops(run: Any) -> float:
    """Work in uncached generations."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        SAMPLING.generate(SAMPLING.model, 1, STEPS)
    whole = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / whole


@pytest.mark.parametrize("detail", ["steps", "sites"])
def test_profiling_takes_what_is_foreseen(detail: Any) -> None:
    def run(samples: int, memory: int) -> None:
        profile(SAMPLING, range(samples), steps=STEPS, detail=detail, memory=memory)

    part = outlook(branches=detail == "sites").parts()[0]
    if detail == "steps":  # so small a model's sketches of branches are half of its work
        # what capturing runs, whatever the samples, is left out
        further = flops(lambda: run(3, PLENTY)) - flops(lambda: run(1, PLENTY))
        assert part.generations == pytest.approx(1 + further, rel=0.15)
    with pytest.raises(GraphCacheError, match=f"needs here: {part.least} bytes"):
        run(1, part.least - 1)
    run(1, part.least)
    assert part.least < part.most
    tight = outlook(branches=detail == "sites", memory=part.least).parts()[0]
    assert tight.generations > part.generations


def test_tuning_takes_what_is_foreseen() -> None:
    found = outlook()
    part, plan = found.parts()[2], found.expected

    def run(iterations: int, memory: int) -> None:
        tune(SAMPLING, plan, [1, 2], [3], iterations=iterations, memory=memory)

    # one look at the held-out sample beside each end
    further = flops(lambda: run(4, PLENTY)) - flops(lambda: run(1, PLENTY))
    without = outlook(iterations=1).parts()[2]
    assert part.generations - without.generations == pytest.approx(2 / 3 * further, rel=0.2)
    with pytest.raises(GraphCacheError, match=f"needs here: {part.least} bytes"):
        run(1, part.least - 1)
    run(1, part.least)


def test_weights_are_not_looked_at() -> None:
    inputs = {name: value.to("meta") for name, value in SAMPLING.first_call(1, STEPS).items()}
    assert outlook(linear().to("meta"), inputs).parts() == outlook().parts()


def test_nothing_is_foreseen_for_no_iterations() -> None:
    assert outlook(iterations=0).parts()[2].generations == 0
