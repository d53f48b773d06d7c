"""The clips of all methods side by side, as a GIF."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import font_manager
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from examples.demo.measure import Row
from examples.demo.picture import GAP, facts
from examples.demo.results import Setting

ZOOM = 5
SHADES = 16
"""Levels of grey; more are hardly seen and make a large file."""
PAPER, BORDER, INK, PALE_INK = 255, 221, 0, 85
FRAME_MS, LAST_FRAME_MS = 100, 600
HEAD, FOOT = 104, 26
"""Heights of what is written above the clips, and of a line below them, in pixels."""


def draw(path: Path, rows: Sequence[Row], clips: Mapping[str, Tensor], setting: Setting) -> None:
    """Write clips (N, 1, T, H, W) in [-1, 1]: a column per row of the table, titled with its numbers."""
    frames = _side_by_side(torch.stack([clips[row.method] for row in rows]))
    width = frames.shape[-1]
    head, foot = _head(rows, setting, width), _foot(setting, width)
    pages = [Image.fromarray(_shaded(np.vstack([head, frame, foot]))) for frame in frames]
    durations = [FRAME_MS] * (len(pages) - 1) + [LAST_FRAME_MS]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=durations, loop=0, optimize=True)


def _side_by_side(clips: Tensor) -> NDArray[np.uint8]:
    """Clips (methods, N, 1, T, H, W) as zoomed frames (T, lines of N, columns of methods), dark on light."""
    grey = PAPER - (clips[:, :, 0] + 1) / 2 * (PAPER - INK)
    bordered = F.pad(grey, (GAP, GAP, GAP, GAP), value=float(BORDER))
    columns, lines, frames, height, width = bordered.shape
    tiled = bordered.permute(2, 1, 3, 0, 4).reshape(frames, lines * height, columns * width)
    zoomed = tiled.repeat_interleave(ZOOM, 1).repeat_interleave(ZOOM, 2)
    array: NDArray[np.uint8] = zoomed.round().to(torch.uint8).numpy()
    return array


def _head(rows: Sequence[Row], setting: Setting, width: int) -> NDArray[np.uint8]:
    """Each method's name above its numbers."""
    image = Image.new("L", (width, HEAD), PAPER)
    pen = ImageDraw.Draw(image)
    for index, row in enumerate(rows):
        middle = (index + 0.5) * width / len(rows)
        pen.text((middle, 10), row.method, INK, _font(14, "bold"), anchor="ma")
        lines = "\n".join(facts(row, setting.sample))
        pen.multiline_text((middle, 34), lines, PALE_INK, _font(14), anchor="ma", align="center", spacing=5)
    return np.asarray(image)


def _foot(setting: Setting, width: int) -> NDArray[np.uint8]:
    """What the numbers are, in as many lines as the width takes."""
    font, text = _font(11), setting.footnote
    letters = int(len(text) * (width - 2 * GAP) / max(font.getlength(text), 1))
    lines = textwrap.wrap(text, letters)
    height = FOOT * len(lines)
    image = Image.new("L", (width, height), PAPER)
    place, told = (width / 2, height / 2), "\n".join(lines)
    pen = ImageDraw.Draw(image)
    pen.multiline_text(place, told, PALE_INK, font, anchor="mm", align="center", spacing=8)
    return np.asarray(image)


def _font(size: int, weight: str = "normal") -> ImageFont.FreeTypeFont:
    """Matplotlib's own font, in pixels."""
    return ImageFont.truetype(font_manager.findfont(font_manager.FontProperties(weight=weight)), size)


def _shaded(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rounded to few shades."""
    step = 255 / (SHADES - 1)
    rounded: NDArray[np.uint8] = (np.round(pixels / step) * step).astype(np.uint8)
    return rounded
