"""What a pass is: a frozen dataclass called like a function, from StepGraph to new StepGraph."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from graphcache.ir.errors import CaptureError, GraphCacheError
from graphcache.ir.graph import StepGraph


class Pass(Protocol):
    """A rewrite; its fields are its options and its name stands in dumps, errors and histories."""

    def __call__(self, step: StepGraph) -> StepGraph: ...


Observer = Callable[[str, StepGraph, StepGraph], None]
"""Called with (pass name, before, after): dumps, timings and verification are observers."""


def run(passes: Sequence[Pass], step: StepGraph, observers: Sequence[Observer] = ()) -> StepGraph:
    """Apply passes in order, record each in the history, and verify what it made.

    Raises:
        CaptureError: a pass would compare sizes that depend on values.
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    for item in passes:
        name = type(item).__name__
        try:
            after = item(step)
        except GuardOnDataDependentSymNode as error:
            reason = str(error).partition(" (unhinted")[0]
            raise CaptureError(
                f"the model's step has sizes that depend on tensor values, and {name} has to know them "
                f"({reason}). Use operations that keep the size, such as torch.where and masks"
            ) from error
        after = replace(after, passes=(*step.passes, name))
        verify(after, name)
        for observe in observers:
            observe(name, step, after)
        step = after
    return step


def verify(step: StepGraph, where: str) -> None:
    """Check that ports match the graph and that every branch still names nodes of it.

    Raises:
        GraphCacheError: naming the pass that broke the graph.
    """
    if len(step.inputs) != len(step.placeholders()):
        raise GraphCacheError(
            f"{where}: {len(step.inputs)} input ports, {len(step.placeholders())} placeholders"
        )
    if len(step.outputs) != len(step.results()):
        raise GraphCacheError(f"{where}: {len(step.outputs)} output ports, {len(step.results())} results")
    names = step.nodes()
    for branch in step.branches:
        if branch.merge not in names or branch.value not in names:
            raise GraphCacheError(f"{where}: branch {branch.name} names a node that is gone")
