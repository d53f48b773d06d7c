"""graphcache: a compiler for feature caching in diffusion transformers."""

from graphcache import importers, presets
from graphcache.inspection import inspect
from graphcache.ir.errors import CaptureError, GraphCacheError, PlanError, StateError
from graphcache.ir.plan import Plan
from graphcache.transform import restore, transform

__all__ = [
    "CaptureError",
    "GraphCacheError",
    "Plan",
    "PlanError",
    "StateError",
    "importers",
    "inspect",
    "presets",
    "restore",
    "transform",
]
