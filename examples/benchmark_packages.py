"""Packages beside compiling: CPU-seconds to make, size, seconds to load, and what a step costs.

python -m examples.benchmark_packages --regions whole regions
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import graphcache
from examples.benchmark_overhead import pixart_of_28_blocks
from examples.records import Cell, Column, add_json_option, report
from graphcache import presets
from graphcache.packaging.archive import Archive
from graphcache.planning.bench import TimedGeneration, runner_overhead

STEPS = 12
PLAN = presets.taylorseer(STEPS, interval=3)

COLUMNS = (
    Column("model"),
    Column("code of"),
    Column("libraries", "", 0),
    Column("compiling", "CPU s", 0),
    Column("packaging", "CPU s", 0),
    Column("package beyond weights", "MB", 1),
    Column("loading", "s", 2),
    Column("first picture", "s", 1),
    Column("full step, compiled", "µs", 0),
    Column("full step, packaged", "µs", 0),
    Column("forecast step, packaged", "µs", 0),
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


def wider_pixart() -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """28 blocks of width 384, for 256 tokens."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, num_layers=28, in_channels=4, out_channels=4,
        cross_attention_dim=384, caption_channels=16, sample_size=32,
    )  # fmt: skip
    inputs = {**pixart_of_28_blocks()[1], "hidden_states": torch.randn(1, 4, 32, 32)}
    return model.eval(), inputs


MODELS: dict[str, Callable[[], tuple[torch.nn.Module, Mapping[str, Any]]]] = {
    "PixArt of 28 tiny blocks": pixart_of_28_blocks,
    "PixArt of 28 blocks of width 384": wider_pixart,
    "digits": digits,
}

HOW: dict[str, Any] = {"auto": "auto", "regions": True, "whole": False}
"""What `regions=` of `package` is."""


def make(name: str, how: str, path: str) -> None:
    """Compile everything that a generation needs, or package it; in a process of its own."""
    torch.set_num_threads(1)
    model, inputs = MODELS[name]()
    if how != "compile":
        graphcache.package(model, path, PLAN, [inputs], regions=HOW[how])
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


def steps(
    model: torch.nn.Module, inputs: Mapping[str, Any], packaged: Mapping[str, Any], rounds: int
) -> dict[str, tuple[float, float]]:
    """Microseconds of steps that compute all and of the others: of the plain model under torch.compile, for
    which all are alike, and of packages.
    """
    contenders = [("compile", torch.compile(model, dynamic=False)), *packaged.items()]
    generation = TimedGeneration(inputs, "timestep", STEPS)
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name, _ in contenders}
    for turn in range(rounds + 1):
        random.Random(turn).shuffle(contenders)
        for name, contender in contenders:
            times = generation.run(contender)
            for step, seconds in enumerate(times[1:] if turn else (), 1):
                taken[name][step % 3 > 0].append(1e6 * seconds)
    return {name: (statistics.median(full), statistics.median(rest)) for name, (full, rest) in taken.items()}


def measured(name: str, ways: Sequence[str], folder: Path, rounds: int) -> Iterator[list[Cell]]:
    caches = (folder / f"{number}" for number in itertools.count())
    paths = {how: folder / f"{how}.graphcache" for how in ways}
    compiling = cpu_seconds(name, "compile", folder / "none", next(caches))
    packaging = {how: cpu_seconds(name, how, path, next(caches)) for how, path in paths.items()}
    model, inputs = MODELS[name]()
    weights = sum(weight.nbytes for weight in {*model.parameters(), *model.buffers()})
    with torch.no_grad():
        packaged = {how: graphcache.load(path, trust=True) for how, path in paths.items()}
        taken = steps(model, inputs, packaged, rounds)
        for how, path in paths.items():
            command = [sys.executable, "-c", FIRST, str(path), name]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            loaded, first = map(float, said.split())
            outside = runner_overhead(packaged[how], TimedGeneration(inputs, "timestep", STEPS), rounds=21)
            yield [
                name, how, len(Archive(path).manifest.codes), compiling, packaging[how],
                (path.stat().st_size - weights) / 1e6, loaded, loaded + first if first else None,
                taken["compile"][0], *taken[how], outside,
            ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=[*MODELS])
    parser.add_argument("--regions", nargs="+", default=["auto"], choices=[*HOW])
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
            for row in measured(name, arguments.regions, Path(folder), arguments.rounds):
                print(json.dumps(row), flush=True)
                rows.append(row)
    report("Packages beside compiling", COLUMNS, rows, arguments.json)


if __name__ == "__main__":
    main()
