"""The server's routes: pictures as a stream of JSON lines, cancellation, metrics."""

import asyncio
import itertools
import json
import resource
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field

from examples.server.studio import Full, Message, Request, Studio

_LAST = ("picture", "cancelled", "error")


class Order(BaseModel):
    """What a client asks for; `arguments` are further ones of the pipeline."""

    prompt: str = Field(max_length=2000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    negative_prompt: str = Field(default="", max_length=2000)


def application(studio: Studio, arguments: Mapping[str, Any]) -> FastAPI:
    """The server's application.

    Args:
        studio: runs the generations.
        arguments: of every call of the pipeline, such as its height and width; also of the first one, which
            warms up.
    """
    numbers = itertools.count(1)
    running: dict[int, Request] = {}

    @asynccontextmanager
    async def lifetime(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(studio.warm_up, {**arguments, "prompt": ""})
        yield
        for request in running.values():
            request.cancelled.set()
        await asyncio.to_thread(studio.close)

    app = FastAPI(lifespan=lifetime)

    @app.post("/pictures")
    async def pictures(order: Order) -> StreamingResponse:
        loop, messages = asyncio.get_running_loop(), asyncio.Queue[Message]()

        def emit(message: Message) -> None:
            loop.call_soon_threadsafe(messages.put_nowait, message)

        given = {**arguments, "prompt": order.prompt, "negative_prompt": order.negative_prompt}
        request, number = Request(given, order.seed, emit), next(numbers)
        try:
            studio.submit(request)
        except Full:
            raise HTTPException(503, "too many requests wait", {"Retry-After": "1"}) from None
        running[number] = request

        lines = _lines(number, request, messages, running)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    @app.delete("/pictures/{number}", status_code=204)
    async def cancel(number: int) -> None:
        if number not in running:
            raise HTTPException(404, "no such request is running")
        running[number].cancelled.set()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        return _metrics(studio)

    return app


async def _lines(
    number: int, request: Request, messages: asyncio.Queue[Message], running: dict[int, Request]
) -> AsyncIterator[str]:
    """What a client is sent: its number, and every message up to the last one."""
    try:
        yield json.dumps({"id": number}) + "\n"
        while True:
            message = await messages.get()
            yield json.dumps(message) + "\n"
            if any(key in message for key in _LAST):
                return
    finally:  # also when the client has gone
        request.cancelled.set()
        running.pop(number, None)


_OUTCOMES = ("done", "cancelled", "failed", "refused")


def _metrics(studio: Studio) -> str:
    counts = studio.counts
    values: dict[str, float] = {f'graphcache_requests{{outcome="{key}"}}': counts[key] for key in _OUTCOMES}
    values |= {
        "graphcache_requests_running": counts["running"],
        "graphcache_seconds_sum": round(studio.seconds, 3),
        "process_peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    return "".join(f"{name} {value}\n" for name, value in values.items())
