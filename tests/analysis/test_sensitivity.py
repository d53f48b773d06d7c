"""Errors, coefficients and step sets from measured products, against what values themselves say."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphcache.analysis.full_steps import (
    NONE,
    SiteProducts,
    best_steps,
    gap_errors,
    gap_squares,
    set_error,
    steadied,
)
from graphcache.analysis.sensitivity import effect, feature_error, fitted

FEW = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**31)


def random_table(steps: int, window: int, seed: int, name: str = "site") -> SiteProducts:
    """Products of random values, and effects along two probes in three samples."""
    rng = np.random.default_rng(seed)
    values = np.cumsum(rng.normal(size=(steps, 7)), axis=0)
    return SiteProducts(name, values @ values.T, rng.normal(size=(steps, window + 1, 2, 3)))


@FEW
@given(seed=SEEDS, steps=st.integers(2, 8), data=st.data())
def test_the_error_from_products_is_that_of_the_values(seed: int, steps: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(steps, 11))
    step = data.draw(st.integers(1, steps - 1))
    entries = tuple(range(step - 1, -1, -1))[: data.draw(st.integers(1, 3))]
    weights = rng.normal(size=len(entries))
    residual = values[step] - weights @ values[list(entries)]
    found = feature_error(values @ values.T, step, entries, weights)
    assert found == pytest.approx(residual @ residual, rel=1e-9, abs=1e-9)


@FEW
@given(seed=SEEDS, ridge=st.sampled_from([1e-6, 1e-3, 0.5]), count=st.integers(1, 3))
def test_fitted_coefficients_solve_the_regularised_least_squares(seed: int, ridge: float, count: int) -> None:
    values = np.cumsum(np.random.default_rng(seed).normal(size=(6, 9)), axis=0)
    entries = (4, 2, 1)[:count]
    spread = np.sum((values[entries[0]] - values[entries[-1]]) ** 2)
    weight = ridge * max(spread, 1e-12 * np.sum(values[entries[0]] ** 2))
    # ‖F(5) − Σ a·F‖² + λ‖a − e₀‖² as one stacked system
    system = np.vstack([values[list(entries)].T, np.sqrt(weight) * np.eye(count)])
    target = np.concatenate([values[5], np.sqrt(weight) * np.eye(count)[0]])
    expected = np.linalg.lstsq(system, target, rcond=None)[0]
    np.testing.assert_allclose(fitted(values @ values.T, 5, entries, ridge), expected, rtol=1e-5, atol=1e-7)


@FEW
@given(
    seed=SEEDS,
    recurrence=st.lists(st.floats(0.1, 1.2) | st.floats(-1.2, -0.1), min_size=1, max_size=3).map(np.array),
)
def test_fitted_recovers_a_linear_recurrence(seed: int, recurrence: np.ndarray) -> None:
    rng, order = np.random.default_rng(seed), len(recurrence)
    values = list(rng.normal(size=(order, 40)))
    while len(values) < order + 2:
        values.append(recurrence @ values[: -order - 1 : -1])
    gram = np.stack(values) @ np.stack(values).T
    entries = tuple(range(order, 0, -1))
    weights = fitted(gram, order + 1, entries, ridge=1e-14)
    np.testing.assert_allclose(weights, recurrence, atol=1e-5)
    assert feature_error(gram, order + 1, entries, weights) <= 1e-8 * gram.max()


@pytest.mark.parametrize("entries", [(3, 2), (3, 2, 0)])
def test_a_value_that_did_not_move_is_what_any_of_its_copies_is(entries: tuple[int, ...]) -> None:
    weights = fitted(np.full((5, 5), 3.0), 4, entries)
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    assert np.abs(weights).max() < 2
    np.testing.assert_allclose(fitted(np.zeros((5, 5)), 4, entries), np.eye(len(entries))[0], atol=1e-6)


def test_a_large_ridge_leads_to_plain_reuse() -> None:
    gram = random_table(6, 5, 0).gram
    np.testing.assert_allclose(fitted(gram, 5, (4, 2, 1), ridge=1e9), [1, 0, 0], atol=1e-6)


def test_the_effect_of_a_stand_in_is_that_of_its_difference_to_the_value() -> None:
    rng = np.random.default_rng(3)
    values, gradient = rng.normal(size=(6, 5)), rng.normal(size=(6, 2, 1, 5))
    # effects[t, d] = <gradient at t, value at t − d>
    effects = np.zeros((6, 4, 2, 1))
    for step in range(6):
        for gap in range(min(4, step + 1)):
            effects[step, gap] = gradient[step] @ values[step - gap]
    weights = np.array([1.5, -0.25, -0.5])
    change = weights @ values[[4, 3, 2]] - values[5]
    np.testing.assert_allclose(effect(effects, 5, (4, 3, 2), weights), gradient[5] @ change, rtol=1e-12)


def summed_gap(tables: list[SiteProducts], older: int, newest: int, end: int) -> float:
    """The squared sum of all stand-ins between two computed steps, mean over probes and sum over samples."""
    total = np.zeros((2, 3))
    for step in range(newest + 1, end):
        for table in tables:
            entries = [newest]
            weights = np.ones(1)
            if not table.reused:
                if older != NONE and step - older <= table.effects.shape[1] - 1:
                    entries.append(older)
                weights = fitted(table.gram, step, tuple(entries))
            for entry, weight in zip(entries, weights, strict=True):
                total += weight * table.effects[step, step - entry]
            total -= table.effects[step, 0]
    return float(sum((total[:, sample] ** 2).mean() for sample in range(3)))


@pytest.mark.parametrize(("steps", "window", "sites"), [(2, 1, 1), (5, 4, 1), (7, 3, 2), (8, 1, 3)])
def test_gap_errors_are_sums_over_the_gap_and_infinite_beyond_the_window(
    steps: int, window: int, sites: int
) -> None:
    tables = [replace(random_table(steps, window, seed), reused=seed == 2) for seed in range(sites)]
    errors = gap_errors(gap_squares(tables))
    assert errors.shape == (steps + 1,) * 3
    for newest in range(steps):
        for older in [NONE, *range(newest)]:
            for end in range(newest + 1, steps + 1):
                found = errors[older + 1, newest, end]
                if end - 1 - newest > window:
                    assert np.isinf(found)
                else:
                    expected = summed_gap(tables, older, newest, end)
                    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert np.isinf(errors[:, steps]).all()
    assert np.isinf(errors[1:, 0, :]).all()


def cost_of(errors: np.ndarray, chosen: tuple[int, ...]) -> float:
    """The sum of a set's gap errors."""
    count, total = errors.shape[0] - 1, 0.0
    for place, newest in enumerate(chosen):
        older = chosen[place - 1] + 1 if place else 0
        end = chosen[place + 1] if place + 1 < len(chosen) else count
        total += errors[older, newest, end]
    return total


