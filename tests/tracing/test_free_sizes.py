"""`inspect(sizes=True)` says which sizes of a call are free, and what fixes the others."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcache
from sized import subject
from tiny import TinyDiT, arguments, tiny


def said(model: Any, call: Any, **options: Any) -> dict[tuple[str, int], Any]:
    found = graphcache.inspect(model, call, sizes=True, **options)
    assert not found.sizes.refusal
    return {(size.argument, size.place): size for size in found.sizes.dimensions}


def test_every_dimension_is_said_to_be_free_or_why_it_is_not() -> None:
    call = arguments(tokens=5, batch=3)
    found = said(tiny(1), call)
    assert {key: size.size for key, size in found.items()} == {
        (name, place): size for name, tensor in call.items() for place, size in enumerate(tensor.shape)
    }
    assert found["x", 1].is_free
    assert found["x", 0].symbol == found["timestep", 0].symbol == found["text", 0].symbol
    width = found["x", 2]
    assert re.search(rf"= {width.size} is what PyTorch's", width.reason), "weights fix it"
    assert f"x[1]: 5, any ({found['x', 1].symbol})" in str(graphcache.inspect(tiny(1), call, sizes=True))


def test_a_batch_of_one_is_a_class_of_its_own() -> None:
    found = said(tiny(1), arguments(tokens=5, batch=1))
    assert "class of its own" in found["x", 0].reason
    assert found["x", 1].is_free


class Tabled(TinyDiT):
    """Has a table for one number of tokens, and takes another way at any other."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        if x.shape[1] == 5:  # asked here
            x = x + torch.arange(5.0)[:, None]
        return super().forward(x, timestep, text)


def test_the_line_that_asks_for_a_number_is_named() -> None:
    reason = said(tiny(1, Tabled), arguments(tokens=5))["x", 1].reason
    where = re.search(r"= 5 is asked for by (.*):(\d+) in forward", reason)
    assert where is not None, reason
    with open(where[1]) as file:
        assert "# asked here" in file.read().splitlines()[int(where[2]) - 1]
    assert said(tiny(1, Tabled), arguments(tokens=6))["x", 1].is_free


class Weighted(TinyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x * {x.shape[1]: 2}[x.shape[1]], timestep, text)


def test_what_cannot_be_traced_with_symbols_says_so() -> None:
    found = graphcache.inspect(tiny(1, Weighted), arguments(), sizes=True).sizes
    assert not found.dimensions
    assert "Weighted" in found.refusal or "forward" in found.refusal
    assert found.lines == (f"each size is traced by itself: {found.refusal}",)
    assert not graphcache.inspect(tiny(1), arguments()).sizes.lines, "nobody asked"


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_what_is_called_free_is_served_by_one_trace(name: str) -> None:
    """The oracle is the model itself, at another size of each dimension that is said to be free."""
    on = subject(name)
    found = said(on.model, on.example(), timestep=on.timestep)
    latent = next(key for key in found if key[0] in ("hidden_states", "x"))[0]
    free = {place for argument, place in found if argument == latent and found[argument, place].is_free}
    assert free == {"pixart": {0}, "wan": {0, 2, 3, 4}}[name], "a table of PixArt's has its own size"
