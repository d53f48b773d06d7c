"""Mark the residual branches of a captured step."""

from dataclasses import dataclass

from graphcache.analysis.sites import find_branches
from graphcache.ir.graph import StepGraph


@dataclass(frozen=True)
class Tag:
    """Name every residual branch; the graph itself stays as it is."""

    def __call__(self, step: StepGraph) -> StepGraph:
        graph, _ = step.copy()
        return step.rebuilt(graph, branches=find_branches(step))
