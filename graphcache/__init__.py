"""graphcache: a compiler for feature caching in diffusion transformers."""

from graphcache import importers, presets
from graphcache.automatic import auto
from graphcache.inspection import inspect
from graphcache.ir.errors import CaptureError, GraphCacheError, PlanError, StateError
from graphcache.ir.plan import Plan
from graphcache.profile import Profile
from graphcache.profile_file import load_profile, save_profile
from graphcache.profiling import profile
from graphcache.search import search
from graphcache.transform import restore, transform
from graphcache.tuning import tune, with_corrections

__all__ = [
    "CaptureError",
    "GraphCacheError",
    "Plan",
    "PlanError",
    "Profile",
    "StateError",
    "auto",
    "importers",
    "inspect",
    "load_profile",
    "presets",
    "profile",
    "restore",
    "save_profile",
    "search",
    "transform",
    "tune",
    "with_corrections",
]
