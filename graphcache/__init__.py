"""graphcache: a compiler for feature caching in diffusion transformers."""

from graphcache import importers, presets
from graphcache.cost.pricing import price
from graphcache.ir.errors import CaptureError, GraphCacheError, PlanError, PromiseWarning, StateError
from graphcache.ir.plan import Plan
from graphcache.ir.promise import Promise
from graphcache.packaging.loading import load
from graphcache.packaging.writing import package
from graphcache.planning.automatic import auto
from graphcache.planning.comparison import compare
from graphcache.planning.profile import Profile
from graphcache.planning.profile_file import load_profile, save_profile
from graphcache.planning.profiling import profile
from graphcache.planning.resampling import Resampler
from graphcache.planning.sampling import Sampling
from graphcache.planning.search import search
from graphcache.planning.tuning import tune, with_corrections
from graphcache.runtime.inspection import inspect
from graphcache.runtime.transform import restore, transform

__all__ = [
    "CaptureError",
    "GraphCacheError",
    "Plan",
    "PlanError",
    "Profile",
    "Promise",
    "PromiseWarning",
    "Resampler",
    "Sampling",
    "StateError",
    "auto",
    "compare",
    "importers",
    "inspect",
    "load",
    "load_profile",
    "package",
    "presets",
    "price",
    "profile",
    "restore",
    "save_profile",
    "search",
    "transform",
    "tune",
    "with_corrections",
]
