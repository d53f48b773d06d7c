"""Measured contenders of a comparison, in order of what they are worth."""

from collections.abc import Sequence

from graphcache.comparison import Row


def unbeaten(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Those that no other one beats in both speed-up and PSNR, fastest first."""
    front: list[Row] = []
    best = float("-inf")
    for row in sorted(rows, key=lambda row: (-row.speedup, -(row.psnr or 0.0))):
        if row.psnr is not None and row.psnr > best:
            front.append(row)
            best = row.psnr
    return tuple(front)
