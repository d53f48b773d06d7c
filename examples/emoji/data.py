"""Emoji with their English names: the pictures of the font Noto Color Emoji on white.

The font is © Google and under the SIL Open Font License 1.1. Its bitmaps, 136x128 pixels, are drawn once
and kept at 64x64; size and position are varied there, and only then is a picture averaged down.

Only training needs what draws them: the font (Debian's ``fonts-noto-color-emoji``), Pillow with Raqm
(``libraqm0``) for emoji of several code points, and the package ``emoji`` for the sequences and names.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

IMAGE_SIZE = 32
CHANNELS = 3
CANVAS_SIZE = 64
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")

SHIFT = 1.0
SCALE = 0.05
"""Ranges of the redrawing, plus or minus: pixels of the final image and shares of the size."""

_FONT_SIZE = 109
"""The only size that the font's bitmaps have."""
_GLYPH_WIDTH, _GLYPH_HEIGHT = 136, 128
_DRAWN_SIZE = 144
_WHITE = (255, 255, 255)
_SKIN_TONES_AND_FLAGS = re.compile("[\U0001f3fb-\U0001f3ff\U0001f1e6-\U0001f1ff\U000e0020-\U000e007f]")
_WORD = re.compile(r"[^\W_]+|[#*]")
_APOSTROPHES = re.compile("['’]")


@dataclass(frozen=True)
class Pictures:
    """Emoji and what each shows.

    Attributes:
        canvases: uint8 of shape (N, CHANNELS, CANVAS_SIZE, CANVAS_SIZE).
        names: of each, lower-case words with a space between.
    """

    canvases: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> Pictures:
        """The same pictures there; to draw from them, make it the default device."""
        return Pictures(self.canvases.to(device), self.names)

    def batch(
        self, size: int, generator: torch.Generator, *, side: int = IMAGE_SIZE
    ) -> tuple[Tensor, Tensor]:
        """Draw `size` pictures with replacement, each a little moved and scaled.

        Returns:
            pictures (size, CHANNELS, side, side) in [-1, 1] and int64 numbers of their names (size,).
        """
        index = torch.randint(len(self), (size,), generator=generator)
        canvases = self.canvases[index].float() / 127.5 - 1
        grid = F.affine_grid(_affine(size, generator), list(canvases.shape), align_corners=False)
        moved = F.grid_sample(canvases, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return F.avg_pool2d(moved, CANVAS_SIZE // side), index


def load_pictures(cache: Path) -> Pictures:
    """The pictures stored in the file `cache`, drawn first if it does not exist."""
    if not cache.exists():
        pictures = draw_pictures()
        torch.save({"canvases": pictures.canvases, "names": pictures.names}, cache)
    contents = torch.load(cache, weights_only=True)
    return Pictures(contents["canvases"], contents["names"])


def draw_pictures() -> Pictures:
    """One picture for each emoji of the font, without skin tones and flags.

    Emoji that look alike or whose names consist of the same words are there once.
    """
    font = _load_font()
    words: set[frozenset[str]] = set()
    drawn: dict[bytes, str] = {_draw("", font).tobytes(): ""}
    for sequence, name in _sequences():
        if round(font.getlength(sequence)) != _GLYPH_WIDTH or frozenset(name.split()) in words:
            continue
        pixels = _draw(sequence, font).tobytes()
        if pixels not in drawn:
            drawn[pixels] = name
            words.add(frozenset(name.split()))
    names = [name for name in drawn.values() if name]
    shape = (len(drawn), CANVAS_SIZE, CANVAS_SIZE, CHANNELS)
    canvases = torch.from_numpy(np.frombuffer(b"".join(drawn), dtype=np.uint8).reshape(shape).copy())
    return Pictures(canvases[1:].permute(0, 3, 1, 2).contiguous(), names)


def plain_name(text: str) -> str:
    """Lower-case words with a space between, as in :eight_o’clock: -> eight oclock."""
    return " ".join(_WORD.findall(_APOSTROPHES.sub("", text.lower())))


def _load_font() -> ImageFont.FreeTypeFont:
    if not FONT.exists():
        raise FileNotFoundError(f"{FONT} is missing: apt-get install fonts-noto-color-emoji")
    if not features.check("raqm"):
        raise RuntimeError("Pillow finds no Raqm layout: apt-get install libraqm0 libfribidi0")
    return ImageFont.truetype(FONT, _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)


def _sequences() -> Iterator[tuple[str, str]]:
    """Code points and name of each emoji, in the order of the package."""
    try:
        package: Any = importlib.import_module("emoji")
    except ImportError as error:
        raise ImportError("the emoji's names come from a package: pip install emoji") from error
    for sequence, entry in package.EMOJI_DATA.items():
        qualified = entry["status"] == package.STATUS["fully_qualified"]
        if qualified and not _SKIN_TONES_AND_FLAGS.search(sequence):
            yield sequence, plain_name(entry["en"])


def _draw(sequence: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    image = Image.new("RGB", (_DRAWN_SIZE, _DRAWN_SIZE), _WHITE)
    corner = ((_DRAWN_SIZE - _GLYPH_WIDTH) // 2, (_DRAWN_SIZE - _GLYPH_HEIGHT) // 2)
    ImageDraw.Draw(image).text(corner, sequence, font=font, embedded_color=True)
    return image.resize((CANVAS_SIZE, CANVAS_SIZE), Image.Resampling.LANCZOS)


def _affine(count: int, generator: torch.Generator) -> Tensor:
    """Inverse maps from output to input coordinates, (count, 2, 3) in the units of `affine_grid`."""
    scale, column, row = torch.rand(3, count, generator=generator) * 2 - 1
    factor = 1 / (1 + SCALE * scale)
    reach = SHIFT * 2 / IMAGE_SIZE
    zero = torch.zeros(count)
    rows = [torch.stack([factor, zero, reach * column]), torch.stack([zero, factor, reach * row])]
    return torch.stack(rows).permute(2, 0, 1)
