"""Measured contenders of a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graphcache.ir.errors import GraphCacheError

Kind = Literal["preset", "searched", "fewer steps", "plain"]
KINDS: tuple[Kind, ...] = ("preset", "searched", "fewer steps", "plain")


@dataclass(frozen=True)
class Row:
    """One measured contender.

    Attributes:
        name: also that of its picture.
        kind: where it comes from; `plain` is the untouched model, which the others are compared with.
        speedup: the plain model's time by this one's.
        psnr: dB to the plain model's results; None of those themselves.
        ssim: likewise.
        frechet: Fréchet distance to real samples; None where it was not measured.
        ms: milliseconds of one sample.
    """

    name: str
    kind: Kind
    speedup: float
    psnr: float | None
    ssim: float | None = None
    frechet: float | None = None
    ms: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GraphCacheError(f"row {self.name}: kind={self.kind!r}; kinds are {', '.join(KINDS)}")


def unbeaten(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Those that no other one beats in both speed-up and PSNR, fastest first."""
    front: list[Row] = []
    best = float("-inf")
    for row in sorted(rows, key=lambda row: (-row.speedup, -(row.psnr or 0.0))):
        if row.psnr is not None and row.psnr > best:
            front.append(row)
            best = row.psnr
    return tuple(front)
