"""Graphs compiled ahead of time by AOTInductor: whole, or what repeats in them once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx

from graphcache.compiler.flat import flattened, weights_of
from graphcache.compiler.native import Code, Following, Native, Part
from graphcache.compiler.regions import Region, regions
from graphcache.ir.data import TensorLine
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import StepGraph, has_symbolic_shapes, layout, value_of
from graphcache.ir.structure import structure
from graphcache.libraries.exclusive import COMPILING
from graphcache.libraries.quiet import quiet_tracing
from graphcache.libraries.torch_private import FakeTensorMode

_OPTIONS = {
    "aot_inductor.package": True,
    # one copy of the weights serves all graphs
    "aot_inductor.package_constants_in_so": False,
    # no weight's value stands in the code, however small it is
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
    # the code that calls the kernels is long, and takes most of the compiler's time
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.enable_line_tables": False,
    # they take longer to make than they save
    "aot_inductor.precompile_headers": False,
}
LIBRARY = 500
"""To how many operations of a long graph it comes to make one library more."""
PART = 2**26
"""FLOPs of a step for each part, from which on the 46 µs that a part costs on a CPU are not felt."""


@dataclass(frozen=True)
class Library:
    """Native code of all graphs that are alike but for the values of their weights.

    Attributes:
        files: one of them the shared library.
        names: under which it asks for weights, with their places among the graph's inputs.
        fed: the layouts of its other inputs.
    """

    files: Sequence[Path]
    names: Mapping[str, int]
    fed: Sequence[TensorLine]


@dataclass(frozen=True)
class Stretch:
    """A part of a graph: its code, its weights by the names in it, and the places in a table of values that
    it reads and writes.
    """

    library: Library
    weights: Mapping[str, torch.Tensor]
    inputs: Sequence[int]
    results: Sequence[int]


@dataclass(frozen=True)
class Ahead:
    """A graph's stretches in their order, and the places of what it returns; its inputs come first."""

    stretches: Sequence[Stretch]
    results: Sequence[int]


@dataclass(frozen=True)
class Libraries:
    """Compiles what is not alike to anything that was compiled before.

    Attributes:
        device: the kind of device that the code is for.
        options: of Inductor.
    """

    device: str
    options: Mapping[str, Any] = field(default_factory=dict)
    _made: dict[str, Library] = field(default_factory=dict)

    def knows(self, key: str) -> bool:
        """Whether a graph like this was compiled."""
        return key in self._made

    def of(self, closed: "_Closed", what: str) -> Library:
        """The code of a graph.

        Raises:
            CaptureError: AOTInductor cannot compile it.
        """
        key = closed.key
        if key not in self._made:
            fed = closed.fed
            files, names = native_code(closed.module, fed, self.device, self.options, what)
            if unknown := {*names} - closed.named.keys():
                raise CaptureError(
                    f"{what} cannot be compiled ahead of time: AOTInductor made constants of its own "
                    f"({', '.join(sorted(unknown))})"
                )
            places = {name: closed.named[name] for name in names}
            self._made[key] = Library(files, places, [*map(TensorLine.of, fed)])
        return self._made[key]


def compile_ahead(
    step: StepGraph,
    what: str,
    libraries: Libraries,
    by_region: Literal["auto"] | bool = False,
    flops: int = 0,
) -> Ahead:
    """Compile a graph to native code, which is given its weights when it is loaded.

    Args:
        step: the graph; its inputs' fake tensors say what it is compiled for.
        what: it is, for a message.
        libraries: compile it.
        by_region: whether what repeats in it is compiled once, where that can be; "auto": on a CPU, where
            that leaves less to compile and makes no step noticeably longer.
        flops: of the step that computes all, for "auto".

    Raises:
        CaptureError: AOTInductor cannot compile it.
    """
    _refuse_uncompilable(step, what)
    weights = weights_of(step)
    module = flattened(step, weights)
    nodes = module.graph.find_nodes(op="placeholder")
    ports = nodes[: len(step.inputs)]
    held = dict(zip(nodes[len(ports) :], weights.values(), strict=True))
    outputs: Any = module.graph.output_node().args[0]
    cuts = by_region and not has_symbolic_shapes(step) and held.keys().isdisjoint(outputs)
    parts = (regions(module.graph) or []) if cuts else []
    made = _laid_out(parts, held)
    if not made or (by_region == "auto" and not _pay(made, libraries, flops)):
        parts = [Region(module, tuple(nodes), tuple(outputs))]
        made = [_Closed.of(parts[0], held, [*map(value_of, ports)])]
    places: dict[fx.Node, int] = {}
    for node in (*ports, *(node for part in parts for node in part.results)):
        places.setdefault(node, len(places))
    stretches = []
    for part, closed in zip(parts, made, strict=True):
        library = libraries.of(closed, what)
        given = {name: held[part.inputs[place]] for name, place in library.names.items()}
        inputs = [places[node] for node in part.inputs if node not in held]
        stretches.append(Stretch(library, given, inputs, [places[node] for node in part.results]))
    return Ahead(stretches, [places[node] for node in outputs])


