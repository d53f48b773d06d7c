"""Schedules of other tools as plans. An importer reads data, runs nothing, and knows no model."""

import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import msgspec
import torch
from torch import Tensor

from graphcache.ir.errors import PlanError
from graphcache.ir.letter import Letter
from graphcache.ir.plan import COMPUTE, REUSE, Plan, Row, check_steps
from graphcache.ir.plantext import read_bytes
from graphcache.ir.selector import Selector

_ATTENTION = ("@self", "@joint")
_COMPONENTS: dict[str, tuple[str, ...]] = {
    "attn": _ATTENTION,
    "attn1": _ATTENTION,
    "self_attn": ("@self",),
    "attn_temp": ("@self.temporal",),
    "attn2": ("@cross",),
    "cross_attn": ("@cross",),
    "joint_attn": ("@joint",),
    "mlp": ("@mlp",),
    "ff": ("@mlp",),
    "ffn": ("@mlp",),
    "feed_forward": ("@mlp",),
    "ff_context": ("@mlp.context",),
}
_INDEXED = re.compile(r"(.+)-(\d{1,6})")
_ALL_BLOCKS = Selector.parse("range(0.0..1.0)")


def smoothcache(
    schedule: str | os.PathLike[str] | Mapping[str, Sequence[int]],
    rows: Mapping[str, str] | None = None,
    blocks: int | None = None,
) -> Plan:
    """A schedule of SmoothCache (arXiv 2411.10510, github.com/Roblox/SmoothCache, 0.1.1).

    Its components are modules of a block, by attribute name; here they become roles. `attn` and `attn1` are
    self-attention in some models and joint attention in others, so both roles get the row. `attn-3` is the
    component of block 3 alone; it goes before `attn`, as there, and becomes a part of the depth. `ff` is the
    text stream's too, unless `ff_context` is listed.

    Args:
        schedule: a JSON file, or what is in one: {"attn": [1, 0, 0, 1], "mlp": [1, 0, 1, 0]}, a number a
            step, 1 to compute and 0 to reuse. SmoothCache computes a leading 0; here it is an error.
        rows: the site of each component that is not known or means something else: {"norm": "@self"}. Any
            selector of docs/plans.md.
        blocks: how many the model has. Needed where `attn-3` and the like leave blocks out.

    Raises:
        PlanError: a file that holds no such schedule, lists of unequal length, an unknown component, or two
            components for one site.
    """
    if not isinstance(schedule, Mapping):
        try:
            return smoothcache(_read(schedule), rows, blocks)
        except PlanError as error:
            raise PlanError(f"{os.fspath(schedule)}: {error}") from None
    rows = rows or {}
    _check_rows(schedule, rows)
    actions = {name: _actions(f"component {_cut(name)}", values) for name, values in schedule.items()}
    steps = _common_length(actions)
    sites = _sites(schedule, rows, _depth(schedule, rows, blocks))
    made = [Row(selector, actions[name]) for selector, name in sites.items()]
    return Plan(steps, rows=tuple(sorted(made, key=lambda row: "." in row.selector.name)))


def steps_mask(
    mask: Sequence[int],
    front: int = 0,
    back: int = 0,
    blocks: int | Sequence[int] | None = None,
    order: int | None = None,
) -> Plan:
    """A mask over the steps, as `cache_dit.steps_mask` makes one: 1 computes, 0 reuses.

    It is what DBCache of cache-dit 1.5.3 does with steps_computation_mask=mask,
    steps_computation_policy="static", Fn_compute_blocks=front and Bn_compute_blocks=back. At a 0 the first
    `front` and the last `back` blocks compute; what those between added to each stream at the latest 1 is
    added again. Its warm-up and thresholds change nothing then. Its Fn_compute_blocks is 8 by default and at
    least 1.

    Args:
        mask: a number a step, the first one 1.
        front: how many blocks at the beginning compute at every step.
        back: how many blocks at the end compute at every step.
        blocks: how many the model has, so that front and back can be counted. Several numbers, as (19, 38),
            where cache-dit was given several lists of blocks that run one after the other: each list has a
            front and a back of its own.
        order: forecast at a 0 instead, as with TaylorSeerCalibratorConfig(taylorseer_order=order). That takes
            no differences between its first three steps, and equals the plan, up to rounding, where the mask
            begins with order + 3 ones or more.

    Raises:
        PlanError: a mask of other numbers, or no block left between front and back.
    """
    letters = () if order is None else (Letter("t", "taylorseer", (("order", order),)),)
    actions = _actions("the mask", mask, letters[0].symbol if letters else REUSE)
    selectors = _between(_count("front", front), _count("back", back), blocks)
    return Plan(len(actions), letters, tuple(Row(selector, actions) for selector in selectors))


