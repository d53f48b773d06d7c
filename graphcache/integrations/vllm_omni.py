"""A cache backend for vLLM-Omni: `enable` puts a plan on a pipeline, `refresh` begins a request."""

import importlib
import logging
import weakref
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

from torch import nn

from graphcache.ir.errors import GraphCacheError
from graphcache.presets.written import written_plan
from graphcache.runtime.parts import denoisers
from graphcache.runtime.transform import restore, transform

_BASE = "vllm_omni.diffusion.cache.base"

log = logging.getLogger("graphcache")


class PlanOnPipeline:
    """The methods of a cache backend, without vLLM-Omni's base class.

    Attributes:
        config: has `plan`, a plan's text, its file or preset:steps:name=value, and may have `parts`, the
            pipeline's attributes that are denoisers, and transform's `backend`, `offload`, `timestep` and
            `latents`.
        enabled: whether a pipeline has the plan.
    """

    config: Any
    enabled: bool
    _models: Mapping[str, Any] = MappingProxyType({})

    def enable(self, pipeline: Any) -> None:
        """Run the pipeline's denoisers under the plan.

        Raises:
            GraphCacheError: the config holds no plan that can be read, or the pipeline no denoiser.
        """
        text = getattr(self.config, "plan", None)
        if not isinstance(text, str):
            raise GraphCacheError("the cache's config has no plan; give it {'plan': 'fora:50:interval=3'}")
        plan = written_plan(text, getattr(self.config, "num_inference_steps", None))
        view = _View(pipeline)
        parts = getattr(self.config, "parts", None)
        names = [parts] if isinstance(parts, str) else [*(parts or denoisers(view))]
        options = {
            name: value
            for name in ("backend", "offload", "timestep", "latents")
            if (value := getattr(self.config, name, None)) is not None
        }
        transform(view, plan, parts=names, **options)
        self._view = view
        self._models = {name: model for name, model in vars(view).items() if hasattr(model, "_graphcache")}
        for name, model in self._models.items():
            setattr(pipeline, name, model)
        self.enabled = True
        log.info("%s follow the plan", ", ".join(self._models))

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Forget the request before, and begin one of so many steps; 0 stands for those of the plan.

        Raises:
            GraphCacheError: a denoiser was exchanged since `enable`, or the plan cannot have so many steps.
        """
        for name, model in self._models.items():
            if getattr(pipeline, name) is not model:
                raise GraphCacheError(f"the pipeline's {name} was exchanged since enable(); call it again")
            model.reset(steps=num_inference_steps or None)
        if verbose:
            log.debug("a request of %d steps begins", num_inference_steps)

    def disable(self, pipeline: Any) -> None:
        """Put the pipeline's own denoisers back."""
        for name, model in self._models.items():
            setattr(pipeline, name, restore(model))
        self._models, self.enabled = {}, False


class _View:
    """A pipeline that is itself a module, as one that holds its modules and its scheduler.

    The scheduler is the pipeline's at each look, and tells the step.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = weakref.ref(pipeline)
        held = {**vars(pipeline), **getattr(pipeline, "_modules", {})}
        vars(self).update({name: item for name, item in held.items() if isinstance(item, nn.Module)})

    @property
    def scheduler(self) -> Any:
        return getattr(self._pipeline(), "scheduler", None)


def backend_class() -> type:
    """The class for vLLM-Omni's runner, against its own base class.

    Raises:
        GraphCacheError: vLLM-Omni cannot be imported.
    """
    try:
        base: Any = importlib.import_module(_BASE)
    except ImportError as error:
        raise GraphCacheError(
            f"vLLM-Omni cannot be imported ({error}); it is installed by: pip install vllm-omni"
        ) from error
    return type("GraphCacheBackend", (PlanOnPipeline, base.CacheBackend), {})


def backend(config: Any) -> Any:
    """A backend for a runner's `cache_backend`.

    Args:
        config: a mapping or an object with these attributes; see `PlanOnPipeline`.
    """
    return backend_class()(SimpleNamespace(**config) if isinstance(config, Mapping) else config)
