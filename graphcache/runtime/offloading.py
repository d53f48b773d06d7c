"""Hooks around a whole model that bring weights, and the transformed model that does without most of them."""

import types
from typing import Any

import torch

from graphcache.libraries import accelerate_private, diffusers_private
from graphcache.libraries.carriers import is_carrier, moves_a_whole_model
from graphcache.libraries.torch_private import tree_leaves, tree_map_only
from graphcache.runtime.engine import Engine


def settle(model: Any) -> None:
    """Let hooks that were set on a transformed model, and do no more than move weights, stand around the
    original, as if they had been set there before: the plan fetches weights by itself, and `restore` leaves
    the hooks on the original.
    """
    engine: Engine = model._graphcache
    original, outer = engine.model, engine.outer
    ours, theirs = diffusers_private.hooks_of(original), accelerate_private.hooks_of(original)
    made = None
    if accelerate_private.is_hooked(outer) and all(map(is_carrier, theirs)):
        made = accelerate_private.rehung(outer, original, _own_forward(original))
    elif diffusers_private.is_hung_on(model) and all(map(is_carrier, ours)):
        made = diffusers_private.rehung(original, _own_forward(original))
    if made is not None:
        engine.outer = None
        original.__dict__["forward"] = made
    for hook in ours:
        _lead(getattr(hook, "group", None), model, original)


def _own_forward(original: Any) -> Any:
    return original.__dict__.get("forward") or types.MethodType(type(original).forward, original)


def _lead(group: Any, model: Any, original: Any) -> None:
    """Let a group wait for the original; its hook may have waited for the other one in vain."""
    if getattr(group, "offload_leader", None) is model:
        group.onload_leader = group.offload_leader = original
        group.offload_()


def run(transformed: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of the plan: its inputs are where the weights come to.

    Hooks that bring a whole model, and others before it back, act as they do for the original.
    """
    settle(transformed)
    engine: Engine = transformed._graphcache
    model = engine.model
    hooks = accelerate_private.hooks_of(model)
    whole = [hook for hook in hooks if moves_a_whole_model(hook)]
    for hook in whole:
        args, kwargs = hook.pre_forward(model, *args, **kwargs)
    homes = engine.maker.homes
    if homes.streams and homes.device is None:
        homes.look()
    device = homes.device
    if device is None or (engine.surroundings.disabled and not homes.streams):
        return engine(args, kwargs)
    places = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
    if places <= {device}:
        return engine(args, kwargs)
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))
    result = engine(args, kwargs)
    back = homes.streams or any(getattr(hook, "io_same_device", False) for hook in hooks)
    if back and len(places) == 1:
        result = tree_map_only(torch.Tensor, lambda tensor: tensor.to(*places), result)
    return result
