"""`package`: a model's phases compiled ahead of time, its weights and its plan as one file."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from graphcache.analysis.cost import graph_flops
from graphcache.compiler.ahead import Libraries, Library, Stretch, compile_ahead
from graphcache.compiler.backends import unwrapped
from graphcache.compiler.guidance_half import Half
from graphcache.compiler.modes import around_code
from graphcache.compiler.phase_code import Runnable
from graphcache.compiler.program import Program
from graphcache.ir.data import TensorLine, described, described_result
from graphcache.ir.errors import CaptureError, GraphCacheError, PlanError
from graphcache.ir.graph import StepGraph, has_symbolic_shapes, value_of
from graphcache.ir.plan import Plan
from graphcache.ir.roles import Names
from graphcache.libraries.extras import require
from graphcache.packaging import archive
from graphcache.packaging.calls import record_calls
from graphcache.packaging.machine import Machine
from graphcache.packaging.manifest import (
    FORMAT,
    CodeLine,
    GraphLine,
    HalfLine,
    Manifest,
    ParameterLine,
    PartLine,
    PhaseLine,
    PortLine,
    SizeLine,
    own_version,
)
from graphcache.packaging.weights import Stored
from graphcache.runtime.engine import Engine, original
from graphcache.runtime.options import Options, check_regions
from graphcache.runtime.parts import denoisers
from graphcache.runtime.warmup import Call, branches_of
from graphcache.tracing.capture import forward_parameters

_MANY = 4096
"""Captures that are kept: those of all sizes."""


def package(
    model_or_pipe: Any,
    path: str | os.PathLike[str],
    plan: Plan | None = None,
    sizes: Sequence[Call] = (),
    *,
    part: str | None = None,
    timestep: str | None = None,
    latents: str | Sequence[str] = (),
    branches: int | None = None,
    wait: Literal["step", "never"] = "step",
    steps: Sequence[int] = (),
    regions: Literal["auto"] | bool = "auto",
) -> None:
    """Compile what a plan needs, and write it with the weights as one file that `load` runs.

    Args:
        model_or_pipe: a model in eval mode, or a pipeline with one denoiser, as `transform` takes them;
            one that was transformed is packaged with the plan that it has.
        path: of the file, which is replaced whole or not at all.
        plan: what each site does at each step.
        sizes: the calls that the package is for, each with its sizes and dtypes: a model's keyword or
            positional arguments, or a pipeline's keyword arguments, for which it is run for two steps.
        part: the denoiser, of a pipeline that has several; each is a package of its own.
        timestep: see `transform`.
        latents: see `transform`.
        branches: see `transform`.
        wait: see `transform`.
        steps: further numbers of evaluations of a generation, beside the plan's.
        regions: True compiles what repeats in a graph, as a model's blocks, once, and False each graph whole;
            "auto" takes regions on a CPU where that takes less to compile and steps are long. They are shared
            by all phases and sizes in which they are alike.

    Raises:
        GraphCacheError: the model cannot be captured, the plan does not fit it, or a package cannot hold it.
    """
    require("safetensors.torch", "package", "writing a package")
    check_regions(regions)
    if not sizes:
        raise GraphCacheError("sizes= is empty: give the arguments of one call for each size to package")
    held = _subject(model_or_pipe, part)
    model, given = original(held), getattr(held, "_graphcache", None)
    if plan is None and given is None:
        raise PlanError("plan= is missing: a package holds the phases of a plan")
    if given is None:
        assert plan is not None
        options = Options(plan, branches=branches, waits=wait == "step", names=Names.of(timestep, latents))
    else:
        options = given.options if plan is None else dataclasses.replace(given.options, plan=plan)
    if options.offload or options.stream_weights or options.max_cache_bytes is not None:
        raise GraphCacheError(
            "a package keeps caches and weights on the device: transform the model without offload=, "
            "stream_weights= and max_cache_bytes=, or package the untransformed one"
        )
    if options.mesh:
        raise GraphCacheError("a package is for one process: package the model without mesh=")
    # a backend that is never called: phases are made as for being compiled
    options = dataclasses.replace(
        options,
        backend="inductor",
        sizes="fixed",
        signatures=_MANY,
        regions=options.regions if regions == "auto" else regions,
    )
    is_pipe = not isinstance(model_or_pipe, nn.Module)
    calls = record_calls(model_or_pipe, held, model, sizes) if is_pipe else sizes
    with torch.no_grad():
        packing = _Packing(model, Engine(model, options))
        for call in calls:
            for count in (options.plan.steps, *steps):
                packing.add(call, packing.engine.plans[count])
        packing.write(Path(path))


def _subject(model_or_pipe: Any, part: str | None) -> nn.Module:
    """The model, or a pipeline's denoiser."""
    if isinstance(model_or_pipe, nn.Module):
        if part is not None:
            raise GraphCacheError(f"part={part!r} names a module of a pipeline, and this is a module")
        return unwrapped(model_or_pipe)[0]
    found = denoisers(model_or_pipe, () if part is None else (part,))
    if len(found) != 1:
        raise GraphCacheError(f"part= must name one of {', '.join(found)}: each is a package of its own")
    return unwrapped(next(iter(found.values())).module)[0]


