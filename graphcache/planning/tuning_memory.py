"""What tuning holds at a time, by the graphs of a plan's phases."""

from collections.abc import Callable, Sequence

from graphcache.compiler.code import build
from graphcache.compiler.phase_code import Runnable
from graphcache.ir.graph import CacheRead, storage_bytes, value_of
from graphcache.passes.pure import Pure
from graphcache.planning.in_stretches import InStretches
from graphcache.planning.plan_memory import Lowered
from graphcache.planning.profile_memory import Needs, input_bytes, passing

_RESULTS = 8
"""Times a result that comparing one with another takes at most, in double precision."""


def cut(runnable: Runnable) -> InStretches:
    """A phase's graph in stretches; the cached values that it writes to are further results."""
    step = Pure()(runnable.step)
    return InStretches(Runnable(step, build(step, None)), len(step.outputs))


def tuning_needs(
    calls: Sequence[Lowered], cut_once: Callable[[Runnable], InStretches], result: int, references: int
) -> Needs:
    """Of one generation and its way back.

    Args:
        calls: the plan for each of a step's calls.
        cut_once: `cut`, which keeps what it made.
        result: bytes of that of a generation.
        references: results that are held beside it.
    """
    fixed = (references + _RESULTS) * result
    for call in calls:
        given = sum(storage_bytes(value_of(node)) for node in call.program.captured.step.results())
        fixed += sum(input_bytes(phase) + given for phase in call.phases)
        # gradients of entries wait for the steps that stored them, beside those of the step gone back through
        fixed += call.hoisted + call.stored + 2 * call.peak
        # and of entries that are written to every step has its own
        fixed += sum(map(_written, call.phases))
    phases = dict.fromkeys(phase for call in calls for phase in call.phases)
    strides = passing([cut_once(phase).stretches for phase in phases])
    advice = "fewer samples, or a plan that caches a range or the output alone, take less"
    return Needs(fixed, 0, strides, "tuning", advice)


def _written(phase: Runnable) -> int:
    """Bytes of the entries that a step writes to."""
    ports = phase.step.ports()
    return sum(value_of(n).nbytes for port, n in ports if isinstance(port, CacheRead) and port.changed)
