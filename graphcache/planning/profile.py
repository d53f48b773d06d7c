"""How sensitive each site, step, token and guidance branch of a model is."""

import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from graphcache.ir.errors import GraphCacheError
from graphcache.ir.selector import ROLES

_ROLES = "|".join(re.escape(role) for role in sorted(ROLES, key=len, reverse=True))
_NAME = re.compile(rf"(?P<path>.+)(?<!\.parallel)\.(?P<role>{_ROLES})(?P<context>\.context)?(\.\d+)?")

Kind = Literal["branch", "range", "output", "guidance"]


@dataclass(frozen=True)
class Site:
    """What a plan can take from the cache, per evaluation of one branch of guidance.

    `flops` and `seconds` are those of computing it, `bytes_kept` those of one cached value. `seconds` are
    measured eagerly, operation by operation; 0 where nobody measured. `token_bytes` are kept where some of
    its tokens are computed alone; 0 where that cannot be.
    """

    name: str
    kind: Kind
    flops: int = 0
    bytes_kept: int = 0
    seconds: float = 0.0
    token_bytes: int = 0


@dataclass(frozen=True)
class Provenance:
    """What a profile, or a plan made from it, holds for.

    `tokens` is the share of the branches' tokens by which their effects were estimated.
    """

    graph: str
    steps: int
    scheduler: str
    samples: int
    probes: int
    seed: int
    conditional: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    tokens: float = 1.0


@dataclass(frozen=True, eq=False)
class Profile:
    """How sensitive a model is.

    Attributes:
        provenance: what was profiled.
        sites: the branches, ranges of blocks, the output, and guidance's difference where there is one.
        gram: float64 (sites, steps, steps), products of each site's values at two steps, summed over all.
        effects: float64 (sites, steps, window + 1, probes, samples). At step t and gap d the product of the
            site's value at step t − d with the gradient, with respect to its value at step t, of a random
            vector's product with the result: Σ a_j·effects[t, gap_j] − effects[t, 0] is the first-order
            effect on that product of replacing the value by Σ a_j·(value at t − gap_j).
        drift: by site (tokens,), how far each token moved from a step to the next on the mean, in units of
            the tokens' mean length. A token that only some calls have, as of longer texts, has not moved in
            the others.
        ranking: by site (steps,), Spearman's correlation of a token's length with how far it moves next.
        bands: (steps, 2), the same of the low and the high frequencies of guidance's difference.
        numbers: elements of one sample's result.
        flops: of one evaluation.
        calls: evaluations of the model in a step: two where guidance's branches are called one by one.
        timings: measured seconds of a compiled step: `plain`, the untouched model; `compute`, a whole step
            whose values are kept; and, by family of sites, a step that takes them from the cache.
        unmeasured: branches that the arrays have nothing of, with their costs.
        handovers: the steps at which another model of the pipeline takes over, with caches of its own. Gram
            products and effects across one are 0: no step can read a value from before it.
    """

    provenance: Provenance
    sites: tuple[Site, ...]
    gram: np.ndarray
    effects: np.ndarray
    drift: dict[str, np.ndarray]
    ranking: dict[str, np.ndarray]
    bands: np.ndarray | None
    numbers: int
    flops: int
    calls: int = 1
    timings: dict[str, float] = field(default_factory=dict)
    unmeasured: tuple[Site, ...] = ()
    handovers: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        return self.provenance.steps

    @property
    def window(self) -> int:
        return int(self.effects.shape[2]) - 1

    def index(self, site: str) -> int:
        """Where a site stands in the arrays.

        Raises:
            GraphCacheError: the profile has no such site.
        """
        names = [item.name for item in self.sites]
        if site not in names:
            raise GraphCacheError(f"the profile has no site {site}; it has {', '.join(names)}")
        return names.index(site)


@dataclass(frozen=True, eq=False)
class SampleProfile:
    """What one sample tells; arrays by site, indexed as those of `Profile`."""

    gram: dict[str, np.ndarray]
    effects: dict[str, np.ndarray]
    drift: dict[str, np.ndarray]
    ranking: dict[str, np.ndarray]
    bands: np.ndarray | None
    numbers: int
    calls: int
    handovers: tuple[int, ...] = ()


def families(profile: Profile) -> dict[str, tuple[Site, ...]]:
    """Sites that are taken from the cache together at a skipped step."""
    found = {site.name: (site,) for site in profile.sites if site.kind in ("output", "range")}
    branches = tuple(site for site in profile.sites if site.kind == "branch")
    return ({"branches": branches} if branches else {}) | found


def parsed(name: str) -> re.Match[str] | None:
    """A branch's name, `<block path>.<role>[.context][.k]`, in its parts."""
    return _NAME.fullmatch(name)


def kinds(profile: Profile) -> dict[str, tuple[Site, ...]]:
    """Branches by what their names say behind the block."""
    found: dict[str, tuple[Site, ...]] = {}
    for site in profile.sites:
        if site.kind == "branch":
            match = parsed(site.name)
            kind = site.name[match.start("role") :] if match else site.name
            found[kind] = (*found.get(kind, ()), site)
    return found
