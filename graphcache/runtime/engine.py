"""Finds the program and the branch's state of a call, and runs it: what is behind a transformed model."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graphcache.compiler.backends import (
    begin_generation,
)
from graphcache.compiler.guidance_half import is_doubled
from graphcache.compiler.modes import refuse_conversion, refuse_export, what_changed
from graphcache.compiler.program import Program
from graphcache.ir.call import Key
from graphcache.ir.errors import StateError
from graphcache.ir.plan import Plan
from graphcache.ir.schedule import Role, Schedule
from graphcache.ir.tree import take
from graphcache.ir.versions import version
from graphcache.runtime.cache_limit import keep_within
from graphcache.runtime.caller import Caller
from graphcache.runtime.guidance_role import role_of
from graphcache.runtime.marks import refuse_overwritten
from graphcache.runtime.matching import Call
from graphcache.runtime.mesh import in_step, refuse_gradients
from graphcache.runtime.options import Options
from graphcache.runtime.plans import Plans
from graphcache.runtime.program_maker import ProgramMaker
from graphcache.runtime.runner import BranchState, begun, carried, changed_inputs, halved, hand_over, run_step
from graphcache.runtime.schedulers import Driver
from graphcache.runtime.session import CallSlot, Generation, Session
from graphcache.runtime.spoken import Spoken
from graphcache.runtime.step_tracking import Turn, place
from graphcache.runtime.surroundings import Around, OpenSession, Scopes, Surroundings


class Engine:
    """Runs a model's evaluations under a plan; neither the model nor a graph holds any of its state.

    The programs are shared by all sessions; each session has the caches of its own generation.

    Attributes:
        model: the original.
        options: what `transform` was told.
        maker: finds programs, or makes them.
        binder: reads calls of the model's forward.
        caller: finds the pipeline that calls.
        driver: tells the step, where nothing else does.
        scopes: the session, context and other surroundings of each thread and task.
        plans: the plan, for each number of steps.
        given: what `restore` gives back.
        timesteps_before: those of the scheduler when the pipeline was transformed.
        outer: a forward that someone set around the plan's own.
        calls: how many there were.
        spoken: what was said once and is not said again.
    """

    def __init__(
        self, model: nn.Module, options: Options, pipe: Any = None, maker: ProgramMaker | None = None
    ) -> None:
        self.model = model
        self.options = options
        self.maker = ProgramMaker(model, options, Spoken()) if maker is None else maker
        self.spoken = self.maker.spoken
        self.binder = self.maker.binder
        self.caller = Caller()
        self.driver = Driver(pipe=pipe, caller=self.caller)
        self.scopes = Scopes(Surroundings(self.new_session(self.driver)))
        self.plans = Plans(options.plan, options.resample)
        self.given = model
        self.timesteps_before: Any = None
        self.outer: Any = None
        self.calls = 0

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        around = self.surroundings
        session = around.session
        self.calls += 1
        if around.disabled:
            session.leave()
            with self.maker.homes.at_hand():
                return self.model(*args, **kwargs)
        session.claim()
        try:
            bound = self.binder.bind(args, kwargs)
            signature, tensors = self.binder.signature(bound)
            refuse_export(tensors)
            spec = self.maker.spec(signature, bound)
            constants = spec.constants(tensors)
            call = Call(
                around.name,
                around.fields,
                self.maker.key(signature, tensors, begins=False),
                constants,
                spec.timestep(tensors),
                spec.given_latents(tensors),
                tuple(map(version, constants)),
                spec.leaf_names,
                bound,
                tensors,
            )
            generation, branch = self._placed(session, call)
            if generation.untouched:
                call = call._replace(key=self.maker.key(signature, tensors, begins=True))
            state = self._state(session, generation, branch, call)
            if state.role == "uncond":
                hand_over(session.states.get(("cond", branch[1])), state)
            if generation.untouched:
                begin_generation(state.program.backend)
            session.enter(generation, branch, state)
            try:
                refuse_overwritten(state, tensors)
                result = self.evaluate(branch, state, tensors)
                take(state.program.captured.output.taken, bound)
                return result
            except BaseException:
                session.forget()
                raise
        finally:
            session.release()

    def _placed(self, session: Session, call: Call) -> Turn:
        try:
            found = place(session, call)
        except StateError:
            session.refuse_others(None)
            raise
        session.refuse_others(found[0])
        return found

    def evaluate(self, branch: CallSlot, state: BranchState, tensors: Sequence[torch.Tensor]) -> Any:
        """Run the step that a branch's state is at."""
        if not self.options.mesh:
            return run_step(state, tensors)
        refuse_gradients()
        with self.in_step(branch, state, tensors):
            return run_step(state, tensors)

    def in_step(
        self, branch: CallSlot, state: BranchState, tensors: Sequence[torch.Tensor]
    ) -> AbstractContextManager[None]:
        """Within, all ranks of a mesh run the same step, which they agree on at first."""
        return in_step(self.options.mesh, self.model, state, branch, tensors)

    @property
    def as_given(self) -> Options:
        """Options that make another such engine, compiled alike."""
        return replace(self.options, backend=self.maker.backend)

    @property
    def surroundings(self) -> Surroundings:
        return self.scopes.now

    def surround(self, **changes: Any) -> Around:
        """A context manager within which calls have these surroundings."""
        return Around(self.scopes, lambda around: around.changed(**changes))

    def open_session(self, scheduler: Any) -> OpenSession:
        """A session that calls belong to within its `with`; it has caches of its own."""
        driver = Driver(scheduler, caller=self.caller)
        return OpenSession(self.scopes, self.new_session(driver, opened=True))

    def new_session(self, driver: Driver, opened: bool = False) -> Session:
        options = self.options
        return Session(options.plan.steps, options.branches, options.waits, driver, opened)

    def reset(self, start_step: int = 0, steps: int | None = None) -> None:
        """Forget the session's generation; the next one that no scheduler drives begins at `start_step`."""
        session = self.surroundings.session
        steps = session.steps if steps is None else steps
        _ = self.plans[steps]  # a number of steps that the plan cannot have is refused here
        if not 0 <= start_step < steps:
            raise StateError(
                f"start_step={start_step} is not a step of the plan, which has steps 0 to {steps - 1}"
            )
        session.forget()
        session.start_step, session.steps = start_step, steps

    def prepare(self, example_inputs: Mapping[str, Any] | tuple[Any, ...]) -> Program:
        """Capture for these keywords or positions and check the plan against the model."""
        return self.prepared(example_inputs, self.options.plan, self.surroundings.name)[0]

    def prepared(
        self, example_inputs: Mapping[str, Any] | tuple[Any, ...], plan: Plan, name: str
    ) -> tuple[Program, Schedule, list[torch.Tensor]]:
        """The program of a call in a cache context, its schedule under a plan, and the call's tensors."""
        if isinstance(example_inputs, Mapping):
            bound = self.binder.bind((), dict(example_inputs))
        else:
            bound = self.binder.bind(example_inputs, {})
        signature, tensors = self.binder.signature(bound)
        key, program = self.maker.find(self.maker.key(signature, tensors, begins=True), bound, tensors)
        role = self._role(plan, name, program, tensors, key)
        program.check(plan, role)
        self.spoken.of_coverage(plan, program.captured.step)
        latents = program.captured.call.given_latents(tensors)
        return program, program.schedule(plan, 0, role, self._shares(plan, role, latents)), tensors

    def flat(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call's keyword arguments, in signature order."""
        return self.binder.signature(self.binder.bind((), dict(inputs)))[1]

    def _state(self, session: Session, generation: Generation, branch: CallSlot, call: Call) -> BranchState:
        """The branch's state at this step; one that did not run the step before begins empty."""
        begins = generation.untouched
        plan = self.plans[generation.steps]
        if begins:
            session.driver.refuse_other(plan)
        state = None if begins else session.states.get(branch)
        if state is not None and state.step + 1 != generation.step:
            self.spoken.once(
                f"branch '{branch[0]}', call {branch[1] + 1} of a step, missed one or more steps before step "
                f"{generation.step}: what it had cached is dropped, and it begins anew"
            )
            state = None
        elif state is None and not generation.begins and branch[1]:
            self.spoken.once(
                "a call of a later step fits none of the calls of the steps before, so that its caches begin "
                "there; where inputs change from step to step, name the calls: model.cache_context(name)"
            )
        if state is not None and state.key != call.key:
            state = self._changed(state, plan, generation.step, call)
        elif state is not None and (changed := changed_inputs(state, call.tensors)):
            self._leave_prologue(state, changed, call.tensors)
        if state is None:
            state = self._begun(plan, generation.step, call)
            self.keep_within(_going_on(session, generation, branch), state, plan)
        state.step = generation.step
        state.note(call.constants, call.versions)
        return state

    def keep_within(self, others: Sequence[BranchState], state: BranchState, plan: Plan) -> None:
        """Let a branch that begins beside others take no more bytes than were allowed."""
        limit = self.options.max_cache_bytes
        if limit is not None and keep_within(limit, others, state, plan):
            self.spoken.once("max_cache_bytes= leaves too little for caches: they are kept in host memory")

    def _changed(self, state: BranchState, plan: Plan, step: int, call: Call) -> BranchState | None:
        """The state for another signature, other values or another form of the model, in the middle of a
        generation; None where what was cached does not fit.
        """
        refuse_conversion(state.key, call.key)
        key, program = self.maker.find(call.key, call.bound, call.tensors)
        call = call._replace(key=key)
        program = program.offloaded if state.program.offload else program
        if state.key[1:] == call.key[1:]:
            role, shared = self._lowered_for(plan, call, program)
            made = carried(state, call.key, program, program.schedule(plan, state.start, role, shared))
        else:
            made = halved(state, call.key, program, plan, step)
        if made is None:
            self.spoken.once(
                f"{what_changed(state.key, call.key)} at step {step} of a generation: what the steps before "
                "have cached does not fit, so the caches begin anew"
            )
        return made

    def _begun(self, plan: Plan, step: int, call: Call) -> BranchState:
        """A state whose history begins with this call."""
        key, program = self.maker.find(call.key, call.bound, call.tensors)
        call = call._replace(key=key)
        role, shared = self._lowered_for(plan, call, program)
        state = begun(call.key, program, plan, step, role, shared)
        self.spoken.of_coverage(plan, program.captured.step)
        return state

    def _lowered_for(self, plan: Plan, call: Call, program: Program) -> tuple[Role, bool]:
        """Which calls of guidance these are, and whether tokens are chosen for both halves of a batch."""
        role = self._role(plan, call.name, program, call.tensors, call.key)
        return role, self._shares(plan, role, call.latents)

    def _shares(self, plan: Plan, role: Role, latents: Sequence[torch.Tensor]) -> bool:
        """Whether tokens are chosen for both halves of a batch."""
        return role == "only" and any(item.is_measured for item in plan.letters) and is_doubled(latents)

    def _role(
        self, plan: Plan, name: str, program: Program, tensors: Sequence[torch.Tensor], key: Key
    ) -> Role:
        """Which calls of guidance these are; of a doubled batch the conditional half is captured as well."""
        role = role_of(plan, name, program.captured.call.given_latents(tensors), self.spoken)
        if role == "doubled":
            assert plan.conditional is not None
            self.maker.halve(program, tensors, plan.conditional, key)
        return role

    def _leave_prologue(self, state: BranchState, changed: set[int], tensors: Sequence[torch.Tensor]) -> None:
        """An input seen changing within a generation is computed with at every step, from now on."""
        state.program = self.maker.leave_prologue(state.key, state.program, changed, tensors)
        state.watched = None
        state.ready.clear()


def _going_on(session: Session, generation: Generation, branch: CallSlot) -> list[BranchState]:
    """The states of other branches that hold caches, beside those that a new generation replaces."""
    return [
        state
        for slot, state in session.states.items()
        if slot != branch
        and not state.finished
        and not (generation.untouched and generation.line in (None, slot[0]))
    ]


def original(model: nn.Module) -> nn.Module:
    """The model behind a transformed one; any other model itself."""
    engine = getattr(model, "_graphcache", None)
    return engine.model if isinstance(engine, Engine) else model
