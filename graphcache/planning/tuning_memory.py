"""What tuning holds at a time, by the graphs of a plan's phases."""

from collections.abc import Callable, Sequence

from graphcache.compiler.phase_code import Runnable
from graphcache.ir.graph import CacheRead, storage_bytes, value_of
from graphcache.planning.in_stretches import InStretches
from graphcache.planning.plan_memory import Lowered
from graphcache.planning.profile_memory import Needs, input_bytes, passing

_RESULTS = 8
"""Times a result that comparing one with another takes at most, in double precision."""
_AT_ONCE = 2
"""Times what an evaluation computes that it takes to run it again as a whole."""


def cut(runnable: Runnable) -> InStretches | None:
    """A phase's graph in stretches; None where it writes into cached values, which it can do once."""
    if any(isinstance(port, CacheRead) and port.changed for port in runnable.step.inputs):
        return None
    return InStretches(runnable, len(runnable.step.outputs))


def tuning_needs(
    calls: Sequence[Lowered], cut_once: Callable[[Runnable], InStretches | None], result: int, references: int
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
    phases = {id(phase): phase for call in calls for phase in call.phases}.values()
    graphs = [graph.stretches for graph in map(cut_once, phases) if graph is not None]
    whole = max((_AT_ONCE * phase.computed_bytes for phase in phases if cut_once(phase) is None), default=0)
    strides = {stride: max(most, whole) for stride, most in passing(graphs).items()} if graphs else {0: whole}
    advice = "fewer samples, or a plan that caches a range or the output alone, take less"
    return Needs(fixed, 0, strides, "tuning", advice)
