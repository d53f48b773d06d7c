"""Lines and points on two axes: where everything stands, in the chart's units."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphcache.page.scales import Axis

WIDTH, HEIGHT = 600, 340
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 16, 48
COLOURS = 6
DASHES = ("", "7 4", "2 4", "10 3 2 3", "14 5", "5 2 1 2 1 2")
CHARACTER = 7.0
"""About the width of a letter of a label."""

Spot = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    place: float
    text: str


@dataclass(frozen=True)
class Line:
    """A line, its points as SVG writes them, and its mark at some of them; told apart by dash and shape."""

    name: str
    path: str
    dash: str
    tone: int
    marks: tuple[str, ...]
    swatch: str


@dataclass(frozen=True)
class Point:
    """A point with the shape of its kind, a label where there is room, and all that is known of it."""

    mark: str
    tone: int
    label: str
    at: Spot
    title: str


@dataclass(frozen=True)
class Chart:
    """Axes with what is drawn between them; `summary` is for those who cannot see it."""

    xs: tuple[Tick, ...]
    ys: tuple[Tick, ...]
    x_name: str
    y_name: str
    summary: str
    lines: tuple[Line, ...] = ()
    front: str = ""
    points: tuple[Point, ...] = ()
    legend: tuple[tuple[str, str, int], ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Strip:
    """A small picture of numbers over the steps, from 0 to `top`; `area` is a closed path."""

    name: str
    top: str
    last: str
    area: str
    summary: str
    width: int
    height: int


def across(make: Callable[..., Axis], values: Sequence[float]) -> Axis:
    """An axis along the chart's width."""
    return make(values, LEFT, WIDTH - RIGHT)


def upwards(make: Callable[..., Axis], values: Sequence[float]) -> Axis:
    """An axis along the chart's height, the largest number on top."""
    return make(values, HEIGHT - BOTTOM, TOP)


def ticks(axis: Axis, text: Callable[[float], str]) -> tuple[Tick, ...]:
    """Where an axis is written on."""
    return tuple(Tick(round(axis(value), 1), text(value)) for value in axis.ticks)


def polyline(places: Sequence[Spot]) -> str:
    """Straight from place to place."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else ""


def shape(kind: int, x: float, y: float, r: float = 5.0) -> str:
    """A closed path around a place: circle, diamond, triangle, square, cross, triangle upside down."""
    if kind % COLOURS == 0:
        return f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    return "M" + "L".join(f"{x + a * r:.1f} {y + b * r:.1f}" for a, b in _CORNERS[kind % COLOURS - 1]) + "z"


_CORNERS: tuple[tuple[Spot, ...], ...] = (
    ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    ((-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)),
    (
        (-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4),
        (0.4, 1.2), (-0.4, 1.2), (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4),
    ),
    ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
)  # fmt: skip


def line(number: int, name: str, places: Sequence[Spot]) -> Line:
    """The line of a number, which gives it colour, dash and shape."""
    every = max(1, len(places) // 8)
    first = number * every // COLOURS
    marks = tuple(shape(number, x, y, 3.5) for x, y in places[first::every])
    return Line(
        name, polyline(places), DASHES[number % COLOURS], number % COLOURS, marks, shape(number, 18, 8, 3.5)
    )


def strip(name: str, values: Sequence[float], top: str, summary: str) -> Strip:
    """Each value until the next step."""
    width, height, most = 240, 70, max(1.0, *values)
    parts = "".join(
        f"V{height * (1 - value / most):.1f}H{width * (step + 1) / len(values):.1f}"
        for step, value in enumerate(values)
    )
    area = f"M0 {height}{parts}V{height}z"
    return Strip(name, top, str(len(values) - 1), area, summary, width, height)


def labelled(points: Sequence[tuple[Spot, str, int, str]]) -> tuple[Point, ...]:
    """Points as (place, label, kind, title); a label stands where it hides neither point nor other label."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for (x, y), _, _, _ in points]
    found = []
    for (x, y), label, kind, title in points:
        width, at = CHARACTER * len(label), (0.0, 0.0)
        right, centre = -9 - width, -width / 2
        for left, base in ((9, 4), (right, 4), (centre, -10), (centre, 20), (9, -9), (right, -9), (9, 17)):
            box = (x + left, y + base - 11, x + left + width, y + base + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                at = (round(x + left, 1), round(y + base, 1))
                taken.append(box)
                break
        found.append(Point(shape(kind, x, y), kind, label if any(at) else "", at, title))
    return tuple(found)


_Box = tuple[float, float, float, float]


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
