"""Models named on a command line: `package.module:factory`, or a local diffusers folder."""

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphcache.ir.errors import GraphCacheError
from graphcache.libraries.diffusers_private import CLASS_NAME
from graphcache.libraries.extras import require
from graphcache.libraries.quiet import quiet_imports, quiet_loading
from graphcache.planning.sampling import Sampler, first_calls
from graphcache.runtime.parts import denoisers


@dataclass(frozen=True)
class Placement:
    """Where a folder's weights go, and in which dtype; None leaves them on the CPU, in float32.

    Raises:
        GraphCacheError: PyTorch has no such device or dtype.
    """

    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not getattr(self._dtype, "is_floating_point", False):
            raise GraphCacheError(f"'{self.dtype}' is no floating-point dtype of torch, such as bfloat16")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise GraphCacheError(f"device '{self.device}' cannot be used: {error}") from error

    @property
    def _dtype(self) -> Any:
        return getattr(torch, self.dtype or "float32", None)

    def loaded(self, kind: Any, folder: Path) -> Any:
        """What a diffusers class reads from a folder."""
        with quiet_loading():
            made = kind.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, torch_dtype=self._dtype
            )
        if not isinstance(made, nn.Module):
            made.set_progress_bar_config(disable=True)
        return made if self.device is None else made.to(self.device)

    def refuse_for(self, name: str) -> None:
        """Raise GraphCacheError if this says anything of what is no folder."""
        if self != CPU:
            raise GraphCacheError(
                f"--device and --dtype are for folders; {name} makes its model itself, where it wants it"
            )


CPU = Placement()
"""In float32."""


def load_object(name: str) -> Any:
    """Import what `package.module:attribute` names; the working directory is searched too.

    Raises:
        GraphCacheError: the name has no colon, or module or attribute are missing.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise GraphCacheError(f"'{name}' is neither a folder nor package.module:factory")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise GraphCacheError(f"cannot import {module_name}: {error}") from error
    if not hasattr(module, attribute):
        raise GraphCacheError(f"{module_name} has no {attribute}")
    return getattr(module, attribute)


def load_model(
    name: str,
    inputs: str | None = None,
    call: Mapping[str, Any] | None = None,
    placement: Placement = CPU,
) -> tuple[nn.Module, Mapping[str, Any]]:
    """A model and keyword arguments of one call of it.

    Args:
        name: `package.module:factory`, which returns a model or (model, inputs); a folder with a
            pipeline's model_index.json; or a folder with a transformer's config.json.
        inputs: `package.module:function` that takes the model and returns its arguments.
        call: arguments of the pipeline, of which the first call of a denoiser is then recorded.
        placement: of a folder's weights.

    Raises:
        GraphCacheError: nothing says how to call the model, or the name leads nowhere.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / "model_index.json").exists():
            ((denoiser, calls),) = _from_pipeline(folder, [call or {}], placement, 2, 1)
            return denoiser, calls[0]
        model, found = _from_folder(folder, placement), None
    else:
        placement.refuse_for(name)
        made = load_object(name)()
        model, found = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise GraphCacheError(f"{name} gave a {type(model).__name__}, not a torch module")
    if inputs is not None:
        found = load_object(inputs)(model)
    if found is None:
        raise GraphCacheError(
            f"{name} does not say how to call the model; return (model, inputs) from the factory, or give "
            "--inputs package.module:function, which takes the model and returns its keyword arguments"
        )
    return model.eval(), found


def _diffusers() -> Any:
    with quiet_imports():
        found = require("diffusers", "diffusers", "a diffusers folder")
        importlib.import_module("diffusers.quantizers")  # takes others up when it is first asked for
    return found


def _from_folder(folder: Path, placement: Placement) -> nn.Module:
    config = folder / "config.json"
    if not config.exists():
        raise GraphCacheError(f"{folder} has neither model_index.json nor config.json")
    diffusers = _diffusers()
    name = json.loads(config.read_text()).get(CLASS_NAME, "")
    kind = getattr(diffusers, str(name), None)
    if kind is None:
        raise GraphCacheError(f"{config} names the class '{name}', which diffusers does not have")
    model: nn.Module = placement.loaded(kind, folder)
    return model


