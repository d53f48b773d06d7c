"""Plans and options as they are written on a command line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from graphcache.ir.errors import GraphCacheError
from graphcache.presets.written import assignment

ModelName = Annotated[
    str, typer.Argument(help="package.module:factory, or a local diffusers folder", metavar="MODEL")
]
Inputs = Annotated[
    str | None,
    typer.Option(help="package.module:function that takes the model and returns its keyword arguments"),
]
Plans = Annotated[list[str] | None, typer.Option("--plan", help="preset[:steps[:key=value,…]] or a file")]
PresetSteps = Annotated[int, typer.Option(help="steps of presets that name none")]
Device = Annotated[str | None, typer.Option(help="where a folder's weights go, such as cuda")]
Dtype = Annotated[str | None, typer.Option(help="of a folder's weights, such as bfloat16")]
Call = Annotated[str | None, typer.Option(help="a pipeline folder's call, as JSON", metavar="JSON")]
Timestep = Annotated[str | None, typer.Option(help="forward's timestep argument, if it is not found")]
Latents = Annotated[list[str] | None, typer.Option(help="its latents, or their paths, if they are not found")]
Backend = Annotated[str, typer.Option(help="a torch.compile backend, or none")]
Options = Annotated[list[str] | None, typer.Option("--set", help="an Inductor option: cpp_wrapper=1")]
Regions = Annotated[
    bool | None, typer.Option("--regions/--whole", help="compile what repeats once, or phases as wholes")
]
Json = Annotated[Path | None, typer.Option("--output", "--json", help="write the figures here as JSON")]
Threads = Annotated[int | None, typer.Option(help="torch threads")]


def backend_argument(text: str, options: list[str] | None = None) -> Any:
    """A torch.compile backend, with options for Inductor written as name=value; None where there is none."""
    chosen = None if text == "none" else text
    return {"backend": chosen, "options": dict(map(assignment, options))} if options else chosen


def regions_argument(wanted: bool | None) -> Literal["auto"] | bool:
    """Whether phases are compiled by regions, as `transform` takes it."""
    return "auto" if wanted is None else wanted


def sizes_argument(text: str) -> dict[str, int]:
    """name=number,… of a call's sizes."""
    sizes = dict(map(assignment, text.split(",")))
    for name, size in sizes.items():
        if type(size) is not int:
            raise GraphCacheError(f"--at {text}: {name} is no whole number; write height=128,width=128")
    return cast(dict[str, int], sizes)


def json_argument(text: str | None, option: str = "--call") -> Mapping[str, Any] | None:
    """A JSON object of a call's arguments."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise GraphCacheError(f"{option} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise GraphCacheError(f"{option} must be a JSON object of the pipeline's arguments")
    return value
