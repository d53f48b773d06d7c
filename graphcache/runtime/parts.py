"""The denoisers of a pipeline: what its components are called with tells them, wherever it holds them."""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphcache.compiler.backends import unwrapped
from graphcache.ir.attributes import attributes_of
from graphcache.ir.errors import GraphCacheError
from graphcache.tracing.capture import forward_parameters

_TIME = re.compile(r"t|c_noise|log_?snr|(.*_)?(time_?steps?|time|sigmas?|noise_levels?)(_(ratio|img|text))?")
"""Names of the argument by which a denoiser is told the time."""
_SIDE = re.compile(r"control")
"""In the name of an argument that cannot be left out: a network beside the denoiser, such as a ControlNet."""


@dataclass(frozen=True)
class PipelinePart:
    """A module of a pipeline, by its path, and every attribute that holds it."""

    path: str
    module: nn.Module
    places: tuple[tuple[Any, str], ...]

    def replace(self, module: nn.Module) -> None:
        """Put another module everywhere in its place."""
        for holder, attribute in self.places:
            setattr(holder, attribute, module)

    @property
    def is_denoiser(self) -> bool:
        """Whether forward is given a time, and nothing that only a network beside a denoiser needs."""
        parameters = forward_parameters(unwrapped(self.module)[0]).values()
        needed = [item.name for item in parameters if item.default is item.empty]
        return any(_TIME.fullmatch(item.name) for item in parameters) and not any(map(_SIDE.search, needed))


def modules(pipe: Any) -> dict[str, PipelinePart]:
    """Every module of a pipeline and of the pipelines in it, by its path, such as `prior_pipe.prior`."""
    found: dict[int, PipelinePart] = {}
    for prefix, holder in _pipelines(pipe, "", set()):
        for name, value in _attributes(holder).items():
            if isinstance(value, nn.Module):
                before = found.get(id(value), PipelinePart(f"{prefix}{name}", value, ()))
                found[id(value)] = PipelinePart(before.path, value, (*before.places, (holder, name)))
    if not found:
        raise GraphCacheError(f"{type(pipe).__name__} is neither a module nor a pipeline with a transformer")
    return {part.path: part for part in found.values()}


def denoisers(pipe: Any, named: Sequence[str] = ()) -> dict[str, PipelinePart]:
    """The modules that are called at every step, or those that were named.

    Raises:
        GraphCacheError: it has none, or none of that name.
    """
    held = modules(pipe)
    ask = f"name them with parts=...: {type(pipe).__name__} holds {', '.join(held)}"
    places = {_path(place, part, pipe): part for part in held.values() for place in part.places}
    unknown = [name for name in named if name not in held and name not in places]
    if unknown:
        raise GraphCacheError(f"parts: there is no module '{unknown[0]}'; {ask}")
    if named:
        chosen = [held.get(name) or places[name] for name in named]
        return {part.path: part for part in chosen}
    found = {path: part for path, part in held.items() if part.is_denoiser}
    if not found:
        raise GraphCacheError(f"none of the modules is called with a time, as denoisers are; {ask}")
    return found


def twin(pipe: Any) -> Any:
    """A copy of a pipeline that can be called without a trace: schedulers of its own and no progress bar.

    So it is with the pipelines in it; modules are shared.
    """
    memo: dict[int, Any] = {}
    made = {id(holder): copy.copy(holder) for _, holder in _pipelines(pipe, "", set())}
    for holder in made.values():
        for name, value in vars(holder).items():
            if id(value) in made:
                vars(holder)[name] = made[id(value)]
            elif "timesteps" in (attributes_of(value) or ()):
                vars(holder)[name] = copy.deepcopy(value, memo)
        if hasattr(holder, "set_progress_bar_config"):
            holder.set_progress_bar_config(disable=True)
    return made[id(pipe)]


def _path(place: tuple[Any, str], part: PipelinePart, pipe: Any) -> str:
    """How a place of the pipeline itself may be called; those in inner pipelines go by the part's path."""
    holder, attribute = place
    return attribute if holder is pipe else part.path


def _pipelines(pipe: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """A pipeline and those that it holds: what has both a scheduler and modules."""
    if id(pipe) in seen or not hasattr(pipe, "__dict__"):
        return
    seen.add(id(pipe))
    yield prefix, pipe
    for name, value in _attributes(pipe).items():
        attributes = attributes_of(value) or {}
        if isinstance(value, nn.Module) or "scheduler" not in attributes:
            continue
        if any(isinstance(item, nn.Module) for item in attributes.values()):
            yield from _pipelines(value, f"{prefix}{name}.", seen)


def _attributes(holder: Any) -> dict[str, Any]:
    """What an object has, and its class, without what is computed when one looks."""
    found: dict[str, Any] = {}
    for kind in reversed(type(holder).__mro__):
        found.update(vars(kind))
    return {**found, **vars(holder)}
