"""PyTorch's own words beside ours: left out while a model is traced."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

_SHAPES = "torch._subclasses.fake_tensor"
_SYMBOLS = "torch.fx.experimental.symbolic_shapes"


@contextlib.contextmanager
def quiet_shapes() -> Iterator[None]:
    """Where sizes are tried, those that do not fit are an answer: PyTorch's log of them stays empty."""
    with _disabled(_SHAPES):
        yield


@contextlib.contextmanager
def quiet_tracing() -> Iterator[None]:
    """What fails is told by one error: PyTorch's log says it too, unless it was asked to by TORCH_LOGS."""
    names = () if os.environ.get("TORCH_LOGS") else (_SHAPES, _SYMBOLS, "torch.export")
    with _disabled(*names), warnings.catch_warnings():
        # of copies that PyTorch makes of its own structures
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        yield


@contextlib.contextmanager
def _disabled(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, was_disabled in zip(loggers, before, strict=True):
            logger.disabled = was_disabled
