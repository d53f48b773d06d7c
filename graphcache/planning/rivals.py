"""Other libraries' caches on a model, as contenders beside plans."""

import copy
import importlib.util
import itertools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graphcache.compiler.backends import Backend, compile_plainly
from graphcache.ir.call import Binder, CallSpec
from graphcache.ir.errors import GraphCacheError
from graphcache.planning.pipeline_sampler import together
from graphcache.planning.sampling import Sampling
from graphcache.tracing.capture import forward_parameters


@dataclass
class Situation:
    """What a cache is told of the generations that it is for.

    Attributes:
        steps: of a generation.
        conditional: the conditional half of a doubled batch, or None.
        latents: shape of the model's latents.
        timestep: of the present call.
    """

    steps: int
    conditional: str | None
    latents: tuple[int, ...]
    timestep: float = 0.0


Rival = Callable[[nn.Module, Situation], None]
"""Puts a cache on a model, with its library's own settings; raises where the model cannot have it."""


def rivals() -> dict[str, Rival]:
    """Caches of the libraries that are installed, by name."""
    found: dict[str, Rival] = {}
    if importlib.util.find_spec("diffusers"):
        found |= {"FirstBlockCache": first_block_cache, "FasterCache": faster_cache, "PAB": pab}
    if importlib.util.find_spec("cache_dit"):
        found["cache-dit"] = cache_dit
    return found


def first_block_cache(model: Any, situation: Situation) -> None:
    """diffusers' FirstBlockCache at its default threshold."""
    from diffusers.hooks import FirstBlockCacheConfig

    _takes_hooks(model).enable_cache(FirstBlockCacheConfig())


def faster_cache(model: Any, situation: Situation) -> None:
    """diffusers' FasterCache; without guidance on a doubled batch its attention alone."""
    from diffusers import FasterCacheConfig

    if situation.conditional == "first":
        raise GraphCacheError("it takes a doubled batch's last half for the conditional one, here the first")
    config = FasterCacheConfig(
        is_guidance_distilled=situation.conditional is None,
        attention_weight_callback=lambda module: 0.5,
        tensor_format=_layout(model, situation.latents),
        current_timestep_callback=lambda: situation.timestep,
    )
    _takes_hooks(model).enable_cache(config)


def pab(model: Any, situation: Situation) -> None:
    """diffusers' Pyramid Attention Broadcast with the ranges of its paper: 2, 4 and 6 steps."""
    from diffusers import PyramidAttentionBroadcastConfig

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=4,
        cross_attention_block_skip_range=6,
        current_timestep_callback=lambda: situation.timestep,
    )
    _takes_hooks(model).enable_cache(config)


def cache_dit(model: Any, situation: Situation) -> None:
    """cache-dit's DBCache with its defaults."""
    import cache_dit as library

    library.enable_cache(model, cache_config=library.DBCacheConfig(num_inference_steps=situation.steps))


def _takes_hooks(model: Any) -> Any:
    if not hasattr(model, "enable_cache"):
        raise GraphCacheError(f"{type(model).__name__} has no enable_cache, as diffusers' models have")
    return model


def _layout(model: Any, latents: tuple[int, ...]) -> str:
    """How latents lie, as FasterCache spells it."""
    if len(latents) != 5:
        return "BCHW"
    channels = getattr(model.config, "in_channels", None)
    return "BFCHW" if channels == latents[2] != latents[1] else "BCFHW"


def hooked(
    sampling: Sampling, rival: Rival, inputs: Mapping[str, Any], steps: int, backend: Backend
) -> Callable[[Any], Tensor]:
    """Generations of a copy of the model or models, with the same weights, under a rival's cache.

    Args:
        sampling: how the model is run.
        rival: the cache.
        inputs: the arguments of one call; of several models all are called so.
        steps: of a generation.
        backend: compiles the model with its cache.

    Raises:
        Exception: what the other library says where it cannot.
    """
    weights = [w for model in sampling.models for w in itertools.chain(model.parameters(), model.buffers())]
    models: Any = copy.deepcopy(sampling.models, {id(weight): weight for weight in weights})
    binder = Binder(forward_parameters(models[0]), sampling.names)
    bound = binder.bind((), dict(inputs))
    spec, tensors = CallSpec.of(binder, bound), binder.signature(bound)[1]
    situation = Situation(steps, sampling.conditional, tuple(tensors[spec.latents[0]].shape))

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = spec.timestep(binder.signature(binder.bind(args, kwargs))[1])
        situation.timestep = situation.timestep if now is None else float(now.flatten()[0])

    called: list[Any] = []
    for model in models:
        rival(model, situation)
        called.append(compile_plainly(model, backend))
        called[-1].register_forward_pre_hook(note, with_kwargs=True)

    def generate(sample: Any) -> Tensor:
        with ExitStack() as stack:
            for model in models:
                if hasattr(model, "cache_context"):
                    stack.enter_context(model.cache_context("cond_uncond"))
            result = sampling.generate(together(called), sample, steps)
        for model in models:
            _forget(model)
        return result

    return generate


def _forget(model: nn.Module) -> None:
    """Begin anew, as diffusers' pipelines do behind every generation."""
    if hasattr(model, "enable_cache"):
        from diffusers.hooks import HookRegistry

        HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)
