"""What the parts of `auto` will take, before any of them runs: from the captured graph alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphcache import presets
from graphcache.analysis import ops
from graphcache.analysis.cost import flops, graph_flops
from graphcache.compiler.code import build
from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.pipeline import observed
from graphcache.compiler.program import Program
from graphcache.ir.graph import StepGraph, storage_bytes, value_of
from graphcache.ir.plan import Plan
from graphcache.planning.calibration import ACTIONS
from graphcache.planning.in_stretches import InStretches
from graphcache.planning.plan_memory import Lowered
from graphcache.planning.profile_memory import Needs
from graphcache.planning.subject import ranges
from graphcache.planning.tuning import with_corrections
from graphcache.planning.tuning_memory import cut, tuning_needs

ATTENTION_BACK = 2.5
"""Times the products of attention that its gradients take, its scores computed anew."""
_TIMED = 6
"""Generations of each kind that calibration times, with those that warm up."""
_LOOKS = 10
"""Iterations of tuning between two looks at the held-out samples."""


@dataclass(frozen=True)
class Part:
    """What one part takes.

    Attributes:
        name: "profile", "search", "tune" or "compare".
        generations: its work in uncached generations, without compilation.
        least: bytes beside the model without which it is refused.
        most: bytes beyond which it has no use for more.
    """

    name: str
    generations: float
    least: int
    most: int


@dataclass(frozen=True)
class Outlook:
    """Foresees a run of `auto`.

    Attributes:
        program: of one call of the model; weights are not looked at. Where ranks share it, bytes are those of
            a rank.
        steps: of a generation.
        speedup: what is asked for.
        calls: of the model in a step.
        profiled, trained, judges: numbers of samples.
        iterations: of tuning.
        branches: whether branches are profiled.
        window: of the profile.
        memory: bytes that every part may take.
        timed: whether compiled steps are timed.
        trials: iterations of tuning of which families are chosen by.
        rivals: contenders of the comparison that take as long as the plain model, at most.
    """

    program: Program
    steps: int
    speedup: float
    calls: int
    profiled: int
    trained: int
    judges: int
    iterations: int
    memory: int
    branches: bool = False
    window: int = 12
    timed: bool = True
    rivals: int = 0
    trials: int = 0

    def parts(self) -> tuple[Part, ...]:
        """All parts, in their order."""
        return self._profile(), self._search(), self._tune(), self._compare()

    def _profile(self) -> Part:
        found = tuple(ranges(self.program))
        branches = [branch.name for branch in self.program.step.block_branches] if self.branches else []
        shards, count = self.program.shards(found), self.program.captured.output.count
        graph = observed(self.program.step, branches, found, shards)
        probed = InStretches.probed(Runnable(graph, build(graph, None)), count, shards)
        window = min(self.window, self.steps - 1)
        needs = Needs.of(probed, steps=self.steps, window=window, calls=self.calls)
        computed = [probed.runnable.computed_bytes] * self.steps * self.calls
        again = self._again(needs, computed)
        probes = 2 if self.branches else 1
        runs = 1 + self.profiled * (1 + probes * (self._back(graph) + again))
        families = 1 + len(found) + self.branches
        timed = _TIMED * len(ACTIONS) / self.steps * (1 + families * ACTIONS.count("#") / len(ACTIONS))
        return Part("profile", runs + self.timed * timed, needs.least, _most(needs, computed))

    def _search(self) -> Part:
        kept = self._kept(self.expected)
        return Part("search", self._checked * (1 + 3 / self.speedup), kept, kept)

    def _tune(self) -> Part:
        calls = self._lowered(self.expected)
        needs = tuning_needs(calls, cut, self._result, self.trained + self.judges)
        phases = [phase for call in calls for phase in call.phases]
        computed = [phase.computed_bytes for phase in phases]
        ranks = math.prod(ranks.count for ranks in self.program.mesh)
        plain = graph_flops(self.program.captured.step) / ranks * len(phases)
        forth = sum(phase.flops for phase in phases) / plain
        back = sum(self._back(phase.step) * phase.flops for phase in phases) / plain
        each = forth * (1 + self._again(needs, computed)) + back
        looks = self.judges * forth * (1 + self.iterations // _LOOKS)
        references = 1 + self.trained - self._checked + self.judges
        runs = references + (self.iterations + self.trials) * each + looks
        return Part("tune", runs if self.iterations else 0.0, needs.least, _most(needs, computed))

    def _compare(self) -> Part:
        every = max(2, round(self.speedup))
        plans = [
            self.expected,
            *(make(self.steps, interval=every) for make in (presets.fora, presets.taylorseer)),
        ]
        held = (len(plans) + 2 + self.rivals) * self._result
        kept = [held + self._kept(plan) for plan in plans]
        runs = 2 + (self.judges + 1) * (1 + self.rivals + (len(plans) + 1) / self.speedup)
        return Part("compare", runs, kept[0], max(kept))

    @property
    def _checked(self) -> int:
        """Samples that candidates are run for; tuning takes up their uncached results."""
        return min(2, self.trained)

    @property
    def _result(self) -> int:
        """Bytes of a generation's result, which is taken to be as large as the model's."""
        return sum(storage_bytes(value_of(node)) for node in self.program.captured.step.results())

    @property
    def expected(self) -> Plan:
        """Such a plan as search finds: every so many steps are computed, the others skip all blocks."""
        every = max(2, round(self.speedup))
        actions = "".join("#" if step < 2 or step % every == 0 else "f" for step in range(self.steps))
        listed = [f"\n  step {step} = 1.5 -0.5" for step, action in enumerate(actions) if action == "f"]
        site = next((name for name, *_ in ranges(self.program)), "output")
        text = f"plan steps={self.steps} preset=none\nf = fitted order=1\n{site} {actions}"
        return with_corrections(Plan.parse(text + "".join(listed)))

    def _lowered(self, plan: Plan) -> list[Lowered]:
        return [Lowered(self.program, self.program.schedule(plan))] * self.calls

    def _kept(self, plan: Plan) -> int:
        return sum(call.peak + call.hoisted for call in self._lowered(plan))

    def _again(self, needs: Needs, computed: Sequence[int]) -> float:
        """Runs of an evaluation on the way back, on the mean: those that are held need none."""
        share = needs.share(max(self.memory, needs.least))
        left, held = share.held, 0
        for size in computed:
            held += size <= left
            left -= size if size <= left else 0
        return (1 - held / len(computed)) * (2 if share.stride else 1)

    @staticmethod
    def _back(step: StepGraph) -> float:
        """The work of gradients by that of the run that they belong to; weights have none."""
        forth = graph_flops(step)
        return sum(flops(node) * _operands(node) for node in step.graph.nodes) / forth if forth else 0.0


def _most(needs: Needs, computed: Sequence[int]) -> int:
    return needs.fixed + needs.branches + needs.passing[0] + sum(computed)


def _operands(node: fx.Node) -> float:
    """Products that the gradients of a product take: one for each operand that is no weight."""
    if node.target in ops.ATTENTION:
        return ATTENTION_BACK
    given: list[Any] = [item for item in node.all_input_nodes if item.op != "get_attr"]
    return min(2, len(given))
