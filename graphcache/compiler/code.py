"""From a specialised graph to something to call, compiled or found among what was."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import fx, nn

from graphcache.compiler.ahead import following
from graphcache.compiler.any_size import Family, Sizes
from graphcache.compiler.arrivals import Away
from graphcache.compiler.backends import (
    Backend,
    Compiled,
    arguments,
    as_one_graph,
    compiled,
    freezes,
    inductor,
    inductor_options,
    is_ahead,
    replays_cuda_graphs,
)
from graphcache.compiler.flat import flattened, weights_of
from graphcache.compiler.regions import InRegions, Region, pieces, regions, whole
from graphcache.ir.errors import CaptureError
from graphcache.ir.graph import StepGraph, has_symbolic_shapes, layout, value_of
from graphcache.ir.opaque import Opaque
from graphcache.ir.sizes import skeleton
from graphcache.ir.structure import structure
from graphcache.libraries.exclusive import COMPILING

_ORDINARY = (torch.Tensor, nn.Parameter, nn.Buffer)


class Kept(Protocol):
    """Code of graphs that were compiled before, by their structure."""

    def find(self, structure: str, backend: Backend, takes_weights: bool) -> Compiled | None:
        """The code of a graph that computes the same: with the same weights, unless it is given them."""

    def keep(
        self,
        structure: str,
        backend: Backend,
        takes_weights: bool,
        code: Compiled,
        opaque: tuple[Opaque, ...] = (),
    ) -> None:
        """Note what a graph was compiled to, and the opaque calls in it."""

    @property
    def signature(self) -> Hashable:
        """Of the calls that the graphs are for."""

    def family(self, form: str, backend: Backend) -> Family:
        """Graphs that differ in their sizes alone."""


@dataclass(frozen=True)
class Ways:
    """How graphs are compiled.

    Attributes:
        by_region: whether what repeats in a graph is compiled once.
        any_size: whether graphs that differ in their sizes alone share code, from the second signature on.
    """

    by_region: bool = False
    any_size: bool = False


FIXED = Ways()

Gradients = tuple[bool, ...]
"""Which of the inputs have a gradient; empty where none are computed."""


def build(step: StepGraph, backend: Backend, kept: Kept | None = None, ways: Ways = FIXED) -> "Built":
    """Make a graph callable. What is `kept` is not compiled again."""
    return Built(_Code(step, backend, kept, ways))


class Built:
    """A graph that is called with its input ports' tensors, in order.

    Code is generated and compiled in the first call, which waits until no other thread does so: plans are
    also made to be checked or priced alone. With gradients there is code for every choice of inputs that have
    one, since compiled code has none for the others.
    """

    def __init__(self, code: "_Code") -> None:
        self._code = code
        self._made: dict[Gradients, Compiled] = {}
        self._weights: tuple[torch.Tensor, ...] = ()

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        gradients = tuple([t.requires_grad for t in tensors]) if torch.is_grad_enabled() else ()
        made = self._made.get(gradients)
        return self._first(tensors, gradients) if made is None else made(*tensors, *self._weights)

    def _first(self, tensors: Sequence[torch.Tensor], gradients: Gradients) -> Sequence[torch.Tensor]:
        with COMPILING:
            made = self._made.get(gradients)
            if made is None:
                code = self._code
                self._weights = tuple(code.weights.values())
                made = code.fetching() or code.regions() or code.whole(gradients)
                if code.backend is not None:
                    with as_one_graph():
                        results = made(*tensors, *self._weights)
                    self._made[gradients] = made
                    return results
                self._made[gradients] = made
        return made(*tensors, *self._weights)

    def announce(self) -> None:
        """Let what is compiled from now on serve this graph's sizes too, as far as it can."""
        with COMPILING:
            if not self._made:
                self._code.announce()


@dataclass(frozen=True)
class _Fetching:
    """Code whose weights are there for a call alone, so that nothing can be computed backwards."""

    call: Compiled

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        if torch.is_grad_enabled():
            raise CaptureError(
                "offloaded weights are there for one evaluation alone, so that there are no gradients: call "
                "the model under torch.no_grad(), or keep its weights on the device"
            )
        return self.call(*tensors)


