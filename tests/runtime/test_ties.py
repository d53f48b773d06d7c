"""Ties among tokens: which one wins is a rule, and no rounding has a say in it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from graphcache.ir.history import History
from graphcache.ir.schedule import Selection
from graphcache.ir.state import Choice
from graphcache.runtime.selection import SiteTokens, choose
from reference import assert_same
from reference_selection import chosen
from tests.analysis.test_tokens import letter

STEPS = (1, 2, 3)
SCORES = {
    "all equal": torch.full((16,), 0.25),
    "all zero": torch.zeros(16),
    "pairs": torch.arange(8).repeat(2) / 8,
    "two values": torch.tensor([1.0, 3.0] * 8),
    "one best": torch.eye(16)[9],
    "sums in another order": torch.tensor([0.1 + 0.2, 0.3, 0.6 / 2, 0.9 / 3] * 4),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def choices(text: str, score: Tensor, **given: Any) -> dict[int, Choice]:
    """What is chosen, after it was held against the reference's choice."""
    item = letter(text)
    selection = Selection(History("x"), tuple((step, item) for step in STEPS), len(STEPS) + 1)
    tokens = SiteTokens(score.shape[0], score.shape[1], score.device, **given)
    (found,) = choose(selection, tokens, 0, [5], [score])
    assert_alike(found, chosen(selection, tokens, 0, 5, score))
    return found


def assert_alike(found: dict[int, Choice], expected: dict[int, Choice]) -> None:
    for step in STEPS:
        assert_same(found[step].places, expected[step].places)
        assert_same(found[step].clusters, expected[step].clusters)


def nudged(value: Tensor) -> Tensor:
    """The same up to a ten-millionth, as another kernel might have computed it."""
    away = 1 + 1e-7 * (2 * torch.rand(value.shape, dtype=torch.float64) - 1)
    return (value.double() * away).to(value.dtype)


def of_row(found: dict[int, Choice], row: int) -> dict[int, Choice]:
    return {
        step: Choice(item.places[row : row + 1], item.clusters[row : row + 1]) for step, item in found.items()
    }


class TestScores:
    @DTYPES
    @pytest.mark.parametrize("options", ["staleness=0.0", "staleness=1.0", "spread=2 bonus=1.0"])
    @pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
    def test_a_nudge_changes_no_choice(self, score: Tensor, options: str, dtype: torch.dtype) -> None:
        rows = score.to(dtype).repeat(2, 1)
        text = f"tokens 5 by norm multiple=1 {options}"
        expected = choices(text, rows)
        for _ in range(5):
            assert_alike(choices(text, nudged(rows)), expected)

    def test_the_first_of_those_that_are_equal(self) -> None:
        for score in (SCORES["all equal"], SCORES["all zero"], SCORES["sums in another order"]):
            found = choices("tokens 5 by norm multiple=1 staleness=0.0", score[None])
            assert found[1].places.tolist() == [[0, 1, 2, 3, 4]]

    def test_who_is_clearly_better_comes_before_the_first_of_the_rest(self) -> None:
        found = choices("tokens 3 by norm multiple=1 staleness=0.0", SCORES["one best"][None])
        assert found[1].places.tolist() == [[0, 1, 9]]

    def test_equal_tokens_of_a_block_share_no_bonus(self) -> None:
        """The first of each of the four blocks has it."""
        found = choices("tokens 4 by norm multiple=1 spread=2 bonus=1.0", torch.ones(1, 16))
        assert found[1].places.tolist() == [[0, 2, 8, 10]]

    def test_rows_in_another_order_choose_alike(self) -> None:
        rows, order = torch.stack(list(SCORES.values())), torch.randperm(len(SCORES))
        text = "tokens 5 by norm multiple=1"
        found, permuted = choices(text, rows), choices(text, rows[order])
        for step in STEPS:
            assert_same(permuted[step].places, found[step].places[order])

    @pytest.mark.parametrize("budget", [0, 1, 16])
    def test_the_fewest_and_the_most(self, budget: int) -> None:
        found = choices(f"tokens {budget} by norm multiple=1", SCORES["all equal"][None])
        assert found[1].places.tolist() == [list(range(budget))]


