"""The calls of models in a generation, with their arguments by name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from graphcache.tracing.capture import forward_parameters


@contextmanager
def calls_told(models: Sequence[nn.Module], tell: Callable[[int, Mapping[str, Any]], None]) -> Iterator[None]:
    """Within, `tell` is given the number of every model that is called, and its arguments by name, before it
    runs.
    """

    def called(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tell(number, {**dict(zip(forward_parameters(module), args, strict=False)), **kwargs})

    with ExitStack() as stack:
        for number, model in enumerate(models):
            hook = model.register_forward_pre_hook(partial(called, number), with_kwargs=True)
            stack.callback(hook.remove)
        yield
