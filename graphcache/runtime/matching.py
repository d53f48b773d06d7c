"""Which of the calls of a step a call is: told by its context, its inputs, and the order of the calls."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from graphcache.ir.call import Key
from graphcache.ir.errors import StateError
from graphcache.ir.versions import version
from graphcache.runtime.runner import BranchState
from graphcache.runtime.session import CallSlot, Generation, Session

UNDECLARED = 4
"""Calls at one step that are taken for branches where the scheduler tells the step."""


class Call(NamedTuple):
    """What is known of a call before it is placed.

    `fields` are those of the cache context, `bound` the arguments by name, `tensors` their leaves and `names`
    those leaves' names. `constants` are the inputs beside latents and timestep, `versions` count how often
    each of them was written.
    """

    name: str
    fields: Mapping[str, Any]
    key: Key
    constants: tuple[torch.Tensor, ...]
    timestep: torch.Tensor | None
    latents: tuple[torch.Tensor, ...]
    versions: tuple[int, ...]
    names: tuple[str, ...]
    bound: Mapping[str, Any]
    tensors: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Matching:
    """One call, held against the branches that its session has seen."""

    session: Session
    call: Call

    def sibling(self, now: Generation) -> CallSlot | None:
        """The branch of a further call at the evaluation at hand; None if it repeats one of the calls, or if
        nobody said that a step makes so many.

        Raises:
            StateError: it may be a further branch as well as a second evaluation.
        """
        known, limit, repeats = self._known(), self.limit(now), self.repeats(now)
        fitting = self._remaining(now)
        if fitting and not (repeats and not any(map(self._has_these_inputs, fitting))):
            return self.likest(now, fitting)
        if len(self._called(now)) >= limit or (
            repeats and (len(known) >= limit or self.session.branches is None)
        ):
            return None
        if repeats and now.clock is not None and any(self._ran_before(branch, now) for branch in known):
            raise StateError(
                f"step {now.step}: branches={limit} calls a step were declared and earlier steps made "
                f"{len(known)}, so that this call may be another branch's or a second evaluation; wrap each "
                "call in a model.cache_context(name) of its own"
            )
        return self.another()

    def another(self) -> CallSlot:
        """A branch that nobody has called yet."""
        known = self._known()
        return self.call.name, next(i for i in itertools.count() if (self.call.name, i) not in known)

    def following(self, now: Generation) -> CallSlot | None:
        """The branch of the first call at an evaluation, None for one that fits no branch of those before.

        Where inputs change from step to step, a call that was alone in the step before goes on.
        """
        known = self._known()
        if not known:
            return self.call.name, 0
        if len(known) == 1 and (self.call.name or self.limit(now) == 1):
            return known[0]
        fitting = [branch for branch in known if self.fits(branch)]
        if fitting or not any(self.likeness(branch)[0] for branch in known):
            return self.likest(now, fitting or known)
        alone = self._called(now)
        if len(alone) == 1 and self.session.states[alone[0]].start == now.step > now.start:
            return alone[0]
        return None

    def _remaining(self, now: Generation) -> list[CallSlot]:
        """The branches that the evaluation has not seen and that the call may be of.

        Where the model takes other forms between the calls of a step, a branch has the form that it had.
        """
        states, form = self.session.states, self.call.key[0]
        changed = any(states[branch].key[0] != form for branch in self._called(now))
        free = [branch for branch in self.free(now) if self.fits(branch)]
        return [branch for branch in free if not changed or states[branch].key[0] == form]

    def _ran_before(self, branch: CallSlot, now: Generation) -> bool:
        """Whether a branch was called at an earlier step of the generation."""
        return any(ran.step < now.step for ran in self.session.states[branch].ran[:1])

    def limit(self, now: Generation) -> int:
        """Calls that a step may make under one name."""
        stands = now.timesteps is not None and now.clock is None
        return self.session.branches or (UNDECLARED if stands else 1)

    def _known(self) -> list[CallSlot]:
        return sorted(branch for branch in self.session.states if branch[0] == self.call.name)

    def _called(self, now: Generation) -> list[CallSlot]:
        """The branches of this name that the evaluation has seen."""
        return [branch for branch in now.called if branch[0] == self.call.name]

    def is_called(self, now: Generation) -> bool:
        return bool(self._called(now))

    def free(self, now: Generation) -> list[CallSlot]:
        """The branches that the evaluation has not seen yet, in their order."""
        return [branch for branch in self._known() if branch not in now.called]

    def likest(self, now: Generation, among: list[CallSlot]) -> CallSlot:
        """The branch whose inputs were most like the call's: the same objects, else equal ones, else the
        first in the order of the calls, if that was declared.
        """
        if len(among) == 1:
            return among[0]
        best = max(map(self.likeness, among))
        tied = [branch for branch in among if self.likeness(branch) == best]
        if len(tied) == 1 or (self.session.branches and best[1] == len(self.call.constants)):
            return tied[0]
        equal = {branch: len(self._equal(self.session.states[branch])) for branch in tied}
        tied = [branch for branch in tied if equal[branch] == max(equal.values())]
        if len(tied) > 1 and not self.session.branches:
            raise self.several(now)
        return tied[0]

    def fits(self, branch: CallSlot) -> bool:
        """Whether a branch may be the call's: what stayed the same over its calls is the same, or at least
        something is. An input written in place in between tells nothing, unless it tells branches apart.
        """
        state, count = self.session.states[branch], len(self.call.constants)
        if state.key[1:] != self.call.key[1:]:
            return False
        if not count:
            return True
        same = self._same(state)
        if state.steady:
            return state.steady <= same or state.steady <= same | self._equal(state) or self._is_rewritten()
        return bool(same or self._equal(state)) or self._is_rewritten()

    def _same(self, state: BranchState) -> frozenset[int]:
        """The inputs that are the same objects as in a branch's latest call, and unchanged."""
        call = self.call
        pairs = zip(call.constants, state.constants, call.versions, state.versions, strict=False)
        return frozenset(i for i, (new, old, now, then) in enumerate(pairs) if new is old and now == then)

    def _equal(self, state: BranchState) -> frozenset[int]:
        """Those that have the values that the branch was called with; waits for the device."""
        found = set(self._same(state))
        for i, (new, old) in enumerate(zip(self.call.constants, state.constants, strict=False)):
            kept = state.versions[i] == version(old)
            if i not in found and kept and new.shape == old.shape and torch.equal(new, old):
                found.add(i)
        return frozenset(found)

    def _is_rewritten(self) -> bool:
        """Whether some input is the same object for every branch, written in place since."""
        states = [self.session.states[branch] for branch in self._known()]
        rewritten = [set(map(id, state.rewritten)) for state in states]
        return any(all(id(new) in olds for olds in rewritten) for new in self.call.constants)

    def likeness(self, branch: CallSlot) -> tuple[bool, int, bool]:
        """Whether a branch was called with the same signature, how many inputs are the same objects, and
        whether the model had the same form.
        """
        state = self.session.states[branch]
        if state.key[1:] != self.call.key[1:]:
            return False, 0, False
        return True, len(self._same(state)), state.key[0] == self.call.key[0]

    def _has_these_inputs(self, branch: CallSlot) -> bool:
        """Whether all inputs but latents and timestep are those of the branch's latest call."""
        return self.likeness(branch)[:2] == (True, len(self.call.constants))

    def _is_like(self, branch: CallSlot) -> bool:
        """Whether, beside these inputs, the model's form is that of the branch's latest call."""
        return self.likeness(branch) == (True, len(self.call.constants), True)

    def repeats(self, now: Generation) -> bool:
        """Whether one of the step's calls had just these inputs."""
        return any(map(self._is_like, self._called(now)))

    def is_same_call(self, now: Generation) -> bool:
        """Whether even the latents are those of the call before; those that keep no version never are."""
        ours, theirs = self.call.latents, now.latents
        same = len(ours) == len(theirs) and all(
            tensor() is latents and version(latents) == before >= 0
            for latents, (tensor, before) in zip(ours, theirs, strict=True)
        )
        return same and self.repeats(now)

    def equals_another(self, now: Generation) -> bool:
        """Whether one of the step's calls had inputs of just these values; waits for the device."""
        whole = len(self.call.constants)
        return any(len(self._equal(self.session.states[branch])) == whole for branch in self._called(now))

    def is_stranger(self, branch: CallSlot) -> bool:
        """Whether none of the inputs is what the branch was called with."""
        return bool(self.call.constants) and not self.likeness(branch)[1]

    def several(self, now: Generation) -> StateError:
        where = f"branch '{self.call.name}'" if self.call.name else "this model"
        calls = len(self._called(now)) + 1
        declared = f", and branches={self.session.branches} were declared" if self.session.branches else ""
        return StateError(
            f"step {now.step}: {where} was called {calls} times at one timestep{declared}. If a step makes "
            "several calls (guidance branches, windows of a clip, tiles, regions), wrap each in a "
            "model.cache_context(name) of its own, such as 'cond' and 'uncond', or declare how many they "
            f"are, always in the same order: transform(..., branches={calls} or more). If a generation was "
            "given up, call model.reset() before the next one; if another loop calls the model, give it "
            "model.session(); if these are evaluations of one solver, transform(..., wait='never') counts "
            "them"
        )
