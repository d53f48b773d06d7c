"""Every private name of diffusers that graphcache uses, and why.

Where diffusers is not loaded nothing is looked for: no model can wear its hooks then.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import nn

from graphcache.libraries.private import attribute, names_of

REGISTRY = "_diffusers_hook"
"""The attribute of a module that holds its hooks."""
CLASS_NAME = "_class_name"
"""The entry of a model's config.json that names its class."""
DEFAULTED = "_use_default_values"
"""The entry of a model's configuration that lists what was left out, in an order that each process has for
itself.
"""


def verify() -> None:
    """Look for the names that modules and hooks have to have.

    Raises:
        MissingName: one is gone, so that hooks would be taken for something else.
    """
    if "diffusers.hooks" in sys.modules:
        with names_of("diffusers"):
            from diffusers.hooks import HookRegistry, ModelHook

            module = nn.Module()
            registry = HookRegistry.check_if_exists_or_initialize(module)
            attribute(module, REGISTRY)
            attribute(registry, "_module_ref")
            attribute(registry, "_fn_refs")
            is_stateful(ModelHook)


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks around a module's forward, from the inside out."""
    registry = module.__dict__.get(REGISTRY)
    return [] if registry is None else list(registry.hooks.values())


def is_hung_on(module: nn.Module) -> bool:
    """Whether hooks stand around this very module's forward, not that of one whose attributes it shares."""
    registry = module.__dict__.get(REGISTRY)
    return registry is not None and bool(registry.hooks) and registry._module_ref is module


def rehung(module: nn.Module, forward: Any) -> Any:
    """What a registry's hooks make of a forward, for the module that they belong to from now on."""
    registry: Any = module.__dict__[REGISTRY]
    registry._module_ref = module
    for reference in registry._fn_refs:
        reference.forward = forward
        forward = functools.update_wrapper(functools.partial(_around(reference), module), forward)
    return forward


def _around(reference: Any) -> Callable[..., Any]:
    def hooked(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = reference.pre_forward(module, *args, **kwargs)
        return reference.post_forward(module, reference.forward(*args, **kwargs))

    return hooked


@contextlib.contextmanager
def stilled(hook: Any) -> Iterator[None]:
    """Within, a hook that acts before and after forward does nothing."""
    reference = hook.fn_ref
    kept = reference.pre_forward, reference.post_forward
    reference.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
    reference.post_forward = lambda module, output: output
    try:
        yield
    finally:
        reference.pre_forward, reference.post_forward = kept


def is_stateful(hook: Any) -> bool:
    """Whether a hook keeps something from call to call, which a graph cannot."""
    return bool(hook._is_stateful)


def attention_backend() -> Hashable:
    """The attention that models dispatch to at present, which tracing bakes in."""
    dispatch: Any = sys.modules.get("diffusers.models.attention_dispatch")
    if dispatch is None:
        return None
    try:
        backend: Hashable = dispatch._AttentionBackendRegistry._active_backend
    except AttributeError:  # another thread loads it just now, for which an import waits, or it is gone
        with names_of("diffusers"):
            from diffusers.models.attention_dispatch import _AttentionBackendRegistry

            backend = _AttentionBackendRegistry._active_backend
    return backend


def announced_steps(pipe: Any) -> int | None:
    """How many steps a pipeline says that it runs, which may be fewer than its scheduler has; else None.

    Others than diffusers' own may use the public name for something else.
    """
    count = getattr(pipe, "_num_timesteps", None)
    if count is None and type(pipe).__module__.startswith("diffusers.") and hasattr(pipe, "num_timesteps"):
        with names_of("diffusers"):
            count = pipe._num_timesteps
    return count if isinstance(count, int) else None
