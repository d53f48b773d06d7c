"""Errors of stand-ins for a site's value, from products that were measured once."""

from collections.abc import Sequence

import numpy as np

Steps = int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray

RIDGE = 1e-3
"""Share of a value's squared length that keeps fitted coefficients small where entries nearly agree."""


def fitted(gram: np.ndarray, step: Steps, entries: Steps, ridge: float = RIDGE) -> np.ndarray:
    """Coefficients a that bring Σ a_j·F(entry_j) nearest to F(step) in the mean square.

    Args:
        gram: (steps, steps), products of the values at two steps.
        step: whose value is to be made, any shape.
        entries: (*step's, entries), steps of the history, newest first.
        ridge: pulls the coefficients towards plain reuse of the newest entry.

    Returns:
        float64 of the entries' shape: (G + λI)⁻¹(g + λe₀), λ = ridge times the spread of the entries.
    """
    step, entries = np.asarray(step), np.asarray(entries)
    own = gram[entries[..., :, None], entries[..., None, :]]
    target = gram[entries, step[..., None]]
    unit = np.eye(entries.shape[-1])
    # differences between entries are far smaller than the entries: only they are to be weighed
    spread = own[..., 0, 0] + own[..., -1, -1] - 2 * own[..., 0, -1]
    weight = ridge * np.maximum(np.maximum(spread, 1e-12 * own[..., 0, 0]), 1e-300)[..., None]
    solved: np.ndarray = np.linalg.solve(
        own + weight[..., None] * unit, (target + weight * unit[0])[..., None]
    )
    return solved[..., 0]


def feature_error(gram: np.ndarray, step: Steps, entries: Steps, weights: np.ndarray) -> np.ndarray:
    """‖F(step) − Σ a_j·F(entry_j)‖² of the step's shape, from products alone; arguments as above."""
    step, entries = np.asarray(step), np.asarray(entries)
    own = gram[entries[..., :, None], entries[..., None, :]]
    target = gram[entries, step[..., None]]
    square = np.einsum("...i,...ij,...j->...", weights, own, weights)
    error: np.ndarray = np.maximum(0.0, gram[step, step] - 2 * (weights * target).sum(axis=-1) + square)
    return error


def effect(effects: np.ndarray, step: Steps, entries: Steps, weights: np.ndarray) -> np.ndarray:
    """First-order effect of the stand-in on the result, along each probe: (*step's, probes, samples).

    Args:
        effects: (steps, window + 1, probes, samples) of one site, as in `Profile`.
        step: whose value is replaced, any shape.
        entries: (*step's, entries), steps of the history, newest first, none further back than the window.
        weights: of the entries' shape.
    """
    step = np.asarray(step)[..., None]
    parts = effects[step, step - np.asarray(entries)]
    replaced: np.ndarray = np.einsum("...n,...nps->...ps", weights, parts) - effects[step[..., 0], 0]
    return replaced