@dataclass(frozen=True)
class _Closed:
    """A region's graph that holds the weights among its inputs, and their places by the names in it."""

    module: fx.GraphModule
    named: Mapping[str, int]

    @staticmethod
    def of(part: Region, held: Mapping[fx.Node, torch.Tensor], fed: Sequence[torch.Tensor]) -> "_Closed":
        """`fed`: fake tensors for the inputs that are no weights. Weights in one memory are one tensor."""
        graph, env, named = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, int]()
        root, met = fx.GraphModule(part.module, part.module.graph), dict[Any, torch.Tensor]()
        others = iter(fed)
        nodes = zip(part.module.graph.find_nodes(op="placeholder"), part.inputs, strict=True)
        for place, (inner, outer) in enumerate(nodes):
            if outer in held:
                weight, name = held[outer].detach(), f"weight_{len(named)}"
                one = weight.data_ptr(), *layout(weight)
                root.register_buffer(name, met.setdefault(one, weight))
                named[name], env[inner] = place, graph.get_attr(name)
            else:
                env[inner] = graph.placeholder(f"given_{place}")
                env[inner].meta["val"] = next(others)
        for node in part.module.graph.nodes:
            if node.op != "placeholder":
                env[node] = graph.node_copy(node, env.__getitem__)
        return _Closed(fx.GraphModule(root, graph), named)

    @property
    def fed(self) -> list[torch.Tensor]:
        return [*map(value_of, self.module.graph.find_nodes(op="placeholder"))]

    @cached_property
    def key(self) -> str:
        """The same for graphs that differ in the values of weights alone."""
        return structure(self.module.graph, self.module, anyones=True)


def _laid_out(parts: Sequence[Region], held: Mapping[fx.Node, torch.Tensor]) -> list[_Closed]:
    """Regions for what arrives at each: what the code of those before returns, whose strides are the ones of
    eager operations.

    Where the strides are other ones at some of those that are alike, as those of a stream are before the
    first block, all are for the most frequent ones: to copy a tensor costs less than another library.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {node: _alike(weight) for node, weight in held.items()}
        arriving = []
        for part in parts:
            for node in part.inputs:
                if node not in fakes:
                    fakes[node] = _alike(value_of(node))
            fed = [fakes[node] for node in part.inputs]
            fakes |= zip(part.results, part.module(*fed), strict=True)
            arriving.append(
                [tensor for tensor, node in zip(fed, part.inputs, strict=True) if node not in held]
            )
        plain = [
            [torch.empty_like(item, memory_format=torch.contiguous_format) for item in fed]
            for fed in arriving
        ]
    kinds = [_Closed.of(part, held, fed).key for part, fed in zip(parts, plain, strict=True)]
    seen: dict[str, Counter[tuple[Any, ...]]] = {}
    examples: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for kind, fed in zip(kinds, arriving, strict=True):
        layouts = tuple(map(layout, fed))
        seen.setdefault(kind, Counter())[layouts] += 1
        examples[kind, layouts] = fed
    chosen = [examples[kind, seen[kind].most_common(1)[0][0]] for kind in kinds]
    return [_Closed.of(part, held, fed) for part, fed in zip(parts, chosen, strict=True)]


def _alike(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _pay(made: Sequence[_Closed], libraries: Libraries, flops: int) -> bool:
    """Whether a graph's regions take less to compile than the graph, and steps are long enough for them."""
    if libraries.device != "cpu" or flops < PART * len(made):
        return False
    sizes = {closed.key: len(closed.module.graph.nodes) for closed in made}
    new = [size for key, size in sizes.items() if not libraries.knows(key)]
    whole = sum(sizes[closed.key] for closed in made)
    return len(new) * LIBRARY + sum(new) < LIBRARY + whole


def _refuse_uncompilable(step: StepGraph, what: str) -> None:
    if any(str(node.target).startswith("graphcache.") for node in step.calls()):
        raise CaptureError(
            f"{what} calls back into Python, which native code cannot: for modules that "
            "are not traced, and for offload=True, take another backend"
        )
    if step.homes:
        raise CaptureError(
            f"{what} reads weights that are kept elsewhere, in host memory or in a file, which native code "
            "cannot fetch: take offloading off the model, or another backend"
        )


def native_code(
    module: fx.GraphModule, fed: Sequence[torch.Tensor], device: str, options: Mapping[str, Any], what: str
) -> tuple[list[Path], list[str]]:
    """The files that AOTInductor makes of a graph for inputs with these layouts, and the names of the weights
    that it asks for.

    Raises:
        CaptureError: AOTInductor cannot compile it.
    """
    from graphcache.libraries.torch_compilers_private import aot_compile

    with COMPILING, quiet_tracing():
        try:
            made = aot_compile(module, tuple(fed), options={**options, **_OPTIONS})
            files = [Path(name) for name in made if not name.endswith((".cpp", "_metadata.json"))]
            return files, Code(files, device).names
        except Exception as error:
            raise CaptureError(f"{what} cannot be compiled ahead of time by AOTInductor: {error}") from error


def following(step: StepGraph, options: Mapping[str, Any], by_region: bool) -> Following:
    """A graph compiled ahead of time, to be called at once.

    Raises:
        CaptureError: AOTInductor cannot compile it, or gradients are asked for.
    """
    if torch.is_grad_enabled():
        raise CaptureError("backend='aot' computes no gradients: call the model under torch.no_grad()")
    device = value_of(step.placeholders()[0]).device.type
    return at_hand(step, compile_ahead(step, "a phase of the plan", Libraries(device, options), by_region))


def at_hand(step: StepGraph, made: Ahead) -> Following:
    """A graph's code with the weights of the model."""
    device, parts = value_of(step.placeholders()[0]).device.type, []
    for item in made.stretches:
        code = Code(item.library.files, device)
        parts.append(Part(code, item.library.fed, item.inputs, item.results))
    returned = [TensorLine.of(value_of(node)) for node in step.results()]
    codes = [(part.code, item.weights) for part, item in zip(parts, made.stretches, strict=True)]
    return Following(Native(parts, made.results, returned), codes)