def random_errors(rng: np.random.Generator, count: int) -> np.ndarray:
    """As `gap_errors` gives them: finite where older < newest < end."""
    older, newest, end = np.indices((count + 1,) * 3)
    possible = (older <= newest) & (newest < end)
    return np.where(possible, rng.exponential(size=possible.shape), np.inf)


def check_best(errors: np.ndarray) -> None:
    """Every size's set is the best of all subsets that begin with the first step."""
    count = errors.shape[0] - 1
    found = best_steps(errors, count)
    for size in range(1, count + 1):
        subsets = [(0, *rest) for rest in combinations(range(1, count), size - 1)]
        costs = {chosen: cost_of(errors, chosen) for chosen in subsets}
        best = min(costs.values())
        if np.isinf(best):
            assert size not in found
            continue
        choice = found[size]
        assert len(choice.steps) == size
        assert choice.error == pytest.approx(best, rel=1e-9)
        assert costs[choice.steps] == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("count", range(1, 10))
def test_step_sets_are_the_best_of_all_subsets(count: int) -> None:
    rng = np.random.default_rng(count)
    for _ in range(6):
        check_best(random_errors(rng, count))


@pytest.mark.parametrize("window", [1, 2, 3])
def test_step_sets_never_have_a_gap_beyond_the_window(window: int) -> None:
    rng = np.random.default_rng(window)
    for _ in range(6):
        errors = random_errors(rng, 9)
        _, newest, end = np.indices(errors.shape)
        errors[end - 1 - newest > window] = np.inf
        check_best(errors)


