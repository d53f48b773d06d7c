"""The command line's bench: plans against the plain model, as it is and as people compile it."""

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn

from graphcache.cli.arguments import (
    Backend,
    Call,
    Device,
    Dtype,
    Inputs,
    Json,
    Latents,
    ModelName,
    Options,
    Plans,
    PresetSteps,
    Regions,
    Threads,
    Timestep,
    backend_argument,
    json_argument,
    regions_argument,
)
from graphcache.cli.console import console
from graphcache.cli.sources import Placement, load_model, load_object
from graphcache.cli.warming import starts
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plantext import write_bytes
from graphcache.ir.units import size
from graphcache.planning.bench import BY_BLOCKS, EAGER, Timing, benchmark
from graphcache.planning.floors import Rates
from graphcache.planning.ranks import SharedBench
from graphcache.presets.written import plan_argument

_VERSIONS = ("graphcache-dit", "torch", "diffusers", "triton")


def bench(
    model: ModelName,
    plan: Plans = None,
    steps: PresetSteps = 20,
    rounds: Annotated[int, typer.Option(help="generations of each contender")] = 7,
    backend: Backend = "inductor",
    regions: Regions = None,
    option: Options = None,
    beside: Annotated[
        list[str] | None, typer.Option(help="package.module:function from model to callable, timed too")
    ] = None,
    floors: Annotated[
        bool, typer.Option("--floors", help="also the least time for each phase's FLOPs and bytes")
    ] = False,
    others: Annotated[
        bool, typer.Option("--plain", help="also the model uncompiled, and compiled block by block")
    ] = False,
    start: Annotated[
        bool, typer.Option("--start", help="also how long new processes take to be ready")
    ] = False,
    ranks: Annotated[
        int,
        typer.Option(help="time plans on so many processes beside one: those of torchrun, or its own"),
    ] = 1,
    inputs: Inputs = None,
    call: Call = None,
    timestep: Timestep = None,
    latents: Latents = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    output: Json = None,
) -> None:
    """Time plans against the plain compiled model, interleaved, as ratios of medians."""
    if threads:
        torch.set_num_threads(threads)
    placement = Placement(device, dtype)
    plans = {text: plan_argument(text, steps) for text in plan or ["compute", "fora", "taylorseer"]}
    load = partial(load_model, model, inputs, json_argument(call), placement)
    if ranks != 1:
        if floors or others or start or beside or regions is not None:
            raise GraphCacheError("--ranks compares plans on one rank and on several: leave out others")
        made = backend_argument(backend, option)
        _bench_ranks(SharedBench(load, plans, ranks, made, timestep, latents or (), rounds, threads), output)
        return
    module, kwargs = load()
    rates = Rates.of(*_place(module)) if floors else None
    with console.status("starting") as status:
        timings = benchmark(
            module,
            kwargs,
            plans,
            backend=backend_argument(backend, option),
            timestep=timestep,
            latents=latents or (),
            rounds=rounds,
            regions=regions_argument(regions),
            plain=(EAGER, BY_BLOCKS) if others else (),
            rates=rates,
            beside={name.rpartition(":")[2]: load_object(name)(load()[0]) for name in beside or []},
            progress=status.update,
        )
        status.update("starting new processes")
        options = {
            "backend": backend, "set": option, "inputs": inputs, "call": call, "timestep": timestep,
            "threads": threads, "device": device, "dtype": dtype, "regions": regions, "latents": latents,
        }  # fmt: skip
        begun = starts(plans, model, options) if start else []
    _print(timings, begun)
    if output is not None:
        contenders = [{**asdict(timing), "realised": timing.realised} for timing in timings]
        figures = {**_circumstances(module), "rates": rates and asdict(rates), "contenders": contenders}
        write_bytes(json.dumps({**figures, "starts": begun}, indent=1).encode(), output)


def _bench_ranks(shared: SharedBench, output: Path | None) -> None:
    found = shared.run()
    if found is None:
        return
    names = ["", "ms/step on 1", f"ms/step on {shared.ranks}", "speed-up", "caches on 1", "caches a rank"]
    table = Table(*names, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for t in found:
        figures = f"{t.alone_ms:.3f}", f"{t.ms:.3f}", f"{t.speedup:.2f}"
        table.add_row(t.name, *figures, size(t.alone_bytes), size(t.rank_bytes))
    console.print(table)
    if output is not None:
        contenders = [{**asdict(timing), "speedup": timing.speedup} for timing in found]
        circumstances = {**_circumstances(shared.load()[0]), "threads": shared.threads}
        write_bytes(json.dumps({**circumstances, "contenders": contenders}, indent=1).encode(), output)


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a model's weights are, and their dtype."""
    first = next((weight for weight in module.parameters() if weight.is_floating_point()), torch.empty(0))
    return first.device, first.dtype


def _circumstances(module: nn.Module) -> dict[str, Any]:
    device, dtype = _place(module)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    found = {dist.name: dist.version for dist in metadata.distributions() if dist.name in _VERSIONS}
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{device} {name}".strip(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **found},
    }


def _print(timings: Sequence[Timing], begun: Sequence[Mapping[str, Any]]) -> None:
    names = ["", "ms/step", "speed-up", "ideal", "realised", "graphs", "runner", "caches", "memory"]
    table = Table(*names, box=None)
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for t in timings:
        cells = [""] * 5
        if t.ideal is not None and t.realised is not None and t.runner_us is not None:
            cells = [f"{t.ideal:.2f}", f"{t.realised:.2f}", str(t.graphs), f"{t.runner_us:.0f} µs"]
            cells.append(size(t.peak_bytes or 0))
        held = "" if t.device_bytes is None else size(t.device_bytes)
        table.add_row(t.name, f"{t.ms:.3f}", f"{t.speedup:.2f}", *cells, held)
    console.print(table)
    for t in timings:
        if t.phases:
            console.print(f"{t.name}: {'; '.join(map(str, t.phases))}")
    for item in begun:
        cold, warm = item["cold"]["seconds"], item["warm"]["seconds"]
        console.print(f"{item['plan']}: ready in {cold:.1f} s in a new process, {warm:.1f} s in a second one")
