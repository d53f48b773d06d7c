"""One run of a sampler over a denoiser: which step and branch each call is, and the caches of the run."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphcache.integrations.denoiser_call import OPTIONS, DenoiserCall, Plainly
from graphcache.runtime.surroundings import OpenSession

_PRECISION = 1e-5
"""Relative; within it a noise level is one of the schedule, which samplers may take through logarithms."""

log = logging.getLogger("graphcache")


@dataclass(frozen=True, slots=True)
class Place:
    """The branch of a call, and which of the run's steps it is."""

    branch: str
    step: int
    steps: int


class SamplingRun:
    """From a sampler's first call to its end.

    Conditionings that are evaluated in one batch are one branch, and each batch has caches of its own: those
    of another one, whose rows mean something else, it never reads. In a branch steps follow each other, one
    call each; where they do not, nothing tells what a call is, and the rest of the run is computed plainly.

    Args:
        transformed: makes the transformed model of a call, for runs of so many steps.
    """

    def __init__(self, transformed: Callable[[DenoiserCall, int], Any]) -> None:
        self.calls = 0
        self._transformed = transformed
        self._sessions: dict[int, tuple[Any, OpenSession]] = {}
        self._reached: dict[tuple[nn.Module, str], int] = {}
        self._kept: dict[tuple[nn.Module, str, str], torch.Tensor] = {}
        self._schedule: tuple[torch.Tensor, list[float]] | None = None
        self._given_up = ""
        self._said: set[str] = set()

    def denoise(self, executor: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A call under the plan, or by what the executor leads to."""
        self.calls += 1
        try:
            call = DenoiserCall.of(executor, args, kwargs)
            place = self._place(call)
        except Plainly as why:
            self._say(str(why))
            return executor(*args, **kwargs)
        model = self._transformed(call, place.steps)
        if id(model) not in self._sessions:
            self._sessions[id(model)] = model, model.session()
        context = model.cache_context(place.branch, step_index=place.step, num_inference_steps=place.steps)
        with self._sessions[id(model)][1], context:
            return model(**self._settled(call, place.branch))

    def close(self) -> None:
        """Free all caches; say what was reused."""
        for model, session in self._sessions.values():
            if not log.isEnabledFor(logging.INFO):
                session.close()
                continue
            with session:
                log.info("%s", model.summary())
            session.close()
        self._sessions.clear()
        self._kept.clear()

    def _place(self, call: DenoiserCall) -> Place:
        """Where a call stands.

        Raises:
            Plainly: nothing says so, or it is none of the plan's steps.
        """
        if self._given_up:
            raise Plainly(self._given_up)
        options = call.options
        uuids, kinds = options.get("uuids"), options.get("cond_or_uncond")
        sigmas, schedule = options.get("sigmas"), options.get("sample_sigmas")
        if not uuids or not kinds or len(uuids) != len(kinds):
            raise Plainly(f"{OPTIONS} do not say which conditionings these are (uuids, cond_or_uncond)")
        if not isinstance(sigmas, torch.Tensor) or not isinstance(schedule, torch.Tensor):
            raise Plainly(f"{OPTIONS} do not say which step this is (sigmas, sample_sigmas)")
        step, steps = self._step(sigmas, schedule)
        branch = " ".join(f"{kind}:{uuid}" for kind, uuid in zip(kinds, uuids, strict=True))
        if step <= self._reached.get((call.model, branch), -1):
            self._given_up = (
                f"the sampler evaluates the denoiser more than once at step {step}, for the same "
                "conditionings: from here on this run follows no plan; choose a sampler of one call a "
                "step, such as euler or dpmpp_2m, and no tiles or windows"
            )
            raise Plainly(self._given_up)
        self._reached[call.model, branch] = step
        return Place(branch, step, steps)

    def _step(self, sigmas: torch.Tensor, schedule: torch.Tensor) -> tuple[int, int]:
        """Which step has this noise level, and how many there are; waits for the device."""
        if self._schedule is None or self._schedule[0] is not schedule:
            self._schedule = schedule, schedule.flatten().tolist()[:-1]
        levels, found = self._schedule[1], set(sigmas.flatten().tolist())
        level = found.pop() if found else float("nan")
        near = (i for i, known in enumerate(levels) if abs(known - level) <= _PRECISION * abs(known))
        step = next(near, None)
        if found or step is None:
            raise Plainly(
                "the sampler evaluates the denoiser at noise levels that are not in its schedule, as "
                "those of second order, stochastic and adaptive ones are"
            )
        return step, len(levels)

    def _settled(self, call: DenoiserCall, branch: str) -> dict[str, Any]:
        """The arguments, with the tensors of the branch's call before where they have the same values.

        A sampler makes all of them anew for every call; what a generation keeps is then computed once.
        """
        named = dict(call.named)
        for name, value in named.items():
            if not isinstance(value, torch.Tensor):
                continue
            slot = call.model, branch, name
            before = self._kept.get(slot)
            if before is None or not _equal(before, value):
                before = self._kept[slot] = value.clone()
            named[name] = before
        return named

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            log.warning("computed without the plan: %s", why)


def _equal(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether a graph computes the same with either; waits for the device."""
    kinds = [(each.shape, each.dtype, each.device, each.requires_grad, each.stride()) for each in (old, new)]
    return kinds[0] == kinds[1] and torch.equal(old, new)
