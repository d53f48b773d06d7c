"""The programs of a package, found as those of a model are, and never made."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphcache.compiler.backends import AOT, Backend
from graphcache.compiler.modes import ambient, around_code
from graphcache.compiler.program import Program
from graphcache.ir.call import Binder, Key, Signature
from graphcache.ir.data import TensorLine
from graphcache.ir.errors import CaptureError, GraphCacheError
from graphcache.packaging.model import Weights
from graphcache.packaging.program import PackagedProgram
from graphcache.runtime.options import Options
from graphcache.runtime.program_maker import ProgramMaker
from graphcache.runtime.spoken import Spoken


class PackagedPrograms(ProgramMaker):
    """Those that a package holds.

    Args:
        options: what the model was packaged with.
        spoken: what was said once.
        binder: reads calls of the model's forward.
        weights: of all code.
        modes: what was around the calls when they were packaged, of `ambient`.
    """

    def __init__(
        self, options: Options, spoken: Spoken, binder: Binder, weights: Weights, modes: Any
    ) -> None:
        super().__init__(weights.model, options, spoken, binder)
        self.backend = AOT
        self.weights = weights
        self.held: dict[Signature, PackagedProgram] = {}
        self._around = modes

    def key(self, signature: Signature, tensors: Sequence[torch.Tensor], begins: bool) -> Key:
        if begins:
            self.weights.look()
        return 0, *signature, *ambient()

    def find(
        self, key: Key, bound: Mapping[str, Any], tensors: Sequence[torch.Tensor]
    ) -> tuple[Key, Program]:
        """The program of a signature.

        Raises:
            CaptureError: the package has none, gradients are asked for, or modes around the call are others.
        """
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise CaptureError("a package computes no gradients; call it under torch.no_grad()")
        if around_code() != self._around:
            raise CaptureError(
                "autocast or the kernels that attention may use are other ones than when the model was "
                "packaged, and the code is for those: call it as it was packaged, or package it like this"
            )
        found = self.held.get(self.binder.signature(bound)[0])
        if found is None:
            raise CaptureError(self._unknown(bound, tensors))
        return key, found

    def _unknown(self, bound: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> str:
        names = self.spec(self.binder.signature(bound)[0], bound).leaf_names
        given = {name: str(TensorLine.of(tensor)) for name, tensor in zip(names, tensors, strict=True)}
        known = []
        for program in self.held.values():
            leaves = zip(program.captured.call.leaf_names, program.line.leaves, strict=True)
            known.append({name: str(leaf) for name, leaf in leaves})
        unlike = {name: text for name, text in given.items() if all(k.get(name) != text for k in known)}
        shown = unlike or given
        others = [" ".join(f"{name} {k[name]}" for name in shown if name in k) or "without it" for k in known]
        return (
            f"the package holds no code for this call: {', '.join(f'{n} {t}' for n, t in shown.items())}, "
            f"where it has {'; '.join(others)}"
            + ("" if unlike else " in other combinations, or with other values of what is no tensor")
            + ". Package the model with a call like this among sizes="
        )

    def compile(self, backend: Backend) -> None:
        raise GraphCacheError("a package is compiled already, and cannot be compiled again")

    def leave_prologue(
        self, key: Key, program: Program, changed: set[int], tensors: Sequence[torch.Tensor]
    ) -> Program:
        """The same: what depends on these inputs is computed anew whenever they change."""
        return program
