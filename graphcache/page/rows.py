"""Measured contenders of a comparison, in order of what they are worth."""

from collections.abc import Sequence

from graphcache.planning.comparison import Contender
from graphcache.planning.pareto import unbeaten


def unbeaten_rows(rows: Sequence[Contender]) -> tuple[Contender, ...]:
    """Those that no other one beats in both speed-up and PSNR, fastest first."""
    known = [(row, row.psnr) for row in rows if row.psnr is not None]
    return tuple(row for row, _ in unbeaten(known, lambda item: (-item[0].speedup, -item[1])))
