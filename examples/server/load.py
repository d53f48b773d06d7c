"""A bounded number of requests to a running server: whether each is right, and whether memory stays flat.

python -m examples.server.load http://localhost:8000 --requests 60 --at-once 4
"""

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

_PATIENCE = 600.0


@dataclass(frozen=True)
class Outcome:
    """What came of the requests.

    Attributes:
        ends: how many ended how.
        errors: what the server said of those that failed.
        wrong: seeds whose picture was not that of the first request with this seed.
        peaks: bytes that the process had taken at most, after each quarter of the requests.
    """

    ends: Counter[str]
    errors: tuple[str, ...]
    wrong: tuple[int, ...]
    peaks: tuple[int, ...]


async def load(address: str, requests: int, at_once: int, seeds: int = 3, cancel_every: int = 5) -> Outcome:
    """Ask for pictures of a few seeds; every so many requests one is cancelled at its first step."""
    ends, errors, wrong, peaks = Counter[str](), list[str](), list[int](), list[int]()
    async with httpx.AsyncClient(base_url=address, timeout=_PATIENCE) as client:
        expected = {seed: (await _ask(client, seed, False))["picture"] for seed in range(seeds)}
        gate = asyncio.Semaphore(at_once)

        async def one(number: int) -> None:
            async with gate:
                seed, cancels = number % seeds, bool(cancel_every) and number % cancel_every == 0
                last = await _ask(client, seed, cancels)
            ends[next(key for key in ("picture", "cancelled", "error", "refused") if key in last)] += 1
            if "error" in last:
                errors.append(last["error"])
            if "picture" in last and last["picture"] != expected[seed]:
                wrong.append(seed)

        quarter = -(-requests // 4)
        for first in range(0, requests, quarter):
            await asyncio.gather(*(one(n) for n in range(first, min(first + quarter, requests))))
            peaks.append(await _peak(client))
    return Outcome(ends, tuple(errors), tuple(wrong), tuple(peaks))


async def _ask(client: httpx.AsyncClient, seed: int, cancels: bool) -> Mapping[str, Any]:
    """The last message of a request."""
    order = {"prompt": "a fox", "seed": seed}
    message: dict[str, Any] = {}
    async with client.stream("POST", "/pictures", json=order) as response:
        if response.status_code == 503:
            return {"refused": True}
        response.raise_for_status()
        number = 0
        async for line in response.aiter_lines():
            message = json.loads(line)
            number = message.get("id", number)
            if cancels and message.get("step") == 1:
                await client.delete(f"/pictures/{number}")
    return message


async def _peak(client: httpx.AsyncClient) -> int:
    text = (await client.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines())
    return int(values["process_peak_memory_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--at-once", type=int, default=4)
    given = parser.parse_args()
    found = asyncio.run(load(given.address, given.requests, given.at_once))
    print(", ".join(f"{count} {end}" for end, count in found.ends.items()), f"; wrong: {len(found.wrong)}")
    for error in found.errors:
        print(error)
    print("peak memory after each quarter:", ", ".join(f"{peak / 2**20:.0f} MiB" for peak in found.peaks))


if __name__ == "__main__":
    main()
