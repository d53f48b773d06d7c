"""Models that a host loads under `torch.inference_mode()`, so that their weights are inference tensors.

The oracle is a model of the same seed that was made outside of it.
"""

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import presets

pytestmark = pytest.mark.usefixtures("captured_anew")

WIDTH = 8
MODES = {"inside": torch.inference_mode, "outside": torch.no_grad}


@functools.lru_cache(maxsize=2)
def remembered(count: int) -> Tensor:
    return torch.linspace(0, 1, count)[:, None]


class Holder:
    def __init__(self) -> None:
        self.tables: dict[int, Tensor] = {}


class Network(nn.Module):
    """Two layers share a weight; a buffer, a tensor that is none, one in a list, and tables made by need."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.layers[2].weight = self.layers[0].weight
        self.register_buffer("scale", torch.rand(WIDTH))
        self.plain = torch.rand(WIDTH)
        self.listed = [torch.rand(WIDTH), (torch.rand(WIDTH),)]
        self.holder = Holder()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        count = x.shape[1]
        if count not in self.holder.tables:
            self.holder.tables[count] = torch.arange(count) * self.scale[0]
        x = x * timestep[:, None, None] + self.holder.tables[count][:, None] + remembered(count)
        for layer in self.layers:
            x = x + layer(torch.tanh(x * self.scale + self.plain + self.listed[0] + self.listed[1][0]))
        return x


def network(within: Any = contextlib.nullcontext) -> Network:
    with torch.random.fork_rng(devices=[]), within():
        torch.manual_seed(0)
        return Network().eval()


def call(count: int, time: float = 0.5) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(count)
    return torch.randn(2, count, WIDTH, generator=made), torch.full((2,), time)


def generation(model: Any, count: int) -> list[Tensor]:
    """Of four steps, each copied to where it can be compared."""
    return [model(*call(count, time)).clone() for time in (1.0, 0.75, 0.5, 0.25)]


@functools.cache
def expected(plan: graphcache.Plan, count: int, backend: Any = None) -> list[Tensor]:
    remembered.cache_clear()
    with torch.no_grad():
        return generation(graphcache.transform(network(), plan, backend=backend), count)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("order", [("inside", "outside"), ("outside", "inside")])
@pytest.mark.parametrize("used", [False, True], ids=["at once", "after a call"])
@pytest.mark.parametrize("plan", [presets.compute(4), presets.fora(4, interval=2)], ids=["compute", "fora"])
def test_results_are_those_of_a_model_loaded_outside(
    backend: Any, order: tuple[str, str], used: bool, plan: graphcache.Plan
) -> None:
    wanted = {count: expected(plan, count, backend) for count in (4, 6)}
    remembered.cache_clear()
    model = network(torch.inference_mode)
    if used:
        with torch.inference_mode():
            model(*call(4))
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    cached = graphcache.transform(model, plan, backend=backend)
    for mode in order * 2:
        for count in (4, 6):
            with MODES[mode]():
                results = generation(cached, count)
            assert all(map(torch.equal, results, wanted[count]))
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == before


def test_compiled_results_are_those_of_a_model_loaded_outside() -> None:
    plan = presets.fora(4, interval=2)
    cached = graphcache.transform(network(torch.inference_mode), plan, backend="inductor")
    for mode in MODES.values():
        with mode():
            results = generation(cached, 4)
        torch.testing.assert_close(results, expected(plan, 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", [None, "eager"])
def test_weights_changed_afterwards_are_seen(mode: str, backend: Any) -> None:
    model = network(torch.inference_mode)
    cached = graphcache.transform(model, presets.compute(4), backend=backend)
    with MODES[mode]():
        generation(cached, 4)
    with torch.inference_mode():
        model.layers[0].weight.mul_(2)
        model.scale.add_(1)
        model.layers[1].weight.data = torch.ones(WIDTH, WIDTH)
    model.holder.tables.clear()
    with MODES[mode]():
        assert all(map(torch.equal, generation(cached, 4), generation(model, 4)))
