"""Other libraries' words beside ours: left out while a model is traced or loaded."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from graphcache.libraries.torch_private import FAKE_TENSOR_LOG

_EXPORTING = ("torch.export", "torch.fx.experimental.symbolic_shapes")


@contextlib.contextmanager
def quiet_shapes() -> Iterator[None]:
    """Where sizes are tried, those that do not fit are an answer: PyTorch's log of them stays empty."""
    with _disabled(FAKE_TENSOR_LOG):
        yield


@contextlib.contextmanager
def quiet_tracing() -> Iterator[None]:
    """What fails is told by one error: PyTorch's log says it too, unless it was asked to by TORCH_LOGS."""
    from graphcache.libraries.torch_compilers_private import EXPORT_LOG

    names = () if os.environ.get("TORCH_LOGS") else (FAKE_TENSOR_LOG, EXPORT_LOG, *_EXPORTING)
    with _disabled(*names), warnings.catch_warnings():
        # of copies that PyTorch makes of its own structures
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        yield


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """No loading bars of diffusers and transformers, and nothing of what they will call otherwise one day."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore", FutureWarning)
        for name in ("diffusers.utils.logging", "transformers.utils.logging"):
            bars = sys.modules.get(name)
            if bars is not None and bars.is_progress_bar_enabled():
                bars.disable_progress_bar()
                stack.callback(bars.enable_progress_bar)
        yield


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Nothing of what libraries miss when they are first imported; what they need and miss is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


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
