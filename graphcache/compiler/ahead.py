"""Graphs compiled ahead of time by AOTInductor, and their code run without any compiler."""

import operator
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from graphcache.compiler.flat import flattened
from graphcache.ir.errors import CaptureError, GraphCacheError
from graphcache.ir.graph import StepGraph, value_of
from graphcache.libraries.exclusive import COMPILING
from graphcache.libraries.quiet import quiet_tracing
from graphcache.libraries.torch_private import aot_runner

_OPTIONS = {
    "aot_inductor.package": True,
    # one copy of the weights serves all graphs
    "aot_inductor.package_constants_in_so": False,
    # the code that calls the kernels is long, and takes most of the compiler's time
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.enable_line_tables": False,
}


@dataclass(frozen=True)
class Ahead:
    """A graph's files, and its weights by the names under which the code asks for them."""

    files: Sequence[Path]
    weights: Mapping[str, torch.Tensor]


def compile_ahead(step: StepGraph, what: str, options: Mapping[str, Any] = MappingProxyType({})) -> Ahead:
    """Compile a graph to native code, which is given its weights when it is loaded.

    Args:
        step: the graph; its inputs' fake tensors say what it is compiled for.
        what: it is, for a message.
        options: of Inductor.

    Raises:
        CaptureError: AOTInductor cannot compile it.
    """
    from graphcache.libraries.torch_compilers_private import aot_compile

    if any(str(node.target).startswith("graphcache.") for node in step.calls()):
        raise CaptureError(
            f"{what} calls back into Python, which native code cannot: for modules that "
            "are not traced, and for offload=True, take another backend"
        )
    if step.homes:
        raise CaptureError(
            f"{what} reads weights that are kept elsewhere, in host memory or in a file, which native code "
            "cannot fetch: take offloading off the model, or another backend"
        )
    module = flattened(step, {})
    named = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    fed = tuple(map(value_of, step.placeholders()))
    with COMPILING, quiet_tracing():
        try:
            made = aot_compile(module, fed, options={**options, **_OPTIONS})
            files = [Path(name) for name in made if not name.endswith((".cpp", "_metadata.json"))]
            wanted = {*Code(files, fed[0].device.type).names}
        except Exception as error:
            raise CaptureError(f"{what} cannot be compiled ahead of time by AOTInductor: {error}") from error
    if unknown := wanted - named.keys():
        raise CaptureError(
            f"{what} cannot be compiled ahead of time: AOTInductor made constants of its own "
            f"({', '.join(sorted(unknown))})"
        )
    return Ahead(files, {name: named[name] for name in wanted})


_ADDRESS = operator.methodcaller("data_ptr")


class Code:
    """Native code of a graph; called with tensors in the order of the input ports, with the layouts that it
    was compiled for, which it does not look at.

    It reads its weights where they were when they were bound: what is written there, it sees.
    """

    def __init__(self, files: Sequence[Path], device: str) -> None:
        library = next(file for file in files if file.suffix == ".so")
        self._runner = aot_runner(device, str(library))
        self.names: list[str] = [*self._runner.get_constant_names_to_original_fqns().values()]
        self._bound: dict[str, torch.Tensor] = {}

    def bind(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Give it all its weights, by the names that it has for them."""
        # kept alive, since the code has their addresses
        self._bound = {name: weight.detach() for name, weight in weights.items()}
        if self._bound:
            self._runner.update_constant_buffer(self._bound, False, True, True)

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        results: list[torch.Tensor] = self._runner.run(list(tensors))
        return results


class Following:
    """Code of a model that is at hand: it follows the weights wherever they are moved, as by `model.to`."""

    def __init__(self, made: Ahead, device: str) -> None:
        self._code = Code(made.files, device)
        self._named = made.weights
        self._weights = [*made.weights.values()]
        self._addresses: list[int] = []

    def __call__(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        addresses = [*map(_ADDRESS, self._weights)]
        if addresses != self._addresses:
            self._code.bind(self._named)
            self._addresses = addresses
        return self._code(*tensors)


def following(step: StepGraph, options: Mapping[str, Any]) -> Following:
    """A graph compiled ahead of time, to be called at once.

    Raises:
        CaptureError: AOTInductor cannot compile it, or gradients are asked for.
    """
    if torch.is_grad_enabled():
        raise CaptureError("backend='aot' computes no gradients: call the model under torch.no_grad()")
    made = compile_ahead(step, "a phase of the plan", options)
    return Following(made, value_of(step.placeholders()[0]).device.type)


def unpacked(files: Mapping[str, bytes], device: str) -> Code:
    """Code from the contents of its files, which lie in a folder of this user's own as long as it runs.

    Raises:
        GraphCacheError: it cannot be loaded here.
    """
    folder = tempfile.mkdtemp(prefix="graphcache-")
    paths = [Path(folder, Path(name).name) for name in files]
    try:
        for path, data in zip(paths, files.values(), strict=True):
            path.write_bytes(data)
        code = Code(paths, device)
    except (OSError, RuntimeError, StopIteration) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise GraphCacheError(f"the package's code cannot be loaded: {error}") from error
    weakref.finalize(code, shutil.rmtree, folder, ignore_errors=True)
    return code
