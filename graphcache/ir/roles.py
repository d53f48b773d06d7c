"""Which leaves of a call are the latents, and which tell the time."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphcache.ir.errors import CaptureError
from graphcache.ir.tree import fields_of, is_record

_TIMES = (
    "timestep", "timesteps", "time_step", "t", "time", "sigma", "sigmas", "noise_level", "noise_levels",
    "log_snr", "logsnr", "c_noise",
)  # fmt: skip
"""Names that a time goes by, the likeliest first."""
_FURTHER = re.compile(r"_(r|s|next|prev|previous|end|start|target|to|from)")
"""What is appended to the name of one time in that of another, such as `timestep_r`."""
_TOKENS = (
    "input_ids", "ids", "token_ids", "tokens", "indices", "hidden_states", "latents", "latent", "sample",
    "x", "xt", "x_t", "z", "zt", "z_t",
)  # fmt: skip
"""Names that latents go by which are whole numbers; texts and classes are whole numbers too."""
_INDICES = re.compile(r"(\[\d+\])+$")


@dataclass(frozen=True)
class Names:
    """Paths of arguments, such as `x`, `batch.x` or `x[0]`: those that were named, None or () for others."""

    timestep: str | None = None
    latents: tuple[str, ...] = ()

    @staticmethod
    def of(timestep: str | None, latents: "str | Sequence[str]") -> "Names":
        """As users give them: one name of the latents, or several."""
        return Names(timestep, (latents,) if isinstance(latents, str) else tuple(latents))


UNNAMED = Names()
"""Where nothing was named, latents and timestep are found."""


@dataclass(frozen=True, slots=True)
class Argument:
    """A tensor or a number among a call's arguments."""

    path: str
    value: Any

    @property
    def name(self) -> str:
        """What it is called, without its place in a list."""
        return self.owner.rpartition(".")[2]

    @property
    def home(self) -> str:
        """The dict or dataclass that it is in, nothing for an argument."""
        return self.owner.rpartition(".")[0]

    @property
    def owner(self) -> str:
        """The argument or entry that it, or the list around it, is."""
        return _INDICES.sub("", self.path)

    @property
    def is_tensor(self) -> bool:
        return isinstance(self.value, torch.Tensor)

    def is_within(self, path: str) -> bool:
        return self.path == path or self.path.startswith((f"{path}.", f"{path}["))


def may_be_time(path: str, names: Names) -> bool:
    """Whether a number there may have to become a tensor, because it is another one at each step."""
    name = Argument(path, None).name
    named = names.timestep is not None and path.startswith(names.timestep)
    return named or name in _TIMES or _FURTHER.search(name) is not None


def find_times(bound: Mapping[str, Any], names: Names) -> list[Argument]:
    """The leaves that tell the time, the one first that says which step a call is.

    Raises:
        CaptureError: one was named that is not there.
    """
    places = list(_places(bound))
    first = _named_time(bound, places, names.timestep) if names.timestep else _likely_time(places)
    if first is None:
        return []
    owned = [place for place in places if place.is_within(names.timestep or first.owner)]
    others = [place for place in places if place not in owned and _is_further(place, first)]
    return owned + others


def _named_time(bound: Mapping[str, Any], places: Sequence[Argument], named: str) -> Argument:
    found = next((place for place in places if place.is_within(named)), None)
    if found is None:
        what = f"a {type(bound[named]).__name__}" if named in bound else "absent"
        raise CaptureError(
            f"the timestep argument '{named}' is {what}, a tensor or a number is needed; "
            f"name it with transform(..., timestep=...): this call has {', '.join(bound) or 'no arguments'}"
        )
    return found


def _likely_time(places: Sequence[Argument]) -> Argument | None:
    def rank(place: Argument) -> tuple[int, bool, int]:
        return place.owner.count("."), not place.is_tensor, _TIMES.index(place.name)

    return min((place for place in places if place.name in _TIMES), key=rank, default=None)


def _is_further(place: Argument, first: Argument) -> bool:
    """Whether it tells a time beside the first one; a whole number may be a size."""
    suffix = place.name.removeprefix(first.name)
    is_named = place.name in _TIMES or (suffix != place.name and _FURTHER.fullmatch(suffix) is not None)
    return is_named and place.home == first.home and (place.is_tensor or isinstance(place.value, float))


def find_latents(bound: Mapping[str, Any], times: Sequence[Argument], names: Names) -> list[Argument]:
    """The leaves that are latents: those of the first argument that holds floating-point tensors, or whole
    numbers under a name that latents have.

    Where the time is an entry of a dict or dataclass, the entries around it count as arguments.

    Raises:
        CaptureError: nothing looks like latents, or what was named is not there.
    """
    told = {place.path for place in times}
    places = [place for place in _places(bound) if place.is_tensor and place.path not in told]
    if names.latents:
        return _named_latents(bound, places, names.latents)
    bundle = times[0].home if times else ""
    arguments: dict[str, list[Argument]] = {}
    for place in places:
        arguments.setdefault(_argument(place, bundle), []).append(place)
    for argument, held in arguments.items():
        if found := [place for place in held if place.value.is_floating_point()]:
            return found
        whole = [place for place in held if place.value.dtype is not torch.bool]
        if whole and _INDICES.sub("", argument).rpartition(".")[2] in _TOKENS:
            return whole
    raise CaptureError(
        "no argument of this call is a floating-point tensor that could be the latents; name them with "
        f"transform(..., latents=...): this call has {', '.join(bound) or 'no arguments'}"
    )


def _named_latents(
    bound: Mapping[str, Any], places: Sequence[Argument], paths: Sequence[str]
) -> list[Argument]:
    for path in paths:
        if not any(place.is_within(path) for place in places):
            raise CaptureError(
                f"latents={path!r} names no tensor of this call, which has {', '.join(bound)}; an entry of a "
                "dict is named 'argument.key', one of a list 'argument[0]'"
            )
    return [place for place in places if any(place.is_within(path) for path in paths)]


def _argument(place: Argument, bundle: str) -> str:
    """The argument that a leaf is in, or the entry of what bundles all of them."""
    inner = place.path.removeprefix(f"{bundle}.") if bundle else place.path
    first = re.split(r"[.\[]", inner)[0]
    return first if inner == place.path else f"{bundle}.{first}"


def _places(bound: Mapping[str, Any]) -> Iterator[Argument]:
    for name, value in bound.items():
        yield from _within(value, name)


def _within(value: Any, path: str) -> Iterator[Argument]:
    if isinstance(value, torch.Tensor) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        yield Argument(path, value)
    elif is_record(value):
        for name, item in fields_of(value).items():
            yield from _within(item, f"{path}.{name}")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _within(item, f"{path}.{name}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _within(item, f"{path}[{i}]")