Called = tuple[nn.Module, list[Mapping[str, Any]]]
"""A model, and keyword arguments of calls of it."""


def load_calls(name: str, calls: Sequence[Mapping[str, Any]], placement: Placement = CPU) -> Called:
    """The denoiser of a pipeline's folder, and arguments of a call of it for each of the pipeline's.

    Of several it is the one that is called first.

    Raises:
        GraphCacheError: the name is no such folder, or the pipeline fails before it calls its denoiser.
    """
    (found,) = _from_pipeline(_pipeline_folder(name), calls, placement, 2, 1)
    return found


def load_denoisers(
    name: str, calls: Sequence[Mapping[str, Any]], steps: int, placement: Placement = CPU
) -> list[Called]:
    """Every denoiser of a pipeline's folder that a generation of so many steps calls, as `load_calls`."""
    return _from_pipeline(_pipeline_folder(name), calls, placement, steps)


def is_pipeline(name: str) -> bool:
    """Whether this is a pipeline's folder."""
    return (Path(name) / "model_index.json").exists()


def _pipeline_folder(name: str) -> Path:
    if not is_pipeline(name):
        raise GraphCacheError(
            f"{name} is no pipeline's folder, whose arguments could be given; write sizes of its model's "
            "call, such as --at height=128,width=128"
        )
    return Path(name)


def load_pipeline(name: str | Path, placement: Placement = CPU) -> Any:
    """The pipeline of a folder."""
    return placement.loaded(_diffusers().DiffusionPipeline, Path(name))


def _from_pipeline(
    folder: Path,
    calls: Sequence[Mapping[str, Any]],
    placement: Placement,
    steps: int,
    most: int | None = None,
) -> list[Called]:
    """Its denoisers, at most so many, in the order in which they are called, each with a call for each."""
    pipe = load_pipeline(folder, placement)
    models = [part.module for part in denoisers(pipe).values()]
    seen = [_recorded(pipe, models, {"num_inference_steps": steps, **call}, most) for call in calls]
    if any(item.keys() != seen[0].keys() for item in seen):
        raise GraphCacheError("the pipeline calls other denoisers for one of these calls than for another")
    return [(models[number], [item[number] for item in seen]) for number in seen[0]]


def _recorded(
    pipe: Any, models: Sequence[nn.Module], call: Mapping[str, Any], most: int | None
) -> dict[int, Mapping[str, Any]]:
    """The keyword arguments of the models' first calls that a pipeline makes for these arguments.

    Raises:
        GraphCacheError: the pipeline fails before that, for instance because an argument is missing.
    """
    try:
        seen = first_calls(models, lambda: pipe(**call), most)
    except Exception as error:
        raise GraphCacheError(
            f"the pipeline failed before it called its denoiser: {error}; "
            'give its arguments, such as --call \'{"prompt": "a cat"}\''
        ) from error
    if not seen:
        raise GraphCacheError("the pipeline never called its denoiser")
    return seen


@dataclass(frozen=True)
class Sampled:
    """A model or pipeline, how it is sampled (None of a pipeline), and samples."""

    model_or_pipe: Any
    sampler: Sampler | None
    samples: Sequence[Any]


def load_sampled(
    name: str, call: Mapping[str, Any] | None, count: int, placement: Placement = CPU
) -> Sampled:
    """What profiling, tuning and comparing take.

    Args:
        name: `package.module:factory`, which returns (model, sampler, samples) or (pipeline, samples); or a
            local pipeline folder.
        call: arguments of the pipeline of a folder.
        count: samples of a folder's pipeline: the call with as many seeds.
        placement: of a folder's weights.

    Raises:
        GraphCacheError: the name leads nowhere, or the factory returns something else.
    """
    folder = Path(name)
    if folder.is_dir():
        pipe = load_pipeline(folder, placement)
        return Sampled(pipe, None, [{**(call or {}), "seed": seed} for seed in range(count)])
    placement.refuse_for(name)
    made = load_object(name)()
    if isinstance(made, tuple) and len(made) == 3:
        return Sampled(*made)
    if isinstance(made, tuple) and len(made) == 2:
        return Sampled(made[0], None, made[1])
    raise GraphCacheError(
        f"{name} must return (model, sampler, samples), the sampler a function of (model, sample, steps), or "
        "(pipeline, samples)"
    )
