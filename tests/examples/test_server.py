"""The server: concurrent requests are right, may be cancelled, and are refused when too many wait."""

import asyncio
import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
import torch
import uvicorn
from diffusers import DiffusionPipeline
from PIL import Image

import graphcache
from examples.server.app import application
from examples.server.load import load
from examples.server.studio import Request, Studio
from folders import FOLDERS
from graphcache import presets

PIXART = FOLDERS["pixart"]
PLAN = presets.taylorseer(6, interval=3, order=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(PIXART.saved(tmp_path_factory.mktemp("pipeline")))


def studio(folder: Path, **options: Any) -> Studio:
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    return Studio(pipe, PLAN, None, every=2, **options)


@contextmanager
def served(studio: Studio) -> Iterator[str]:
    """The address of a server that runs in another thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(application(studio, PIXART.arguments), port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def counts(address: str) -> dict[str, float]:
    text = httpx.get(f"{address}/metrics").text
    return {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines()}


def test_requests_at_once_get_the_pictures_that_they_get_alone(folder: Path) -> None:
    """Four at once in three threads; every fifth is cancelled within its generation."""
    with served(studio(folder, workers=3)) as address:
        outcome = asyncio.run(load(address, requests=15, at_once=4))
        found = counts(address)
    assert outcome.wrong == ()
    assert outcome.ends == {"picture": 12, "cancelled": 3}
    assert found['graphcache_requests{outcome="done"}'] == 12 + 3, "the expected ones too"
    assert found['graphcache_requests{outcome="cancelled"}'] == 3
    assert found["graphcache_requests_running"] == 0


def test_a_picture_is_the_pipelines_own_under_the_plan(folder: Path) -> None:
    """Beside previews after every second step, and a message for each."""
    messages: list[dict[str, Any]] = []
    on = studio(folder)
    on.submit(Request({**PIXART.arguments, "prompt": "a fox"}, 3, messages.append)).result()
    on.close()
    assert [message.get("step") for message in messages] == [1, 2, 3, 4, 5, 6, None]
    assert ["preview" in message for message in messages] == [False, True] * 3 + [False]
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    graphcache.transform(pipe, PLAN)
    numbers = torch.Generator().manual_seed(3)
    alone = pipe(prompt="a fox", generator=numbers, num_inference_steps=6, **PIXART.arguments).images[0]
    ours = Image.open(io.BytesIO(base64.b64decode(messages[-1]["picture"])))
    assert numpy.array_equal(numpy.asarray(ours), numpy.asarray(alone))


def test_what_fails_is_told_to_its_client_alone(folder: Path) -> None:
    on = studio(folder, workers=1)
    ends: list[dict[str, Any]] = []
    on.submit(Request({**PIXART.arguments, "prompt": "a fox", "height": 17}, 0, ends.append)).result()
    assert "error" in ends[-1]
    assert "height" in ends[-1]["error"]
    on.submit(Request({**PIXART.arguments, "prompt": "a fox"}, 0, ends.append)).result()
    on.close()
    assert "picture" in ends[-1]
    assert on.counts["failed"] == on.counts["done"] == 1


def test_more_than_may_wait_are_refused(folder: Path) -> None:
    on = studio(folder, workers=1, waiting=1)
    order, held = {**PIXART.arguments, "prompt": "a fox"}, threading.Event()
    with served(on) as address:
        on.submit(Request(order, 0, lambda message: held.wait() and None))
        waiting = on.submit(Request(order, 0, lambda message: None))
        refused = httpx.post(f"{address}/pictures", json={"prompt": "a fox"})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        held.set()
        waiting.result()
        assert httpx.post(f"{address}/pictures", json={"prompt": "a fox"}).status_code == 200
        assert counts(address)['graphcache_requests{outcome="refused"}'] == 1
        assert httpx.delete(f"{address}/pictures/99").status_code == 404
        assert httpx.post(f"{address}/pictures", json={"prompt": "a fox", "seed": -1}).status_code == 422


def test_a_client_that_goes_away_ends_its_request(folder: Path) -> None:
    on = studio(folder, workers=1)
    with served(on) as address:
        with httpx.stream("POST", f"{address}/pictures", json={"prompt": "a fox"}) as response:
            next(response.iter_lines())
        while on.counts["running"]:
            time.sleep(0.02)
        assert on.counts["cancelled"] + on.counts["done"] == 1
