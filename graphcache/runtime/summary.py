"""What a run did, for people."""

from collections import Counter
from dataclasses import dataclass

from graphcache.ir.history import GUIDANCE, PREDICTION
from graphcache.ir.schedule import UNCORRECTED, Action, Step
from graphcache.ir.units import size
from graphcache.runtime.runner import Ran
from graphcache.runtime.session import CallSlot, Session


@dataclass(frozen=True)
class StepSummary:
    """One step: how many sites it obtained in which way, and the cache bytes held after it.

    Branches, ranges of the plan and `output` count; `partial` ones compute some of their tokens, `skipped`
    are those inside what is taken from the cache. `branches` are those of guidance that the call evaluated:
    of a doubled batch both or one.
    """

    step: int
    phase: int
    computed: int
    corrected: int
    reused: int
    forecast: int
    partial: int
    skipped: int
    held_bytes: int
    branches: int = 1


@dataclass(frozen=True)
class BranchSummary:
    """One branch's latest generation, as far as it went.

    `held_bytes` is measured, now. `peak_bytes` is the most that a whole generation holds, hoisted values
    included; `host_bytes` of it are in host memory by `offload`. `flops` are those of the steps that were
    run, `plain_flops` what the plain model takes for as many. `from_disk`: its capture
    was found in the folder `captures`, and the model not traced.
    """

    branch: str
    steps: tuple[StepSummary, ...]
    plan_steps: int
    phases: int
    graphs: int
    held_bytes: int
    hoisted_bytes: int
    peak_bytes: int
    host_bytes: int
    flops: int
    plain_flops: int
    from_disk: bool = False

    @property
    def ideal_speedup(self) -> float:
        """FLOPs of the plain model by those of the steps that were run."""
        return _ratio(self.plain_flops, self.flops)

    def __str__(self) -> str:
        name = f"branch {self.branch}: " if self.branch else ""
        source = " of a capture from disk" * self.from_disk
        lines = [
            f"{name}{len(self.steps)} of {self.plan_steps} steps, {self.phases} phases, "
            f"{self.graphs} graphs built{source}, {self.ideal_speedup:.2f} times fewer FLOPs",
            f"cache: {size(self.held_bytes)} held now, {size(self.peak_bytes)} at most, of which "
            f"{size(self.hoisted_bytes)} are values hoisted out of the steps"
            + (f" and {size(self.host_bytes)} in host memory" if self.host_bytes else ""),
            "step phase branches computed corrected reused forecast partial skipped      held",
        ]
        for s in self.steps:
            ways = f"{s.computed:8} {s.corrected:9} {s.reused:6} {s.forecast:8} {s.partial:7} {s.skipped:7}"
            lines.append(f"{s.step:4} {s.phase:5} {s.branches:8} {ways} {size(s.held_bytes):>9}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Summary:
    """What `summary()` returns: one entry per guidance branch."""

    branches: tuple[BranchSummary, ...]

    @property
    def held_bytes(self) -> int:
        """Bytes that all branches' caches and hoisted values hold now."""
        return sum(branch.held_bytes for branch in self.branches)

    @property
    def ideal_speedup(self) -> float:
        """FLOPs of the plain model by those of the steps that were run, over all branches."""
        return _ratio(
            sum(item.plain_flops for item in self.branches), sum(item.flops for item in self.branches)
        )

    def __str__(self) -> str:
        if not self.branches:
            return "no generation yet"
        return "\n\n".join(map(str, self.branches))


def summarise(session: Session) -> Summary:
    """Read the states of a session's branches; changes nothing."""
    branches = []
    for branch, state in session.states.items():
        program, schedule = state.program, state.schedule
        size = program.entry_bytes(schedule)
        moved = program.moved(schedule)
        branches.append(
            BranchSummary(
                branch=_label(branch),
                steps=tuple(map(_step, state.ran)),
                plan_steps=state.start + len(schedule.steps),
                phases=len(schedule.phases),
                graphs=program.graphs,
                held_bytes=state.cache.held_bytes() + state.cache.hoisted_bytes(),
                hoisted_bytes=state.hoisted_bytes,
                peak_bytes=schedule.peak(size) + state.hoisted_bytes,
                host_bytes=schedule.peak({name: size[name] * (name in moved) for name in size}),
                flops=sum(ran.program.flops(ran.schedule, ran.index, ran.hoisted) for ran in state.ran),
                plain_flops=sum(ran.program.plain_flops for ran in state.ran),
                from_disk=program.captured.from_disk,
            )
        )
    return Summary(tuple(branches))


def _ratio(plain: int, done: int) -> float:
    return plain / done if done else 1.0 if not plain else float("inf")


def _label(branch: CallSlot) -> str:
    name, ordinal = branch
    return name if ordinal == 0 else f"{name} call {ordinal + 1}".lstrip()


def _step(ran: Ran) -> StepSummary:
    program, schedule, index = ran.program, ran.schedule, ran.index
    step = schedule.steps[index]
    phase = schedule.phases[step.phase]
    pseudo = (GUIDANCE, PREDICTION)
    actions = {
        name.site: "compute" if _is_uncorrected(action, step) else action.kind
        for name, action in phase.actions
        if name.is_value and name.site not in pseudo
    }
    kinds = Counter(actions.values())
    for branch in program.captured.step.branches:
        if branch.name not in actions:
            skipped = not schedule.branches(index) or schedule.is_skipped(phase, branch.block)
            kinds["hold" if skipped else "compute"] += 1
    return StepSummary(
        step=ran.step,
        phase=step.phase,
        computed=kinds["compute"],
        corrected=kinds["correct"],
        reused=kinds["reuse"],
        forecast=kinds["forecast"],
        partial=kinds["tokens"],
        skipped=kinds["hold"],
        held_bytes=schedule.held(index, program.entry_bytes(schedule)),
        branches=schedule.branches(index),
    )


def _is_uncorrected(action: Action, step: Step) -> bool:
    """Whether the step only shares a corrected phase's graph, having no history to correct by."""
    return action.optional and step.coefficients[action.group] == UNCORRECTED
