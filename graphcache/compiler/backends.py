"""What compiles graphs: torch.compile's backends, as they are chosen, adopted and called.

PyTorch's compilers are imported where they are used: a packaged model runs without them.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from graphcache.ir.errors import CaptureError, GraphCacheError
from graphcache.libraries.torch_private import compiled_call, compiled_module, get_eval_frame_callback

_AS_FULLGRAPH = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}

AOT = "aot"
"""The backend that compiles graphs ahead of time, by AOTInductor."""

Backend = str | Callable[..., Any] | Mapping[str, Any] | None
"""None runs the graph as it is; a name or callable is torch.compile's `backend`; a mapping holds
torch.compile's keyword arguments, such as {"backend": "inductor", "options": {"cpp_wrapper": True}}. "aot" is
AOTInductor's native code."""

Compiled = Callable[..., Sequence[torch.Tensor]]


def refuse_unknown(backend: Backend) -> None:
    """Raise GraphCacheError if torch.compile takes no such backend or options."""
    if backend is None or is_ahead(backend):
        return
    try:
        compiled(nn.Identity(), backend, guarded=True)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise GraphCacheError(f"backend={backend!r} is nothing that torch.compile takes: {error}") from error


def is_ahead(backend: Backend) -> bool:
    """Whether graphs are compiled ahead of time."""
    return bool(arguments(backend)["backend"] == AOT)


def inductor(
    backend: Backend, dynamic_shapes: str, module: fx.GraphModule, examples: Sequence[Any]
) -> Compiled:
    """Inductor's own code, without gradients: torch.compile adds 100 µs to each call of it."""
    from graphcache.libraries.torch_compilers_private import standalone_compile

    options = inductor_options(backend)
    code: Compiled = standalone_compile(
        module,
        list(examples),
        dynamic_shapes=dynamic_shapes,
        options={"config_patches": options} if options else {},
    )
    return code


def compiled(module: nn.Module, backend: Backend, guarded: bool) -> Compiled:
    """Guards are left out where every shape is static: the runner has compared the whole signature before
    it calls. What it cannot compare, a shape that depends on data, keeps its guards.
    """
    given = arguments(backend)
    options: dict[str, Any] = {**_mode_options(given), **(given.pop("options", None) or {})}
    if not guarded:
        options.setdefault("guard_filter_fn", torch.compiler.skip_all_guards_unsafe)
    given |= {"fullgraph": False, "dynamic": False}
    code: Compiled = torch.compile(module, options=options, **given)
    return code


@contextmanager
def as_one_graph() -> Iterator[None]:
    """In a first call, which compiles graphs or none, a break is an error.

    torch.compile's own fullgraph counts frames in a variable that all threads share, and then takes a call
    for one that was not compiled.
    """
    from graphcache.libraries.torch_compilers_private import dynamo_options, error_on_graph_break

    with error_on_graph_break(True), dynamo_options(_AS_FULLGRAPH):
        yield


def compile_plainly(model: nn.Module, backend: Backend) -> Callable[..., Any]:
    """The untouched model under torch.compile as a user would call it, to compare with."""
    if backend is None:
        return model
    # what is compiled ahead of time is a graph, and not a model
    given = {**arguments(backend), "backend": "inductor"} if is_ahead(backend) else arguments(backend)
    compiled = torch.compile(model, dynamic=False, **given)

    def call(*args: Any, **kwargs: Any) -> Any:
        # nothing is kept from call to call; once someone marks generations, PyTorch waits for marks
        begin_generation(backend)
        return compiled(*args, **kwargs)

    return call if replays_cuda_graphs(backend) else compiled


def compile_blocks_plainly(model: nn.Module, backend: Backend) -> nn.Module:
    """The untouched model with each of its repeated blocks compiled by itself, as diffusers does it.

    It has the same weights; modules in a ModuleList whose first two are of one class are blocks.
    """
    weights = itertools.chain(model.parameters(), model.buffers())
    copied = copy.deepcopy(model, {id(weight): weight for weight in weights})
    lists = [[*module] for module in copied.modules() if isinstance(module, nn.ModuleList)]
    repeated = [blocks for blocks in lists if len(blocks) > 1 and type(blocks[0]) is type(blocks[1])]
    inside = {
        id(part) for blocks in repeated for block in blocks for part in block.modules() if part is not block
    }
    for block in itertools.chain.from_iterable(repeated):
        if id(block) not in inside and backend is not None:
            block.compile(dynamic=False, **arguments(backend))
    return copied


def begin_generation(backend: Backend) -> None:
    """Under CUDA graphs: what the graphs returned in the generation before may be overwritten from now on.

    Without a mark PyTorch takes every call for an iteration of its own, at whose end nothing is kept.
    """
    if replays_cuda_graphs(backend):
        mark: Callable[[], None] = torch.compiler.cudagraph_mark_step_begin
        mark()


def replays_cuda_graphs(backend: Backend) -> bool:
    """Whether code runs as CUDA graphs, whose inputs and results lie where they were recorded."""
    compiler = arguments(backend)["backend"]
    if compiler == "inductor":
        from graphcache.libraries.torch_compilers_private import inductor_config

        return bool(inductor_options(backend).get("triton.cudagraphs", inductor_config.triton.cudagraphs))
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
    module = compiled_module(model)
    if module is None:
        return model, None
    wrapper: Any = model
    return module, _innermost(wrapper.dynamo_ctx.callback)


def active_compilation() -> Backend:
    """What the torch.compile region that this runs in compiles with."""
    callback = get_eval_frame_callback()
    return _innermost(callback) if callback else None


def compiled_by_blocks(model: nn.Module) -> bool:
    """Whether a model's blocks were compiled and not the model, as by `compile_repeated_blocks`."""
    return compiled_call(model) is None and any(map(compiled_call, model.modules()))


def _innermost(callback: Any) -> Backend:
    from graphcache.libraries.torch_compilers_private import innermost_backend

    backend: Any = innermost_backend(callback)
    if getattr(backend, "compiler_name", None) != "inductor":
        return backend  # type: ignore[no-any-return]
    return {"backend": "inductor", "options": dict(backend.config)} if backend.config else "inductor"


def arguments(backend: Backend) -> dict[str, Any]:
    """Those of torch.compile."""
    given = dict(backend) if isinstance(backend, Mapping) else {"backend": backend}
    return {"backend": "inductor", **given}


def inductor_options(backend: Backend) -> dict[str, Any]:
    """Those of Inductor, with those of its mode."""
    given = arguments(backend)
    return {**_mode_options(given), **(given.get("options") or {})}


def freezes(backend: Backend) -> bool:
    """Whether weights become constants of the code."""
    from graphcache.libraries.torch_compilers_private import inductor_config

    return bool(inductor_options(backend).get("freezing", inductor_config.freezing))


def _mode_options(given: dict[str, Any]) -> dict[str, Any]:
    """torch.compile takes a mode or options but not both, so a mode is spelt out."""
    mode = given.pop("mode", None)
    if mode is None:
        return {}
    from graphcache.libraries.torch_compilers_private import list_mode_options

    found: dict[str, Any] = list_mode_options(mode)
    return found
