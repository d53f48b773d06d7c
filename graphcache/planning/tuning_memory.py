"""What tuning holds at a time, by the graphs of a plan's phases."""

from collections.abc import Callable, Sequence

from torch import Tensor

from graphcache.compiler.phase_code import Runnable
from graphcache.ir.graph import storage_bytes, value_of
from graphcache.planning.in_stretches import InStretches
from graphcache.planning.plan_memory import Lowered
from graphcache.planning.profile_memory import Needs, input_bytes, passing

_RESULTS = 8
"""Times a result that comparing one with another takes at most, in double precision."""
_AT_ONCE = 2
"""Times what an evaluation computes that it takes to run it again as a whole."""


def tuning_needs(
    calls: Sequence[Lowered], cut: Callable[[Runnable], InStretches | None], result: Tensor, references: int
) -> Needs:
    """Of one generation and its way back.

    Args:
        calls: the plan for each of a step's calls.
        cut: a phase in stretches; None where it runs as a whole.
        result: that of a generation.
        references: results that are held beside it.
    """
    fixed = (references + _RESULTS) * result.nbytes
    for call in calls:
        given = sum(storage_bytes(value_of(node)) for node in call.program.captured.step.results())
        fixed += sum(input_bytes(phase) + given for phase in call.phases)
        # gradients of entries wait for the steps that stored them, beside those of the step gone back through
        fixed += call.hoisted + call.stored + 2 * call.peak
    phases = {id(phase): phase for call in calls for phase in call.phases}.values()
    graphs = [graph.stretches for graph in map(cut, phases) if graph is not None]
    whole = max((_AT_ONCE * phase.computed_bytes for phase in phases if cut(phase) is None), default=0)
    strides = {stride: max(most, whole) for stride, most in passing(graphs).items()} if graphs else {0: whole}
    advice = "fewer samples, or a plan that caches a range or the output alone, take less"
    return Needs(fixed, 0, strides, "tuning", advice)
