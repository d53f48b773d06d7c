"""Processes with a gloo group, each at work on the same function."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_MODELS = (
    "dit_transformer_2d",
    "pixart_transformer_2d",
    "transformer_sd3",
    "transformer_flux",
    "transformer_wan",
    "cogvideox_transformer_3d",
    "transformer_hunyuan_video",
)
_DIFFUSERS = [f"diffusers.models.transformers.{name}" for name in _MODELS]
Work = Callable[..., Any]
_CONTEXT = multiprocessing.get_context("forkserver")


def together(count: int, work: Work, *arguments: Any, timeout: float = 120) -> list[Any]:
    """What each rank returned or raised; None of one that died.

    Args:
        count: how many processes.
        work: a function of a module, called with the arguments.
        arguments: for it.
        timeout: seconds after which ranks that are still at work are ended, which is an error.
    """
    _CONTEXT.set_forkserver_preload(["mesh_work", "torch.export", "torch._dynamo", *_DIFFUSERS])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _CONTEXT.Process(target=_run, args=(rank, count, folder, work, arguments), daemon=True)
            for rank in range(count)
        ]
        for process in ranks:
            process.start()
        try:
            for process in ranks:
                process.join(timeout)
            assert not any(process.is_alive() for process in ranks), "a rank hangs"
        finally:
            for process in ranks:
                process.kill()
        found: list[Any] = [None] * count
        for rank in range(count):
            path = Path(folder, f"result{rank}")
            if path.exists():
                found[rank] = torch.load(path, weights_only=False)
        return found


def _run(rank: int, count: int, folder: str, work: Work, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    try:
        result = work(*arguments)
    except Exception as error:  # what a rank raises is what tests look at
        result = f"{type(error).__name__}: {error}"
    torch.save(result, f"{folder}/writing{rank}")
    os.rename(f"{folder}/writing{rank}", f"{folder}/result{rank}")
    os._exit(0)  # nobody waits for ranks that are gone