@FEW
@given(seed=SEEDS, steps=st.integers(2, 8), window=st.integers(1, 7))
def test_step_sets_of_measured_products_are_the_best_of_all_subsets(
    seed: int, steps: int, window: int
) -> None:
    tables = [random_table(steps, min(window, steps - 1), seed + number) for number in range(2)]
    errors = gap_errors(gap_squares(tables))
    check_best(errors)
    found = best_steps(errors, steps)
    assert found[steps].error == 0
    assert found[steps].steps == tuple(range(steps))


def test_the_error_of_a_set_is_the_sum_of_its_gaps() -> None:
    errors = random_errors(np.random.default_rng(1), 7)
    for chosen in [(0,), (0, 3), (0, 1, 2, 6)]:
        assert set_error(errors, chosen) == pytest.approx(cost_of(errors, chosen))


def test_steady_errors_are_the_mean_with_what_nearby_gaps_feel() -> None:
    table = random_table(7, 3, 2)
    squares, felt = gap_squares([table]), {}
    raw, steady = gap_errors(squares), gap_errors(steadied(squares, [table]))
    for newest in range(7):
        for older in [NONE, *range(newest)]:
            for end in range(newest + 2, min(newest + 4, 7) + 1):
                moved = 0.0
                for step in range(newest + 1, end):
                    near = older != NONE and step - older <= 3
                    entries = (newest, older) if near else (newest,)
                    weights = fitted(table.gram, step, entries)
                    moved += np.sqrt(feature_error(table.gram, step, entries, weights))
                paired = older != NONE and end - 1 - older <= 3
                felt[older, newest, end - 1 - newest] = (moved**2, paired)
    for (older, newest, gap), (moved, paired) in felt.items():
        where = older + 1, newest, newest + gap + 1
        expected, measurements = raw[where], 2 * 3
        near = [
            raw[o + 1, n, n + g + 1] / square
            for (o, n, g), (square, alike) in felt.items()
            if alike is paired and abs(n - newest) <= 2 and abs(g - gap) <= 1 and (alike or o == NONE)
        ]
        expected = (measurements * expected + 4 * np.mean(near) * moved) / (measurements + 4)
        if paired or older == NONE:
            assert steady[where] == pytest.approx(expected, rel=1e-6), where


def test_steady_errors_choose_better_sets_from_few_measurements() -> None:
    """True errors are known from as many probes as there are numbers; the choice has seen one."""
    ratios = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        turns = np.linspace(0, 3, 24)[:, None] * rng.uniform(0.3, 2, size=30)
        values = np.sin(turns + rng.uniform(0, 6, size=30))
        effects = np.zeros((24, 7, 31, 1))
        for step in range(24):
            felt = np.vstack([np.eye(30) * np.sqrt(30), rng.normal(size=30)]) * (1 + step / 24)
            for gap in range(min(7, step + 1)):
                effects[step, gap, :, 0] = felt @ values[step - gap]
        gram = values @ values.T
        true = gap_errors(gap_squares([SiteProducts("site", gram, effects[:, :, :30])]))
        seen = [SiteProducts("site", gram, effects[:, :, 30:])]
        squares = gap_squares(seen)
        raw, steady = (best_steps(gap_errors(s), 8)[8].steps for s in (squares, steadied(squares, seen)))
        ratios.append(set_error(true, steady) / set_error(true, raw))
    assert np.median(ratios) < 0.5
    assert np.mean(np.array(ratios) <= 1) >= 0.9


def test_no_more_sizes_are_returned_than_asked_for() -> None:
    errors = random_errors(np.random.default_rng(0), 6)
    assert list(best_steps(errors, 3)) == [1, 2, 3]
