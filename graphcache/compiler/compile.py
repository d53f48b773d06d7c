"""From a specialised graph to something to call: eager, or any torch.compile backend."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx, nn

from graphcache.ir.errors import CaptureError, GraphCacheError
from graphcache.ir.graph import StepGraph, has_symbolic_shapes
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
)

_AS_FULLGRAPH = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}

Backend = str | Callable[..., Any] | Mapping[str, Any] | None
"""None runs the graph as it is; a name or callable is torch.compile's `backend`; a mapping holds
torch.compile's keyword arguments, such as {"backend": "inductor", "options": {"cpp_wrapper": True}}."""

Compiled = Callable[..., Sequence[torch.Tensor]]


class Kept(Protocol):
    """Code of graphs that were compiled before."""

    def find(self, step: StepGraph) -> Compiled | None:
        """The code of a graph that computes the same with the same weights."""

    def keep(self, step: StepGraph, code: Compiled) -> None:
        """Note what a graph was compiled to."""


def build(step: StepGraph, backend: Backend, kept: Kept | None = None) -> Compiled:
    """Make a graph callable with its input ports' tensors, in order.

    Code is generated and compiled in the first call, which waits until no other thread does so: plans are
    also made to be checked or priced alone. What is `kept` is not compiled again.
    """
    made: Compiled | None = None

    def call(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        return first(tensors) if made is None else made(*tensors)

    def first(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        nonlocal made
        with COMPILING:
            if made is None:
                known = kept.find(step) if kept and backend is not None else None
                code = _code(step, backend) if known is None else known
                results = None if backend is None or known is not None else _compiling(code, tensors)
                made = code
                if results is not None:
                    if kept:
                        kept.keep(step, code)
                    return results
        return made(*tensors)

    return call


def refuse_unknown(backend: Backend) -> None:
    """Raise GraphCacheError if torch.compile takes no such backend or options."""
    if backend is None:
        return
    try:
        _compiled(nn.Identity(), backend, guarded=True)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise GraphCacheError(f"backend={backend!r} is nothing that torch.compile takes: {error}") from error


def _code(step: StepGraph, backend: Backend) -> Compiled:
    module = _flattened(step)
    if backend is None:
        eager: Compiled = module.forward
        return eager
    return _compiled(module, backend, has_symbolic_shapes(step))


def _compiled(module: nn.Module, backend: Backend, guarded: bool) -> Compiled:
    """Guards are left out where every shape is static: the runner has compared the whole signature before
    it calls. What it cannot compare, a shape that depends on data, keeps its guards.
    """
    given = _arguments(backend)
    options: dict[str, Any] = {**_mode_options(given), **(given.pop("options", None) or {})}
    if not guarded:
        options.setdefault("guard_filter_fn", torch.compiler.skip_all_guards_unsafe)
    given |= {"fullgraph": False, "dynamic": False}
    compiled: Compiled = torch.compile(module, options=options, **given)
    return compiled


def _compiling(code: Compiled, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """A first call, which compiles one graph or none.

    torch.compile's own fullgraph counts frames in a variable that all threads share, and then takes a call
    for one that was not compiled.
    """
    with error_on_graph_break(True), dynamo_options(_AS_FULLGRAPH):
        return code(*tensors)


def compile_plainly(model: nn.Module, backend: Backend) -> Callable[..., Any]:
    """The untouched model under torch.compile as a user would call it, to compare with."""
    if backend is None:
        return model
    compiled = torch.compile(model, dynamic=False, **_arguments(backend))

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
    given = _arguments(backend)
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


def _innermost(callback: Any) -> Backend:
    backend: Backend = innermost_backend(callback)
    return backend


def _arguments(backend: Backend) -> dict[str, Any]:
    return dict(backend) if isinstance(backend, Mapping) else {"backend": backend}


def _mode_options(given: dict[str, Any]) -> dict[str, Any]:
    """torch.compile takes a mode or options but not both, so a mode is spelt out."""
    mode = given.pop("mode", None)
    if mode is None:
        return {}
    found: dict[str, Any] = list_mode_options(mode)
    return found


def _flattened(step: StepGraph) -> fx.GraphModule:
    """The same graph over one flat table of the same weights: a fetch costs one look-up, not a path's."""
    graph, _ = step.copy()
    names: dict[str, str] = {}
    for node in graph.find_nodes(op="get_attr"):
        node.target = names.setdefault(str(node.target), f"weight_{len(names)}")
    root = nn.Module()
    for path, name in names.items():
        value = _attribute(step.root, path)
        if isinstance(value, nn.Parameter):
            root.register_parameter(name, value)
        elif isinstance(value, torch.Tensor):
            root.register_buffer(name, value)
        else:
            setattr(root, name, value)
    return fx.GraphModule(root, graph)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
