"""`load`: a packaged model, ready to run."""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphcache.compiler.native import Native, Part, Unpacked
from graphcache.ir.call import Binder, CallSpec
from graphcache.ir.data import dtype_named, tree
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.ir.roles import Names
from graphcache.ir.tree import fill
from graphcache.packaging.archive import Archive
from graphcache.packaging.machine import refuse_other
from graphcache.packaging.maker import PackagedPrograms
from graphcache.packaging.manifest import GraphLine, Manifest, ParameterLine, PartLine, SizeLine
from graphcache.packaging.model import Packaged, Shell, Weights, shell
from graphcache.packaging.program import program_of
from graphcache.runtime.engine import Engine
from graphcache.runtime.options import Options
from graphcache.runtime.spoken import Spoken
from graphcache.runtime.transform import wrapped


def load(path: str | os.PathLike[str], *, trust: bool = False) -> Any:
    """A model that `package` wrote, without its source, without diffusers and without compiling anything.

    It takes sessions, contexts and schedulers as every transformed model does, and stands in a pipeline:
    `pipe.transformer = graphcache.load(path, trust=True)`.

    Args:
        path: of the package.
        trust: a package holds native code, which may do whatever this process may. Checksums tell a file
            that was damaged, not one that was made to do harm: load only packages of your own, or of
            somebody whose programs you would run.

    Raises:
        GraphCacheError: nobody said `trust=True`; the file was changed, or is no package; or it was made
            for another processor, GPU or version of PyTorch.
    """
    archive = Archive(path)
    manifest = archive.manifest
    if not trust:
        raise GraphCacheError(
            f"{path}: a package holds native code, which may do whatever this process may; if you made it, "
            "or trust whoever did as you would with a program, say graphcache.load(path, trust=True)"
        )
    refuse_other(manifest.machine, manifest.torch, _device(manifest))
    model, weights = _model(archive)
    plan = Plan.parse(manifest.plan)
    names = Names.of(manifest.timestep, manifest.latents)
    binder = Binder(_parameters(manifest.parameters), names)
    options = Options(plan, None, manifest.calls, manifest.waits, names=names)
    spoken = Spoken()
    spoken.of_preset(plan)
    maker = PackagedPrograms(options, spoken, binder, weights, tree(manifest.modes))
    code = _Loader(archive, weights, _device(manifest))
    for line in manifest.sizes:
        _hold(maker, line, code)
    weights.bind()
    engine = Engine(model, options, maker=maker)
    made = wrapped(model, engine, Packaged)
    engine.given = made
    return made


class _Loader:
    """Loads the code of graphs, each part with its weights; of a library there is one file for all."""

    def __init__(self, archive: Archive, weights: Weights, device: str) -> None:
        self._archive = archive
        self._weights = weights
        self._device = device
        self._unpacked: dict[int, Unpacked] = {}

    def __call__(self, line: GraphLine) -> Native:
        return Native([*map(self._part, line.parts)], line.results, [port.tensor for port in line.outputs])

    def _part(self, line: PartLine) -> Part:
        known = self._archive.manifest.codes[line.code]
        if line.code not in self._unpacked:
            self._unpacked[line.code] = Unpacked({name: self._archive.read(name) for name in known.files})
        code = self._unpacked[line.code].code(self._device)
        self._weights.serve(code, line.weights)
        return Part(code, known.inputs, line.inputs, line.results)


def _device(manifest: Manifest) -> str:
    return torch.device(manifest.sizes[0].leaves[0].device).type


def _parameters(lines: Sequence[ParameterLine]) -> Mapping[str, inspect.Parameter]:
    kinds = {int(kind): kind for kind in _KINDS}
    return {
        line.name: inspect.Parameter(
            line.name, kinds[line.kind], default=None if line.optional else inspect.Parameter.empty
        )
        for line in lines
    }


_KINDS = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.KEYWORD_ONLY,
    inspect.Parameter.VAR_KEYWORD,
)


def _model(archive: Archive) -> tuple[Shell, Weights]:
    manifest = archive.manifest
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    ordinary = _parameters(manifest.parameters).values()
    first = own if any(p.kind is p.POSITIONAL_ONLY for p in ordinary) else own.replace(kind=_KINDS[1])
    attributes = {name: tree(value) for name, value in manifest.attributes.items()}
    config = None if manifest.config is None else tree(manifest.config)
    model = shell(manifest.model, inspect.Signature([first, *ordinary]), attributes, config)
    stored = archive.weights(
        {line.stored: dtype_named(line.tensor.dtype) for line in manifest.weights.values()}
    )
    lines = manifest.weights
    laid = {name: _laid(stored[name], lines[name].tensor) for name in stored}
    beside = {name: laid[line.stored] for name, line in lines.items() if line.kind == "constant"}
    weights = Weights(model, beside)
    for name, line in lines.items():
        if name not in beside:
            weights.hold(name, laid[line.stored], line.kind)
    return model, weights


def _laid(stored: torch.Tensor, line: Any) -> torch.Tensor:
    """A stored tensor where, and laid out as, code was compiled for."""
    if line.device == "cpu" and [*stored.stride()] == line.stride:
        return stored
    return line.empty().copy_(stored)  # type: ignore[no-any-return]


def _hold(maker: PackagedPrograms, line: SizeLine, code: _Loader) -> None:
    """Make a call's program, under the signature that such calls have here."""
    template = tree(line.call)
    examples: list[Any] = [leaf.empty() for leaf in line.leaves]
    for place in line.numbers:  # which the caller gives as such
        examples[place] = examples[place].item()
    bound = fill(template, examples)
    signature = maker.binder.signature(bound)[0]
    maker.held[signature] = program_of(line, CallSpec.of(maker.binder, bound), code)
