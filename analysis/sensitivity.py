"""Errors of stand-ins for a site's value, from products that were measured once."""

import numpy as np

RIDGE = 1e-3
"""Share of a value's squared length that keeps fitted coefficients small where entries nearly agree."""


def fitted(gram: np.ndarray, step: int, entries: tuple[int, ...], ridge: float = RIDGE) -> np.ndarray:
    """Coefficients a that bring Σ a_j·F(entry_j) nearest to F(step) in the mean square.

    Args:
        gram: (steps, steps), products of the values at two steps.
        step: whose value is to be made.
        entries: steps of the history, newest first.
        ridge: pulls the coefficients towards plain reuse of the newest entry.

    Returns:
        float64 (entries,): (G + λI)⁻¹(g + λe₀), λ = ridge times the spread of the entries.
    """
    own = gram[np.ix_(entries, entries)]
    target = gram[list(entries), step]
    first = np.eye(len(entries))[0]
    # differences between entries are far smaller than the entries: only they are to be weighed
    spread = own[0, 0] + own[-1, -1] - 2 * own[0, -1]
    weight = ridge * max(float(spread), 1e-12 * float(own[0, 0]), 1e-300)
    return np.linalg.solve(own + weight * np.eye(len(entries)), target + weight * first)


def feature_error(gram: np.ndarray, step: int, entries: tuple[int, ...], weights: np.ndarray) -> float:
    """‖F(step) − Σ a_j·F(entry_j)‖², from the products alone."""
    own = gram[np.ix_(entries, entries)]
    target = gram[list(entries), step]
    return max(0.0, float(gram[step, step] - 2 * weights @ target + weights @ own @ weights))


def effect(effects: np.ndarray, step: int, entries: tuple[int, ...], weights: np.ndarray) -> np.ndarray:
    """First-order effect of the stand-in on the result, along each probe: (probes, samples).

    Args:
        effects: (steps, window + 1, probes, samples) of one site, as in `Profile`.
        step: whose value is replaced.
        entries: steps of the history, newest first, none further back than the window.
        weights: (entries,).
    """
    gaps = [step - entry for entry in entries]
    replaced: np.ndarray = np.tensordot(weights, effects[step, gaps], axes=1) - effects[step, 0]
    return replaced