def magcache(
    mag_ratios: Sequence[float] | Tensor,
    steps: int | None = None,
    threshold: float = 0.06,
    max_skip_steps: int = 3,
    retention_ratio: float = 0.2,
) -> Plan:
    """What MagCache (arXiv 2506.09045) decides for these ratios, as diffusers 0.42.1 computes it.

    A step reuses what all blocks together add to the stream while the errors, |1 - product of the ratios
    since the last full step|, sum to at most `threshold`; at most `max_skip_steps` times in a row, and never
    in the first `retention_ratio` of the steps. No run changes that, so it is a plan. The paper's script for
    FLUX always computes step 11 of 28 as well.

    Args:
        mag_ratios: how the norm of that addition grows from step to step, 1 for the first one, as
            `MagCacheConfig(calibrate=True)` prints it. Of one guidance branch: the paper's lists for Wan hold
            two in turn.
        steps: model evaluations of a generation, by default one a ratio; others take the nearest ratio.

    Raises:
        PlanError: ratios that are no list of finite numbers, or an option out of bounds.
    """
    ratios = _ratios(mag_ratios)
    steps = len(ratios) if steps is None else steps
    check_steps(steps)
    _check_number("threshold", threshold, most=float("inf"))
    _check_number("retention_ratio", retention_ratio, most=1)
    most = _count("max_skip_steps", max_skip_steps)
    if steps != len(ratios):
        ratios = ratios[_nearest(len(ratios), steps)]
    actions = _magcache_actions(ratios, threshold, most, retained=int(retention_ratio * steps + 0.5))
    return Plan(steps, rows=(Row(_ALL_BLOCKS, actions),))


def _read(path: str | os.PathLike[str]) -> dict[str, list[int]]:
    data = read_bytes(path)
    try:
        return msgspec.json.decode(data, type=dict[str, list[int]])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(f"not a schedule of SmoothCache: {error}") from None


def _actions(what: str, values: object, zero: str = REUSE) -> str:
    """The characters of a row from its zeros and ones."""
    if not isinstance(values, Iterable):
        raise PlanError(f"{what} is not a list of 1 (compute) and 0 (reuse)")
    row = ""
    for step, value in enumerate(values):
        number = _index(value)
        if number not in (0, 1):
            raise PlanError(f"{what}, step {step}: {value!r} is neither 1 (compute) nor 0 (reuse)")
        row += COMPUTE if number else zero
    if not row:
        raise PlanError(f"{what} has no steps")
    if row[0] != COMPUTE:
        raise PlanError(f"{what} starts with 0, but nothing is cached before the first step; make it 1")
    return row


def _index(value: object) -> int | None:
    """A whole number of any library as an int; None of anything else."""
    try:
        return operator.index(cast(Any, value))
    except TypeError:
        return None


def _count(name: str, value: object, least: int = 0) -> int:
    number = None if isinstance(value, bool) else _index(value)
    if number is None or number < least:
        raise PlanError(f"{name}={value}: must be a whole number of at least {least}")
    return number


def _check_number(name: str, value: object, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise PlanError(f"{name}={value}: must be a number from 0 to {most:g}")


def _cut(name: str) -> str:
    """A name out of a stranger's file, short enough for a message."""
    return repr(name if len(name) <= 40 else name[:40] + "…")


def _common_length(actions: Mapping[str, str]) -> int:
    if not actions:
        raise PlanError('the schedule is empty; it looks like {"attn": [1, 0, 0, 1], "mlp": [1, 0, 1, 0]}')
    (first, row), *rest = actions.items()
    for name, other in rest:
        if len(other) != len(row):
            raise PlanError(
                f"component {_cut(name)} has {len(other)} steps, component {_cut(first)} has {len(row)}; "
                f"all lists have a number for each step"
            )
    return len(row)


def _check_rows(schedule: Iterable[str], rows: Mapping[str, str]) -> None:
    named = dict.fromkeys(part for name in schedule for part in (_split(name)[0], name))
    for name in rows:
        if name not in named:
            known = ", ".join(map(_cut, named))
            raise PlanError(f"rows: the schedule has no component {name!r}; it has {known}")


def _split(name: str) -> tuple[str, int | None]:
    """A component and the block that it is restricted to."""
    found = _INDEXED.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)


