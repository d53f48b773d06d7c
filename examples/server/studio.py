"""Generations of several requests over one transformed pipeline, each with caches of its own."""

import base64
import copy
import inspect
import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import nn

import graphcache
from graphcache import Plan

Message = dict[str, Any]
Emit = Callable[[Message], None]


class Full(Exception):
    """As many requests are waiting as may."""


class _Cancelled(Exception):
    pass


@dataclass(frozen=True)
class Request:
    """One picture: the pipeline's arguments, where its messages go, and whether it is still wanted."""

    arguments: Mapping[str, Any]
    seed: int
    emit: Emit
    cancelled: threading.Event = field(default_factory=threading.Event)


class Studio:
    """Runs requests in a few threads.

    Every thread has a copy of the pipeline with a scheduler and tokenizers of its own (those of transformers
    hold their padding while they work), and every request a session: weights and compiled code are shared,
    and nothing else.

    Args:
        pipe: a diffusers pipeline; it is transformed.
        plan: of as many steps as every generation has.
        backend: compiles the plan's phases.
        workers: generations at a time.
        waiting: requests that may wait beside them.
        every: a preview is sent after so many steps; 0 for none.
    """

    def __init__(
        self, pipe: Any, plan: Plan, backend: Any, workers: int = 2, waiting: int = 8, every: int = 5
    ) -> None:
        self.plan, self.every = plan, every
        self.pipe = graphcache.transform(pipe, plan, backend=backend)
        self.pipe.set_progress_bar_config(disable=True)
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self._most = workers + waiting
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="generation")
        self._own = threading.local()

    def warm_up(self, arguments: Mapping[str, Any]) -> None:
        """One generation, which compiles every phase; its picture is dropped."""
        self._picture(Request(arguments, 0, lambda message: None))

    def submit(self, request: Request) -> "Future[None]":
        """Put a request into the queue.

        Raises:
            Full: too many are there.
        """
        with self._lock:
            if self.counts["running"] >= self._most:
                self.counts["refused"] += 1
                raise Full
            self.counts["running"] += 1
        return self._pool.submit(self._run, request)

    def close(self) -> None:
        """Wait for what runs."""
        self._pool.shutdown()

    def _run(self, request: Request) -> None:
        began = time.perf_counter()
        message: Message
        try:
            message, outcome = {"picture": self._picture(request)}, "done"
        except _Cancelled:
            message, outcome = {"cancelled": True}, "cancelled"
        except Exception as error:  # whatever a pipeline raises is the request's, not the server's
            message, outcome = {"error": f"{type(error).__name__}: {error}"}, "failed"
        seconds = time.perf_counter() - began
        with self._lock:
            self.counts[outcome] += 1
            self.counts["running"] -= 1
            self.seconds += seconds
        request.emit({**message, "seconds": round(seconds, 3)})

    def _pipe(self) -> Any:
        """This thread's."""
        if not hasattr(self._own, "pipe"):
            self._own.pipe = copy.copy(self.pipe)
            for name, part in self.pipe.components.items():
                if part is not None and not isinstance(part, nn.Module):
                    setattr(self._own.pipe, name, copy.deepcopy(part))
        return self._own.pipe

    def _picture(self, request: Request) -> str:
        if request.cancelled.is_set():
            raise _Cancelled
        pipe = self._pipe()

        def after(step: int, latents: torch.Tensor) -> None:
            if request.cancelled.is_set():
                raise _Cancelled
            message: Message = {"step": step + 1, "steps": self.plan.steps}
            if self.every and (step + 1) % self.every == 0:
                message["preview"] = _preview(latents)
            request.emit(message)

        options = {
            "num_inference_steps": self.plan.steps,
            "generator": torch.Generator().manual_seed(request.seed),
            **_callback(pipe, after),
        }
        with pipe.transformer.session():
            return _png(pipe(**{**request.arguments, **options}).images[0])


def _callback(pipe: Any, after: Callable[[int, torch.Tensor], None]) -> dict[str, Any]:
    """The argument by which this pipeline tells its steps."""
    if "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters:
        return {"callback": lambda step, timestep, latents: after(step, latents), "callback_steps": 1}

    def at_the_end(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        after(step, values["latents"])
        return values

    return {"callback_on_step_end": at_the_end}


def _preview(latents: torch.Tensor) -> str:
    """The first three channels of the latents as colours: not decoded, which would cost as much as a step."""
    channels = latents[0, :3].float()
    low, high = channels.amin(), channels.amax()
    pixels = ((channels - low) / (high - low).clamp_min(1e-6) * 255).byte()
    return _png(Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()))


def _png(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()
