from collections.abc import Callable, Sequence
from fractions import Fraction
from math import factorial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphcache.analysis import bases
from graphcache.ir.errors import PlanError
from graphcache.ir.letter import Letter

HISTORIES = st.lists(st.integers(0, 40), min_size=1, max_size=5, unique=True).map(lambda s: sorted(s)[::-1])


def weights(
    kind: str,
    step: int,
    computed: Sequence[int],
    *,
    steps: int = 50,
    first: int = 0,
    listed: Sequence[float] | None = None,
    **options: int | float | str,
) -> tuple[float, ...]:
    letter = Letter("x", kind, tuple(options.items()))
    return bases.coefficients(letter, step, computed, steps=steps, first_forecast=first, listed=listed)


def published(
    features: dict[int, np.ndarray], step: int, order: int, power: Callable[[int, int], float]
) -> np.ndarray:
    """TaylorSeer as written down: difference tensors are stored at full steps, then summed."""
    stored: list[np.ndarray] = []
    last = 0
    for full in sorted(features):
        updated = [features[full]]
        for i in range(min(order, len(stored))):
            updated.append((updated[i] - stored[i]) / (full - last))
        stored, last = updated, full
    x = step - last
    return sum(power(i, x) / factorial(i) * stored[i] for i in range(len(stored)))


def forecast(features: dict[int, np.ndarray], coefficients: Sequence[float]) -> np.ndarray:
    newest_first = [features[step] for step in sorted(features, reverse=True)]
    return sum(c * value for c, value in zip(coefficients, newest_first, strict=False))


@given(HISTORIES, st.integers(1, 9), st.integers(0, 4), st.lists(st.integers(-3, 3), min_size=5, max_size=5))
def test_newton_is_exact_on_polynomials_of_its_degree(
    computed: list[int], ahead: int, order: int, polynomial: list[int]
) -> None:
    degree = min(order, len(computed) - 1)

    def value(t: int) -> int:
        return sum(a * t**i for i, a in enumerate(polynomial[: degree + 1]))

    step = computed[0] + ahead
    exact = [Fraction(c) for c in weights("newton", step, computed, order=order)]
    found = sum(c * value(t) for c, t in zip(exact, computed, strict=False))
    scale = max(1, max(abs(c) for c in exact) * max(abs(value(t)) for t in computed))
    assert abs(found - value(step)) <= 1e-14 * scale


@pytest.mark.parametrize("order", range(5))
@given(computed=HISTORIES, ahead=st.integers(1, 9), seed=st.integers(0, 99))
def test_taylorseer_is_the_published_recursion(
    order: int, computed: list[int], ahead: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    features = {step: random.standard_normal(3) for step in computed}
    step = computed[0] + ahead
    expected = published(features, step, order, lambda i, x: x**i)
    found = forecast(features, weights("taylorseer", step, computed, order=order))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-7)


@given(HISTORIES, st.integers(1, 9), st.sampled_from([0.25, 0.5, 0.7]), st.integers(0, 99))
def test_hermite_replaces_the_powers(computed: list[int], ahead: int, sigma: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    features = {step: random.standard_normal(3) for step in computed}
    step = computed[0] + ahead

    def power(i: int, x: int) -> float:
        return sigma**i * np.polynomial.hermite.Hermite.basis(i)(sigma * x)

    expected = published(features, step, 3, power)
    found = forecast(features, weights("hermite", step, computed, order=3, sigma=sigma))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-7)


def test_physicists_hermite_polynomials() -> None:
    for x in (Fraction(-3, 2), Fraction(0), Fraction(1, 3), Fraction(5)):
        found = [bases.physicists_hermite(n, x) for n in range(4)]
        assert found == [1, 2 * x, 4 * x**2 - 2, 8 * x**3 - 12 * x]


def test_taylorseer_differs_from_newton_on_quadratics() -> None:
    computed, step = [8, 6, 2], 11
    quadratic = {t: np.array(float(t * t)) for t in computed}
    assert forecast(quadratic, weights("newton", step, computed, order=2)) == pytest.approx(121)
    # Δ¹ = (64−36)/2 = 14, Δ¹ before = (36−4)/4 = 8, Δ² = (14−8)/2 = 3, F̂ = 64 + 3·14 + 9/2·3
    assert forecast(quadratic, weights("taylorseer", step, computed, order=2)) == pytest.approx(119.5)


def test_order_one_is_the_line_through_the_last_two() -> None:
    line = (1.5, -0.5, 0.0, 0.0)
    for kind in ("newton", "taylorseer"):
        assert weights(kind, 9, [8, 6], order=1) == line[:2]
        assert weights(kind, 9, [8, 6], order=3) == line
    assert weights("linear", 9, [8, 6, 1], weight="exact") == line[:2]


