"""The samples of all methods in one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from examples.demo.measure import Row
from examples.demo.results import Setting

matplotlib.use("Agg")
from matplotlib import pyplot

COLUMNS = 3
GAP = 1
DPI = 120


def draw(path: Path, rows: Sequence[Row], images: Mapping[str, Tensor], setting: Setting) -> None:
    """Write one grid of images (N, 1 or 3, H, W) in [-1, 1] per row of the table, titled with its numbers."""
    lines = math.ceil(len(rows) / COLUMNS)
    grids = [grid(images[row.method]) for row in rows]
    height = 4 * grids[0].shape[0] / grids[0].shape[1] + 0.75
    figure, axes = pyplot.subplots(
        lines, COLUMNS, figsize=(4 * COLUMNS, height * lines + 0.35), dpi=DPI, squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, row, drawn in zip(axes.flat, rows, grids, strict=False):
        axis.imshow(drawn, cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.text(0.5, 1.105, row.method, transform=axis.transAxes, ha="center", fontsize=16, weight="bold")
        axis.text(
            0.5,
            1.03,
            " · ".join(facts(row, setting.sample)),
            transform=axis.transAxes,
            ha="center",
            fontsize=12,
            color="#555555",
        )
    figure.text(0.5, 0.012, setting.footnote, ha="center", fontsize=10.5, color="#555555")
    figure.subplots_adjust(left=0.015, right=0.985, top=0.93, bottom=0.04, wspace=0.06, hspace=0.2)
    figure.savefig(path)
    pyplot.close(figure)


def facts(row: Row, sample: str) -> list[str]:
    """Speed-up and how near the samples are to the uncached ones."""
    steps = f"{row.model_calls} steps"
    if row.psnr_db is None:
        return [steps, f"{row.ms_per_sample:.0f} ms per {sample}"]
    return [steps, f"{row.speedup:.2f}× as fast", f"{row.psnr_db:.1f} dB"]


def grid(images: Tensor) -> NDArray[np.float32]:
    """Images (N, 1 or 3, H, W) in a near-square array, with lines of paper between them.

    Ink is high on one channel; colours are turned into the 0 to 1 that matplotlib shows.
    """
    count, channels, height, _ = images.shape
    columns = math.isqrt(count - 1) + 1
    lines = math.ceil(count / columns)
    paper = -1.0 if channels == 1 else 1.0
    padded = F.pad(images, (GAP, GAP, GAP, GAP), value=paper)
    blank = torch.full((lines * columns - count, *padded.shape[1:]), paper)
    tiles = torch.cat([padded, blank]).reshape(lines, columns, *padded.shape[1:])
    sheet = tiles.permute(0, 3, 1, 4, 2).reshape(lines * (height + 2 * GAP), -1, channels)
    array: NDArray[np.float32] = (sheet[..., 0] if channels == 1 else sheet / 2 + 0.5).numpy()
    return array
