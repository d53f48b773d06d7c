"""Every private name of accelerate that graphcache uses, and why."""

import sys

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
