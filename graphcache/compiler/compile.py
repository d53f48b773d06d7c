"""From a specialised graph to something to call: eager, or any torch.compile backend."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import fx, nn

from graphcache.compiler.flat import flattened, weights_of
from graphcache.compiler.regions import InRegions, regions
from graphcache.ir.errors import CaptureError, GraphCacheError
from graphcache.ir.graph import StepGraph, has_symbolic_shapes, layout
from graphcache.ir.opaque import Opaque
from graphcache.ir.structure import structure
from graphcache.libraries.exclusive import COMPILING
from graphcache.libraries.torch_private import (
    OptimizedModule,
    compiled_call,
    compiled_module,
    dynamo_options,
    error_on_graph_break,
    get_eval_frame_callback,
    inductor_config,
    innermost_backend,
    list_mode_options,
    standalone_compile,
)

_AS_FULLGRAPH = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}

_ORDINARY = (torch.Tensor, nn.Parameter, nn.Buffer)

Backend = str | Callable[..., Any] | Mapping[str, Any] | None
"""None runs the graph as it is; a name or callable is torch.compile's `backend`; a mapping holds
torch.compile's keyword arguments, such as {"backend": "inductor", "options": {"cpp_wrapper": True}}."""

Compiled = Callable[..., Sequence[torch.Tensor]]


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


