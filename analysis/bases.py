"""Forecasts as weights on raw history: the basis lives in the coefficients, never in the cache."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import factorial, prod

from graphcache.ir.errors import PlanError
from graphcache.ir.letter import Letter


def coefficients(
    letter: Letter,
    step: int,
    computed: Sequence[int],
    *,
    steps: int,
    first_forecast: int,
    listed: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """Weights of the newest `letter.order + 1` raw values, newest first, that give a site's value at `step`.

    `computed` are the steps of the history's entries, newest first; for a corrected compute the newest is
    `step` itself. A history shorter than the order lowers the order, and the weights of what is missing are
    0. `steps` counts the plan's steps and `first_forecast` is the first one at which the row uses the
    letter: both bound the paper's rising weight. `listed` are the row's own coefficients for this step.
    """
    entries = letter.order + 1
    known = tuple(computed[:entries])
    _check_history(letter, step, known)
    if letter.is_listed:
        weights = _listed(letter, step, known, listed)
    elif letter.kind == "newton":
        weights = newton(step, known)
    elif letter.kind == "taylorseer":
        weights = taylorseer(step, known)
    elif letter.kind == "hermite":
        weights = hermite(step, known, float(letter.option("sigma")))
    elif letter.is_linear:
        weights = _linear(letter, step, known, steps, first_forecast)
    else:
        raise PlanError(f"letter {letter.symbol!r} is {letter.kind}, which weighs no history")
    return weights + (0.0,) * (entries - len(weights))


def newton(step: int, computed: Sequence[int]) -> tuple[float, ...]:
    """The polynomial through all entries, at its true spacing: exact on polynomials of its degree."""
    return tuple(
        float(
            prod(
                (Fraction(step - other, own - other) for other in computed if other != own), start=Fraction(1)
            )
        )
        for own in computed
    )


def taylorseer(step: int, computed: Sequence[int]) -> tuple[float, ...]:
    """Σ xⁱ/i! · Δⁱ of TaylorSeer (arXiv 2503.06923), x steps after the newest entry."""
    x = step - computed[0]
    return _series([Fraction(x) ** i for i in range(len(computed))], computed)


def hermite(step: int, computed: Sequence[int], sigma: float) -> tuple[float, ...]:
    """TaylorSeer's differences with σⁱ·H_i(σx) in place of xⁱ: HiCache (arXiv 2508.16984)."""
    x, scale = step - computed[0], Fraction(sigma)
    return _series([scale**i * physicists_hermite(i, scale * x) for i in range(len(computed))], computed)


def physicists_hermite(order: int, x: Fraction) -> Fraction:
    """H_0 = 1, H_1 = 2x, H_{n+1} = 2x·H_n − 2n·H_{n−1}."""
    before, value = Fraction(0), Fraction(1)
    for n in range(order):
        before, value = value, 2 * x * value - 2 * n * before
    return value


def linear(weight: float, entries: int) -> tuple[float, ...]:
    """F_a + w·(F_a − F_b) of FasterCache (arXiv 2410.19355); F_a alone when there is no older entry."""
    return (1.0 + weight, -weight) if entries > 1 else (1.0,)


def _series(powers: Sequence[Fraction], computed: Sequence[int]) -> tuple[float, ...]:
    weights = [Fraction(0)] * len(computed)
    for i, (power, difference) in enumerate(zip(powers, _differences(computed), strict=True)):
        for j, part in enumerate(difference):
            weights[j] += power / factorial(i) * part
    return tuple(map(float, weights))


def _differences(computed: Sequence[int]) -> list[list[Fraction]]:
    """Δⁱ after the newest entry, as weights on the raw values.

    As published, each full step divides every order by its own distance from the full step before, and
    subtracts what that step had computed with its own. Backward differences stand for derivatives, so
    only order 1 is exact on polynomials of its degree.
    """
    count = len(computed)
    kept: list[list[Fraction]] = []
    for entry in reversed(range(count)):
        new = [[Fraction(int(j == entry)) for j in range(count)]]
        for previous in kept:
            spacing = computed[entry] - computed[entry + 1]
            new.append([(a - b) / spacing for a, b in zip(new[-1], previous, strict=True)])
        kept = new
    return kept


def _linear(
    letter: Letter, step: int, computed: Sequence[int], steps: int, first_forecast: int
) -> tuple[float, ...]:
    weight = letter.option("weight")
    if len(computed) < 2:
        return linear(0.0, 1)
    if weight == "exact":
        return linear((step - computed[0]) / (computed[0] - computed[1]), 2)
    if weight == "paper":
        span = steps - 1 - first_forecast
        return linear((step - first_forecast) / span if span > 0 else 0.0, 2)
    if weight == "ramp":
        begin, over, gain, floor = (float(letter.option(name)) for name in ("begin", "over", "gain", "floor"))
        return linear(max(floor, (step + 1 - begin) / over * gain), 2)
    return linear(float(weight), 2)


def _listed(
    letter: Letter, step: int, computed: Sequence[int], listed: Sequence[float] | None
) -> tuple[float, ...]:
    if listed is None:
        raise PlanError(
            f"step {step}: letter {letter.symbol!r} is {letter.kind}; its coefficients are not listed"
        )
    if len(listed) > len(computed):
        raise PlanError(
            f"step {step}: letter {letter.symbol!r} lists {len(listed)} coefficients, but the history holds "
            f"{len(computed)} values by then; list fewer or compute more often before"
        )
    return tuple(map(float, listed))


def _check_history(letter: Letter, step: int, computed: Sequence[int]) -> None:
    if not computed:
        raise PlanError(
            f"step {step}: letter {letter.symbol!r} needs a computed value, and there is none yet"
        )
    falling = all(newer > older for newer, older in pairwise(computed))
    latest = step if letter.is_compute else step - 1
    if not falling or computed[0] > latest:
        raise PlanError(
            f"step {step}: the history {list(computed)} must fall, newest first, from {latest} or less"
        )
