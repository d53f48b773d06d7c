"""The programs of a model: one for each signature and each form of the model, the latest of them kept."""

import logging
from collections import OrderedDict, deque

from graphcache.compiler.compilations import Compilations
from graphcache.compiler.program import Program
from graphcache.ir.call import Key

_COMPILED = 64
"""Compiled graphs are kept for so many times as many: what was compiled costs more to make than to hold."""
_REMEMBERED = 1024
"""Signatures that were dropped and are recognised when they return."""

log = logging.getLogger("graphcache")


class Programs(OrderedDict[Key, Program]):
    """At most so many; the least recently used is dropped, and it is said when one returns."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.compilations = Compilations(_COMPILED * most)
        self._dropped: deque[Key] = deque(maxlen=_REMEMBERED)
        self._warned = False

    def add(self, key: Key, program: Program) -> None:
        """Keep a program that was made, and drop those called longest ago."""
        if key in self._dropped and not self._warned:
            self._warned = True
            log.warning(
                "sizes, prompt lengths or forms of the model return after their captures were dropped, so "
                "that they are captured again at every turn: only %d are kept; say "
                "transform(..., signatures=) for as many as take turns",
                self.most,
            )
        self[key] = program
        while len(self) > self.most:
            self._dropped.append(self.popitem(last=False)[0])

    def forget_others(self, variants: set[int]) -> None:
        """Drop the programs of all forms of the model but these."""
        for key in [key for key in self if key[0] not in variants]:
            del self[key]
        if not self:
            self.compilations.forget_weights()