def build(step: StepGraph, backend: Backend, kept: Kept | None = None, by_region: bool = False) -> Compiled:
    """Make a graph callable with its input ports' tensors, in order.

    Code is generated and compiled in the first call, which waits until no other thread does so: plans are
    also made to be checked or priced alone. What is `kept` is not compiled again. `by_region`: what repeats
    in the graph is compiled once.
    """
    made: Compiled | None = None
    weights: tuple[torch.Tensor, ...] = ()

    def call(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        return first(tensors) if made is None else made(*tensors, *weights)

    def first(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        nonlocal made, weights
        with COMPILING:
            if made is None:
                code = _Code(step, backend, kept, by_region)
                weights = tuple(code.weights.values())
                ready = code.regions() or code.whole()
                if backend is not None:
                    with _as_one_graph():
                        results = ready(*tensors, *weights)
                    made = ready
                    return results
                made = ready
        return made(*tensors, *weights)

    return call


@dataclass(frozen=True)
class _Code:
    """How a graph is compiled, or found among what was."""

    step: StepGraph
    backend: Backend
    kept: Kept | None
    by_region: bool

    @cached_property
    def takes_weights(self) -> bool:
        return takes_weights(self.step, self.backend)

    @cached_property
    def weights(self) -> dict[int, torch.Tensor]:
        """Those that the code is given."""
        return weights_of(self.step) if self.takes_weights else {}

    @cached_property
    def module(self) -> fx.GraphModule:
        return flattened(self.step, self.weights)

    def whole(self) -> Compiled:
        """The graph's code."""
        if self.backend is None:
            eager: Compiled = self.module.forward
            return eager
        takes = self.takes_weights
        key = structure(self.step.graph, self.step.root, takes)
        known = self.kept.find(key, self.backend, takes) if self.kept else None
        if known is not None:
            return known
        code = _compiled(self.module, self.backend, has_symbolic_shapes(self.step))
        if self.kept:
            self.kept.keep(key, self.backend, takes, code, self.step.opaque)
        return code

    def regions(self) -> Compiled | None:
        """The code of its regions; None where it has none, or is not given its weights."""
        if not self.by_region or not self.takes_weights or has_symbolic_shapes(self.step):
            return None
        parts = regions(self.module.graph)
        return None if parts is None else InRegions(self.module.graph, parts, self._of_region)

    def _of_region(self, module: fx.GraphModule, tensors: Sequence[torch.Tensor]) -> Compiled:
        key = f"{structure(module.graph, module)} {_arriving(tensors)}"
        known = self.kept.find(key, self.backend, True) if self.kept else None
        if known is not None:
            return known
        code = _region_code(module, tensors, self.backend)
        if self.kept:
            self.kept.keep(key, self.backend, True, code)
        return code


def takes_weights(step: StepGraph, backend: Backend) -> bool:
    """Whether code is given the weights at every call, so that it serves whatever else has the same graph.

    Code of CUDA graphs and frozen code depend on where weights lie and what they are, code for packed weights
    on what is in them; other compilers than PyTorch's may look for weights among a module's attributes; and
    opaque calls are of one model.
    """
    if backend is None or step.opaque or _replays_cuda_graphs(backend):
        return False
    if any(type(weight) not in _ORDINARY for weight in weights_of(step).values()):
        return False
    given = arguments(backend)
    options = {**_mode_options(given), **(given.get("options") or {})}
    freezes = options.get("freezing", inductor_config.freezing)
    return given.get("backend", "inductor") in ("inductor", "eager", "aot_eager") and not freezes


def refuse_unknown(backend: Backend) -> None:
    """Raise GraphCacheError if torch.compile takes no such backend or options."""
    if backend is None:
        return
    try:
        _compiled(nn.Identity(), backend, guarded=True)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise GraphCacheError(f"backend={backend!r} is nothing that torch.compile takes: {error}") from error


def _arriving(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """What code is made for of a region's inputs, and which of them are one."""
    met: dict[int, int] = {}
    places = [met.setdefault(id(tensor), len(met)) for tensor in tensors]
    kinds = [(layout(tensor), tensor.requires_grad, tensor.is_inference()) for tensor in tensors]
    return [*zip(kinds, places, strict=True)]


def _region_code(module: fx.GraphModule, tensors: Sequence[torch.Tensor], backend: Backend) -> Compiled:
    """Inductor's own code where nothing has a gradient: torch.compile adds 100 µs to each call of it."""
    given = arguments(backend)
    if given["backend"] != "inductor" or torch.is_grad_enabled():
        return _compiled(module, backend, guarded=False)
    options = {**_mode_options(given), **(given.get("options") or {})}
    code: Compiled = standalone_compile(
        module,
        list(tensors),
        dynamic_shapes="from_example_inputs",
        options={"config_patches": options} if options else {},
    )
    return code


def _compiled(module: nn.Module, backend: Backend, guarded: bool) -> Compiled:
    """Guards are left out where every shape is static: the runner has compared the whole signature before
    it calls. What it cannot compare, a shape that depends on data, keeps its guards.
    """
    given = arguments(backend)
    options: dict[str, Any] = {**_mode_options(given), **(given.pop("options", None) or {})}
    if not guarded:
        options.setdefault("guard_filter_fn", torch.compiler.skip_all_guards_unsafe)
    given |= {"fullgraph": False, "dynamic": False}
    compiled: Compiled = torch.compile(module, options=options, **given)
    return compiled


@contextmanager
def _as_one_graph() -> Iterator[None]:
    """In a first call, which compiles graphs or none, a break is an error.

    torch.compile's own fullgraph counts frames in a variable that all threads share, and then takes a call
    for one that was not compiled.
    """
    with error_on_graph_break(True), dynamo_options(_AS_FULLGRAPH):
        yield


def compile_plainly(model: nn.Module, backend: Backend) -> Callable[..., Any]:
    """The untouched model under torch.compile as a user would call it, to compare with."""
    if backend is None:
        return model
    compiled = torch.compile(model, dynamic=False, **arguments(backend))

    def call(*args: Any, **kwargs: Any) -> Any:
        # nothing is kept from call to call; once someone marks generations, PyTorch waits for marks
        begin_generation(backend)
        return compiled(*args, **kwargs)

    return call if _replays_cuda_graphs(backend) else compiled


def begin_generation(backend: Backend) -> None:
    """Under CUDA graphs: what the graphs returned in the generation before may be overwritten from now on.

    Without a mark PyTorch takes every call for an iteration of its own, at whose end nothing is kept.
    """
    if _replays_cuda_graphs(backend):
        mark: Callable[[], None] = torch.compiler.cudagraph_mark_step_begin
        mark()


def _replays_cuda_graphs(backend: Backend) -> bool:
    given = arguments(backend)
    options = {**_mode_options(given), **(given.get("options") or {})}
    compiler = given.get("backend", "inductor")
    if compiler == "inductor":
        return bool(options.get("triton.cudagraphs", inductor_config.triton.cudagraphs))
    # a model that was compiled before brings Inductor as an object that holds its options
    return bool(getattr(compiler, "config", {}).get("triton.cudagraphs"))


def prior_compilation(model: nn.Module) -> Backend:
    """What the model or its blocks were compiled with before, by torch.compile or Module.compile."""
    for module in model.modules():
        compiled = compiled_call(module)
        if compiled is not None:
            callback = inspect.getclosurevars(compiled).nonlocals.get("callback")
            if callback is None:
                raise CaptureError("what compiled the model cannot be told; use transform(..., backend=...)")
            return _innermost(callback)
    return None


def unwrapped(model: nn.Module) -> tuple[nn.Module, Backend]:
    """The module behind torch.compile(module), and what it was compiled with."""
    if isinstance(model, OptimizedModule):
        return compiled_module(model), _innermost(model.dynamo_ctx.callback)
    return model, None


def active_compilation() -> Backend:
    """What the torch.compile region that this runs in compiles with."""
    callback = get_eval_frame_callback()
    return _innermost(callback) if callback else None


def compiled_by_blocks(model: nn.Module) -> bool:
    """Whether a model's blocks were compiled and not the model, as by `compile_repeated_blocks`."""
    return compiled_call(model) is None and any(map(compiled_call, model.modules()))


def _innermost(callback: Any) -> Backend:
    backend: Any = innermost_backend(callback)
    if getattr(backend, "compiler_name", None) != "inductor":
        return backend  # type: ignore[no-any-return]
    return {"backend": "inductor", "options": dict(backend.config)} if backend.config else "inductor"


def arguments(backend: Backend) -> dict[str, Any]:
    """Those of torch.compile."""
    given = dict(backend) if isinstance(backend, Mapping) else {"backend": backend}
    return {"backend": "inductor", **given}


def _mode_options(given: dict[str, Any]) -> dict[str, Any]:
    """torch.compile takes a mode or options but not both, so a mode is spelt out."""
    mode = given.pop("mode", None)
    if mode is None:
        return {}
    found: dict[str, Any] = list_mode_options(mode)
    return found
