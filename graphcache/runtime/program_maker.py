"""Finds the program of a call, or makes it: captures, and how their phases are compiled."""

import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphcache.compiler.backends import Backend, compiled_by_blocks, prior_compilation
from graphcache.compiler.captured import Captured
from graphcache.compiler.code import Ways
from graphcache.compiler.decisions import Decisions
from graphcache.compiler.guidance_half import Rows
from graphcache.compiler.kept_captures import KeptCaptures
from graphcache.compiler.modes import ambient
from graphcache.compiler.program import Elsewhere, Program
from graphcache.compiler.programs import Programs
from graphcache.compiler.symbolic_captures import FIXED, SymbolicCaptures
from graphcache.compiler.variants import Variants
from graphcache.ir.call import Binder, CallSpec, Key, Signature
from graphcache.ir.errors import CaptureError
from graphcache.ir.opaque import Opaque
from graphcache.libraries.exclusive import COMPILING
from graphcache.runtime.mesh import refuse_for_ranks
from graphcache.runtime.options import Options
from graphcache.runtime.spoken import Spoken
from graphcache.tracing.capture import forward_parameters
from graphcache.tracing.homes import Homes
from graphcache.tracing.sized_graph import SizedGraph
from graphcache.tracing.untraceable import told


class ProgramMaker:
    """The programs of one model, for all its sessions.

    Attributes:
        model: the original.
        options: what `transform` was told.
        backend: compiles the phases; None adopts what the model was compiled with, where `adopts`.
        binder: reads calls of the model's forward.
        homes: where weights are that are kept elsewhere.
        variants: numbers the forms that adapters and hooks give the model.
        programs: what was captured, by key.
        decisions: which answers of forward a call needs.
        spoken: what was said once and is not said again.
    """

    adopts = True

    def __init__(
        self, model: nn.Module, options: Options, spoken: Spoken, binder: Binder | None = None
    ) -> None:
        self.model = model
        self.options = options
        self.backend = options.backend
        self.binder = binder or Binder(forward_parameters(model), options.names)
        self.homes = Homes(model, options.stream_weights)
        self.variants = Variants(model, self.homes, options.watches_all)
        self.programs = Programs(options.signatures)
        self.decisions = Decisions()
        self.spoken = spoken
        self._kept = KeptCaptures(options.captures)
        self._symbolic = SymbolicCaptures(0 if options.sizes == "any" else FIXED, self._kept)
        self._number = 0
        self._rows: Rows | None = None
        self._opaque: Sequence[Opaque] = ()
        self._specs: dict[Key, CallSpec] = {}
        self._lock = threading.RLock()

    def spec(self, signature: Signature, bound: Mapping[str, Any]) -> CallSpec:
        """How the tensors of a call with this signature make up its arguments."""
        spec = self._specs.get(signature)
        if spec is None:
            if len(self._specs) >= 8 * self.options.signatures:
                self._specs.clear()
            spec = self._specs[signature] = CallSpec.of(self.binder, bound)
        return spec

    def key(self, signature: Signature, tensors: Sequence[torch.Tensor], begins: bool) -> Key:
        """What a program depends on: the form of the model, the call's signature, modes around it, and
        values that forward decides on.
        """
        number = self.variants.look(begins)
        if number != self._number or (begins and self.homes.device is not None):
            with self._lock:
                self._number = number
                self.homes.look()
        if begins:
            with self._lock:
                self.programs.forget_others(self.variants.numbers)
                self.decisions.forget_others(self.variants.numbers)
                self._symbolic.forget_others(self.variants.numbers)
        key = number, *signature, *ambient()
        return self.decisions.completed(key, tensors, begins) if self.decisions else key

    def find(
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
        spec = self.spec(signature, bound)
        with COMPILING:
            captured, trace = (twin.captured, None) if twin else self._captured(key, spec, tensors, asks)
        modes = *ambient(), tuple([tensor.requires_grad for tensor in tensors])

        def program(captured: Captured, signature: Hashable, elsewhere: Elsewhere | None = None) -> Program:
            return Program(
                captured,
                self.compilation(),
                offload=self.options.offload,
                observers=self.options.observers,
                kept=self.programs.compilations.under(signature, modes),
                ways=self._ways(),
                mesh=self.options.mesh,
                elsewhere=elsewhere,
            )

        there = None
        if trace is not None and self.options.sizes == "any":
            observers, split = self.options.observers, self.options.plan.splits_parallel
            there = captured.elsewhere(trace, self.model, tensors, observers, split)
        if there is None:
            return program(captured, signature).prepared()
        other, others = there
        return program(
            captured, signature, Elsewhere(program(other, (signature, "elsewhere")), others)
        ).prepared()

    def _ways(self) -> Ways:
        """How phases are compiled: as was asked for, or by regions as the model was."""
        asked = self.options.regions
        # of weights that are kept elsewhere only those of two regions are on the device at a time
        auto = self.homes.device is not None or compiled_by_blocks(self.model)
        fixed = self.options.sizes == "fixed" or bool(self.options.mesh)
        return Ways(auto if asked == "auto" else asked, not fixed)

    def compilation(self) -> Backend:
        """What phases are compiled with: what was asked for, or what the model was compiled with."""
        found = self.backend if self.backend is not None or not self.adopts else prior_compilation(self.model)
        if self.options.mesh:
            refuse_for_ranks(found)
        return found

    def _captured(
        self, key: Key, spec: CallSpec, tensors: Sequence[torch.Tensor], asks: bool
    ) -> tuple[Captured, SizedGraph | None]:
        """A call's capture, and a trace with symbols that was made for it."""
        split, observers = self.options.plan.splits_parallel, self.options.observers
        self.homes.look()
        is_away, trace = self.homes.device is not None, None
        is_plain = not asks and self._is_plain
        # one of any size is worth more than one of this size
        before = self._filled(key, spec, tensors) if is_plain and self.options.sizes == "any" else None

        def traced() -> Captured:
            found = self._filled(key, spec, tensors) if is_plain and self.options.sizes != "any" else None
            if found is not None:
                return found[0]
            known = asks, self._opaque, self.homes
            return Captured.of(self.model, spec, tensors, observers, split, *known)

        if before is not None:
            captured, trace = before
        elif is_plain and not observers:
            captured = self._kept.captured(self.model, spec, tensors, split, traced)
        else:
            why = "it is observed, asks for values, calls modules or moves weights"
            captured = self._kept.left_out(self.model, why, traced)
        if captured.step.opaque and is_away:
            called = captured.step.opaque[0]
            raise CaptureError(
                f"{called.place} cannot be traced{called.cause}, and weights are offloaded by modules: keep "
                "them on the device, or offload the whole model (enable_model_cpu_offload)"
            )
        self._opaque = captured.step.opaque
        for text in told(captured.step.opaque):
            self.spoken.once(text)
        self.variants.captured()
        return captured, trace

    @property
    def _is_plain(self) -> bool:
        """Whether nothing is known of the model that a trace with symbols does not hold."""
        return not self._opaque and self.homes.device is None

    def _filled(
        self, key: Key, spec: CallSpec, tensors: Sequence[torch.Tensor]
    ) -> tuple[Captured, SizedGraph | None] | None:
        """A call's capture by a trace with symbols, and that trace if it is new; None where there is none."""
        if not self._ways().any_size:
            return None
        observers, split = self.options.observers, self.options.plan.splits_parallel
        return self._symbolic.find(key, self.model, spec, tensors, observers, split)

    def halve(self, program: Program, tensors: Sequence[torch.Tensor], conditional: str, key: Key) -> None:
        """Capture the step for the conditional half of these inputs too, unless it was."""
        with self._lock:
            if program.half is None:

                def filled(inputs: Sequence[torch.Tensor], rows: Rows) -> Captured | None:
                    found = self._filled((*key, rows), program.captured.call, inputs)
                    return found and found[0]

                is_plain = program.captured.conditions is None and self._is_plain
                program.halve(self.model, tensors, conditional, filled if is_plain else None, self._rows)
                self._rows = program.half and program.half.rows
                half = program.half
                if half is not None and half.conditions is not None:
                    self.decisions.note(key, half.conditions, tensors, half.rows)

    def compile(self, backend: Backend) -> None:
        """Compile the phases from now on; what was captured stays."""
        if self.options.mesh:
            refuse_for_ranks(backend)
        with self._lock:
            self.backend = backend
            self.programs.compilations.clear()
            for key, program in self.programs.items():
                self.programs[key] = program.compiled_with(backend).prepared()

    def leave_prologue(
        self, key: Key, program: Program, changed: set[int], tensors: Sequence[torch.Tensor]
    ) -> Program:
        """The program from now on, in which these inputs, seen changing, are computed with at every step."""
        with self._lock:
            known = self.programs.get(key)
            is_away = known is not None and known is not program and known.offloaded is program
            made = (known if known is not None and is_away else program).without(changed).prepared()
            if program.half is not None:
                conditional = "first" if program.half.rows.first else "last"
                self.halve(made, tensors, conditional, key)
            if is_away or known is program:
                self.programs[key] = made
        return made.offloaded if is_away else made
