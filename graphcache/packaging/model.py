"""What stands in a packaged model's place: its weights under their names, its config, and no source."""

import inspect
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphcache.compiler.native import Code
from graphcache.ir.errors import CaptureError, GraphCacheError
from graphcache.ir.graph import layout
from graphcache.libraries.extras import require
from graphcache.runtime.transform import Transformed
from graphcache.tracing.hooks import refuse_uncapturable


class Config(dict[str, Any]):
    """A model's config, whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the packaged model's config has no '{name}'") from None


class Shell(nn.Module):
    """A model without its source: weights, buffers and plain attributes where the model had them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise CaptureError(
            "a package holds the phases of its plan and not the model: for another plan, or to call the "
            "model outside of its plan, load the model itself"
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the first floating-point weight."""
        return next(weight.dtype for weight in self.parameters() if weight.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Of the first weight."""
        return next(self.parameters()).device

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Shell":
        """Conversions that change nothing, as pipelines ask for; code is for one dtype and device."""
        kinds = {(weight.dtype, weight.device) for weight in (*self.parameters(), *self.buffers())}
        for dtype, device in kinds:
            made = fn(torch.empty(0, dtype=dtype, device=device))
            if (made.dtype, made.device) != (dtype, device):
                raise GraphCacheError(
                    f"the package was compiled for {dtype} on {device}, and is asked for {made.dtype} on "
                    f"{made.device}: package the model with that"
                )
        return self


def shell(
    name: str, signature: inspect.Signature, attributes: Mapping[str, Any], config: Mapping[str, Any] | None
) -> Shell:
    """A model's place, with its name and its forward's arguments, and no weights yet."""

    def forward(self: Shell, *args: Any, **kwargs: Any) -> Any:
        return Shell.forward(self, *args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    made: Shell = type(name, (Shell,), {"forward": forward, "__module__": __name__})()
    for attribute, value in attributes.items():
        if not hasattr(made, attribute):
            object.__setattr__(made, attribute, value)
    if config is not None:
        object.__setattr__(made, "config", Config(config))
    return made.eval()


class Weights:
    """The weights of a package where its code finds them: in the model's place, or beside it.

    Code has their addresses. Whoever puts other ones in their place is noticed when a generation begins.
    """

    def __init__(self, model: Shell, beside: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        held = dict(beside)
        self._tables: dict[str, tuple[dict[str, Any], str]] = {name: (held, name) for name in held}
        self._codes: list[tuple[Code, Mapping[str, str]]] = []
        self._modules: list[nn.Module] = []
        self._kinds: dict[str, Any] = {}
        self._bound: list[int] = []

    def hold(self, path: str, weight: torch.Tensor, kind: str) -> None:
        """Put a weight where the model had it."""
        *holders, name = path.split(".")
        module: nn.Module = self.model
        for holder in holders:
            if holder not in module._modules:
                module.add_module(holder, nn.Module().eval())
            module = module.get_submodule(holder)
        if kind == "parameter":
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            self._tables[path] = module._parameters, name
        else:
            module.register_buffer(name, weight, persistent=kind == "buffer")
            self._tables[path] = module._buffers, name

    def serve(self, code: Code, names: Mapping[str, str]) -> None:
        """Give code its weights: `names` are ours, by those that it has for them."""
        self._codes.append((code, names))

    def bind(self) -> None:
        """Tell all code where the weights are, once all are held."""
        held = {name: table[key].detach() for name, (table, key) in self._tables.items()}
        self._modules = [*self.model.modules()]
        self._kinds = {name: layout(weight) for name, weight in held.items()}
        self._bound = self._addresses()
        for code, names in self._codes:
            code.bind({theirs: held[ours] for theirs, ours in names.items()})

    def look(self) -> None:
        """Notice whatever was done to the model since the generation before.

        Raises:
            CaptureError: it has hooks or is trained, or modules or weights are others that code cannot take.
        """
        refuse_uncapturable(self.model)
        modules = [*self.model.modules()]
        if len(modules) != len(self._modules) or not all(map(operator.is_, modules, self._modules)):
            raise CaptureError(
                "modules of the packaged model were put in or taken out, as adapters do, which its code does "
                "not see: merge an adapter into the weights, and give these to model.load_weights(...)"
            )
        if self._addresses() != self._bound:
            for name, (table, key) in self._tables.items():
                if not isinstance(table.get(key), torch.Tensor) or layout(table[key]) != self._kinds[name]:
                    raise CaptureError(
                        f"weight {name} of the packaged model was replaced by one of another shape, dtype, "
                        "layout or device; package the model with that"
                    )
            self.bind()

    def _addresses(self) -> list[int]:
        try:
            return [table[key].data_ptr() for table, key in self._tables.values()]
        except (KeyError, AttributeError):
            return []


class Packaged(Transformed):
    """What a loaded package has beside what every transformed model has."""

    __slots__ = ()

    def load_weights(self, source: Mapping[str, torch.Tensor] | str | os.PathLike[str]) -> None:
        """Take other values for the weights: another fine-tuning, or an adapter merged into them.

        They are written into the weights' own memory, between generations; the code stays.

        Args:
            source: a state dict of the model's names, shapes and dtypes, or a safetensors file of one.

        Raises:
            GraphCacheError: something is missing, unknown or of another kind; nothing was changed.
        """
        values = source if isinstance(source, Mapping) else _read(source)
        held: Mapping[str, torch.Tensor] = self.state_dict(keep_vars=True)  # type: ignore[attr-defined]
        if unlike := sorted(held.keys() ^ values.keys()):
            there = "lacks" if unlike[0] in held else "has, and the package does not,"
            raise GraphCacheError(f"load_weights: the state dict {there} {_some(unlike)}")
        for name, weight in held.items():
            new = values[name]
            if (new.shape, new.dtype) != (weight.shape, weight.dtype):
                raise GraphCacheError(
                    f"load_weights: {name} is {new.dtype} of shape {tuple(new.shape)}, and the package was "
                    f"compiled for {weight.dtype} of shape {tuple(weight.shape)}"
                )
        with torch.no_grad():
            for name, weight in held.items():
                weight.detach().copy_(values[name])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise GraphCacheError("a packaged model cannot be copied: load the package once more")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise GraphCacheError("a packaged model cannot be pickled: load the package where it is needed")


def _read(path: str | os.PathLike[str]) -> Mapping[str, torch.Tensor]:
    library = require("safetensors.torch", "package", "reading weights")
    try:
        found: Mapping[str, torch.Tensor] = library.load_file(os.fspath(path))
    except Exception as error:
        raise GraphCacheError(f"{path}: cannot be read as safetensors: {error}") from error
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
