"""How much it matters that a site's value is one step old."""

import numpy as np

from graphcache.analysis.full_steps import SiteProducts, gap_squares, steadied
from graphcache.planning.profile import Profile


def sensitivity(profile: Profile) -> np.ndarray:
    """Root of the squared first-order effect on the result of reusing the value one step old.

    Returns:
        float64 (sites, steps): sqrt(Σ over samples of the mean over probes of (effects[t, 1] −
        effects[t, 0])²), drawn towards what neighbouring steps make likely (`steadied`). NaN where a model
        takes over, at first or later: it finds no value there.
    """
    found = np.full((len(profile.sites), profile.steps), np.nan)
    if profile.window:
        for place, site in enumerate(profile.sites):
            one_step = profile.effects[place][:, :2]
            table = SiteProducts(site.name, profile.gram[place], one_step, True, profile.handovers)
            found[place, 1:] = np.sqrt(steadied(gap_squares([table]), [table])[:-1, 0, 0])
        found[:, list(profile.handovers)] = np.nan
    return found
