"""Finds the program and the branch's state of a call, and runs it: what is behind a transformed model."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from graphcache.compiler.backends import (
    Backend,
    begin_generation,
    compiled_by_blocks,
    prior_compilation,
)
from graphcache.compiler.captured import Captured
from graphcache.compiler.code import Ways
from graphcache.compiler.decisions import Decisions
from graphcache.compiler.guidance_half import is_doubled
from graphcache.compiler.modes import ambient, refuse_conversion, refuse_export, what_changed
from graphcache.compiler.program import Program
from graphcache.compiler.programs import Programs
from graphcache.compiler.variants import Variants
from graphcache.ir.call import Binder, CallSpec, Key, Signature
from graphcache.ir.errors import StateError
from graphcache.ir.opaque import Opaque
from graphcache.ir.plan import Plan
from graphcache.ir.schedule import Role
from graphcache.ir.tree import take
from graphcache.ir.versions import version
from graphcache.runtime.caller import Caller
from graphcache.runtime.guidance_role import role_of
from graphcache.runtime.matching import Call
from graphcache.runtime.options import Options
from graphcache.runtime.plans import Plans
from graphcache.runtime.runner import BranchState, begun, carried, changed_inputs, halved, hand_over, run_step
from graphcache.runtime.schedulers import Driver
from graphcache.runtime.session import CallSlot, Generation, Session
from graphcache.runtime.spoken import Spoken
from graphcache.runtime.step_tracking import Turn, place
from graphcache.runtime.surroundings import Around, OpenSession, Scopes, Surroundings
from graphcache.tracing.capture import forward_parameters
from graphcache.tracing.untraceable import told


class Engine:
    """Runs a model's evaluations under a plan; neither the model nor a graph holds any of its state.

    The programs are shared by all sessions; each session has the caches of its own generation.

    Attributes:
        model: the original.
        options: what `transform` was told; `backend` is its backend.
        binder: reads calls of the model's forward.
        caller: finds the pipeline that calls.
        driver: tells the step, where nothing else does.
        scopes: the session, context and other surroundings of each thread and task.
        variants: numbers the forms that adapters and hooks give the model.
        programs: what was captured, by signature.
        decisions: which answers of forward a call needs.
        plans: the plan, for each number of steps.
        given: what `restore` gives back.
        timesteps_before: those of the scheduler when the pipeline was transformed.
        outer: a forward that someone set around the plan's own.
        calls: how many there were.
        spoken: what was said once and is not said again.
    """

    def __init__(self, model: nn.Module, options: Options, pipe: Any = None) -> None:
        self.model = model
        self.options = options
        self.backend = options.backend
        self.binder = Binder(forward_parameters(model), options.names)
        self.caller = Caller()
        self.driver = Driver(pipe=pipe, caller=self.caller)
        self.scopes = Scopes(Surroundings(self.new_session(self.driver)))
        self.variants = Variants(model, options.watches_all)
        self.programs = Programs(options.signatures)
        self.decisions = Decisions()
        self.plans = Plans(options.plan)
        self.given = model
        self.timesteps_before: Any = None
        self.outer: Any = None
        self.calls = 0
        self.spoken = Spoken()
        self._opaque: Sequence[Opaque] = ()
        self._specs: dict[Key, CallSpec] = {}
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
            refuse_export(tensors)
            spec = self._spec(signature, bound)
            constants = spec.constants(tensors)
            call = Call(
                around.name,
                around.fields,
                self._key(signature, tensors, begins=False),
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
                call = call._replace(key=self._key(signature, tensors, begins=True))
            state = self._state(session, generation, branch, call)
            if state.role == "uncond":
                hand_over(session.states.get(("cond", branch[1])), state)
            if generation.untouched:
                begin_generation(state.program.backend)
            session.enter(generation, branch, state)
            try:
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

    def _key(self, signature: Signature, tensors: Sequence[torch.Tensor], begins: bool) -> Key:
        """What a program depends on: the form of the model, the call's signature, modes around it, and
        values that forward decides on.
        """
        number = self.variants.look(begins)
        if begins:
            with self._lock:
                self.programs.forget_others(self.variants.numbers)
                self.decisions.forget_others(self.variants.numbers)
        key = number, *signature, *ambient()
        return self.decisions.completed(key, tensors, begins) if self.decisions else key

    def evaluate(self, branch: CallSlot, state: BranchState, tensors: Sequence[torch.Tensor]) -> Any:
        """Run the step that a branch's state is at."""
        return run_step(state, tensors)

    @property
    def as_given(self) -> Options:
        """Options that make another such engine, compiled alike."""
        return replace(self.options, backend=self.backend)

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
        if isinstance(example_inputs, Mapping):
            bound = self.binder.bind((), dict(example_inputs))
        else:
            bound = self.binder.bind(example_inputs, {})
        signature, tensors = self.binder.signature(bound)
        key, program = self._program(self._key(signature, tensors, begins=True), bound, tensors)
        plan, name = self.options.plan, self.surroundings.name
        program.check(plan, self._role(plan, name, program, tensors, key))
        self.spoken.of_coverage(plan, program.captured.step)
        return program

    def flat(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call's keyword arguments, in signature order."""
        return self.binder.signature(self.binder.bind((), dict(inputs)))[1]

    def compile(self, backend: Backend) -> None:
        """Compile the phases from now on; what was captured stays."""
        with self._lock:
            self.backend = backend
            self.programs.compilations.clear()
            for key, program in self.programs.items():
                self.programs[key] = replace(program, backend=backend, phases={}).prepared()

    def _spec(self, signature: Signature, bound: Mapping[str, Any]) -> CallSpec:
        spec = self._specs.get(signature)
        if spec is None:
            if len(self._specs) >= 8 * self.options.signatures:
                self._specs.clear()
            spec = self._specs[signature] = CallSpec.of(self.binder, bound)
        return spec

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
        if state is None:
            state = self._begun(plan, generation.step, call)
        elif state.key != call.key:
            state = self._changed(state, plan, generation.step, call)
        elif changed := changed_inputs(state, call.tensors):
            self._leave_prologue(state, changed, call.tensors)
        state.step = generation.step
        state.note(call.constants, call.versions)
        return state

    def _changed(self, state: BranchState, plan: Plan, step: int, call: Call) -> BranchState:
        """The state for another signature, other values or another form of the model, in the middle of a
        generation.
        """
        refuse_conversion(state.key, call.key)
        key, program = self._program(call.key, call.bound, call.tensors)
        call = call._replace(key=key)
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
            return self._begun(plan, step, call)
        return made

    def _begun(self, plan: Plan, step: int, call: Call) -> BranchState:
        """A state whose history begins with this call."""
        key, program = self._program(call.key, call.bound, call.tensors)
        call = call._replace(key=key)
        role, shared = self._lowered_for(plan, call, program)
        state = begun(call.key, program, plan, step, role, shared)
        self.spoken.of_coverage(plan, program.captured.step)
        return state

    def _lowered_for(self, plan: Plan, call: Call, program: Program) -> tuple[Role, bool]:
        """Which calls of guidance these are, and whether tokens are chosen for both halves of a batch."""
        role = self._role(plan, call.name, program, call.tensors, call.key)
        shares = role == "only" and any(item.is_measured for item in plan.letters)
        return role, shares and is_doubled(call.latents)

    def _role(
        self, plan: Plan, name: str, program: Program, tensors: Sequence[torch.Tensor], key: Key
    ) -> Role:
        """Which calls of guidance these are; of a doubled batch the conditional half is captured as well."""
        role = role_of(plan, name, program.captured.call.given_latents(tensors), self.spoken)
        if role == "doubled":
            assert plan.conditional is not None
            self._halve(program, tensors, plan.conditional, key)
        return role

    def _halve(self, program: Program, tensors: Sequence[torch.Tensor], conditional: str, key: Key) -> None:
        with self._lock:
            if program.half is None:
                program.halve(self.model, tensors, conditional)
                half = program.half
                if half is not None and half.conditions is not None:
                    self.decisions.note(key, half.conditions, tensors, half.rows)

    def _program(
        self, key: Key, bound: Mapping[str, Any], tensors: Sequence[torch.Tensor]
    ) -> tuple[Key, Program]:
        """The program of a signature, of a form of the model and of values; its key, once these are known."""
        with self._lock:
            if self.decisions:
                key = self.decisions.completed(key, tensors)
            if key not in self.programs:
                program = self._made(key, bound, tensors)
                if program.captured.conditions is not None:
                    key = self.decisions.note(key, program.captured.conditions, tensors)
                self.programs.add(key, program)
                self.variants.keep({known[0] for known in self.programs})
            self.programs.move_to_end(key)
            return key, self.programs[key]

    def _made(self, key: Key, bound: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> Program:
        """A program; its capture is shared with the same signature's in the other gradient mode."""
        twin = self.programs.get((*key[:-1], not key[-1]))
        signature = self.binder.signature(bound)[0]
        asks = self.decisions.knows(key)
        captured = twin.captured if twin else self._captured(self._spec(signature, bound), tensors, asks)
        modes = *ambient(), tuple([tensor.requires_grad for tensor in tensors])
        return Program(
            captured,
            self.compilation(),
            offload=self.options.offload,
            observers=self.options.observers,
            kept=self.programs.compilations.under(signature, modes),
            ways=self._ways(),
        ).prepared()

    def _ways(self) -> Ways:
        """How phases are compiled: as was asked for, or by regions as the model was."""
        asked = self.options.regions
        by_region = compiled_by_blocks(self.model) if asked == "auto" else asked
        return Ways(by_region, self.options.sizes == "auto")

    def compilation(self) -> Backend:
        """What phases are compiled with: what was asked for, or what the model was compiled with."""
        return prior_compilation(self.model) if self.backend is None else self.backend

    def _captured(self, spec: CallSpec, tensors: Sequence[torch.Tensor], asks: bool) -> Captured:
        split = self.options.plan.splits_parallel
        captured = Captured.of(self.model, spec, tensors, self.options.observers, split, asks, self._opaque)
        self._opaque = captured.step.opaque
        for text in told(captured.step.opaque):
            self.spoken.once(text)
        self.variants.captured()
        return captured

    def _leave_prologue(self, state: BranchState, changed: set[int], tensors: Sequence[torch.Tensor]) -> None:
        """An input seen changing within a generation is computed with at every step, from now on."""
        program = state.program.without(changed).prepared()
        if state.program.half is not None:
            conditional = "first" if state.program.half.rows.first else "last"
            self._halve(program, tensors, conditional, state.key)
        with self._lock:
            if self.programs.get(state.key) is state.program:
                self.programs[state.key] = program
        state.program = program
        state.watched = None
        state.ready.clear()


def original(model: nn.Module) -> nn.Module:
    """The model behind a transformed one; any other model itself."""
    engine = getattr(model, "_graphcache", None)
    return engine.model if isinstance(engine, Engine) else model