def _depth(schedule: Iterable[str], rows: Mapping[str, str], blocks: int | None) -> int:
    """How many blocks the model has; 0 where no component is restricted to one."""
    split = [_split(name) for name in schedule if name not in rows]
    named = {block for _, block in split if block is not None}
    last = max(named, default=-1)
    count = len(named) if blocks is None else _count("blocks", blocks, least=1)
    if last >= count:
        raise PlanError(
            f"the schedule speaks of block {last} and names {len(named)} in all; say how many blocks the "
            f"model has: blocks={last + 1} or more, since the first is 0"
        )
    return count


def _sites(schedule: Iterable[str], rows: Mapping[str, str], count: int) -> dict[Selector, str]:
    """The component of each selector, those of single blocks last."""
    sites: dict[Selector, str] = {}
    for name in sorted(schedule, key=lambda name: _split(name)[1] is not None):
        for selector in _selectors(name, rows, count):
            other = sites.setdefault(selector, name)
            if other != name:
                raise PlanError(
                    f"components {_cut(other)} and {_cut(name)} both are {selector}; say which site one of "
                    f"them is: rows={{{_cut(name)}: '@…'}}"
                )
    return sites


def _selectors(name: str, rows: Mapping[str, str], count: int) -> tuple[Selector, ...]:
    if name in rows:
        return (Selector.parse(rows[name]),)
    component, block = _split(name)
    texts = (rows[component],) if component in rows else _COMPONENTS.get(component)
    if texts is None:
        raise PlanError(
            f"component {_cut(component)} is not known; known are {', '.join(_COMPONENTS)}; say which site "
            f"it is: rows={{{_cut(component)}: '@self'}}"
        )
    found = tuple(map(Selector.parse, texts))
    return found if block is None else tuple(_narrowed(selector, block, count) for selector in found)


def _narrowed(selector: Selector, block: int, count: int) -> Selector:
    """The role at one of `count` blocks: half a block to either side of its depth."""
    if not selector.is_role or selector.bounds is not None:
        raise PlanError(
            f"rows: {selector} cannot be narrowed to block {block}; give a role such as @self, or a site for "
            f"each of the component's blocks"
        )
    low, high = (round((block + side) / max(count - 1, 1), 6) for side in (-0.5, 0.5))
    return replace(selector, bounds=(max(low, 0.0), min(high, 1.0)))


def _between(front: int, back: int, blocks: int | Sequence[int] | None) -> list[Selector]:
    """Of each list of blocks the range between its front and its back, where there is one."""
    if blocks is None:
        if front or back:
            raise PlanError(
                f"front={front} and back={back} count blocks; say how many the model has: blocks=57, or "
                f"blocks=(19, 38) for two lists; graphcache inspect shows how many"
            )
        return [_ALL_BLOCKS]
    ranges, start = [], 0
    for given in blocks if isinstance(blocks, Sequence) else (blocks,):
        size = _count("blocks", given, least=1)
        if front + back > size:
            raise PlanError(f"front={front} and back={back} are more than {size} blocks")
        if front + back < size:
            ranges.append(Selector.parse(f"range({start + front}..{start + size - back - 1})"))
        start += size
    if not ranges:
        raise PlanError(f"front={front} and back={back} leave no block of blocks={blocks} to reuse")
    return ranges


def _ratios(values: object) -> Tensor:
    """A vector in the dtype that MagCacheConfig gives it, since the errors are summed in that."""
    try:
        ratios = torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(f"mag_ratios is not a list of numbers: {error}") from None
    if ratios.ndim != 1 or not len(ratios) or ratios.is_complex() or not ratios.isfinite().all():
        raise PlanError("mag_ratios is not a list of finite numbers, one a step")
    return ratios


def _nearest(length: int, steps: int) -> Tensor:
    """For each step the index of the ratio nearest in position; a single step takes the last."""
    if steps == 1:
        return torch.tensor([length - 1])
    scale = (length - 1) / (steps - 1)
    return torch.round(torch.arange(steps, dtype=torch.float32) * scale).long()


def _magcache_actions(ratios: Tensor, threshold: float, most: int, retained: int) -> str:
    product: Any = 1.0
    error: Any = 0.0
    row, skipped = "", 0
    for step, ratio in enumerate(ratios):
        is_taken = False
        if step >= retained:
            product, skipped = product * ratio, skipped + 1
            error = error + abs(1.0 - product)
            is_taken = step > 0 and bool(error <= threshold) and skipped <= most
        if not is_taken:
            product, error, skipped = 1.0, 0.0, 0
        row += REUSE if is_taken else COMPUTE
    return row
