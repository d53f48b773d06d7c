"""The page itself."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from graphcache.cost.pricing import Price, cheapest
from graphcache.ir.plan import Plan
from graphcache.ir.plantext import write_bytes
from graphcache.ir.units import duration, fixed, number, size, work
from graphcache.libraries.extras import require
from graphcache.page import png
from graphcache.page.figures import bands_chart, byte_strips, measured_front, promised_front
from graphcache.page.heatmap import heat_map
from graphcache.page.scales import VIRIDIS
from graphcache.page.tokens import token_maps
from graphcache.planning.candidates import Candidate
from graphcache.planning.comparison import Contender
from graphcache.planning.prediction import predicted
from graphcache.planning.profile import Profile
from graphcache.planning.timeline import meet

TEMPLATES = "graphcache.page"


@dataclass(frozen=True)
class Picture:
    """A contender's picture, as a page holds it."""

    name: str
    uri: str
    width: int
    height: int
    row: Contender | None


def write_page(
    path: str | os.PathLike[str],
    profile: Profile,
    plans: Mapping[str, Plan],
    *,
    rows: Sequence[Contender] = (),
    prices: Sequence[Price] = (),
    pictures: Mapping[str, bytes] | None = None,
    sample: bytes | None = None,
    candidates: Sequence[Candidate] = (),
    title: str = "Sensitivity and plans",
) -> Path:
    """Write one HTML page that needs nothing else: no network, no script.

    Args:
        path: of the page; the file is replaced whole or not at all.
        profile: what was measured.
        plans: by name, of as many steps as the profile; the first is drawn over the heat map at first.
        rows: measured contenders of a comparison.
        prices: of plans at other sizes.
        pictures: PNG or GIF files by contender; that of a `plain` row, else the first, is the uncached one.
        sample: PNG or GIF of a profiled sample, to lay the tokens' drift over.
        candidates: what `graphcache.candidates.candidates` found.
        title: the heading.

    Raises:
        GraphCacheError: jinja2 is missing, a plan does not fit the profile, a picture is neither PNG nor GIF,
            or the file cannot be written.
    """
    page = render(profile, plans, rows, pictures or {}, sample, candidates, title, prices)
    write_bytes(page.encode(), path)
    return Path(path)


def render(
    profile: Profile,
    plans: Mapping[str, Plan],
    rows: Sequence[Contender],
    pictures: Mapping[str, bytes],
    sample: bytes | None,
    candidates: Sequence[Candidate],
    title: str,
    prices: Sequence[Price] = (),
) -> str:
    """The page's text."""
    timelines = [meet(name, plan, profile) for name, plan in plans.items()]
    given = {timeline.name: predicted(timeline) for timeline in timelines}
    return str(
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            profile=profile,
            timelines=timelines,
            given=given,
            rows=rows,
            prices=prices,
            cheapest=cheapest(prices),
            heat=heat_map(profile, timelines),
            tokens=token_maps(profile),
            bands=bands_chart(profile),
            measured=measured_front(rows),
            promised=promised_front(candidates, {name: item for name, item in given.items() if item}),
            held=byte_strips(timelines),
            pictures=_pictures(pictures, rows),
            sample=None if sample is None else _picture("sample", sample, None),
            palette=VIRIDIS,
        )
    )


def _pictures(pictures: Mapping[str, bytes], rows: Sequence[Contender]) -> list[Picture]:
    """The uncached one first."""
    by_name = {row.name: row for row in rows}
    found = [_picture(name, data, by_name.get(name)) for name, data in pictures.items()]
    return sorted(found, key=lambda item: item.row is None or item.row.kind != "plain")


def _picture(name: str, data: bytes, row: Contender | None) -> Picture:
    kind, width, height = png.measure(data, name)
    return Picture(name, png.uri(data, kind), width, height, row)


@cache
def _environment() -> Any:
    jinja2 = require("jinja2", "report", "a report as HTML")
    folder = resources.files(TEMPLATES)
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"size": size, "work": work, "duration": duration, "number": number, "fixed": fixed}
    return made


def _printable(value: object) -> object:
    """Control characters and changes of writing direction, which names from files may hold, are shown."""
    if type(value) is not str:
        return value
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in value)
