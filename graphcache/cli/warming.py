"""The command line's warmup: what a plan needs, made before the first request."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from graphcache.cli.arguments import (
    Backend,
    Device,
    Dtype,
    Inputs,
    Json,
    Latents,
    ModelName,
    Options,
    Regions,
    Threads,
    Timestep,
    backend_argument,
    json_argument,
    regions_argument,
)
from graphcache.cli.console import console
from graphcache.cli.sources import Placement, is_pipeline, load_denoisers, load_model
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.ir.plantext import write_bytes
from graphcache.presets.written import plan_argument
from graphcache.runtime.transform import transform


def warmup(
    model: ModelName,
    plan: Annotated[str, typer.Option(help="preset[:steps[:key=value,…]] or a file")],
    call: Annotated[
        list[str] | None,
        typer.Option(help="a pipeline folder's call, for each size that is to come", metavar="JSON"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="evaluations of a generation, if not the plan's")] = None,
    backend: Backend = "inductor",
    option: Options = None,
    regions: Regions = None,
    inputs: Inputs = None,
    timestep: Timestep = None,
    latents: Latents = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    captures: Annotated[Path | None, typer.Option(help="a folder to keep captures in, too")] = None,
    output: Json = None,
) -> None:
    """Capture and compile what a plan needs: later processes find the code in PyTorch's cache on disk."""
    if threads:
        torch.set_num_threads(threads)
    placement, wanted = Placement(device, dtype), [json_argument(text) or {} for text in call or []]
    given = plan_argument(plan, steps)
    if len(wanted) > 1 or (is_pipeline(model) and inputs is None):
        found = load_denoisers(model, wanted or [{}], steps or given.steps, placement)
    else:
        module, only = load_model(model, inputs, wanted[0] if wanted else None, placement)
        found = [(module, [only])]
    began, worked = time.perf_counter(), time.process_time()
    for module, calls in found:
        made: Any = transform(
            module,
            given,
            backend=backend_argument(backend, option),
            timestep=timestep,
            latents=latents or (),
            regions=regions_argument(regions),
            captures=captures,
        )
        made.warmup(*calls, steps=steps)
    figures = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
    sizes = f"{len(found[0][1])} sizes of calls" + (f" of {len(found)} models" if len(found) > 1 else "")
    console.print(f"ready after {figures['seconds']:.1f} s, for {sizes}")
    if output is not None:
        write_bytes(json.dumps(figures, indent=1).encode(), output)


def starts(plans: Mapping[str, Plan], model: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How long new processes take to be ready for each plan: with PyTorch's cache empty, and then with it.

    Args:
        plans: by name.
        model: as it is written on the command line.
        options: of `warmup`; None are left out.

    Raises:
        GraphCacheError: a process fails.
    """
    regions = {True: ["--regions"], False: ["--whole"], None: []}[options["regions"]]
    arguments = [model, *regions]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        given = [str(item) for item in values if item is not None and name != "regions"]
        arguments += [part for item in given for part in (f"--{name}", item)]
    found = []
    for name, plan in plans.items():
        with tempfile.TemporaryDirectory() as folder:
            plan.save(Path(folder) / "plan.json")
            cold, warm = (_in_new_process(arguments, Path(folder)) for _ in range(2))
        found.append({"plan": name, "cold": cold, "warm": warm})
    return found


def _in_new_process(arguments: Sequence[str], folder: Path) -> dict[str, float]:
    figures = folder / "figures.json"
    files = "--plan", str(folder / "plan.json"), "--json", str(figures)
    command = [sys.executable, "-m", "graphcache", "warmup", *arguments, *files]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise GraphCacheError(f"a new process failed to get ready: {done.stdout.strip()[-400:]}")
    seconds: dict[str, float] = json.loads(figures.read_text())
    return seconds
