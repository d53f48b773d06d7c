"""A profile as a file: JSON, numbers as base64 of little-endian floats. Nothing in it is ever executed."""

import base64
import math
import os
from itertools import pairwise

import msgspec
import numpy as np

from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plantext import read_bytes, write_bytes
from graphcache.planning.profile import Profile, Provenance, SampleProfile, Site

VERSION = 3
MOST_NUMBERS = 2**28
MOST_BYTES = 2**32
"""More than a profile of so many numbers takes."""


class Numbers(msgspec.Struct, forbid_unknown_fields=True):
    """An array: "f4" or "f8", its shape and its base64."""

    kind: str
    shape: list[int]
    data: str


class ProvenanceLine(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of `Provenance`."""

    graph: str
    steps: int
    scheduler: str
    samples: int
    probes: int
    seed: int
    conditional: str | None
    versions: dict[str, str]
    tokens: float = 1.0


class SiteLine(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of `Site`."""

    name: str
    kind: str
    flops: int
    bytes_kept: int
    seconds: float
    token_bytes: int = 0


class ProfileDocument(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of `Profile`."""

    version: int
    provenance: ProvenanceLine
    sites: list[SiteLine]
    gram: Numbers
    effects: Numbers
    drift: dict[str, Numbers]
    ranking: dict[str, Numbers]
    bands: Numbers | None
    numbers: int
    flops: int
    calls: int
    timings: dict[str, float]
    unmeasured: list[SiteLine] = []
    handovers: tuple[int, ...] = ()


class _Versioned(msgspec.Struct):
    version: int


def save_profile(profile: Profile, path: str | os.PathLike[str]) -> None:
    """Write a profile; the file is replaced whole or not at all."""
    write_bytes(encode(profile), path)


def load_profile(path: str | os.PathLike[str]) -> Profile:
    """Read what `save_profile` wrote.

    Raises:
        GraphCacheError: the file is no such profile; the message says where.
    """
    try:
        return decode(read_bytes(path, MOST_BYTES, "profile"))
    except GraphCacheError as error:
        raise GraphCacheError(f"{os.fspath(path)}: {error}") from None


def encode(profile: Profile) -> bytes:
    """A profile as JSON."""
    document = ProfileDocument(
        version=VERSION,
        provenance=msgspec.convert(msgspec.to_builtins(profile.provenance), ProvenanceLine),
        sites=[*map(_line, profile.sites)],
        gram=pack(profile.gram),
        effects=pack(profile.effects),
        drift={name: pack(values) for name, values in profile.drift.items()},
        ranking={name: pack(values) for name, values in profile.ranking.items()},
        bands=None if profile.bands is None else pack(profile.bands),
        numbers=profile.numbers,
        flops=profile.flops,
        calls=profile.calls,
        timings=profile.timings,
        unmeasured=[*map(_line, profile.unmeasured)],
        handovers=profile.handovers,
    )
    return msgspec.json.encode(document) + b"\n"


def _line(site: Site) -> SiteLine:
    return msgspec.convert(msgspec.to_builtins(site), SiteLine)


def decode(data: bytes) -> Profile:
    """The profile in JSON.

    Raises:
        GraphCacheError: unknown fields, other types, arrays that do not fit together, numbers not finite.
    """
    try:
        version = msgspec.json.decode(data, type=_Versioned).version
        if not 1 <= version <= VERSION:
            raise GraphCacheError(
                f"version {version} of the profile format is not known, only 1 to {VERSION}"
            )
        document = msgspec.json.decode(data, type=ProfileDocument)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise GraphCacheError(f"not a profile in JSON: {error}") from None
    sites, unmeasured = (
        tuple(Site(**msgspec.structs.asdict(line)) for line in lines)
        for lines in (document.sites, document.unmeasured)
    )
    profile = Profile(
        provenance=Provenance(**msgspec.structs.asdict(document.provenance)),
        sites=sites,
        gram=unpack(document.gram, "gram"),
        effects=unpack(document.effects, "effects"),
        drift={
            name: _mean_drift(unpack(values, f"drift of {name}"), version)
            for name, values in document.drift.items()
        },
        ranking={name: unpack(values, f"ranking of {name}") for name, values in document.ranking.items()},
        bands=None if document.bands is None else unpack(document.bands, "bands"),
        numbers=document.numbers,
        flops=document.flops,
        calls=document.calls,
        timings=document.timings,
        unmeasured=unmeasured,
        handovers=document.handovers,
    )
    _check(profile)
    return profile


def _mean_drift(table: np.ndarray, version: int) -> np.ndarray:
    """By token; the first version has a row for every step."""
    if version > 1:
        return table
    if table.ndim != 2:
        raise GraphCacheError("drift has one row for each step")
    return table[1:].mean(axis=0) if len(table) > 1 else np.zeros(table.shape[1])


def pack(values: np.ndarray) -> Numbers:
    """An array for a file, exactly as it is."""
    kind = "f4" if values.dtype == np.float32 else "f8"
    raw = np.ascontiguousarray(values, dtype=f"<{kind}").tobytes()
    return Numbers(kind, list(values.shape), base64.b64encode(raw).decode())


def unpack(numbers: Numbers, where: str) -> np.ndarray:
    """The array of a file.

    Raises:
        GraphCacheError: shape and data do not fit, or a number is not finite.
    """
    if numbers.kind not in ("f4", "f8") or any(size < 0 for size in numbers.shape):
        raise GraphCacheError(f"{where}: an array is f4 or f8 of sizes of at least 0")
    if len(numbers.shape) > 8 or math.prod(numbers.shape) > MOST_NUMBERS:
        raise GraphCacheError(f"{where}: {numbers.shape} is more than a profile holds")
    try:
        raw = base64.b64decode(numbers.data, validate=True)
    except ValueError as error:
        raise GraphCacheError(f"{where}: {error}") from None
    if len(raw) != math.prod(numbers.shape) * int(numbers.kind[1]):
        raise GraphCacheError(f"{where}: {len(raw)} bytes are not {numbers.shape} of {numbers.kind}")
    values = np.frombuffer(raw, dtype=f"<{numbers.kind}").reshape(numbers.shape).copy()
    if not np.isfinite(values).all():
        raise GraphCacheError(f"{where}: not all numbers are finite")
    return values


class PartDocument(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of `SampleProfile`, and what tells that it belongs to a profile."""

    key: str
    gram: dict[str, Numbers]
    effects: dict[str, Numbers]
    drift: dict[str, Numbers]
    ranking: dict[str, Numbers]
    bands: Numbers | None
    numbers: int
    calls: int
    handovers: tuple[int, ...] = ()


_TABLES = ("gram", "effects", "drift", "ranking")


def save_part(part: SampleProfile, key: str, path: str | os.PathLike[str]) -> None:
    """Write what one sample tells, to be taken up by a later call."""
    tables = {name: {site: pack(values) for site, values in getattr(part, name).items()} for name in _TABLES}
    bands = None if part.bands is None else pack(part.bands)
    document = PartDocument(
        key=key, bands=bands, numbers=part.numbers, calls=part.calls, handovers=part.handovers, **tables
    )
    write_bytes(msgspec.json.encode(document), path)


def load_part(key: str, path: str | os.PathLike[str]) -> SampleProfile | None:
    """What `save_part` wrote under this key; None where there is nothing, or something else."""
    try:
        document = msgspec.json.decode(read_bytes(path, MOST_BYTES), type=PartDocument)
        tables = {
            name: {site: unpack(values, site) for site, values in getattr(document, name).items()}
            for name in _TABLES
        }
        bands = None if document.bands is None else unpack(document.bands, "bands")
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, GraphCacheError):
        return None
    if document.key != key:
        return None
    return SampleProfile(
        bands=bands, numbers=document.numbers, calls=document.calls, handovers=document.handovers, **tables
    )


def _check(profile: Profile) -> None:
    count, steps = len(profile.sites), profile.steps
    if not 1 <= steps <= 100_000 or profile.gram.shape != (count, steps, steps) or not count:
        raise GraphCacheError(f"gram is {profile.gram.shape} for {count} sites and {steps} steps")
    shape = profile.effects.shape
    if len(shape) != 5 or shape[:2] != (count, steps) or not 1 <= shape[2] <= steps or 0 in shape:
        raise GraphCacheError(f"effects are {shape} for {count} sites and {steps} steps")
    if any(step >= later for step, later in pairwise((0, *profile.handovers, steps))):
        raise GraphCacheError(f"handovers are steps after the first of {steps}, each once and in their order")
    every = (*profile.sites, *profile.unmeasured)
    if len({site.name for site in every}) < len(every):
        raise GraphCacheError("a site is there twice")
    if any(site.kind != "branch" for site in profile.unmeasured):
        raise GraphCacheError("what was not measured are branches")
    if any(site.kind not in ("branch", "range", "output", "guidance") for site in profile.sites):
        raise GraphCacheError("a site is a branch, range, output or guidance")
    if min(profile.numbers, profile.flops, profile.calls) < 1:
        raise GraphCacheError("numbers, flops and calls are at least 1")
    if not all(0 < value < float("inf") for value in profile.timings.values()):
        raise GraphCacheError("timings are seconds above 0")
    tables = [*profile.ranking.values(), *([] if profile.bands is None else [profile.bands])]
    if any(table.ndim < 1 or table.shape[0] != steps for table in tables):
        raise GraphCacheError(f"ranking and bands have one row for each of {steps} steps")
    if any(table.ndim != 1 for table in profile.drift.values()):
        raise GraphCacheError("drift has one number for each token")
    if not 0 < profile.provenance.tokens <= 1:
        raise GraphCacheError("the share of tokens is above 0 and at most 1")
    if profile.provenance.conditional not in (None, "first", "last"):
        raise GraphCacheError("conditional is first, last or absent")
