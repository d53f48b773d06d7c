"""Objects of tensors that a model is given or gives back, such as caches of keys and values."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, presets
from inside import programs_of
from reference import Reference, assert_same, capture_call, runner_tensors
from tiny import TinyBlock


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


class LayerCache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.mode: str | None = None

    def store(self, keys: Tensor, values: Tensor) -> None:
        self.keys.append(keys)
        self.values.append(values)

    def joined(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.keys:
            return keys, values
        return torch.cat([*self.keys, keys], dim=1), torch.cat([*self.values, values], dim=1)


class Cache:
    def __init__(self, layers: int = 1, **others: Any) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self.scale = 1.0
        self.__dict__.update(others)

    def __getitem__(self, index: int) -> LayerCache:
        return self.layers[index]


class Remembering(nn.Module):
    """Attends to itself and to what its cache holds; stores its own keys and values if told so."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4, bias=False)
        self.heads = nn.Linear(4, 12, bias=False)
        self.block = TinyBlock(4)

    def forward(self, x: Tensor, timestep: Tensor, cache: Cache | None = None, extract: bool = False) -> Any:
        given = cache if cache is not None and not extract else Cache()
        query, key, value = self.heads(x * given.scale).chunk(3, dim=-1)
        layer = given[0]
        if extract or layer.mode == "write":
            layer.store(key, value)
        else:
            key, value = layer.joined(key, value)
        x = x + F.scaled_dot_product_attention(query, key, value)
        x = self.block(x, self.time(timestep[:, None])[:, None])
        return (x, given) if extract else x


@pytest.fixture
def model() -> Remembering:
    return Remembering().eval()


def filled(tokens: int = 2) -> Cache:
    cache = Cache()
    cache[0].store(torch.randn(2, tokens, 4), torch.randn(2, tokens, 4))
    return cache


def generation(call: Any, steps: int = 2, **given: Any) -> list[Any]:
    made = torch.Generator().manual_seed(steps)
    results, x = [], torch.randn(2, 3, 4, generator=made)
    for step in range(steps):
        results.append(call(x=x, timestep=torch.full((2,), 1 - step / steps), **given))
        x = x * 0.9
    return results


def programs(model: Any) -> int:
    return len(programs_of(model))


def test_caches_that_are_read(model: Remembering) -> None:
    exact = graphcache.transform(model, presets.compute(2))
    for cache, count in ((Cache(), 1), (filled(), 2), (filled(), 2), (Cache(), 2), (filled(3), 3)):
        assert_same(generation(exact, cache=cache), generation(model, cache=cache))
        assert programs(exact) == count, "one for each size, whatever the tensors hold"


def test_a_caching_plan_gives_what_the_reference_gives(model: Remembering) -> None:
    plan, cache = presets.fora(4, interval=2), filled()
    example = {"x": torch.randn(2, 3, 4), "timestep": torch.ones(2), "cache": cache}
    reference = Reference(capture_call(model, example, None), plan)
    cached = graphcache.transform(model, plan)
    expected = generation(lambda **given: reference(runner_tensors(model, given)), 4, cache=cache)
    assert_same(generation(cached, 4, cache=cache), expected)


def test_numbers_and_words_in_it_are_part_of_the_signature(model: Remembering) -> None:
    exact = graphcache.transform(model, presets.compute(2))
    for changes, count in (({}, 1), ({"scale": 2.0}, 2), ({"note": "new"}, 3), ({"scale": 2.0}, 3)):
        cache = Cache(**changes)
        assert_same(generation(exact, cache=cache), generation(model, cache=cache))
        assert programs(exact) == count


def test_a_cache_written_to_between_generations(model: Remembering) -> None:
    exact, cache = graphcache.transform(model, presets.compute(2)), filled()
    for _ in range(3):
        assert_same(generation(exact, cache=cache), generation(model, cache=cache))
        cache[0].keys[0].mul_(1.5)
    assert programs(exact) == 1


def test_a_cache_that_is_handed_back_is_made_anew_at_every_step(model: Remembering) -> None:
    exact = graphcache.transform(model, presets.compute(2))
    ours, theirs = generation(exact, extract=True), generation(model, extract=True)
    for (found, cache), (expected, other) in zip(ours, theirs, strict=True):
        assert type(cache) is Cache
        assert type(cache[0]) is LayerCache
        assert_same((found, vars(cache[0])), (expected, vars(other[0])))
    assert ours[0][1] is not ours[1][1]
    assert_same(generation(exact, cache=ours[0][1]), generation(model, cache=theirs[0][1]))


class TestRefusals:
    def refused(self, model: Remembering, cache: Any, *words: str) -> None:
        with pytest.raises(CaptureError) as error:
            generation(graphcache.transform(model, presets.compute(2)), cache=cache)
        for word in words:
            assert word in str(error.value)

    def test_a_cache_that_forward_fills(self, model: Remembering) -> None:
        cache = Cache()
        cache[0].mode = "write"
        self.refused(model, cache, "forward changes its argument cache", "switch off the cache")
        assert cache[0].keys == []

    def test_something_else_within_it(self, model: Remembering) -> None:
        self.refused(model, Cache(lock=threading.Lock()), "argument cache.lock is a lock")

    def test_an_object_that_leads_back_to_itself(self, model: Remembering) -> None:
        cache = Cache()
        cache.__dict__["parent"] = [cache]
        self.refused(model, cache, "argument cache.parent[0] is within itself")

    def test_an_object_that_makes_up_its_attributes(self, model: Remembering) -> None:
        class Lazy(Cache):
            def __getattr__(self, name: str) -> Any:
                raise AttributeError(name)

        self.refused(model, Lazy(), "argument cache is a Lazy")