class _Packing:
    """One package in the making."""

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        self.model = model
        self.engine = engine
        self.stored = Stored(model)
        self.files: dict[str, Path] = {}
        self.codes: list[CodeLine] = []
        self._libraries: Libraries | None = None
        self._numbers: dict[int, int] = {}
        self._by_region = engine.options.regions
        self._sizes: dict[Program, SizeLine] = {}

    def write(self, path: Path) -> None:
        lines, options = [*self._sizes.values()], self.engine.options
        manifest = Manifest(
            format=FORMAT,
            graphcache=own_version(),
            torch=str(torch.__version__),
            machine=Machine.here(torch.device(lines[0].leaves[0].device).type),
            model=type(self.model).__name__,
            plan=str(options.plan),
            parameters=[
                ParameterLine(p.name, int(p.kind), p.default is not p.empty)
                for p in forward_parameters(self.model).values()
            ],
            timestep=options.names.timestep,
            latents=[*options.names.latents],
            calls=options.branches,
            waits=options.waits,
            modes=described(around_code(), "modes"),
            attributes=_attributes(self.model),
            config=_config(self.model),
            weights=self.stored.lines,
            codes=self.codes,
            sizes=lines,
            files={},
        )
        archive.write(path, manifest, self.stored.tensors, self.files)

    def add(self, call: Call, plan: Plan) -> None:
        """Compile what calls like this one need under a plan, of both branches of guidance."""
        for state, tensors in branches_of(self.engine, call, plan):
            program, schedule = state.program, state.schedule
            line = self._sizes.get(program)
            if line is None:
                _refuse(program)
                line = self._sizes[program] = self._size(program, tensors)
            known = [(item.phase, item.ranges, item.guided, item.memories) for item in line.phases]
            for index, phase in enumerate(schedule.phases):
                key = phase, [*schedule.ranges], schedule.guided, [*schedule.memories]
                if key not in known:
                    graph = self._graph(program, program.phase(schedule, index), f"phase {index} of the plan")
                    line.phases.append(PhaseLine(*key, graph))
            line.memories = [*schedule.memories]

    def _size(self, program: Program, tensors: Sequence[torch.Tensor]) -> SizeLine:
        captured = program.captured
        leaves = [torch.empty(0) for _ in range(captured.output.count)]
        places = {id(leaf): place for place, leaf in enumerate(leaves)}
        prologue = program.prologue
        return SizeLine(
            call=described(captured.call.template, "the call"),
            leaves=[TensorLine.of(tensor) for tensor in tensors],
            numbers=[*captured.call.numbers],
            strides=[[*stride] for stride in captured.strides],
            result=described_result(captured.output.build(leaves), places),
            count=captured.output.count,
            taken=described(captured.output.taken, "what forward takes out of lists"),
            branches=[*captured.step.branches],
            fingerprint=program.fingerprint,
            flops=program.plain_flops,
            prologue=None if prologue is None else self._graph(program, prologue, "the prologue"),
            phases=[],
            half=None if program.half is None else _half(program.half),
            memories=[],
            tokens=dict(program.tokens),
        )

    def _graph(self, program: Program, runnable: Runnable, what: str) -> GraphLine:
        step = runnable.step
        _refuse_unpackable(step, what)
        if self._libraries is None:
            self._libraries = Libraries(value_of(step.placeholders()[0]).device.type)
        made = compile_ahead(step, what, self._libraries, self._by_region, program.plain_flops)
        return GraphLine(
            parts=[*map(self._part, made.stretches)],
            results=[*made.results],
            inputs=[PortLine.of(port, value_of(node)) for port, node in step.ports()],
            outputs=[
                PortLine.of(port, value_of(node))
                for port, node in zip(step.outputs, step.results(), strict=True)
            ],
            flops=graph_flops(step),
        )

    def _part(self, stretch: Stretch) -> PartLine:
        weights = {name: self.stored.name(weight) for name, weight in stretch.weights.items()}
        return PartLine(self._code(stretch.library), weights, [*stretch.inputs], [*stretch.results])

    def _code(self, library: Library) -> int:
        """The number of a library among those of the package."""
        number = self._numbers.setdefault(id(library), len(self.codes))
        if number == len(self.codes):
            files = {f"code/{number}/{file.name}": file for file in library.files}
            self.files |= files
            self.codes.append(CodeLine([*files], [*library.fed]))
        return number


def _half(half: Half) -> HalfLine:
    return HalfLine(
        [[*stride] for stride in half.strides],
        sorted(half.rows.carriers),
        half.rows.first,
        sorted(half.hoisted),
        sorted(half.shared),
    )


def _refuse(program: Program) -> None:
    """Raise CaptureError for what only the model itself can do."""
    captured = program.captured
    if captured.step.opaque:
        places = ", ".join(sorted({call.place for call in captured.step.opaque}))
        raise CaptureError(
            f"{places} cannot be traced and is called as it is, which needs the model's source; a package "
            "has none: use the model with transform(...)"
        )
    if captured.conditions is not None or (program.half and program.half.conditions is not None):
        raise CaptureError(
            "the model's forward decides by values of its inputs, such as how long a mask is, and for each "
            "answer there is another graph, which a package cannot tell: use the model with transform(...)"
        )


def _refuse_unpackable(step: StepGraph, what: str) -> None:
    if has_symbolic_shapes(step):
        raise CaptureError(f"{what} has sizes that depend on values, which a package cannot hold")


def _attributes(model: nn.Module) -> dict[str, Any]:
    """The plain attributes of a model, which pipelines look at."""
    plain = (bool, int, float, str, type(None))
    return {
        name: described(value, name)
        for name, value in vars(model).items()
        if type(value) in plain and not name.startswith("_") and name != "training"
    }


def _config(model: nn.Module) -> Any:
    """A model's config, as far as it is plain."""
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if not isinstance(config, Mapping):
        return None
    kept = {}
    for name, value in config.items():
        try:
            described(value, str(name))
        except CaptureError:
            continue
        kept[name] = value
    return described(kept, "config")
