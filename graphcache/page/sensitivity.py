"""How much it matters that a site's value is one step old."""

import numpy as np

from graphcache.profile import Profile


def sensitivity(profile: Profile) -> np.ndarray:
    """Root of the squared first-order effect on the result of reusing the value one step old.

    Returns:
        float64 (sites, steps): sqrt(Σ over samples of the mean over probes of (effects[t, 1] −
        effects[t, 0])²). NaN at the first step, which has none before it.
    """
    found = np.full((len(profile.sites), profile.steps), np.nan)
    if profile.window:
        change = profile.effects[:, 1:, 1].astype(np.float64) - profile.effects[:, 1:, 0]
        found[:, 1:] = np.sqrt((change**2).mean(axis=2).sum(axis=2))
    return found
