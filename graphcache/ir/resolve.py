"""How the rows of a plan meet the sites of a model."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graphcache.ir.errors import PlanError
from graphcache.ir.plan import Plan, Row
from graphcache.ir.selector import BranchLike, Selector


@dataclass(frozen=True, slots=True)
class Resolution:
    """The rows of a plan, met with a model's sites; a branch that is absent computes."""

    branches: dict[str, Row]
    ranges: tuple[tuple[Row, int, int], ...]
    output: Row | None
    guidance: Row | None


def resolve(plan: Plan, branches: Sequence[BranchLike], blocks: int) -> Resolution:
    """The row of every site of a model with `blocks` blocks; ranges come with first and last block.

    The last row that matches a site wins. Raises PlanError for a named, glob or range row that matches
    nothing, and for a plan of which no row matches anything.
    """
    chosen: dict[str, Row] = {}
    ranges: dict[tuple[int, int], Row] = {}
    output = guidance = None
    for row in plan.rows:
        selector = row.selector
        if selector.is_range:
            inside = selector.blocks(blocks)
            ranges.pop((inside[0], inside[-1]), None)
            ranges[inside[0], inside[-1]] = row
        elif selector.is_output:
            output = row
        elif selector.is_guidance:
            guidance = row
        else:
            matched = [branch.name for branch in branches if selector.matches(branch)]
            if not matched and not selector.is_role:
                raise PlanError(_no_match(selector, (branch.name for branch in branches)))
            chosen.update(dict.fromkeys(matched, row))
    if plan.rows and not (chosen or ranges or output or guidance):
        rows = ", ".join(str(row.selector) for row in plan.rows)
        roles = ", ".join(sorted({f"@{branch.role}" for branch in branches})) or "none"
        raise PlanError(f"no row of the plan matches a site: rows {rows}; roles of this model: {roles}")
    bounds = tuple((row, first, last) for (first, last), row in ranges.items())
    return Resolution(chosen, bounds, output, guidance)


def _no_match(selector: Selector, sites: Iterable[str]) -> str:
    names = list(sites)
    close = difflib.get_close_matches(selector.name, names, n=3, cutoff=0.5)
    if close:
        return f"row {selector} matches no site; close names: {', '.join(close)}"
    shown = ", ".join(names[:5]) or "none"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"row {selector} matches no site; sites of this model: {shown}{more}"
