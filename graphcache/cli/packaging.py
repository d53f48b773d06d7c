"""The command line's package: a model's phases as native code, its weights and its plan, as one file."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from graphcache.cli.arguments import (
    Device,
    Dtype,
    Inputs,
    Latents,
    ModelName,
    Threads,
    Timestep,
    json_argument,
)
from graphcache.cli.console import console
from graphcache.cli.sources import Placement, load_model_for
from graphcache.ir.units import size
from graphcache.packaging.writing import package as write_package
from graphcache.presets.written import plan_argument


def package(
    model: ModelName,
    plan: Annotated[str, typer.Option(help="preset[:steps[:key=value,…]] or a file")],
    output: Annotated[Path, typer.Option(help="the package")],
    call: Annotated[
        list[str] | None,
        typer.Option(help="a pipeline folder's call, for each size to package", metavar="JSON"),
    ] = None,
    steps: Annotated[
        list[int] | None, typer.Option(help="evaluations of a generation; the first is for a preset")
    ] = None,
    inputs: Inputs = None,
    timestep: Timestep = None,
    latents: Latents = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compile what a plan needs ahead of time, into one file that graphcache.load runs."""
    if threads:
        torch.set_num_threads(threads)
    counts = steps or []
    wanted = [json_argument(text) or {} for text in call or []]
    module, calls = load_model_for(model, inputs, wanted, Placement(device, dtype))
    chosen = plan_argument(plan, counts[0] if counts else None)
    write_package(module, output, chosen, calls, timestep=timestep, latents=latents or (), steps=counts)
    console.print(f"wrote {output}: {size(output.stat().st_size)}, for {len(calls)} sizes of calls")