@dataclass(frozen=True)
class _Code:
    """How a graph is compiled, or found among what was."""

    step: StepGraph
    backend: Backend
    kept: Kept | None
    ways: Ways

    @cached_property
    def takes_weights(self) -> bool:
        return takes_weights(self.step, self.backend)

    @cached_property
    def weights(self) -> dict[int, torch.Tensor]:
        """Those that the code is given."""
        return weights_of(self.step) if self.takes_weights or self.step.homes else {}

    @cached_property
    def module(self) -> fx.GraphModule:
        return flattened(self.step, self.weights)

    def whole(self, gradients: Gradients) -> Compiled:
        """The graph's code, for inputs of which these have a gradient."""
        if self.backend is None:
            eager: Compiled = self.module.forward
            return eager
        takes = self.takes_weights
        key = f"{structure(self.step.graph, self.step.root, takes)} {gradients}"
        known = self.kept.find(key, self.backend, takes) if self.kept else None
        if known is not None:
            return known
        code = self._compiled(gradients)
        if self.kept:
            self.kept.keep(key, self.backend, takes, code, self.step.opaque)
        return code

    def _compiled(self, gradients: Gradients) -> Compiled:
        if is_ahead(self.backend):
            return following(self.step, inductor_options(self.backend), self.ways.by_region)
        # torch.compile finds code again by a forward's code object, so that other inputs need another one
        module = fx.GraphModule(self.module, self.module.graph) if gradients else self.module
        code = self._of_any_size(module, self._fed)
        return code or compiled(module, self.backend, has_symbolic_shapes(self.step))

    @property
    def _fed(self) -> list[torch.Tensor]:
        return [*map(value_of, self.step.placeholders()), *self.weights.values()]

    def announce(self) -> None:
        """Note the graph's sizes as an example more, or those of its regions."""
        parts = self._parts() or ()
        given = dict(zip(self.module.graph.find_nodes(op="placeholder"), self._fed, strict=True))
        graphs = [(part.module, part.fed(given)) for part in parts] or [(self.module, self._fed)]
        for module, fed in graphs:
            found = self._family(module, fed)
            if found is not None:
                family, sizes, signature = found
                family.note(sizes, signature)

    def _family(
        self, module: fx.GraphModule, fed: Sequence[torch.Tensor]
    ) -> tuple[Family, Sizes, Hashable] | None:
        """The graphs that a graph differs from in its sizes alone, these, and the call that it is for; None
        where each size has code of its own.
        """
        if not (self.ways.any_size and self.kept and self.takes_weights and _is_bare(self.backend)):
            return None
        form, sizes = skeleton(module.graph, fed)
        return self.kept.family(form, self.backend), sizes, self.kept.signature

    def _of_any_size(self, module: fx.GraphModule, fed: Sequence[torch.Tensor]) -> Compiled | None:
        """Code that also serves graphs of other sizes; None where that is not wanted, or not yet."""
        found = self._family(module, fed)
        if found is None:
            return None
        family, sizes, signature = found
        return family.code(sizes, signature, module, fed, partial(inductor, self.backend, "from_graph"))

    def regions(self) -> Compiled | None:
        """The code of its regions; None where it has none, or is not given its weights."""
        parts = self._parts()
        return None if parts is None else InRegions(self.module.graph, parts, self._of_region)

    def _parts(self) -> list[Region] | None:
        if not self.ways.by_region or not self.takes_weights or has_symbolic_shapes(self.step):
            return None
        return regions(self.module.graph)

    def fetching(self) -> Compiled | None:
        """Code that fetches weights that are kept elsewhere; None where all are where they are read.

        As it is, a graph is cut where it reads weights of another unit; compiled, where its regions are, or
        else all weights come at once.
        """
        graph, count, homes = self.module.graph, len(self.step.inputs), self.step.homes
        if not homes:
            return None
        if self.backend is not None and not self.takes_weights:
            raise CaptureError(
                "offloaded weights are fetched for each call, and this backend's code holds its weights: "
                "leave out CUDA graphs, frozen weights and other compilers than PyTorch's, or keep weights "
                "on the device"
            )
        weights = enumerate(self.weights.items(), count)
        away = {place: Away(homes[key], weight) for place, (key, weight) in weights if key in homes}
        inputs = graph.find_nodes(op="placeholder")
        if self.backend is None:
            units = {inputs[place]: weight.home.unit for place, weight in away.items()}
            return _Fetching(InRegions(graph, pieces(graph, units), lambda module, _: module.forward, away))
        return _Fetching(InRegions(graph, self._parts() or whole(graph), self._of_region, away))

    def _of_region(self, module: fx.GraphModule, tensors: Sequence[torch.Tensor]) -> Compiled:
        key = f"{structure(module.graph, module)} {_arriving(tensors)}"
        known = self.kept.find(key, self.backend, True) if self.kept else None
        if known is not None:
            return known
        code = self._of_any_size(module, tensors) or self._region_code(module, tensors)
        if self.kept:
            self.kept.keep(key, self.backend, True, code)
        return code

    def _region_code(self, module: fx.GraphModule, tensors: Sequence[torch.Tensor]) -> Compiled:
        guarded = has_symbolic_shapes(self.step)
        if _is_bare(self.backend) and not guarded:
            return inductor(self.backend, "from_example_inputs", module, tensors)
        return compiled(module, self.backend, guarded)


def takes_weights(step: StepGraph, backend: Backend) -> bool:
    """Whether code is given the weights at every call, so that it serves whatever else has the same graph.

    Code of CUDA graphs and frozen code depend on where weights lie and what they are, code for packed weights
    on what is in them; other compilers than PyTorch's may look for weights among a module's attributes; and
    opaque calls are of one model.
    """
    if backend is None or step.opaque or replays_cuda_graphs(backend):
        return False
    held = [weight for key, weight in weights_of(step).items() if key not in step.homes]
    if any(type(weight) not in _ORDINARY for weight in held):
        return False
    return arguments(backend)["backend"] in ("inductor", "eager", "aot_eager") and not freezes(backend)


def _arriving(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """What code is made for of a region's inputs, and which of them are one."""
    met: dict[int, int] = {}
    places = [met.setdefault(id(tensor), len(met)) for tensor in tensors]
    kinds = [(layout(tensor), tensor.requires_grad, tensor.is_inference()) for tensor in tensors]
    return [*zip(kinds, places, strict=True)]


def _is_bare(backend: Backend) -> bool:
    """Whether Inductor's own code serves, without torch.compile around it: where nothing has a gradient."""
    return arguments(backend)["backend"] == "inductor" and not torch.is_grad_enabled()
