"""The heat map and the Pareto chart as PNG files, for papers and slides."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import COMPUTE, REUSE, Plan
from graphcache.ir.plantext import write_bytes
from graphcache.libraries.extras import require
from graphcache.page.heatmap import colour_scale
from graphcache.page.names import common_prefix, shortened
from graphcache.page.scales import colour, is_light
from graphcache.planning.candidates import Candidate, pareto
from graphcache.planning.comparison import KINDS, Contender, unbeaten_rows
from graphcache.planning.prediction import predicted
from graphcache.planning.profile import Profile
from graphcache.planning.site_sensitivity import sensitivity
from graphcache.planning.timeline import HOLD, Timeline, meet

DPI = 150
MARKERS = ("o", "D", "^", "s", "P", "v")
TONES = ("#0550ae", "#b35900", "#1a7f37", "#a40e6a", "#6639ba", "#57606a")
FRONT: dict[str, Any] = {"linestyle": "--", "color": TONES[-1], "linewidth": 1, "zorder": 1}
_SIGNS = {COMPUTE: "■", REUSE: "·", HOLD: "–"}


def save_charts(
    folder: str | os.PathLike[str],
    profile: Profile,
    plans: Mapping[str, Plan],
    *,
    rows: Sequence[Contender] = (),
    candidates: Sequence[Candidate] = (),
) -> tuple[Path, ...]:
    """Write `sensitivity.png`, with the first plan drawn over it, and what there is of `measured.png` and
    `predicted.png`: speed against quality of rows, and of candidates and plans.

    Raises:
        GraphCacheError: matplotlib is missing, a plan does not fit the profile, or a file cannot be written.
    """
    require("matplotlib", "report", "a chart as PNG")
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GraphCacheError(f"{target}: cannot be made a folder: {error.strerror}") from error
    timelines = [meet(name, plan, profile) for name, plan in plans.items()]
    given = {timeline.name: item for timeline in timelines if (item := predicted(timeline)) is not None}
    figures = {"sensitivity": _sensitivity(profile, timelines[0] if timelines else None)}
    if any(row.psnr is not None for row in rows):
        figures["measured"] = _measured([row for row in rows if row.psnr is not None])
    if candidates or given:
        figures["predicted"] = _predicted(candidates, given)
    paths = []
    for name, figure in figures.items():
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=DPI)
        paths.append(target / f"{name}.png")
        write_bytes(data.getvalue(), paths[-1])
    return tuple(paths)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure that no window or global state knows."""
    figure = require("matplotlib.figure", "report", "a chart as PNG").Figure(
        figsize=(width, height), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _sensitivity(profile: Profile, timeline: Timeline | None) -> Any:
    colors = require("matplotlib.colors", "report", "a chart as PNG")
    values, scale = sensitivity(profile), colour_scale(sensitivity(profile))
    names = [site.name for site in profile.sites]
    figure, axes = _figure(2.8 + 0.15 * profile.steps, 1.3 + 0.19 * len(names))
    if scale is not None:
        norm = colors.LogNorm(scale.low, scale.high)
        image = axes.imshow(values.clip(scale.low), norm=norm, cmap="viridis", aspect="auto")
        figure.colorbar(image, label="effect of reuse, one step old", fraction=0.03, pad=0.01)
    prefix = common_prefix([site.name for site in profile.sites if site.kind == "branch"])
    labels = [shortened(name, prefix) for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=8, parse_math=False)
    axes.set_xlabel("step")
    axes.set_xlim(-0.5, profile.steps - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    if timeline is not None:
        axes.set_title(timeline.name, loc="left", fontsize=10, parse_math=False)
        for i, name in enumerate(names):
            for step, symbol in enumerate(timeline.symbols.get(name, "")):
                known = scale is not None and math.isfinite(values[i, step])
                share = scale.share(max(values[i, step], scale.low)) if scale and known else None
                ink = "black" if share is None or is_light(colour(share)) else "white"
                text = _SIGNS.get(symbol, symbol)
                axes.text(
                    step, i, text, color=ink, ha="center", va="center", fontsize=6, parse_math=False
                )  # fmt: skip
    return figure


def _measured(rows: Sequence[Contender]) -> Any:
    figure, axes = _figure(7, 4.5)
    for number, kind in enumerate(KINDS):
        own = [row for row in rows if row.kind == kind]
        if own:
            axes.scatter(
                [row.speedup for row in own],
                [row.psnr for row in own],
                marker=MARKERS[number],
                color=TONES[number],
                label=kind,
            )
    for row in rows:
        _annotate(axes, row.name, row.speedup, row.psnr or 0.0)
    front = unbeaten_rows(rows)
    axes.plot(
        [row.speedup for row in front], [row.psnr for row in front], "--", color=TONES[-1], lw=1, zorder=1
    )
    return _finished(figure, axes, "times as fast as the uncached model", "PSNR to it, dB")


def _predicted(candidates: Sequence[Candidate], given: Mapping[str, Candidate]) -> Any:
    figure, axes = _figure(7, 4.5)
    front = [item for item in pareto(candidates) if item.known_error > 0]
    axes.plot(
        [i.speedup for i in front], [i.known_error for i in front], "--", color=TONES[-1], lw=1, zorder=1
    )
    groups = {"plans": [*given.values()]} if given else {}
    for item in front:
        groups.setdefault(f"searched: {item.family}", []).append(item)
    for number, (name, items) in enumerate(groups.items()):
        places = [item.speedup for item in items], [item.known_error for item in items]
        look = {"marker": MARKERS[number % 6], "color": TONES[number % 6], "label": name}
        axes.scatter(*places, s=40 if name == "plans" else 14, **look)
    for name, item in given.items():
        _annotate(axes, name, item.speedup, item.known_error)
    if any(item.known_error > 0 for items in groups.values() for item in items):
        axes.set_yscale("log")
    axes.invert_yaxis()
    return _finished(
        figure, axes, "times as fast as the uncached model, predicted", "root mean square error, estimated"
    )


def _annotate(axes: Any, name: str, x: float, y: float) -> None:
    axes.annotate(
        shortened(name), (x, y), (6, 4), textcoords="offset points", fontsize=8, parse_math=False
    )  # fmt: skip


def _finished(figure: Any, axes: Any, x_name: str, y_name: str) -> Any:
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name)
    axes.grid(color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, frameon=False)
    return figure
