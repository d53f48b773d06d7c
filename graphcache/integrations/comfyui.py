"""A node for ComfyUI that runs a loaded model under a plan, by ComfyUI's own wrappers."""

import logging
import weakref
from typing import Any

from torch import nn

from graphcache import presets
from graphcache.integrations.denoiser_call import KEY, OPTIONS, DenoiserCall, core
from graphcache.integrations.sampling_run import SamplingRun
from graphcache.ir.errors import PlanError
from graphcache.ir.plan import Plan
from graphcache.presets.written import preset_argument, written_plan
from graphcache.runtime.transform import transform

_OUTER, _DENOISER = "outer_sample", "diffusion_model"
"""Kinds of wrappers: around a whole run of a sampler, and around every call of the denoiser."""
_STEPS = 20
"""Of a preset until the first run says how many there are."""

log = logging.getLogger("graphcache")


class GraphCache:
    """The node: a model goes in, and one that shares its weights and runs under a plan comes out."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "advanced/model"
    DESCRIPTION = "Reuses features of earlier sampling steps, as a plan says: docs/comfyui.md of graphcache."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI draws."""
        whole = {"default": 3, "min": 0, "max": 100, "tooltip": "of the preset; 0 leaves it to the preset"}
        text = {
            "default": "",
            "multiline": True,
            "tooltip": "used in the preset's place: a plan's text, its file, or preset:steps:name=value",
        }
        return {
            "required": {
                "model": ("MODEL",),
                "preset": (list(presets.names()), {"default": "taylorseer"}),
                "interval": ("INT", whole),
                "plan": ("STRING", text),
                "backend": (["none", "inductor"], {"default": "none"}),
                "offload": ("BOOLEAN", {"default": False, "tooltip": "keep caches in host memory"}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, preset: str, interval: int, plan: str, **others: Any) -> str:
        """The plan's text, so that a file that was written anew is read again."""
        return str(_plan(preset, interval, plan))

    def apply(
        self,
        model: Any,
        preset: str = "taylorseer",
        interval: int = 3,
        plan: str = "",
        backend: str = "none",
        offload: bool = False,
    ) -> tuple[Any]:
        """A clone of a model patcher that samples under a plan; a plan that it had before is replaced.

        Raises:
            PlanError: the plan cannot be read, or is none that can be followed here.
        """
        wrappers = PlanWrappers(
            _plan(preset, interval, plan), not plan.strip(), None if backend == "none" else backend, offload
        )
        patcher = model.clone()
        for kind, wrapper in ((_OUTER, wrappers.sample), (_DENOISER, wrappers.denoise)):
            patcher.remove_wrappers_with_key(kind, KEY)
            patcher.add_wrapper_with_key(kind, KEY, wrapper)
        return (patcher,)


class PlanWrappers:
    """What stands around runs and calls, and the transformed models, which later runs find again.

    Args:
        plan: of any number of steps.
        fits_any: whether it is made for the steps of the first run, and not for its own.
        backend: as `transform` takes it.
        offload: likewise.
    """

    def __init__(self, plan: Plan, fits_any: bool, backend: str | None, offload: bool) -> None:
        self._plan = plan
        self._fits_any = fits_any
        self._backend = backend
        self._offload = offload
        self._models: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a run: a generation that has its own caches, and frees them however it ends."""
        guider = executor.class_obj
        before = guider.model_options
        run = SamplingRun(self._transformed)
        guider.model_options = _with_run(before, run)
        try:
            result = executor(*args, **kwargs)
        finally:
            guider.model_options = before
            run.close()
        if not run.calls:
            log.warning("the plan was not followed: this model calls no wrappers of kind %s", _DENOISER)
        return result

    def denoise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a call of the denoiser."""
        told = [value for value in (*args, *kwargs.values()) if isinstance(value, dict) and KEY in value]
        if told:
            return told[0][KEY].denoise(executor, args, kwargs)
        log.warning("computed without the plan: the denoiser is called outside of a sampler's run")
        return executor(*args, **kwargs)

    def _transformed(self, call: DenoiserCall, steps: int) -> Any:
        """The call's model under the plan."""
        made = self._models.setdefault(call.model, {})
        if call.function not in made:
            plan = presets.resample(self._plan, steps) if self._fits_any else self._plan
            # weights are exchanged between the calls of a step where conditionings have hooks
            made[call.function] = transform(
                core(call.model, call.function),
                plan,
                backend=self._backend,
                offload=self._offload,
                watch="everything",
            )
        return made[call.function]


def _plan(preset: str, interval: int, text: str) -> Plan:
    """What the node's fields say.

    Raises:
        PlanError: they say nothing, or a plan with a row `guidance`.
    """
    if text.strip():
        plan = written_plan(text, _STEPS)
    else:
        plan = preset_argument(preset, _STEPS, [f"interval={interval}"] if interval else [])
    if plan.is_guided:
        raise PlanError(
            "row guidance needs the conditional call before the other one at every step, and ComfyUI batches "
            "and orders them by free memory; leave the row out (fastercache:20:guidance=false)"
        )
    return plan


def _with_run(options: dict[str, Any], run: SamplingRun) -> dict[str, Any]:
    """A model's options with the run among them, and the plan's wrapper the innermost of its kind."""
    inner = dict(options.get(OPTIONS, {}))
    wrappers = dict(inner.get("wrappers", {}))
    ours = {key: value for key, value in wrappers.get(_DENOISER, {}).items() if key == KEY}
    others = {key: value for key, value in wrappers.get(_DENOISER, {}).items() if key != KEY}
    wrappers[_DENOISER] = {**others, **ours}
    return {**options, OPTIONS: {**inner, "wrappers": wrappers, KEY: run}}


NODE_CLASS_MAPPINGS = {"GraphCache": GraphCache}
NODE_DISPLAY_NAME_MAPPINGS = {"GraphCache": "graphcache: run under a plan"}