def on_a_grid(rows: int, count: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers: many tokens are equal, mirrored, or equally far from a mean."""
    return torch.randint(-2, 3, (rows, count, 3)).to(dtype)


class TestClusters:
    @DTYPES
    @pytest.mark.parametrize("mean", [0.0, 1.0, -96.0])
    def test_the_first_of_two_mirrored_about_their_mean(self, mean: float, dtype: torch.dtype) -> None:
        apart = torch.randint(1, 9, (8,)) / 4
        value = (mean + torch.stack([apart, -apart]))[None].to(dtype)
        for pair in (value, value.flip(1)):
            for _ in range(5):
                found = choices("tokens 1 by cluster multiple=1", nudged(pair))[1]
                assert found.places.tolist() == [[0]]
                assert found.clusters.tolist() == [[0, 0]]

    @DTYPES
    @pytest.mark.parametrize("budget", [1, 2, 3, 5, 8, 16])
    def test_a_nudge_changes_no_choice(self, budget: int, dtype: torch.dtype) -> None:
        value, text = on_a_grid(4, 16, dtype), f"tokens {budget} by cluster multiple=1"
        expected = choices(text, value)
        for _ in range(5):
            assert_alike(choices(text, nudged(value)), expected)

    @DTYPES
    def test_other_rows_of_the_batch_change_no_choice(self, dtype: torch.dtype) -> None:
        value, text = on_a_grid(4, 40, dtype), "tokens 30 by cluster multiple=1"
        expected = choices(text, value)
        for row in range(4):
            others = on_a_grid(4, 40, dtype)
            others[row] = value[row]
            assert_alike(of_row(choices(text, others), row), of_row(expected, row))
        assert_alike(of_row(choices(text, value[:1]), 0), of_row(expected, 0))

    def test_identical_tokens_are_one_cluster(self) -> None:
        """An empty cluster has token 0 as well, which is then computed more than once."""
        found = choices("tokens 4 by cluster multiple=1", torch.full((2, 16, 3), 0.1))[1]
        assert found.places.tolist() == [[0, 0, 0, 0]] * 2
        assert all(len(set(row)) == 1 for row in found.clusters.tolist())

    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_narrower_products_change_no_choice(self, precision: str) -> None:
        value, text = torch.randn(2, 40, 8), "tokens 30 by cluster multiple=1"
        expected = choices(text, value)
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision(precision)
            with torch.autocast("cpu", torch.bfloat16):
                assert_alike(choices(text, value), expected)
        finally:
            torch.set_float32_matmul_precision(before)

    def test_threads_change_no_choice(self) -> None:
        value, text = on_a_grid(2, 64, torch.float32), "tokens 7 by cluster multiple=1"
        expected, before = choices(text, value), torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert_alike(choices(text, value), expected)
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("by", ["random", "stratified"])
@pytest.mark.parametrize("count", [3, 16, 4096])
def test_random_draws_are_those_of_the_reference(by: str, count: int) -> None:
    """Among 4096 numbers of 24 bits some are equal."""
    choices(f"tokens 5 by {by} multiple=1 seed=3", torch.empty(2, count))


@pytest.mark.parametrize("by", ["norm", "cluster"])
def test_what_is_not_a_number_still_chooses_tokens(by: str) -> None:
    shape = (2, 16, 3) if by == "cluster" else (2, 16)
    item = letter(f"tokens 4 by {by} multiple=1")
    selection = Selection(History("x"), ((1, item),), 2)
    (found,) = choose(
        selection, SiteTokens(2, 16, torch.device("cpu")), 0, [5], [torch.full(shape, torch.nan)]
    )
    assert found[1].places.shape == (2, 4)
    assert bool(((found[1].places >= 0) & (found[1].places < 16)).all())
