"""Which tokens move: drift over the grid of tokens, and how well a token's length foretells it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphcache.page.names import common_prefix, shortened
from graphcache.page.png import encode, uri
from graphcache.page.scales import colour
from graphcache.planning.profile import Profile
from graphcache.planning.timeline import branches_of

SMALLEST_SIDE = 2


@dataclass(frozen=True)
class TokenMap:
    """One site's drift by token, mean over the steps after the first.

    Attributes:
        label: the site's name, shortened.
        picture: the grid of tokens as a data URI, one pixel a token, the palette from `low` to `high`.
        spread: the 95th percentile by the 5th; infinite where that is 0.
        rank: mean correlation of a token's length with how far it moves next; None where unknown.
    """

    site: str
    label: str
    side: int
    picture: str
    low: float
    high: float
    spread: float
    rank: float | None


def token_maps(profile: Profile) -> tuple[TokenMap, ...]:
    """Those of sites whose tokens form a square; text's do not, whatever their number."""
    text = {branch.name for branch in branches_of(profile) if branch.context}
    names = [site.name for site in profile.sites if site.name in profile.drift and site.name not in text]
    prefix = common_prefix([site.name for site in profile.sites if site.kind == "branch"])
    found = (_map(profile, name, shortened(name, prefix)) for name in names)
    return tuple(item for item in found if item is not None)


def _map(profile: Profile, site: str, label: str) -> TokenMap | None:
    drift = profile.drift[site]
    side = math.isqrt(len(drift))
    if profile.steps < 2 or side < SMALLEST_SIDE or side**2 != len(drift):
        return None
    low, high = float(drift.min()), float(drift.max())
    spread = float(np.percentile(drift, 95)) / max(float(np.percentile(drift, 5)), 1e-300)
    ranking = profile.ranking.get(site)
    rank = None if ranking is None else float(ranking[1:].mean())
    shares = (drift - low) / max(high - low, 1e-300)
    return TokenMap(site, label, side, uri(encode(_pixels(shares, side))), low, high, spread, rank)


def _pixels(shares: Sequence[float] | np.ndarray, side: int) -> np.ndarray:
    hues = [colour(float(share)) for share in shares]
    return np.array(hues, dtype=np.uint8).reshape(side, side, 3)
