"""Colours and axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

VIRIDIS = ("440154", "482878", "3e4a89", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")
"""Ten even steps through matplotlib's palette: light is more, also in grey and to the colour-blind."""

Colour = tuple[int, int, int]
_ANCHORS = tuple((int(hue[:2], 16), int(hue[2:4], 16), int(hue[4:], 16)) for hue in VIRIDIS)


def colour(share: float) -> Colour:
    """The palette's colour from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(_ANCHORS) - 1)
    low = min(int(place), len(_ANCHORS) - 2)
    weight = place - low
    red, green, blue = (round(a + (b - a) * weight) for a, b in zip(*_ANCHORS[low : low + 2], strict=True))
    return red, green, blue


def hexadecimal(value: Colour) -> str:
    """As CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*value)


def is_light(value: Colour) -> bool:
    """Whether black stands out on a colour more than white does (WCAG's relative luminance)."""
    parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in value]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] > 0.179


@dataclass(frozen=True)
class Axis:
    """Numbers from `low` to `high` on a line of some length.

    Attributes:
        begin, end: where low and high stand, in the chart's units; downwards where end < begin.
        ticks: the numbers that are written.
    """

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False
    ticks: tuple[float, ...] = ()

    def share(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low) if high > low else 0.5

    def __call__(self, value: float) -> float:
        return self.begin + (self.end - self.begin) * self.share(value)


def linear(values: Sequence[float], begin: float, end: float, ticks: int = 5) -> Axis:
    """An axis with round ticks around all values."""
    low, high = min(values), max(values)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / ticks
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return Axis(marks[0], marks[-1], begin, end, False, marks)


def logarithmic(values: Sequence[float], begin: float, end: float) -> Axis:
    """An axis as wide as its values, all above 0; ticks at powers of ten, if few also at 2 and 5."""
    low, high = min(values), max(values)
    if high <= low:
        low, high = low / 2, high * 2
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    few = len(exponents) < 6
    marks = [float(f"{factor}e{e}") for e in exponents for factor in ((1, 2, 5) if few else (1,))]
    return Axis(low, high, begin, end, True, tuple(mark for mark in marks if low <= mark <= high))
