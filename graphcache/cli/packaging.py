"""The command line's package: a model's phases as native code, its weights and its plan, as one file."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from graphcache.cli.arguments import (
    Device,
    Dtype,
    Inputs,
    Latents,
    ModelName,
    Regions,
    Threads,
    Timestep,
    json_argument,
    regions_argument,
)
from graphcache.cli.console import console
from graphcache.cli.sources import Placement, is_pipeline, load_model, load_pipeline
from graphcache.ir.errors import GraphCacheError
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
    part: Annotated[
        str | None, typer.Option(help="of a pipeline's folder with several denoisers, the one to package")
    ] = None,
    inputs: Inputs = None,
    timestep: Timestep = None,
    latents: Latents = None,
    regions: Regions = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compile what a plan needs ahead of time, into one file that graphcache.load runs."""
    if threads:
        torch.set_num_threads(threads)
    counts = steps or []
    wanted = [json_argument(text) or {} for text in call or []]
    placement, calls = Placement(device, dtype), wanted or [{}]
    chosen = plan_argument(plan, counts[0] if counts else None)
    subject: Any
    if is_pipeline(model) and inputs is None:
        subject = load_pipeline(model, placement)
    elif len(wanted) > 1:
        raise GraphCacheError(f"--call of several sizes is for a pipeline's folder, which {model} is not")
    else:
        subject, only = load_model(model, inputs, calls[0], placement)
        calls = [only]
    write_package(
        subject,
        output,
        chosen,
        calls,
        part=part,
        timestep=timestep,
        latents=latents or (),
        steps=counts,
        regions=regions_argument(regions),
    )
    console.print(f"wrote {output}: {size(output.stat().st_size)}, for {len(calls)} sizes of calls")
