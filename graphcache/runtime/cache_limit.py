"""Keeps caches within a number of bytes on the device, or says which plan would."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from graphcache.compiler.program import Program
from graphcache.ir.errors import PlanError
from graphcache.ir.graph import storage_bytes, value_of
from graphcache.ir.history import History
from graphcache.ir.plan import COMPUTE, REUSE, Plan, Row
from graphcache.ir.resolve import resolve
from graphcache.ir.schedule import Schedule
from graphcache.ir.selector import Selector
from graphcache.ir.units import size
from graphcache.runtime.runner import BranchState

_WHOLE_DEPTH, _OUTPUT = "range(0.0..1.0)", "output"


def device_bytes(program: Program, schedule: Schedule) -> int:
    """The most that a generation's caches take on the device, values computed once included.

    Of what is offloaded the entries of two sites are there at a time.
    """
    sizes, moved = program.entry_bytes(schedule), program.moved(schedule)
    there = schedule.peak({name: 0 if name in moved else count for name, count in sizes.items()})
    passing = max((sizes[name] * _entries(schedule, name) for name in moved), default=0)
    hoisted = program.prologue.step.results() if program.prologue else ()
    return there + 2 * passing + sum(storage_bytes(value_of(node)) for node in hoisted)


def _entries(schedule: Schedule, name: History) -> int:
    return max((step.keep.get(name, 0) for step in schedule.steps), default=0)


def keep_within(limit: int, others: Sequence[BranchState], state: BranchState, plan: Plan) -> bool:
    """Let a branch that begins keep within what the other branches of its generation leave of a limit.

    Returns:
        Whether its caches go to host memory for that.

    Raises:
        PlanError: they do not fit there either; the message has a plan that does, if there is one.
    """
    left = limit - sum(device_bytes(other.program, other.schedule) for other in others)
    needed = device_bytes(state.program, state.schedule)
    if needed <= left:
        return False
    away = state.program.offloaded
    if away is not state.program and device_bytes(away, state.schedule) <= left:
        state.program = away
        return True
    beside = f" beside the {size(limit - left)} of the generation's other branches" if others else ""
    with_offload = device_bytes(away, state.schedule)
    text = (
        f"max_cache_bytes={limit}: under this plan a branch caches up to {size(needed)}{beside}, and keeps "
        f"{size(with_offload)} on the device with offload=True. "
    )
    made = next(_fitting(state, plan, left), None)
    if made is None:
        raise PlanError(f"{text}Nothing that caches fits: raise the limit, or use presets.compute")
    raise PlanError(f"{text}This plan would fit; compare its pictures (graphcache.compare):\n{made}")


def _fitting(state: BranchState, plan: Plan, left: int) -> Iterator[Plan]:
    """Plans that cache less and compute at the same steps, the most faithful first."""
    actions = _usual(state.program, plan)
    reused = "".join(COMPUTE if action == COMPUTE else REUSE for action in actions)
    for site, row in ((_WHOLE_DEPTH, actions), (_WHOLE_DEPTH, reused), (_OUTPUT, actions), (_OUTPUT, reused)):
        letters = tuple(letter for letter in plan.letters if letter.symbol in row)
        with suppress(PlanError):
            made = replace(plan, letters=letters, rows=(Row(Selector.parse(site), row),), preset=None)
            schedule = state.program.schedule(made, state.start, state.role)
            if device_bytes(state.program, schedule) <= left:
                yield made


def _usual(program: Program, plan: Plan) -> str:
    """The actions of most sites."""
    step = program.captured.step
    found = resolve(plan, step.branches, step.blocks)
    rows = [*found.branches.values(), *(row for row, _, _ in found.ranges)]
    rows += [row for row in (found.output, found.guidance) if row is not None]
    return Counter(row.actions for row in rows).most_common(1)[0][0]
