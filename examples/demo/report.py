"""The page about the plan that the demo found."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from torch import Tensor

from examples.demo.measure import Row as Measured
from examples.demo.picture import grid
from examples.demo.searched import Searched
from graphcache.page import write_page
from graphcache.planning.comparison import Contender, Kind

matplotlib.use("Agg")
from matplotlib import pyplot


def write(folder: Path, searched: Searched, rows: Sequence[Measured], samples: Mapping[str, Tensor]) -> Path:
    """Write report.html: the profile, the plan over it, and what was measured."""
    return write_page(
        folder / "report.html",
        searched.profile,
        {"searched and tuned": searched.plan},
        rows=[_row(number, row) for number, row in enumerate(rows)],
        pictures={row.method: _picture(samples[row.method]) for row in rows},
        candidates=searched.found.priced,
        title="A plan found for the digits model",
    )


def _row(number: int, row: Measured) -> Contender:
    kind: Kind = "preset" if row.peak_cache_mib is not None else "fewer steps"
    if row.method.startswith("searched"):
        kind = "searched"
    return Contender(
        row.method,
        kind if number else "plain",
        row.speedup,
        row.psnr_db,
        row.ssim,
        row.frechet_distance,
        row.ms_per_sample,
    )


def _picture(images: Tensor) -> bytes:
    file = io.BytesIO()
    pyplot.imsave(file, grid(images), cmap="gray_r", vmin=-1, vmax=1, format="png")
    return file.getvalue()
