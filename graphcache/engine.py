"""Finds the program and the branch's state of a call, and runs it: what is behind a transformed model."""

import itertools
import logging
import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

from graphcache import presets
from graphcache.capture import forward_parameters
from graphcache.compile import Backend, begin_generation, prior_compilation
from graphcache.halves import is_doubled
from graphcache.ir.call import Binder, CallSpec
from graphcache.ir.errors import CaptureError, PlanError, StateError
from graphcache.ir.plan import Plan
from graphcache.ir.schedule import Role
from graphcache.passes.base import Observer
from graphcache.placement import Call, place
from graphcache.program import Captured, Program
from graphcache.runner import BranchState, Key, begun, changed_inputs, halved, hand_over, run_step
from graphcache.schedulers import Driver
from graphcache.session import Branch, Generation, Session
from graphcache.watch import Watch, refuse_uncapturable

_ROLES: dict[str, Role] = {"cond": "cond", "uncond": "uncond"}
"""Of calls in cache contexts with these names."""
MOST_PROGRAMS = 8
"""Signatures kept ready; the least recently used is dropped."""

log = logging.getLogger("graphcache")


@dataclass(frozen=True)
class Options:
    """What `transform` was given beside the model; see there."""

    plan: Plan
    backend: Backend = None
    timestep: str = "timestep"
    branches: int | None = None
    waits: bool = True
    offload: bool = False
    observers: Sequence[Observer] = ()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the `with` statements around a call say: session, cache context and its step fields."""

    session: Session
    name: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    disabled: bool = False


_surroundings: ContextVar[Mapping["Engine", Surroundings]] = ContextVar(
    "graphcache", default=MappingProxyType({})
)


class Engine:
    """Runs a model's evaluations under a plan; neither the model nor a graph holds any of its state.

    The programs are shared by all sessions; each session has the caches of its own generation.
    """

    def __init__(self, model: nn.Module, options: Options, pipe: Any = None) -> None:
        self.model = model
        self.options = options
        self.backend = options.backend
        self.binder = Binder(forward_parameters(model))
        self.driver = Driver(pipe=pipe)
        self.outermost = Surroundings(self.new_session(self.driver))
        self.programs: OrderedDict[Key, Program] = OrderedDict()
        self.plans = {options.plan.steps: options.plan}
        self.given = model
        self.outer: Any = None
        self.calls = 0
        self.unguided = False
        self._specs: dict[Key, CallSpec] = {}
        self._watch: Watch | None = None
        self._lock = threading.RLock()

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        around = self.surroundings
        session = around.session
        self.calls += 1
        if around.disabled:
            session.leave()
            return self.model(*args, **kwargs)
        session.claim()
        try:
            bound = self.binder.bind(args, kwargs)
            signature, tensors = self.binder.signature(bound)
            _refuse_export(tensors)
            key = signature + _ambient()
            spec = self._spec(key, bound)
            call = Call(around.name, around.fields, key, spec.constants(tensors), tensors[spec.timestep])
            generation, branch = place(session, call)
            state = self._state(session, generation, branch, call, bound, tensors)
            if state.role == "uncond":
                hand_over(session.states.get(("cond", branch[1])), state)
            if generation.untouched:
                begin_generation(state.program.backend)
            session.enter(generation, branch, state)
            try:
                return self.evaluate(branch, state, tensors)
            except BaseException:
                session.forget()
                raise
        finally:
            session.release()

    def evaluate(self, branch: Branch, state: BranchState, tensors: Sequence[torch.Tensor]) -> Any:
        """Run the step that a branch's state is at."""
        return run_step(state, tensors)

    @property
    def as_given(self) -> Options:
        """Options that make another such engine, compiled alike."""
        return replace(self.options, backend=self.backend)

    @property
    def surroundings(self) -> Surroundings:
        return _surroundings.get().get(self, self.outermost)

    def surround(self, **changes: Any) -> "_Around":
        """A context manager within which calls have these surroundings."""
        return _Around(self, replace(self.surroundings, **changes), closes=False)

    def open_session(self, scheduler: Any) -> "_Around":
        """A context manager within which calls have a session of their own, empty again at its end."""
        return _Around(self, Surroundings(self.new_session(Driver(scheduler))), closes=True)

    def new_session(self, driver: Driver) -> Session:
        options = self.options
        return Session(options.plan.steps, options.branches, options.waits, driver)

    def reset(self, start_step: int = 0, steps: int | None = None) -> None:
        """Forget the session's generation; the next one that no scheduler drives begins at `start_step`."""
        session = self.surroundings.session
        steps = session.steps if steps is None else steps
        self.plan_for(steps)
        if not 0 <= start_step < steps:
            raise StateError(
                f"start_step={start_step} is not a step of the plan, which has steps 0 to {steps - 1}"
            )
        session.forget()
        session.start_step, session.steps = start_step, steps

    def plan_for(self, steps: int) -> Plan:
        """The plan for a number of evaluations: a preset evaluated anew, any other grid resampled."""
        plan = self.plans.get(steps)
        if plan is None:
            given = self.options.plan
            plan = self.plans[steps] = presets.resample(given, steps)
            how = "resampled" if plan.preset is None else "evaluated anew"
            if given.lists_coefficients:
                how += "; its coefficients hold for its own steps, so values are extrapolated linearly"
            log.warning("the plan has %d steps, this generation %d: it was %s", given.steps, steps, how)
        return plan

    def prepare(self, example_inputs: Mapping[str, Any] | tuple[Any, ...]) -> Program:
        """Capture for these keywords or positions and check the plan against the model."""
        if isinstance(example_inputs, Mapping):
            bound = self.binder.bind((), dict(example_inputs))
        else:
            bound = self.binder.bind(example_inputs, {})
        key, tensors = self.binder.signature(bound)
        program = self._program(key + _ambient(), bound, tensors, begins=True)
        plan, name = self.options.plan, self.surroundings.name
        program.check(plan, self._role(plan, name, program, tensors))
        return program

    def flat(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call's keyword arguments, in signature order."""
        return self.binder.signature(self.binder.bind((), dict(inputs)))[1]

    def compile(self, backend: Backend) -> None:
        """Compile the phases from now on; what was captured stays."""
        with self._lock:
            self.backend = backend
            for key, program in self.programs.items():
                self.programs[key] = replace(program, backend=backend, phases={}).prepared()

    def _spec(self, key: Key, bound: Mapping[str, Any]) -> CallSpec:
        spec = self._specs.get(key)
        if spec is None:
            if len(self._specs) >= 8 * MOST_PROGRAMS:
                self._specs.clear()
            spec = self._specs[key] = CallSpec.of(self.binder, bound, self.options.timestep)
        return spec

    def _state(
        self,
        session: Session,
        generation: Generation,
        branch: Branch,
        call: Call,
        bound: Mapping[str, Any],
        tensors: Sequence[torch.Tensor],
    ) -> BranchState:
        """The branch's state at this step; one that did not run the step before begins empty."""
        begins = generation.untouched
        plan = self.plan_for(generation.steps)
        if begins:
            session.driver.refuse_other(plan)
        state = None if begins else session.states.get(branch)
        if state is None or state.step + 1 != generation.step:
            state = self._begun(plan, generation.step, call, bound, tensors, begins)
        elif state.key != call.key:
            _refuse_conversion(state.key, call.key)
            program = self._program(call.key, bound, tensors, begins)
            state = halved(state, call.key, program, plan, generation.step) or self._begun(
                plan, generation.step, call, bound, tensors, begins
            )
        elif changed := changed_inputs(state, tensors):
            self._leave_prologue(state, changed, tensors)
        state.step, state.constants = generation.step, call.constants
        return state

    def _begun(
        self,
        plan: Plan,
        step: int,
        call: Call,
        bound: Mapping[str, Any],
        tensors: Sequence[torch.Tensor],
        begins: bool,
    ) -> BranchState:
        """A state whose history begins with this call."""
        program = self._program(call.key, bound, tensors, begins)
        role = self._role(plan, call.name, program, tensors)
        shares = role == "only" and any(item.is_measured for item in plan.letters)
        shared = shares and is_doubled(tensors[program.captured.call.latent])
        return begun(call.key, program, plan, step, role, shared)

    def _role(self, plan: Plan, name: str, program: Program, tensors: Sequence[torch.Tensor]) -> Role:
        """Which calls of guidance these are, by the cache context and by the latents."""
        if not plan.is_guided:
            return "only"
        if name in _ROLES:
            return _ROLES[name]
        if not is_doubled(tensors[program.captured.call.latent]):
            if not self.unguided:
                self.unguided = True
                log.warning(
                    "the halves of the batch are not the same latents: row guidance has no effect here"
                )
            return "only"
        if plan.conditional is None:
            raise PlanError(
                "row guidance: say which half of the doubled batch is the conditional branch's, with "
                "conditional=last (or first) in the plan's header, or make two calls a step, in "
                "model.cache_context('cond') and ('uncond')"
            )
        self._halve(program, tensors, plan.conditional)
        return "doubled"

    def _halve(self, program: Program, tensors: Sequence[torch.Tensor], conditional: str) -> None:
        with self._lock:
            if program.half is None:
                program.halve(self.model, tensors, conditional)

    def _program(
        self, key: Key, bound: Mapping[str, Any], tensors: Sequence[torch.Tensor], begins: bool
    ) -> Program:
        """The program of a signature; when a generation begins, for the model as it is now."""
        with self._lock:
            if begins and (self._watch is None or self._watch.has_changed()):
                refuse_uncapturable(self.model)
                self.programs.clear()
                self._watch = None
            program = self.programs.get(key)
            if program is None:
                program = self.programs[key] = self._made(key, bound, tensors)
            self.programs.move_to_end(key)
            while len(self.programs) > MOST_PROGRAMS:
                self.programs.popitem(last=False)
            return program

    def _made(self, key: Key, bound: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> Program:
        """A program; its capture is shared with the same signature's in the other gradient mode."""
        twin = self.programs.get((*key[:-1], not key[-1]))
        captured = twin.captured if twin else self._captured(self._spec(key, bound), tensors)
        options = self.options
        made = Program(captured, self.compilation(), offload=options.offload, observers=options.observers)
        return made.prepared()

    def compilation(self) -> Backend:
        """What phases are compiled with: what was asked for, or what the model was compiled with."""
        return prior_compilation(self.model) if self.backend is None else self.backend

    def _captured(self, spec: CallSpec, tensors: Sequence[torch.Tensor]) -> Captured:
        split = self.options.plan.splits_parallel
        captured = Captured.of(self.model, spec, tensors, self.options.observers, split)
        if self._watch is None:
            # afterwards, because a first forward may fill what later ones only read
            self._watch = Watch(self.model)
        return captured

    def _leave_prologue(self, state: BranchState, changed: set[int], tensors: Sequence[torch.Tensor]) -> None:
        """An input seen changing within a generation is computed with at every step, from now on."""
        program = state.program.without(changed).prepared()
        if state.program.half is not None:
            conditional = "first" if state.program.half.rows.first else "last"
            self._halve(program, tensors, conditional)
        with self._lock:
            if self.programs.get(state.key) is state.program:
                self.programs[state.key] = program
        state.program = program
        state.watched = None
        state.ready.clear()


class _Around:
    """Sets the surroundings of an engine's calls in this thread or task, and puts the old ones back."""

    def __init__(self, engine: Engine, surroundings: Surroundings, closes: bool) -> None:
        self._engine = engine
        self._inner = surroundings
        self._closes = closes

    def __enter__(self) -> Session:
        outer = _surroundings.get()
        self._token = _surroundings.set({**outer, self._engine: self._inner})
        return self._inner.session

    def __exit__(self, *_: object) -> None:
        _surroundings.reset(self._token)
        if self._closes:
            self._inner.session.forget()


def original(model: nn.Module) -> nn.Module:
    """The model behind a transformed one; any other model itself."""
    engine = getattr(model, "_graphcache", None)
    return engine.model if isinstance(engine, Engine) else model


def _ambient() -> tuple[Hashable, ...]:
    """What tracing and compiled code depend on besides the arguments."""
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    dtypes = tuple(torch.get_autocast_dtype(d) for d, on in zip(("cpu", "cuda"), autocast, strict=True) if on)
    return autocast, dtypes, _attention_backend(), torch.is_grad_enabled()


def _attention_backend() -> Hashable:
    """The attention that diffusers dispatches to at present, which tracing bakes in."""
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    registry = getattr(dispatch, "_AttentionBackendRegistry", None)
    return getattr(registry, "_active_backend", None)


def _refuse_export(tensors: Sequence[torch.Tensor]) -> None:
    if torch.compiler.is_exporting() and any(isinstance(tensor, FakeTensor) for tensor in tensors):
        raise CaptureError(
            "a transformed model cannot be exported, since its steps are different graphs; export the "
            "original, graphcache.restore(model)"
        )


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
