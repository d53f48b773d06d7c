"""Finds the program, step and branch of a call; the one owner of a transformed model's state."""

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphcache.capture import forward_parameters
from graphcache.clock import Clock, read_timestep
from graphcache.compile import Backend
from graphcache.fingerprint import Fingerprint, fingerprint
from graphcache.ir.call import Binder, CallSpec
from graphcache.ir.errors import StateError
from graphcache.ir.plan import Plan
from graphcache.passes.base import Observer
from graphcache.program import Captured, Program
from graphcache.runner import BranchState, changed_inputs, run_step

MOST_PROGRAMS = 8
"""Signatures kept ready; the least recently used is dropped."""


MOST_BRANCHES = 16
"""Branches whose state is kept; beyond, the one whose generation began first is dropped."""

Key = tuple[Hashable, ...]
"""A signature, and what tracing and compiled code depend on besides it; gradient mode comes last."""


class Engine:
    """Runs a model's evaluations under a plan; neither the model nor a graph holds any of its state."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        backend: Backend,
        timestep: str,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.model = model
        self.plan = plan
        self.backend = backend
        self.timestep = timestep
        self.observers = observers
        self.binder = Binder(forward_parameters(model))
        self.programs: OrderedDict[Key, Program] = OrderedDict()
        self.states: dict[str, BranchState] = {}
        self.branch = ""
        self.start_step = 0

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        bound = self.binder.bind(args, kwargs)
        key, tensors = self.binder.signature(bound)
        state = self._place(key + _ambient(), bound, tensors)
        try:
            return run_step(state, tensors)
        except BaseException:
            self.states.pop(self.branch, None)
            self.start_step = 0
            raise

    def reset(self, start_step: int = 0) -> None:
        """Forget every generation in progress; the next one of each branch begins at `start_step`."""
        Clock.begin(self.plan.steps, 0.0, start_step)
        self.states.clear()
        self.start_step = start_step

    @contextlib.contextmanager
    def in_branch(self, name: str) -> Iterator[None]:
        before, self.branch = self.branch, name
        try:
            yield
        finally:
            self.branch = before

    def prepare(self, example_inputs: Mapping[str, Any] | tuple[Any, ...]) -> Program:
        """Capture for these keywords or positions and check the plan against the model."""
        if isinstance(example_inputs, Mapping):
            bound = self.binder.bind((), dict(example_inputs))
        else:
            bound = self.binder.bind(example_inputs, {})
        key, tensors = self.binder.signature(bound)
        program = self._program(key + _ambient(), bound, tensors)
        program.check()
        return program

    def _place(self, key: Key, bound: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> BranchState:
        """The branch's state with its clock set to this call; nothing changes before all is checked."""
        timestep = bound.get(self.timestep)
        if not isinstance(timestep, torch.Tensor):
            raise CallSpec.missing_timestep(bound, self.timestep)
        now = read_timestep(timestep)
        state = self.states.get(self.branch)
        if state is not None and now == state.clock.last and not state.finished:
            self._refuse_second_branch(state, key, tensors)
        clock = state.clock.advance(now) if state is not None else None
        if state is None or clock is None:
            return self._begin(key, bound, tensors, now)
        if state.key != key:
            _refuse_conversion(state.key, key)
            state = self._enter(key, self._program(key, bound, tensors), clock)
        elif changed := changed_inputs(state, tensors):
            self._leave_prologue(state, changed)
        state.clock = clock
        state.constants = state.program.captured.constants(tensors)
        return state

    def _begin(
        self, key: Key, bound: Mapping[str, Any], tensors: Sequence[torch.Tensor], now: float
    ) -> BranchState:
        program = self._program(key, bound, tensors)
        if self.branch in self.states:
            self.start_step = 0
        state = self._enter(key, program, Clock.begin(self.plan.steps, now, self.start_step))
        state.constants = program.captured.constants(tensors)
        return state

    def _enter(self, key: Key, program: Program, clock: Clock) -> BranchState:
        """A state with an empty history, from the clock's step on."""
        state = BranchState(key, program, program.schedule(clock.step), clock.step, clock)
        self.states.pop(self.branch, None)
        self.states[self.branch] = state
        while len(self.states) > MOST_BRANCHES:
            del self.states[next(iter(self.states))]
        return state

    def _program(self, key: Key, bound: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> Program:
        """The program of a signature, for the model as it is now."""
        now = fingerprint(self.model)
        program = self.programs.get(key)
        if program is None or program.captured.fingerprint != now:
            captured = self._captured(key, now, bound, tensors)
            program = self.programs[key] = Program(
                captured, self.plan, self.backend, observers=self.observers
            )
        self.programs.move_to_end(key)
        while len(self.programs) > MOST_PROGRAMS:
            self.programs.popitem(last=False)
        return program

    def _captured(
        self, key: Key, now: Fingerprint, bound: Mapping[str, Any], tensors: Sequence[torch.Tensor]
    ) -> Captured:
        """A capture, shared with the same signature's program in the other gradient mode."""
        twin = self.programs.get((*key[:-1], not key[-1]))
        if twin is not None and twin.captured.fingerprint == now:
            return twin.captured
        call = CallSpec.of(self.binder, bound, self.timestep)
        return Captured.of(self.model, call, tensors, self.observers)

    def _leave_prologue(self, state: BranchState, changed: set[int]) -> None:
        """An input seen changing within a generation is computed with at every step, from now on."""
        program = state.program.without(changed)
        self.programs[state.key] = state.program = program
        state.watched = None
        state.ready.clear()

    def _refuse_second_branch(self, state: BranchState, key: Key, tensors: Sequence[torch.Tensor]) -> None:
        same = key == state.key and all(
            new is old
            for new, old in zip(state.program.captured.constants(tensors), state.constants, strict=True)
        )
        if not same:
            where = f"branch '{self.branch}'" if self.branch else "this model"
            raise StateError(
                f"step {state.clock.step}: {where} was called twice at timestep {state.clock.last:g} "
                "with other inputs. If these are two guidance branches, wrap each call in "
                "model.cache_context('cond') or model.cache_context('uncond'), so that each keeps its own "
                "cache; if a generation was given up, call model.reset() before the next one"
            )


def original(model: nn.Module) -> nn.Module:
    """The model behind a transformed one; any other model itself."""
    engine = getattr(model, "_graphcache", None)
    return engine.model if isinstance(engine, Engine) else model


def _ambient() -> tuple[Hashable, ...]:
    """What tracing and compiled code depend on besides the arguments."""
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    dtypes = tuple(torch.get_autocast_dtype(d) for d, on in zip(("cpu", "cuda"), autocast, strict=True) if on)
    return autocast, dtypes, torch.is_grad_enabled()


def _refuse_conversion(before: Key, after: Key) -> None:
    old, new = _kinds(before), _kinds(after)
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            raise StateError(
                f"argument {name} changed from {old[name]} to {new[name]} in the middle of a generation; "
                "call model.reset() if this is another one"
            )


def _kinds(key: Any) -> dict[str, str]:
    """Dtype and device of each named tensor of a signature."""
    pairs = itertools.pairwise(key)
    return {
        name: f"{item[1]} on {item[2]}"
        for name, item in pairs
        if isinstance(name, str) and isinstance(item, tuple) and item and isinstance(item[0], torch.Size)
    }
