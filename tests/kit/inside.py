"""What tests look at within a transformed model, where nothing public tells it."""

from collections.abc import Hashable, Mapping
from typing import Any

from torch import nn

from graphcache.compiler.program import Program
from graphcache.runtime.engine import Engine
from graphcache.runtime.runner import BranchState


def engine_of(model: nn.Module) -> Engine:
    engine: Any = model._graphcache
    assert isinstance(engine, Engine)
    return engine


def programs_of(model: nn.Module) -> list[Program]:
    """What was captured for a model, each with its phases."""
    return list(engine_of(model).maker.programs.values())


def only_program(model: nn.Module) -> Program:
    (program,) = programs_of(model)
    return program


def states_of(model: nn.Module) -> Mapping[Hashable, BranchState]:
    """The states of the session's branches."""
    return engine_of(model).surroundings.session.states
