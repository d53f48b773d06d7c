"""What a profile says of generations of another number of steps."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from graphcache.analysis.handovers import turns
from graphcache.ir.errors import GraphCacheError
from graphcache.planning.profile import Profile


def at_steps(profile: Profile, steps: int, handovers: Sequence[int] = ()) -> Profile:
    """The profile of generations of so many steps, by the same scheduler.

    Step i of n is where step i·N/n of the N profiled ones is, as with a flow's timesteps 1 − i/n. Values are
    interpolated between the profiled steps, and so are effects, over the step and over how far back a value
    is from; a step that covers more of the way has so much more effect. What was measured at single steps is
    that of the nearest one. Where another model takes over moves as the steps do; steps that lie between the
    last one of a model and the first one of the next may be either's, so that they and the step after them
    find nothing of what was before.

    Args:
        profile: what was measured.
        steps: of the generations.
        handovers: where other models are known to take over in them, beside what is told by the profile.

    Raises:
        GraphCacheError: one of the two has fewer than two steps, or a gap of one step is more than was
            profiled.
    """
    before = profile.steps
    if steps == before and {*handovers} <= {*profile.handovers}:
        return profile
    if min(steps, before) < 2:
        raise GraphCacheError(f"a profile of {before} steps says nothing of generations of {steps}")
    stride = before / steps
    window = min(steps - 1, int(profile.window / stride + 1e-9))
    if window < 1:
        raise GraphCacheError(
            f"one step of {steps} is {stride:.1f} of the profile's, which follows effects over "
            f"{profile.window}; profile with a larger window="
        )
    places = np.minimum(np.arange(steps) * stride, before - 1)
    handovers = tuple(sorted({*handovers, *_handovers(places, profile.handovers)}))
    turn = turns(steps, handovers)
    alike = np.equal.outer(turn, turn)
    weights = _weights(places, before)
    nearest = places.round().astype(int)
    bands = None if profile.bands is None else profile.bands[nearest] * stride
    return replace(
        profile,
        provenance=replace(profile.provenance, steps=steps),
        gram=np.einsum("it,sth,jh->sij", weights, profile.gram, weights, optimize=True) * alike,
        effects=_effects(profile, places, turn, stride, window) * np.float32(stride),
        drift={site: moved * stride for site, moved in profile.drift.items()},
        ranking={site: ranks[nearest] for site, ranks in profile.ranking.items()},
        bands=bands,
        handovers=handovers,
    )


def _handovers(places: np.ndarray, before: Sequence[int]) -> tuple[int, ...]:
    """The steps, by their places among the profiled ones, that may be the first one of a model."""
    found = set[int]()
    for handover in before:
        first, surely = np.searchsorted(places, (handover - 1 + 1e-9, handover - 1e-9))
        found |= {*range(int(first), int(surely) + 1)}
    return tuple(step for step in sorted(found) if 0 < step < len(places))


def _weights(places: np.ndarray, count: int) -> np.ndarray:
    """(places, count): every place as a mean of the whole numbers beside it."""
    weights = np.zeros((len(places), count))
    low = np.minimum(places.astype(int), count - 2)
    rows, share = np.arange(len(places)), places - low
    weights[rows, low] = 1 - share
    weights[rows, low + 1] = share
    return weights


def _effects(
    profile: Profile, places: np.ndarray, turn: np.ndarray, stride: float, window: int
) -> np.ndarray:
    """Bilinear in the step and the gap; of a step before the gap there is nothing to mix in."""
    effects, starts = profile.effects, np.array([0, *profile.handovers])
    steps, gaps = len(places), np.arange(window + 1) * stride
    back = _weights(gaps, effects.shape[2]) if effects.shape[2] > 1 else np.ones((len(gaps), 1))
    by_gap = np.einsum("gd,stdpn->stgpn", back, effects, optimize=True)
    found = np.zeros((len(effects), steps, window + 1, *effects.shape[3:]), dtype=np.float32)
    for step, place in enumerate(places):
        low = min(int(place), effects.shape[1] - 2)
        since = low - starts[starts <= place].max()
        own = int((turn[:step] == turn[step]).sum())
        for gap in range(min(own, window) + 1):
            # values of so long before are there at the first of the two steps, or at the second alone
            first = 1 - (place - low) if since >= np.ceil(gaps[gap] - 1e-9) else 0.0
            found[:, step, gap] = first * by_gap[:, low, gap] + (1 - first) * by_gap[:, low + 1, gap]
    return found
