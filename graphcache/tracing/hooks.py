"""What is put around the forward of a model's parts, and which of it a capture can hold."""

import contextlib
import functools
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from graphcache.ir.errors import CaptureError
from graphcache.libraries import accelerate_private, diffusers_private
from graphcache.libraries.carriers import is_carrier
from graphcache.libraries.diffusers_private import REGISTRY, is_stateful
from graphcache.libraries.torch_private import COMPILED_CALL, FORWARD_HOOKS, compiled_call

BOOKKEEPING = frozenset((REGISTRY, *accelerate_private.HOOKS))
"""What hooks of diffusers and accelerate leave on a module; they act through its forward, which counts."""

Worn = tuple[tuple[Any, Mapping[str, Any]], ...]
"""What stands around one module's forward, from the inside out: what it is, and its attributes."""


def refuse_uncapturable(model: nn.Module) -> None:
    """Say what a captured graph would lose silently.

    Raises:
        CaptureError: training mode, hooks that act before forward or keep a state, or a forward set on an
            instance.
        MissingName: diffusers or accelerate mark hooks in another way.
    """
    diffusers_private.verify()
    accelerate_private.verify()
    if model.training:
        raise CaptureError("the model is in training mode; call model.eval() before the first generation")
    stateful = any(map(_has_state, model.modules()))
    for name, module in model.named_modules():
        where = name or "the model"
        state = module.__dict__
        if any(state[hooks] for hooks in FORWARD_HOOKS):
            raise _lost(where, "forward hooks")
        if not is_own(module) and (stateful or not _only_computes(module)):
            raise _lost(
                where, "a forward of its own, set on the instance (accelerate's and other hooks do that)"
            )


def _lost(where: str, what: str) -> CaptureError:
    return CaptureError(
        f"{where} has {what}, which would run once during the capture and never again; remove it before "
        "transforming, and leave it out within a generation (diffusers' caches: model.disable_cache(); "
        "torch.compile: compile the model, not its forward)"
    )


def is_own(module: nn.Module) -> bool:
    """Whether the module runs a forward of its class, or one that its class's author chose for it.

    Removed hooks leave the class's own behind on the instance. A model chooses one by setting a method of
    its own, or a function of the package that its class is from; what others set is a hook.
    """
    own = _beneath(module)
    if own is None:
        return True
    if isinstance(own, types.MethodType):
        return own.__self__ is module and _is_method(own.__func__, type(module))
    return isinstance(own, types.FunctionType) and not _wraps(own) and _package(own) == _package(type(module))


def _is_method(function: Any, kind: type) -> bool:
    name = getattr(function, "__name__", "")
    # a class without a forward has one under another name, as lists of modules do
    return any(function in (vars(base).get(name), vars(base).get("forward")) for base in kind.__mro__)


def _wraps(function: Any) -> bool:
    """Whether it stands around another one, as hooks do."""
    return hasattr(function, "__wrapped__")


def _package(thing: Any) -> str:
    return str(thing.__module__).partition(".")[0]


def worn(module: nn.Module) -> Worn:
    """What stands around the module's forward, comparable with what stands there at another time.

    Of hooks that move weights only that there are some: which ones is no part of a graph.
    """
    hooks = [*diffusers_private.hooks_of(module), *accelerate_private.hooks_of(module)]
    if any(map(is_carrier, hooks)):
        return ((is_carrier, {}), *_computing(module))
    return _computing(module)


def _computing(module: nn.Module) -> Worn:
    own = _beneath(module)
    chosen = getattr(own, "__func__", own)
    if chosen is None or chosen is type(module).forward:
        return ()
    if is_own(module):
        return ((chosen, {}),)
    hooks = diffusers_private.hooks_of(module)
    if not hooks:
        return ((own, {}),)
    return tuple((type(hook), _attributes(hook)) for hook in hooks if not is_carrier(hook))


def _beneath(module: nn.Module) -> Any:
    """The forward on a module, without hooks of accelerate that move weights."""
    forward = module.__dict__.get("forward")
    hooks = accelerate_private.hooks_of(module)
    if hooks and all(map(is_carrier, hooks)) and accelerate_private.is_hooked(forward):
        return accelerate_private.beneath(module)
    return forward


def _attributes(hook: Any) -> Mapping[str, Any]:
    return {name: value for name, value in vars(hook).items() if name != "fn_ref"}


def _has_state(module: nn.Module) -> bool:
    return any(map(is_stateful, diffusers_private.hooks_of(module)))


def _only_computes(module: nn.Module) -> bool:
    """Whether all that stands around forward are hooks that move weights, replace what it computes, or change
    its result.

    Of those that act before it, some cast weights, which is part of a graph.
    """
    base: Any = getattr(sys.modules.get("diffusers.hooks"), "ModelHook", None)
    hooks, forward = diffusers_private.hooks_of(module), _beneath(module)
    if not hooks or not isinstance(forward, functools.partial) or forward.args[:1] != (module,):
        return False
    return all(
        is_carrier(hook) or _casts(hook) or type(hook).pre_forward is base.pre_forward for hook in hooks
    )


def is_cast(module: nn.Module) -> bool:
    """Whether a hook casts the module's weights before its forward, and back afterwards."""
    return any(map(_casts, diffusers_private.hooks_of(module)))


def _casts(hook: Any) -> bool:
    casting: Any = getattr(sys.modules.get("diffusers.hooks.layerwise_casting"), "LayerwiseCastingHook", None)
    return casting is not None and type(hook) is casting


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Call modules that Module.compile() compiled as they were, so that tracing sees through them."""
    compiled = [module for module in model.modules() if compiled_call(module) is not None]
    kept = [module.__dict__.pop(COMPILED_CALL) for module in compiled]
    try:
        yield
    finally:
        for module, call in zip(compiled, kept, strict=True):
            setattr(module, COMPILED_CALL, call)
