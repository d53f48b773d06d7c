"""What `transform` was given beside the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graphcache.compiler.backends import Backend
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.ir.ranks import Ranks
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
    captures: Path | None = None
    mesh: tuple[Ranks, ...] = ()


def check_options(
    branches: int | None,
    wait: str,
    signatures: int,
    watch: str,
    regions: Any,
    sizes: str,
    max_cache_bytes: int | None,
    check: int,
) -> None:
    """Raise GraphCacheError where one of `transform`'s options is none."""
    if branches is not None and not is_count(branches):
        raise GraphCacheError(f"branches={branches}: say how many calls a step makes, at least 1")
    if not is_count(signatures):
        raise GraphCacheError(f"signatures={signatures}: say how many captures are kept, at least 1")
    if watch not in ("adapters", "everything"):
        raise GraphCacheError(f"watch={watch!r}: must be 'adapters' or 'everything'")
    check_regions(regions)
    if max_cache_bytes is not None and not is_count(max_cache_bytes):
        raise GraphCacheError(f"max_cache_bytes={max_cache_bytes!r}: say how many bytes, at least 1")
    if check != 0 and not is_count(check):
        raise GraphCacheError(f"check={check!r}: say how many generations are checked, or 0")
    if sizes not in ("auto", "fixed", "any"):
        raise GraphCacheError(f"sizes={sizes!r}: must be 'auto', 'fixed' or 'any'")
    if wait not in ("step", "never"):
        raise GraphCacheError(f"wait={wait!r}: must be 'step' or 'never'")
    if wait == "never" and (branches or 1) > 1:
        raise GraphCacheError(
            "branches= cannot be told apart without the timestep; leave wait= out, or wrap each call in "
            "model.cache_context(name)"
        )


def check_regions(regions: Any) -> None:
    """Raise GraphCacheError where this says nothing of regions."""
    if not isinstance(regions, bool) and regions != "auto":
        raise GraphCacheError(f"regions={regions!r}: must be True, False or 'auto'")


def is_count(value: Any) -> bool:
    """Whether something is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
