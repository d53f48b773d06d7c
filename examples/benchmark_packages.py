"""Packages beside compiling: CPU-seconds to make, size, seconds to load, and what a step costs.

python -m examples.benchmark_packages
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import graphcache
from examples.benchmark_overhead import pixart_of_28_blocks
from examples.records import Cell, Column, add_json_option, report
from graphcache import presets
from graphcache.planning.bench import TimedGeneration, runner_overhead

STEPS = 12
PLAN = presets.taylorseer(STEPS, interval=3)

COLUMNS = (
    Column("model"),
    Column("compiling", "CPU s", 0),
    Column("packaging", "CPU s", 0),
    Column("package beyond weights", "MB", 1),
    Column("loading", "s", 2),
    Column("first picture", "s", 1),
    Column("full step, compiled", "µs", 0),
    Column("full step, packaged", "µs", 0),
    Column("a step outside its graph", "µs", 1),
)

FIRST = """
import sys, time
import torch
began = time.perf_counter()
import graphcache
model = graphcache.load(sys.argv[1], trust=True)
loaded = time.perf_counter() - began
from examples.benchmark_packages import MODELS, first_picture
seconds = first_picture(sys.argv[2], model)
print(loaded, seconds)
"""


def digits() -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """The digits' model, for four pictures with guidance."""
    from examples.digits.model import load_model

    labels = torch.tensor([1, 2, 3, 4, 10, 10, 10, 10])
    inputs = {
        "hidden_states": torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.full((8,), 500),
        "class_labels": labels,
        "return_dict": False,
    }
    return load_model(), inputs


MODELS: dict[str, Callable[[], tuple[torch.nn.Module, Mapping[str, Any]]]] = {
    "PixArt of 28 tiny blocks": pixart_of_28_blocks,
    "digits": digits,
}


def make(name: str, how: str, path: str) -> None:
    """Compile everything that a generation needs, or package it; in a process of its own."""
    torch.set_num_threads(1)
    model, inputs = MODELS[name]()
    if how == "package":
        graphcache.package(model, path, PLAN, [inputs])
    else:
        made: Any = graphcache.transform(model, PLAN, backend="inductor")
        made.warmup(inputs, progress=False)


def first_picture(name: str, model: Any) -> float:
    """Seconds of a first generation, by the same loop that times the others."""
    if name != "digits":
        return 0.0
    from examples.digits.model import ddim_scheduler
    from examples.digits.sample import sample

    began = time.perf_counter()
    sample(model, ddim_scheduler(), torch.tensor([1, 2, 3, 4]), steps=STEPS)
    return time.perf_counter() - began


def cpu_seconds(name: str, how: str, path: Path, cache: Path) -> float:
    """Of a new process with an empty cache, and all that it starts."""
    command = [sys.executable, "-m", "examples.benchmark_packages", "--make", name, how, str(path)]
    process = subprocess.Popen(command, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)})
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return used.ru_utime + used.ru_stime


def full_steps(model: torch.nn.Module, inputs: Mapping[str, Any], packaged: Any, rounds: int) -> list[float]:
    """Microseconds of the plain model under torch.compile, and of a packaged step that computes all."""
    plain = torch.compile(model, dynamic=False)
    generation = TimedGeneration(inputs, "timestep", STEPS)
    computed = [step for step in range(STEPS) if not step % 3]
    taken: dict[str, list[float]] = {"compiled": [], "packaged": []}
    for turn in range(rounds + 1):
        contenders: list[tuple[str, Any]] = [("compiled", plain), ("packaged", packaged)]
        random.Random(turn).shuffle(contenders)
        for name, contender in contenders:
            times = generation.run(contender)
            if turn:
                taken[name] += [times[step] for step in computed[1:]]
    return [1e6 * statistics.median(times) for times in taken.values()]


def measured(name: str, folder: Path, rounds: int) -> list[Cell]:
    caches = (folder / f"{number}" for number in itertools.count())
    path = folder / "package"
    makers = {how: cpu_seconds(name, how, path, next(caches)) for how in ("compile", "package")}
    command = [sys.executable, "-c", FIRST, str(path), name]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    loaded, first = map(float, said.split())
    model, inputs = MODELS[name]()
    weights = sum(weight.nbytes for weight in {*model.parameters(), *model.buffers()})
    with torch.no_grad():
        packaged = graphcache.load(path, trust=True)
        full = full_steps(model, inputs, packaged, rounds)
        outside = runner_overhead(packaged, TimedGeneration(inputs, "timestep", STEPS), rounds=21)
    beyond = (path.stat().st_size - weights) / 1e6
    return [name, *makers.values(), beyond, loaded, loaded + first if first else None, *full, outside]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.make:
        make(*arguments.make)
        return
    torch.set_num_threads(1)
    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(name, Path(folder), arguments.rounds))
            print(json.dumps(rows[-1]), flush=True)
    report("Packages beside compiling", COLUMNS, rows, arguments.json)


if __name__ == "__main__":
    main()