@pytest.mark.parametrize(
    ("kind", "options", "entries"),
    [
        ("newton", {"order": 2}, 3),
        ("taylorseer", {"order": 3}, 4),
        ("hermite", {"order": 1}, 2),
        ("linear", {"weight": 0.7}, 2),
        ("linear", {"weight": "paper"}, 2),
        ("newton", {"order": 0}, 1),
    ],
)
def test_one_entry_is_plain_reuse_padded_to_the_order(
    kind: str, options: dict[str, int | float | str], entries: int
) -> None:
    assert weights(kind, 5, [3], **options) == (1.0, *[0.0] * (entries - 1))


@pytest.mark.parametrize(
    ("weight", "step", "expected"),
    [
        (0.3, 21, 0.3),
        ("exact", 21, 0.5),
        ("exact", 23, 1.5),
        ("paper", 19, 0.0),
        ("paper", 34, 0.5),
        ("paper", 49, 1.0),
    ],
)
def test_weights_of_the_linear_basis(weight: float | str, step: int, expected: float) -> None:
    computed = [20, 18] if step > 20 else [18, 16]
    assert weights("linear", step, computed, first=19, weight=weight) == pytest.approx(
        (1 + expected, -expected)
    )


def test_a_paper_weight_used_at_the_last_step_only_is_plain_reuse() -> None:
    assert weights("linear", 49, [48, 47], first=49, weight="paper") == (1.0, 0.0)


@pytest.mark.parametrize(("counted", "expected"), [(8, 0.045), (20, 0.585), (30, 1.035)])
def test_a_ramp_counts_steps_from_one(counted: int, expected: float) -> None:
    found = weights("linear", counted - 1, [3, 2], weight="ramp", begin=7, over=20, gain=0.9)
    assert found == pytest.approx((1 + expected, -expected))


@pytest.mark.parametrize(("step", "expected"), [(20, 0.5), (31, 0.5), (42, 42 / 63)])
def test_the_floor_of_a_ramp(step: int, expected: float) -> None:
    found = weights("linear", step, [3, 2], weight="ramp", begin=1, over=63, floor=0.5)
    assert found == pytest.approx((1 + expected, -expected))


@pytest.mark.parametrize("kind", ["fitted", "tuned"])
def test_listed_coefficients_are_padded(kind: str) -> None:
    assert weights(kind, 5, [4, 2, 1], order=2, listed=(1.5, -0.5)) == (1.5, -0.5, 0.0)
    assert weights(f"{kind} compute", 5, [5, 2], listed=(0.9, 0.1)) == (0.9, 0.1)
    assert weights(f"{kind} compute", 5, [5, 2, 1], listed=(0.9,)) == (0.9, 0.0)


@given(st.sampled_from(["newton", "taylorseer", "hermite"]), HISTORIES, st.integers(1, 9), st.integers(0, 6))
def test_there_are_always_order_plus_one_weights(
    kind: str, computed: list[int], ahead: int, order: int
) -> None:
    found = weights(kind, computed[0] + ahead, computed, order=order)
    assert len(found) == order + 1
    assert all(isinstance(value, float) for value in found)
    if kind != "hermite":
        assert sum(found) == pytest.approx(1, abs=1e-9 * max(map(abs, found)))


def test_entries_beyond_the_order_play_no_part() -> None:
    for kind in ("newton", "taylorseer", "hermite"):
        assert weights(kind, 9, [8, 6, 3, 1], order=2) == weights(kind, 9, [8, 6, 3], order=2)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("newton", 5, []), {"order": 1}, "needs a computed value, and there is none yet"),
        (
            ("newton", 5, [2, 3]),
            {"order": 1},
            r"the history \[2, 3\] must fall, newest first, from 4 or less",
        ),
        (("newton", 5, [5, 3]), {"order": 1}, "from 4 or less"),
        (("tuned compute", 5, [6, 3]), {"listed": (1.0,)}, "from 5 or less"),
        (("fitted", 5, [4]), {"order": 1}, "is fitted; its coefficients are not listed"),
        (
            ("fitted", 5, [4]),
            {"order": 1, "listed": (1.0, 2.0)},
            "lists 2 coefficients, but the history holds 1",
        ),
        (("tokens", 5, [4]), {"count": 4, "by": "random"}, "is tokens, which weighs no history"),
    ],
)
def test_refusals(arguments: tuple[str, int, list[int]], options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        weights(*arguments, **options)
