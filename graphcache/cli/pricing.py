"""The command line's `price`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from graphcache.cli.arguments import (
    Call,
    Device,
    Dtype,
    Inputs,
    Latents,
    ModelName,
    Plans,
    PresetSteps,
    Timestep,
    json_argument,
    sizes_argument,
)
from graphcache.cli.console import console
from graphcache.cli.sources import Placement, load_calls, load_model
from graphcache.cost.pricing import Price, cheapest
from graphcache.cost.pricing import price as price_plans
from graphcache.ir.plantext import write_bytes
from graphcache.ir.units import size, work
from graphcache.presets.written import plan_argument

At = Annotated[
    list[str] | None,
    typer.Option(
        help="sizes of the model's call, height=128,width=128, or all as a pipeline's arguments in JSON"
    ),
]


def price(
    model: ModelName,
    plan: Plans = None,
    at: At = None,
    steps: PresetSteps = 50,
    calls: Annotated[int, typer.Option(help="of the model in a step, 2 where guidance makes two")] = 1,
    inputs: Inputs = None,
    call: Call = None,
    timestep: Timestep = None,
    latents: Latents = None,
    device: Device = None,
    dtype: Dtype = None,
    output: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
) -> None:
    """Say what plans compute and cache at sizes that the model is not run at."""
    placement, given = Placement(device, dtype), json_argument(call)
    plans = {text: plan_argument(text, steps) for text in plan or ["compute", "fora", "taylorseer"]}
    if any(text.startswith("{") for text in at or []):
        arguments = [{**(given or {}), **(json_argument(text, "--at") or {})} for text in at or []]
        module, examples = load_calls(model, arguments, placement)
        places: list[tuple[Any, list[dict[str, int]]]] = [(example, [{}]) for example in examples]
    else:
        module, example = load_model(model, inputs, given, placement)
        places = [(example, list(map(sizes_argument, at)) if at else [{}])]
    found: list[Price] = []
    for example, sizes in places:
        found += price_plans(
            module, example, plans, at=sizes, calls=calls, timestep=timestep, latents=latents or ()
        )
    _print_prices(found)
    if output is not None:
        write_bytes(json.dumps([asdict(item) for item in found], indent=1).encode(), output)


def _print_prices(prices: Sequence[Price]) -> None:
    table = Table("", "latents", "plan", "steps", "work", "of uncached", "cached", "at most", box=None)
    for column in table.columns[3:]:
        column.justify = "right"
    best = cheapest(prices)
    for item in prices:
        table.add_row(
            "→" if item in best else "",
            item.latents,
            item.plan,
            str(item.steps),
            work(item.flops),
            f"{item.share:.1%}",
            size(item.held_bytes),
            size(item.peak_bytes),
        )
    console.print(table)
