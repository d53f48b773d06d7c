"""Says when a pipeline has run and its transformed models were never called."""

import logging
from collections.abc import Sequence
from typing import Any

from graphcache.runtime.engine import Engine

log = logging.getLogger("graphcache")


def timesteps_of(pipe: Any) -> Any:
    """What the pipeline's scheduler was given to run by, another object for each generation."""
    return getattr(getattr(pipe, "scheduler", None), "timesteps", None)


def say_if_passed_by(engines: Sequence[Engine]) -> None:
    """Warn if a pipeline has run since it was transformed and none of these models was called."""
    if not engines or any(engine.calls for engine in engines):
        return
    pipe, before = engines[0].driver.given, engines[0].timesteps_before
    if pipe is not None and timesteps_of(pipe) is not before:
        log.warning(
            "%s has run since it was transformed, and no call arrived at the model under the plan, so that "
            "nothing was cached: what it calls is another module, or one that it took before; transform the "
            "object that holds that, or name it with transform(pipe, plan, parts=...)",
            type(pipe).__name__,
        )
