"""Weights that are cast by hooks around their module's forward, in a trace."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from graphcache.libraries.carriers import tables
from graphcache.tracing.hooks import is_cast


@contextlib.contextmanager
def traced_casts(model: nn.Module) -> Iterator[None]:
    """Within, hooks that cast a module's weights put traced values in their place.

    `Module.to` gives the weights other data, of which tracing knows nothing. The tables are put back by
    whoever traces.
    """
    cast = [module for module in model.modules() if is_cast(module)]
    for module in cast:
        module.__dict__["to"] = _to(module)
    try:
        yield
    finally:
        for module in cast:
            del module.__dict__["to"]


def _to(module: nn.Module) -> Callable[..., nn.Module]:
    def to(**kwargs: Any) -> nn.Module:
        for part in module.modules():
            for table in tables(part):
                for name, value in table.items():
                    if value is not None and value.is_floating_point():
                        dict.__setitem__(table, name, value.to(**kwargs))
        return module

    return to
