"""What `transform` was given beside the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graphcache.compiler.backends import Backend
from graphcache.ir.plan import Plan
from graphcache.ir.roles import UNNAMED, Names
from graphcache.passes.base import Observer
from graphcache.runtime.plans import Resample

SIGNATURES = 8
"""Captures that are kept where nobody says how many."""


@dataclass(frozen=True)
class Options:
    """What `transform` was given beside the model; see there."""

    plan: Plan
    backend: Backend = None
    branches: int | None = None
    waits: bool = True
    offload: bool = False
    observers: Sequence[Observer] = ()
    signatures: int = SIGNATURES
    watches_all: bool = False
    regions: Literal["auto"] | bool = "auto"
    sizes: Literal["auto", "fixed", "any"] = "auto"
    max_cache_bytes: int | None = None
    resample: Resample | None = None
    stream_weights: bool = False
    names: Names = UNNAMED
