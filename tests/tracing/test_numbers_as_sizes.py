"""Whole numbers of a call, and numbers that forward makes of sizes, are symbols in a trace for all sizes."""

import functools
import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graphcache
from counted import traces
from graphcache import presets
from graphcache.tracing.capture import capture
from graphcache.tracing.kept_symbols import kept_symbols
from reference import assert_same
from tiny import TinyDiT, arguments, tiny

PLAN = presets.fora(2, interval=2)


@pytest.fixture(autouse=True)
def inference(captured_anew: None) -> Iterator[None]:
    with torch.no_grad():
        yield


@functools.lru_cache
def waves(height: int, width: int) -> Tensor:
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return (rows + 0.1 * columns).sin().flatten()[:, None]


class Gridded(TinyDiT):
    """Is told its tokens' grid in numbers, as some models are told a picture's height and width."""

    def forward(
        self, x: Tensor, timestep: Tensor, text: Tensor, grid: list[tuple[int, int]], causal: bool = False
    ) -> Tensor:
        ((height, width),) = grid
        x = x + waves(height, width) + self.ramp(height * width)
        return super().forward(-x if causal else x, timestep, text)

    @functools.lru_cache  # noqa: B019
    def ramp(self, count: int) -> Tensor:
        assert isinstance(count, int)
        length = int(count)
        return torch.arange(length)[:, None] / (torch.tensor([length, 1]).sum() + torch.as_tensor(length))


def gridded(height: int, width: int, **others: Any) -> dict[str, Any]:
    return {**arguments(tokens=height * width, **others), "grid": [(height, width)]}


def test_one_trace_serves_other_numbers() -> None:
    model = tiny(1, Gridded)
    cached: Any = graphcache.transform(model, PLAN, signatures=16)
    with traces() as found:
        for height, width in ((2, 3), (3, 3), (3, 4), (4, 3), (5, 2), (2, 7)):
            cached.reset()
            call = gridded(height, width)
            assert_same(cached(**call), model(**call))
    assert str(found) == "2+1"


DIFFERENT = ((2, 3, False), (3, 3, False), (3, 4, True), (1, 5, False), (1, 6, True))


def test_switches_and_numbers_without_symbols_are_of_other_kinds() -> None:
    model = tiny(1, Gridded)
    cached: Any = graphcache.transform(model, PLAN, signatures=16)
    with traces() as found:
        for height, width, causal in (
            (2, 3, False),
            (3, 3, False),
            (3, 4, True),
            (1, 5, False),
            (1, 6, True),
        ):
            cached.reset()
            call = {**gridded(height, width), "causal": causal}
            assert_same(cached(**call), model(**call))
    assert str(found) == "5+0"


def test_inspect_says_which_numbers_are_free() -> None:
    found = graphcache.inspect(tiny(1, Gridded), gridded(3, 4), sizes=True).sizes
    said = {size.argument: size for size in found.dimensions if size.place is None}
    assert [size.size for size in said.values()] == [3, 4]
    assert all(size.is_free for size in said.values())
    height, width = (said[f"grid[0][{place}]"] for place in range(2))
    assert str(height) == f"grid[0][0]: 3, any ({height.symbol})"
    (tokens,) = (size for size in found.dimensions if (size.argument, size.place) == ("x", 1))
    assert set(tokens.symbol.split("*")) == {height.symbol, width.symbol}


def test_code_for_any_size_serves_other_numbers_from_the_first_on() -> None:
    model = tiny(1, Gridded)
    cached: Any = graphcache.transform(model, PLAN, sizes="any", signatures=16)
    for height, width in ((2, 3), (5, 3), (3, 7)):
        cached.reset()
        call = gridded(height, width)
        assert_same(cached(**call), model(**call))


class Repeating(TinyDiT):
    """Takes a number that a trace needs to know, beside sizes that it need not."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, times: int) -> Tensor:
        return super().forward(x * {2: 0.5, 3: 2.0}[times], timestep, text)


def test_a_number_that_has_to_be_known_leaves_sizes_free() -> None:
    model = tiny(1, Repeating)
    cached: Any = graphcache.transform(model, PLAN, signatures=16)
    with traces() as found:
        for tokens, times in ((3, 2), (4, 2), (5, 2), (6, 2), (7, 3), (8, 3), (9, 2)):
            cached.reset()
            call = {**arguments(tokens=tokens), "times": times}
            assert_same(cached(**call), model(**call))
    assert found.fixed == 2
    assert found.any == 4, "each is tried with numbers as sizes, and then as they are"


def test_pythons_own_names_are_back_afterwards_and_others_never_notice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Meanwhile other threads convert and compare as ever."""
    here = sys.modules[__name__]
    model = tiny(1, Gridded)
    cached: Any = graphcache.transform(model, PLAN)
    seen: list[Any] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        thread = threading.Thread(target=lambda: seen.append(elsewhere()))
        thread.start()
        thread.join()
        return capture(*args, **kwargs)

    def elsewhere() -> Any:
        return int("11", 2), int(2.5), isinstance(True, int), isinstance(2.5, int), waves(2, 2).shape

    expected = elsewhere()
    monkeypatch.setattr("graphcache.tracing.symbolic.capture", watched)
    for height, width in ((2, 3), (3, 3), (3, 4)):
        cached.reset()
        cached(**gridded(height, width))
    assert seen == [expected]
    assert "int" not in vars(here)
    assert vars(Gridded)["ramp"].cache_info()
    assert waves.cache_info()


def test_threads_that_trace_one_after_the_other_leave_names_as_they_were() -> None:
    here, model, inside, left = sys.modules[__name__], tiny(1, Gridded), threading.Event(), threading.Event()

    def second() -> None:
        with kept_symbols(model):
            inside.set()
            left.wait()

    thread = threading.Thread(target=second)
    with kept_symbols(model):
        thread.start()
        assert not inside.wait(0.2), "two threads at once"
    assert inside.wait(30)
    left.set()
    thread.join()
    assert "int" not in vars(here)
    assert waves.cache_info()


COMPARING = """
from tiny import TinyDiT

class Comparing(TinyDiT):
    def forward(self, x, timestep, text, scale):
        return super().forward(x * (scale if type(scale) is int else 1) / int(x.shape[1]), timestep, text)
"""


def test_where_it_matters_which_object_int_is_results_stay_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "comparing.py").write_text(COMPARING)
    monkeypatch.syspath_prepend(tmp_path)
    model = tiny(1, importlib.import_module("comparing").Comparing)
    cached: Any = graphcache.transform(model, PLAN, signatures=16)
    for tokens, scale in ((3, 2), (4, 2), (5, 3), (6, 4), (7, 2)):
        cached.reset()
        call = {**arguments(tokens=tokens), "scale": scale}
        assert_same(cached(**call), model(**call))
