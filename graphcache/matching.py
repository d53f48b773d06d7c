"""Which of the calls of a step a call is: told by its context, its inputs, and the order of the calls."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from graphcache.ir.errors import StateError
from graphcache.runner import BranchState, Key
from graphcache.session import Branch, Generation, Session

UNDECLARED = 4
"""Calls at one step that are taken for branches where the scheduler tells the step."""


@dataclass(frozen=True, slots=True)
class Call:
    """What is known of a call before it is placed.

    `fields` are those of the cache context, `names` those of the leaves.
    """

    name: str
    fields: Mapping[str, Any]
    key: Key
    constants: tuple[torch.Tensor, ...]
    timestep: torch.Tensor | None
    latents: tuple[torch.Tensor, ...]
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Matching:
    """One call, held against the branches that its session has seen."""

    session: Session
    call: Call

    def sibling(self, now: Generation) -> Branch | None:
        """The branch of a further call at the evaluation at hand; None if it repeats one of the calls, or if
        nobody said that a step makes so many.

        Raises:
            StateError: it may be a further branch as well as a second evaluation.
        """
        known, free, limit = self._known(), self.free(now), self._limit(now)
        repeats = self.repeats(now)
        if free and not (repeats and not any(map(self._is_like, free))):
            return self.likest(now, free)
        if len(known) >= limit or (repeats and self.is_called(now) and self.session.branches is None):
            return None
        if repeats and now.clock is not None and any(self._ran_before(branch, now) for branch in known):
            raise StateError(
                f"step {now.step}: branches={limit} calls a step were declared and earlier steps made "
                f"{len(known)}, so that this call may be another branch's or a second evaluation; wrap each "
                "call in a model.cache_context(name) of its own"
            )
        return self.call.name, next(i for i in range(limit) if (self.call.name, i) not in known)

    def _ran_before(self, branch: Branch, now: Generation) -> bool:
        """Whether a branch was called at an earlier step of the generation."""
        return any(ran.step < now.step for ran in self.session.states[branch].ran[:1])

    def _limit(self, now: Generation) -> int:
        """Calls that a step may make under one name."""
        stands = now.timesteps is not None and now.clock is None
        return self.session.branches or (UNDECLARED if stands else 1)

    def _known(self) -> list[Branch]:
        return [branch for branch in self.session.states if branch[0] == self.call.name]

    def is_called(self, now: Generation) -> bool:
        return any(branch[0] == self.call.name for branch in now.called)

    def free(self, now: Generation) -> list[Branch]:
        """The branches that the evaluation has not seen yet, in their order."""
        return sorted(branch for branch in self._known() if branch not in now.called)

    def likest(self, now: Generation, free: list[Branch]) -> Branch:
        """The branch whose inputs were most like the call's: the same objects, else equal ones, else the
        first in the order of the calls, if that was declared.
        """
        best = max(map(self.likeness, free))
        tied = [branch for branch in free if self.likeness(branch) == best]
        if len(tied) == 1 or (self.session.branches and best == self._whole):
            return tied[0]
        equal = {branch: self._equal_constants(self.session.states[branch]) for branch in tied}
        best_equal = max(equal.values())
        tied = [branch for branch in tied if equal[branch] == best_equal]
        if len(tied) > 1 and not self.session.branches:
            raise self.several(now)
        return tied[0]

    def _equal_constants(self, state: BranchState) -> int:
        """How many inputs have the values that a branch was called with; waits for the device."""
        if state.key != self.call.key:
            return -1
        return sum(map(torch.equal, state.constants, self.call.constants))

    def likeness(self, branch: Branch) -> tuple[bool, int]:
        """Whether a branch was called with the same signature, and how many inputs are the same objects."""
        state = self.session.states[branch]
        if state.key != self.call.key:
            return False, 0
        return True, sum(map(operator.is_, state.constants, self.call.constants))

    @property
    def _whole(self) -> tuple[bool, int]:
        return True, len(self.call.constants)

    def _is_like(self, branch: Branch) -> bool:
        """Whether all inputs but latents and timestep are those of the branch's latest call."""
        return self.likeness(branch) == self._whole

    def repeats(self, now: Generation) -> bool:
        """Whether one of the step's calls had just these inputs."""
        return any(self._is_like(branch) for branch in self._known() if branch in now.called)

    def is_same_call(self, now: Generation) -> bool:
        """Whether even the latents are those of the call before."""
        ours, theirs = self.call.latents, now.latents
        same = len(ours) == len(theirs) and all(
            tensor() is latents and version(latents) == before
            for latents, (tensor, before) in zip(ours, theirs, strict=True)
        )
        return same and self.repeats(now)

    def equals_another(self, now: Generation) -> bool:
        """Whether one of the step's calls had inputs of just these values; waits for the device."""
        called = [branch for branch in self._known() if branch in now.called]
        whole = len(self.call.constants)
        return any(self._equal_constants(self.session.states[branch]) == whole for branch in called)

    def is_stranger(self, branch: Branch) -> bool:
        """Whether none of the inputs is what the branch was called with."""
        return bool(self.call.constants) and not self.likeness(branch)[1]

    def several(self, now: Generation) -> StateError:
        where = f"branch '{self.call.name}'" if self.call.name else "this model"
        calls = sum(branch[0] == self.call.name for branch in now.called) + 1
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


def version(tensor: torch.Tensor | None) -> int:
    """Counts changes in place; inference tensors have no count."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version
