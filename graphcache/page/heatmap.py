"""Steps × sites as coloured cells, and the plans' actions drawn over them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphcache.ir.plan import COMPUTE, REUSE
from graphcache.ir.units import number
from graphcache.page.charts import Tick
from graphcache.page.names import common_prefix, shortened
from graphcache.page.scales import Axis, colour, hexadecimal, is_light, logarithmic
from graphcache.planning.profile import Profile
from graphcache.planning.site_sensitivity import sensitivity
from graphcache.planning.timeline import HOLD, Timeline

WIDTH, HEIGHT, TOP = 15, 17, 20
LEGEND = 240.0
PAPER = 660


@dataclass(frozen=True)
class Cell:
    """A step of a site; `colour` is None where nothing was measured."""

    x: int
    y: int
    colour: str | None
    title: str


@dataclass(frozen=True)
class Marks:
    """A plan's actions in one ink: paths of squares, dots and dashes, and letters at (x, y)."""

    ink: str
    squares: str
    dots: str
    dashes: str
    letters: tuple[tuple[int, int, str], ...]


@dataclass(frozen=True)
class Label:
    """A site's or a step's name at a place; `title` is the whole of it."""

    place: int
    text: str
    title: str = ""


@dataclass(frozen=True)
class HeatMap:
    """All that is drawn; lengths in CSS pixels."""

    width: int
    height: int
    names_width: int
    sites: tuple[Label, ...]
    steps: tuple[Label, ...]
    cells: tuple[Cell, ...]
    plans: tuple[tuple[Marks, Marks], ...]
    scale: Axis | None
    ticks: tuple[Tick, ...]
    means: tuple[float | None, ...]
    dropped: str

    @property
    def print_zoom(self) -> float:
        """What makes the whole map fit on a sheet of paper."""
        return round(min(1.0, PAPER / (self.width + self.names_width)), 3)


def heat_map(profile: Profile, timelines: Sequence[Timeline]) -> HeatMap:
    """The map of a profile with a layer of marks for every plan."""
    values = sensitivity(profile)
    scale = colour_scale(values)
    names = [site.name for site in profile.sites]
    dropped = common_prefix([site.name for site in profile.sites if site.kind == "branch"])
    labels = [shortened(name, dropped) for name in names]
    sites = tuple(Label(_y(i), label, names[i]) for i, label in enumerate(labels))
    every = 5 if profile.steps > 12 else 1
    steps = tuple(Label(_x(t), str(t)) for t in range(0, profile.steps, every))
    return HeatMap(
        width=profile.steps * WIDTH + 12,
        height=TOP + len(names) * HEIGHT,
        names_width=round(max(map(len, labels)) * 7.3) + 10,
        sites=sites,
        steps=steps,
        cells=_cells(values, names, scale),
        plans=tuple(_marks(timeline, values, names, scale) for timeline in timelines),
        scale=scale,
        ticks=_ticks(scale),
        means=_means(values),
        dropped=dropped,
    )


def colour_scale(values: np.ndarray) -> Axis | None:
    """The logarithmic scale of all measured values above 0; None where there are none."""
    known = values[np.isfinite(values) & (values > 0)]
    return logarithmic([float(known.min()), float(known.max())], 0.0, LEGEND) if known.size else None


def _ticks(scale: Axis | None) -> tuple[Tick, ...]:
    """Powers of ten, and all of the scale's numbers where those are few."""
    if scale is None:
        return ()
    tens = [value for value in scale.ticks if f"{value:e}".startswith("1.0")]
    chosen = tens if len(tens) > 1 else scale.ticks[:: 1 + len(scale.ticks) // 6]
    return tuple(Tick(round(scale(value), 1), number(value)) for value in chosen)


def _means(values: np.ndarray) -> tuple[float | None, ...]:
    known = [line[np.isfinite(line)] for line in values]
    return tuple(float(line.mean()) if line.size else None for line in known)


def shade(value: float, scale: Axis | None) -> str | None:
    """The colour of a cell; 0 has that of the least."""
    if scale is None or not np.isfinite(value):
        return None
    return hexadecimal(colour(scale.share(max(value, scale.low))))


def _cells(values: np.ndarray, names: Sequence[str], scale: Axis | None) -> tuple[Cell, ...]:
    cells = []
    for i, name in enumerate(names):
        for t, value in enumerate(values[i]):
            known = number(float(value)) if np.isfinite(value) else "nothing to reuse yet"
            cells.append(Cell(t * WIDTH, _top(i), shade(value, scale), f"step {t}, {name}: {known}"))
    return tuple(cells)


def _marks(
    timeline: Timeline, values: np.ndarray, names: Sequence[str], scale: Axis | None
) -> tuple[Marks, Marks]:
    """Over light cells in black, over dark ones in white."""
    inks: dict[bool, dict[str, list[tuple[int, int, str]]]] = {True: {}, False: {}}
    for i, name in enumerate(names):
        for t, symbol in enumerate(timeline.symbols.get(name, "")):
            light = scale is None or not np.isfinite(values[i, t])
            if scale is not None and not light:
                light = is_light(colour(scale.share(max(float(values[i, t]), scale.low))))
            kind = symbol if symbol in (COMPUTE, REUSE, HOLD) else "letter"
            inks[light].setdefault(kind, []).append((_x(t), _top(i) + HEIGHT // 2, symbol))
    return _inked("black", inks[True]), _inked("white", inks[False])


def _inked(ink: str, kinds: dict[str, list[tuple[int, int, str]]]) -> Marks:
    return Marks(
        ink,
        squares="".join(f"M{x - 3} {y - 3}h6v6h-6z" for x, y, _ in kinds.get(COMPUTE, ())),
        dots="".join(f"M{x} {y}h0" for x, y, _ in kinds.get(REUSE, ())),
        dashes="".join(f"M{x - 3} {y}h6" for x, y, _ in kinds.get(HOLD, ())),
        letters=tuple(kinds.get("letter", ())),
    )


def _x(step: int) -> int:
    return step * WIDTH + WIDTH // 2


def _top(site: int) -> int:
    return TOP + site * HEIGHT


def _y(site: int) -> int:
    return _top(site) + HEIGHT // 2 + 4
