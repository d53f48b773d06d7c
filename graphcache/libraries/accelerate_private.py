"""Every private name of accelerate that graphcache uses, and why."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from graphcache.libraries.private import attribute, names_of

HOOKS = ("_hf_hook", "_old_forward")
"""What its hooks leave on a module; they act through its forward, which is watched."""


def verify() -> None:
    """Look for the names that a module with a hook has.

    Raises:
        MissingName: one is gone, so that a hook that comes or goes would be taken for another model.
    """
    if "accelerate.hooks" in sys.modules:
        with names_of("accelerate"):
            from accelerate.hooks import ModelHook, add_hook_to_module

            module = add_hook_to_module(nn.Identity(), ModelHook())
            for name in HOOKS:
                attribute(module, name)


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks around a module's forward, from the outside in."""
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return []
    sequence = getattr(sys.modules.get("accelerate.hooks"), "SequentialHook", None)
    return list(hook.hooks) if type(hook) is sequence else [hook]


def is_hooked(forward: Any) -> bool:
    """Whether a forward on a module is what its hooks made of it."""
    return isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks"


def beneath(module: nn.Module) -> Any:
    """The forward that a module's hooks stand around."""
    return module.__dict__["_old_forward"]


@contextlib.contextmanager
def stilled(module: nn.Module) -> Iterator[None]:
    """Within, the hooks around a module's forward do nothing."""
    from accelerate.hooks import ModelHook

    kept, module._hf_hook = module.__dict__["_hf_hook"], ModelHook()
    try:
        yield
    finally:
        module._hf_hook = kept


def rehung(forward: Any, module: nn.Module, own: Any) -> Any:
    """What hooks made of another module's forward, around the own forward of a module that they stand around
    from now on.
    """
    module._old_forward = own
    return functools.update_wrapper(functools.partial(forward.func, module), own)
