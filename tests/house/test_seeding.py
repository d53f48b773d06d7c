"""Random numbers that depend on the seed and a name alone."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seeding import Run, numbers_of, own_numbers, seed_of

Drawn = tuple[float, float, float]


def draw() -> Drawn:
    return float(torch.rand(())), float(np.random.rand()), random.random()


@pytest.fixture(scope="module")
def shared() -> Drawn:
    return draw()


def test_a_name_and_a_seed_say_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "seed", 3)
    assert (seed_of("a test"), seed_of("another")) == (4251383554, 1204549505)
    monkeypatch.setattr(Run, "seed", 4)
    assert seed_of("a test") != 4251383554


def test_what_was_drawn_within_is_not_missed_afterwards() -> None:
    with numbers_of("here"):
        expected = draw(), draw()
    with numbers_of("here"):
        first = draw()
        with pytest.raises(KeyError), numbers_of("within"):
            raise KeyError(draw())
        assert (first, draw()) == expected


def test_a_test_begins_with_numbers_of_its_own(request: pytest.FixtureRequest, shared: Drawn) -> None:
    """A fixture of the module was made before, with other ones."""
    ours = draw()
    with numbers_of(request.node.nodeid):
        assert draw() == ours
    assert shared != ours


def test_what_is_shared_has_its_own_whoever_asks_first() -> None:
    make = own_numbers(draw)
    first = make()
    draw()
    assert make() == first


def test_hypothesis_follows_the_seed() -> None:
    seen: list[list[int]] = []

    def collect() -> None:
        @settings(max_examples=20)
        @given(st.integers())
        def check(number: int) -> None:
            seen[-1].append(number)

        seen.append([])
        check()

    collect()
    collect()
    assert seen[0] == seen[1]
