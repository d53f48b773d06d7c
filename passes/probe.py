"""Hand out every site's value, and the values whose gradients are the site's."""

from collections.abc import Sequence
from dataclasses import dataclass

from graphcache.analysis.ranges import Bypass, cut_range
from graphcache.ir.graph import CacheWrite, StepGraph
from graphcache.ir.history import History
from graphcache.passes.rewrite import Rewriter, aten


@dataclass(frozen=True)
class Probe:
    """Write the value of every branch, and of every (name, first block, last block) of `ranges`.

    The gradient of a range's change is that of the stream behind it, its `handle`.
    """

    branches: Sequence[str]
    ranges: Sequence[tuple[str, int, int]] = ()

    def __call__(self, step: StepGraph) -> StepGraph:
        rewriter = Rewriter(step)
        values = {branch.name: branch.value for branch in step.branches}
        for name in self.branches:
            rewriter.write(CacheWrite(History(name), 0), rewriter.nodes[values[name]])
        for name, first, last in self.ranges:
            cut = cut_range(step, name, first, last)
            bypass = Bypass(rewriter.graph, cut)
            for part, leaving in enumerate(cut.leaving):
                merge = rewriter.nodes[leaving]
                before = bypass(merge)
                delta = rewriter.emit(max(merge, before), aten.sub.Tensor, merge, before)
                rewriter.write(CacheWrite(History(name), part), delta)
                rewriter.write(CacheWrite(History(name, "handle"), part), merge)
        return rewriter.finished()
