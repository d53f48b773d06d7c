"""An instance of a class like a model's own, whose forward is an engine's."""

import functools
import types
from typing import Any

import torch
from torch import nn

from graphcache.compiler.backends import active_compilation
from graphcache.ir.errors import GraphCacheError
from graphcache.libraries.torch_private import MODULE_CALL, skip
from graphcache.runtime.offloading import run, settle
from graphcache.tracing.hooks import is_own


def alike(model: nn.Module, base: type) -> nn.Module:
    """An instance of a same-named subclass that shares the model's attributes, weights included.

    The class equals the model's own, because libraries look for a component's class in lists of those that
    they take.

    Args:
        base: what the instance has beside everything of the model's class.
    """
    kind = type(model)
    names = {
        "__slots__": ("_graphcache",),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "forward": _Forward(kind),
        # the class may be asked for further models, as from_pretrained does: those have no plan
        "__new__": lambda cls, *args, **kwargs: kind(*args, **kwargs),
        # not Module.__call__, which would run what original.compile() left in the shared attributes
        "__call__": MODULE_CALL,
    }
    made: nn.Module = object.__new__(equal_to(kind)(kind.__name__, (base, kind), names))
    made.__dict__ = model.__dict__
    return made


def equal_to(kind: type) -> Any:
    """A metaclass whose classes equal another one, and are found in sets and tables under it."""

    class Likeness(type(kind)):  # type: ignore[misc]
        def __eq__(cls, other: object) -> bool:
            return cls is other or kind == other

        def __hash__(cls) -> int:
            return hash(kind)

    return Likeness


def _untraced(function: Any) -> Any:
    """Keeps torch.compile out of a function but not of those that it calls."""
    return skip(
        function,
        "graphcache compiles each phase on its own: leave fullgraph out, or use transform(..., backend=)",
    )


class _Forward:
    """The forward of a transformed model: a descriptor, because one set on the instance would hide a method.

    What is set stands around the plan's own forward, but for hooks that move weights: see `settle`.
    """

    def __init__(self, kind: type[nn.Module]) -> None:
        @functools.wraps(kind.forward)
        def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            return _called(model, args, kwargs)

        self.function = forward

    @_untraced
    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:
            return self.function
        outer = model._graphcache.outer
        return types.MethodType(self.function, model) if outer is None else _checked(model, outer)

    def __set__(self, model: Any, value: Any) -> None:
        if getattr(value, "__func__", None) not in (self.function, self.function.__wrapped__):
            model._graphcache.outer = value
            return
        # a hook is removed: one that stood around the original is in the attributes shared with it
        if not is_own(model._graphcache.model):
            model.__dict__.pop("forward", None)
        model._graphcache.outer = None

    def __delete__(self, model: Any) -> None:
        model._graphcache.outer = None


@_untraced
def _called(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    backend = active_compilation()
    if backend is None:
        return run(model, args, kwargs)
    maker = model._graphcache.maker
    if maker.backend is None:
        maker.compile(backend)
    outside: Any = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
    return outside(model, args, kwargs)


def _checked(model: Any, outer: Any) -> Any:
    """A forward that was set on the model, which has to come to the plan's in the end."""
    engine = model._graphcache

    @functools.wraps(outer)
    def forward(*args: Any, **kwargs: Any) -> Any:
        settle(model)
        if engine.outer is None:
            return model.forward(*args, **kwargs)
        before = engine.calls
        result = outer(*args, **kwargs)
        if engine.calls == before:
            raise GraphCacheError(
                "the forward that was set on the transformed model does not call the one it replaced, so no "
                "plan is applied; `del model.forward` gives the plan's back"
            )
        return result

    return forward
