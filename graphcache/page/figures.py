"""The page's charts: speed against quality, guidance's bands, bytes over the steps."""

import math
from collections.abc import Mapping, Sequence

from graphcache.ir.units import number, size
from graphcache.page.charts import (
    Chart,
    Strip,
    Tick,
    across,
    labelled,
    line,
    polyline,
    shape,
    strip,
    ticks,
    upwards,
)
from graphcache.page.names import shortened
from graphcache.page.scales import Axis, linear, logarithmic
from graphcache.planning.candidates import Candidate, pareto
from graphcache.planning.comparison import KINDS, Contender, unbeaten_rows
from graphcache.planning.profile import Profile
from graphcache.planning.timeline import Timeline

BANDS = ("low frequencies", "high frequencies")


def measured_front(rows: Sequence[Contender]) -> Chart | None:
    """Speed-up against PSNR of all rows that have one; None where none has."""
    known = [row for row in rows if row.psnr is not None and math.isfinite(row.psnr)]
    if not known:
        return None
    x, y = across(linear, [row.speedup for row in known]), upwards(linear, [_psnr(row) for row in known])
    front = unbeaten_rows(known)
    points = [
        ((x(row.speedup), y(_psnr(row))), shortened(row.name), KINDS.index(row.kind), _told(row))
        for row in known
    ]
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in known)]
    best = ", ".join(f"{row.name} ({row.speedup:.2f}×, {_psnr(row):.1f} dB)" for row in front)
    return Chart(
        ticks(x, lambda value: f"{value:g}×"),
        ticks(y, lambda value: f"{value:g}"),
        "times as fast as the uncached model",
        "PSNR to it, dB",
        f"{len(known)} measured contenders by speed-up and PSNR; not beaten in both: {best}",
        front=polyline([(x(row.speedup), y(_psnr(row))) for row in front]),
        points=labelled(points),
        legend=tuple((kind, shape(KINDS.index(kind), 18, 8), KINDS.index(kind)) for kind in kinds),
    )


def promised_front(candidates: Sequence[Candidate], given: Mapping[str, Candidate]) -> Chart | None:
    """Predicted speed-up against estimated error of what a search found, and of the page's plans."""
    front = list(pareto([item for item in candidates if item.known_error > 0]))
    shown = front + [item for item in given.values() if item.known_error > 0]
    if not shown:
        return None
    x = across(linear, [item.speedup for item in shown])
    y = upwards(_falling, [item.known_error for item in shown])
    families = sorted({item.family for item in front})
    tones = {name: tone + 1 for tone, name in enumerate(families)}
    points = [
        ((x(item.speedup), y(item.known_error)), shortened(name), 0, f"{name}: {_foretold(item)}")
        for name, item in given.items()
        if item.known_error > 0
    ]
    points += [((x(c.speedup), y(c.known_error)), "", tones[c.family] % 6, _foretold(c)) for c in front]
    legend = tuple((f"searched: {name}", shape(tones[name] % 6, 18, 8), tones[name] % 6) for name in families)
    own = (("plan of this page", shape(0, 18, 8), 0),) if given else ()
    return Chart(
        ticks(x, lambda value: f"{value:g}×"),
        ticks(y, lambda value: f"{value:g}"),
        "times as fast as the uncached model, predicted",
        "root mean square error, estimated",
        f"{len(front)} searched plans that no other one beats, from {_ends(front)}, and "
        f"{len(points) - len(front)} given ones by predicted speed-up and estimated error",
        front=polyline([(x(item.speedup), y(item.known_error)) for item in front]),
        points=labelled(points),
        legend=own + legend,
    )


def bands_chart(profile: Profile) -> Chart | None:
    """How far both bands of guidance's difference move from step to step; None where nobody measured."""
    if profile.bands is None or profile.steps < 2 or profile.bands.ndim != 2 or profile.bands.shape[1] != 2:
        return None
    moved = profile.bands[1:]
    x = across(linear, [0, profile.steps - 1])
    y = upwards(linear, [0.0, float(moved.max())])
    lines = tuple(
        line(band, name, [(x(t), y(float(value))) for t, value in enumerate(moved[:, band], 1)])
        for band, name in enumerate(BANDS)
    )
    means = " and ".join(f"{number(float(moved[:, band].mean()))} of the {BANDS[band]}" for band in (0, 1))
    return Chart(
        _steps(x, profile.steps),
        ticks(y, lambda value: f"{value:g}"),
        "step",
        "moved since the step before",
        f"Drift of guidance's difference over the steps, relative to its length: on average {means}",
        lines,
    )


def byte_strips(timelines: Sequence[Timeline]) -> tuple[Strip, ...]:
    """Bytes that each plan's caches hold after each step."""
    found = []
    for timeline in timelines:
        top = size(max(timeline.held))
        summary = f"{timeline.name} holds between {size(min(timeline.held))} and {top} after a step"
        found.append(strip(timeline.name, timeline.held, top, summary))
    return tuple(found)


def _steps(axis: Axis, steps: int) -> tuple[Tick, ...]:
    whole = [value for value in axis.ticks if value == int(value) and value < steps]
    return ticks(Axis(axis.low, axis.high, axis.begin, axis.end, False, tuple(whole)), lambda v: f"{v:g}")


def _falling(values: Sequence[float], begin: float, end: float) -> Axis:
    """Errors fall upwards, so that better is higher, as with PSNR."""
    return logarithmic(values, end, begin)


def _psnr(row: Contender) -> float:
    assert row.psnr is not None
    return row.psnr


def _told(row: Contender) -> str:
    return f"{row.name}, {row.kind}: {row.speedup:.2f} times as fast, {_psnr(row):.2f} dB"


def _foretold(item: Candidate) -> str:
    how = "estimated" if item.measured is None else "measured"
    return (
        f"{item.family}, {len(item.computed)} of {item.plan.steps} steps computed, "
        f"{item.speedup:.2f} times as fast, {how} error {number(item.known_error)}, {size(item.bytes)}"
    )


def _ends(front: Sequence[Candidate]) -> str:
    if not front:
        return "nothing"
    return " to ".join(f"{item.speedup:.2f}× at {number(item.known_error)}" for item in (front[0], front[-1]))
