"""A forward that a model sets on itself is part of it; one that others set is a hook."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, presets
from inside import programs_of


def doubled(x: Tensor) -> Tensor:
    return x * 2


class Choosing(nn.Module):
    """Its author decides in __init__ what forward is."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        if way == "function":
            self.forward: Any = doubled
        elif way:
            self.forward = getattr(self, way)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def twice(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))

    def thrice(self, x: Tensor) -> Tensor:
        return self.inner(self.twice(x))


class Network(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.part = Choosing(way)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.part(x) * timestep


class Whole(nn.Module):
    """The whole model has chosen, and its arguments are those of what it chose."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.forward: Any = self.fast

    def forward(self, *args: Any) -> Tensor:
        raise NotImplementedError

    def fast(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + self.inner(x) * timestep


def assert_alike(cached: Any, model: nn.Module) -> None:
    x, time = torch.randn(3, 4), torch.rand(3, 1)
    with torch.no_grad():
        assert torch.equal(cached(x, time), model(x, time))


@pytest.mark.parametrize("way", ["", "twice", "function"])
def test_it_is_captured(way: str) -> None:
    model = Network(way).eval()
    assert_alike(graphcache.transform(model, presets.compute(1)), model)


def test_it_is_watched() -> None:
    model = Network("twice").eval()
    cached: Any = graphcache.transform(model, presets.compute(1))
    for way in ("twice", "thrice", "twice", "", "twice"):
        if way:
            model.part.forward = getattr(model.part, way)
        else:
            del model.part.forward
        assert_alike(cached, model)
    assert len(programs_of(cached)) == 3
    model.part.forward = doubled
    assert_alike(cached, model)


def test_the_whole_model_may_choose() -> None:
    model = Whole().eval()
    cached = graphcache.transform(model, presets.compute(1))
    assert_alike(cached, model)
    cached.forward = cached.forward  # what removed hooks leave behind
    assert_alike(cached, model)
    assert graphcache.restore(cached) is model


def test_what_others_set_is_refused() -> None:
    model, other = Network("").eval(), Choosing("")
    for forward in (torch.relu, nn.Identity().forward, other.twice):
        model.part.forward = forward
        with pytest.raises(CaptureError, match="part has a forward of its own, set on the instance"):
            graphcache.transform(model, presets.compute(1))(torch.randn(3, 4), torch.rand(3, 1))
