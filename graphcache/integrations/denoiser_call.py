"""One call of a denoiser that wrappers stand around: what of it a captured graph can be given."""

import enum
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphcache.ir.errors import CaptureError
from graphcache.ir.tree import fields_of, is_record

OPTIONS = "transformer_options"
"""The argument that holds what is not the model's own, but says something of the call."""
KEY = "graphcache"
"""Under which wrappers are registered, and the run stands among the options."""

_OF_THE_CALL = frozenset(("uuids", "cond_or_uncond", "sample_sigmas"))
"""Options by which a call is placed: others for each prompt or number of steps, and no input of a model."""
_CALLED_OUTSIDE = frozenset((KEY, "wrappers", "callbacks"))
_AROUND = frozenset(
    (
        "outer_sample",
        "prepare_sampling",
        "sampler_sample",
        "predict_noise",
        "calc_cond_batch",
        "apply_model",
        "diffusion_model",
    )
)
"""Kinds of wrappers that have been called before the denoiser is."""
_DATA = (
    torch.Tensor, torch.dtype, torch.device, type(None), bool, int, float, complex, str, bytes, enum.Enum,
)  # fmt: skip


class Plainly(Exception):
    """A call has to be computed by the model itself; says why."""


@dataclass(frozen=True, slots=True)
class DenoiserCall:
    """A call by the names of its arguments.

    Attributes:
        model: whose method the wrappers stand around.
        function: that method.
        named: what it is given; its options are those that a graph may be given.
        options: all of them.
    """

    model: nn.Module
    function: Callable[..., Any]
    named: dict[str, Any]
    options: Mapping[str, Any]

    @staticmethod
    def of(executor: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "DenoiserCall":
        """Read a call that has come to a wrapper.

        Raises:
            Plainly: a graph would lose something of it.
        """
        model, method = executor.class_obj, executor.original
        if executor.wrappers[executor.idx + 1 :]:
            raise Plainly("another wrapper of the denoiser was put within the plan's")
        owner = getattr(method, "__self__", None)
        if owner is not model or not isinstance(model, nn.Module):
            raise Plainly("what the wrappers stand around is no method of the denoiser")
        named = _by_name(method, args, kwargs)
        options = named.get(OPTIONS)
        if not isinstance(options, Mapping):
            raise Plainly(f"the denoiser was called without {OPTIONS}")
        held = [name for name, value in named.items() if name != OPTIONS and not _is_data(value)]
        held += [f"{OPTIONS}[{name!r}]" for name in _not_data(options)]
        if held:
            raise Plainly(
                f"{', '.join(held)}: functions or objects, which a captured graph would not call again"
            )
        given = {n: v for n, v in options.items() if n not in _OF_THE_CALL and n not in _CALLED_OUTSIDE}
        return DenoiserCall(model, method.__func__, {**named, OPTIONS: given}, options)


def core(model: nn.Module, function: Callable[..., Any]) -> nn.Module:
    """The model without its wrappers: it shares all attributes, weights included; its forward is `function`.

    Forward may write into its options. It may not look at those by which a call is placed.
    """

    @functools.wraps(function)
    def forward(self: nn.Module, **named: Any) -> Any:
        return function(self, **{**named, OPTIONS: _Options(named[OPTIONS])})

    kind: Any = type(model)
    names = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: nn.Module = object.__new__(type(kind)(kind.__name__, (kind,), names))
    made.__dict__ = model.__dict__
    return made


class _Options(dict[str, Any]):
    """Options in which forward would miss those that it is not given."""

    def __missing__(self, name: str) -> Any:
        _refuse(name)
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        _refuse(name)
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        _refuse(name)
        return super().get(name, default)

    def copy(self) -> "_Options":
        return _Options(self)


def _refuse(name: object) -> None:
    if name in _OF_THE_CALL:
        raise CaptureError(
            f"the model's forward looks at {OPTIONS}[{name!r}], which differs between calls that a plan "
            "serves with one graph; run this model without a plan"
        )


def _by_name(method: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(method)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


def _not_data(options: Mapping[str, Any]) -> list[str]:
    """The options that a graph cannot hold."""
    passed_by = _OF_THE_CALL | _CALLED_OUTSIDE
    found = [name for name, value in options.items() if name not in passed_by and not _is_data(value)]
    wrappers = options.get("wrappers") or {}
    inner = any(any(keyed.values()) for kind, keyed in wrappers.items() if kind not in _AROUND)
    return [*found, "wrappers"] if inner else found


def _is_data(value: Any) -> bool:
    """Whether it is tensors and plain values, in dicts, lists, tuples and plain objects."""
    if isinstance(value, _DATA):
        return True
    if isinstance(value, Mapping):
        return all(map(_is_data, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_data, value))
    return is_record(value) and all(map(_is_data, fields_of(value).values()))
