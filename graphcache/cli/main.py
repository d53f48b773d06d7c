"""The command line: inspect, plan, show, report; what measures, prices or prepares stands beside it."""

import inspect as signatures
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from graphcache import importers, presets
from graphcache.cli.arguments import (
    Call,
    Device,
    Dtype,
    Inputs,
    Latents,
    ModelName,
    Timestep,
    json_argument,
)
from graphcache.cli.automatic import auto
from graphcache.cli.benching import bench
from graphcache.cli.console import console
from graphcache.cli.measuring import add_commands
from graphcache.cli.packaging import package
from graphcache.cli.pricing import price
from graphcache.cli.sources import Placement, load_model
from graphcache.cli.warming import warmup
from graphcache.cost.pricing import load_prices
from graphcache.ir.errors import GraphCacheError, PlanError
from graphcache.ir.plan import Plan, Value
from graphcache.ir.plantext import parse_value
from graphcache.page import save_charts, write_page
from graphcache.planning.candidates import candidates
from graphcache.planning.comparison import load_rows
from graphcache.planning.profile_file import load_profile
from graphcache.presets.written import assignment, plan_argument, preset_argument
from graphcache.runtime.inspection import inspect as inspect_model

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_COLOURS = {"#": "bold white on blue", ".": "bright_black"}
_LETTER_COLOURS = ("green", "magenta", "yellow", "cyan", "red")


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"graphcache {metadata.version('graphcache-dit')}, PyTorch {torch.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="say it and leave")
    ] = False,
) -> None:
    """A compiler for feature caching in diffusion transformers."""


@app.command()
def inspect(
    model: ModelName,
    inputs: Inputs = None,
    call: Call = None,
    timestep: Timestep = None,
    latents: Latents = None,
    sizes: Annotated[
        bool, typer.Option("--sizes", help="also which sizes of the call may change without another trace")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """List a model's sites: role, shape of a cached value, share of the FLOPs."""
    module, kwargs = load_model(model, inputs, json_argument(call), Placement(device, dtype))
    found = inspect_model(module, kwargs, timestep=timestep, latents=latents or (), sizes=sizes)
    table = Table("site", "role", "cached value", "bytes", "MFLOPs", "share")
    for column in table.columns[3:]:
        column.justify = "right"
    for site in found.sites:
        cost = f"{site.flops / 1e6:.2f}", f"{site.share:.1%}"
        table.add_row(site.name, site.role, site.shape, f"{site.bytes:,}", *cost)
    console.print(table)
    for line in (found.totals, *found.opaque, *found.sizes.lines):
        console.print(line, soft_wrap=True)


@app.command()
def plan(
    source: Annotated[
        str, typer.Argument(help=f"one of {', '.join(presets.names())}; with --from a file or its numbers")
    ],
    steps: Annotated[
        int | None, typer.Option(help="model evaluations of one generation, of a preset 50 by default")
    ] = None,
    option: Annotated[list[str] | None, typer.Option("--set", help="an argument: interval=3")] = None,
    origin: Annotated[
        str | None, typer.Option("--from", help="smoothcache FILE, steps-mask 1,0,0,1 or magcache 1,1.02,…")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="write here: .json as JSON, else text")] = None,
) -> None:
    """Write out a preset, or another tool's schedule, as a plan."""
    if origin is None:
        made = preset_argument(source, 50 if steps is None else steps, option or [])
    else:
        made = _imported(origin, source, steps, option or [])
    if output is not None:
        made.save(output)
        console.print(f"wrote {output}")
    else:
        typer.echo(str(made), nl=not str(made).endswith("\n"))


@app.command()
def show(plan: Annotated[str, typer.Argument(help="a plan file, or preset:steps[:key=value,…]")]) -> None:
    """Show a plan's grid in colour."""
    found = plan_argument(plan, None)
    console.print(f"{found.steps} steps" + (f", preset {found.preset.name}" if found.preset else ""))
    if found.promise is not None:
        console.print(f"promises {found.promise}")
    width = max((len(str(row.selector)) for row in found.rows), default=0)
    colours = {letter.symbol: c for letter, c in zip(found.letters, _LETTER_COLOURS * 9, strict=False)}
    for row in found.rows:
        line = Text(f"{row.selector!s:{width}}  ")
        for symbol in row.actions:
            line.append(symbol, _COLOURS.get(symbol) or colours.get(symbol, ""))
        console.print(line, soft_wrap=True)
    console.print("# compute   . reuse", style="dim")
    for letter in found.letters:
        options = " ".join(f"{key}={value}" for key, value in letter.options)
        console.print(f"{letter.symbol} {letter.kind} {options}", style=colours[letter.symbol])


@app.command()
def report(
    profile: Annotated[Path, typer.Argument(help="what graphcache.profile wrote")],
    plan: Annotated[list[str] | None, typer.Option(help="a file, or preset[:steps[:key=value,…]]")] = None,
    rows: Annotated[Path | None, typer.Option(help="what graphcache compare --output wrote")] = None,
    prices: Annotated[Path | None, typer.Option(help="what graphcache price --output wrote")] = None,
    output: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
    charts: Annotated[Path | None, typer.Option(help="a folder for the charts as PNG")] = None,
) -> None:
    """Draw a profile and plans of as many steps as one HTML page."""
    measured = load_profile(profile)
    plans = {text: plan_argument(text, measured.steps) for text in plan or []}
    found = candidates(measured)
    measured_rows = load_rows(rows) if rows else ()
    priced = load_prices(prices) if prices else ()
    write_page(
        output, measured, plans, rows=measured_rows, prices=priced, candidates=found, title=profile.name
    )
    written = save_charts(charts, measured, plans, rows=measured_rows, candidates=found) if charts else ()
    for path in (output, *written):
        console.print(f"wrote {path}")


def _imported(origin: str, source: str, steps: int | None, options: list[str]) -> Plan:
    """The schedule of another tool; of `smoothcache`, every option but `blocks` names a component's site."""
    arguments = dict(map(assignment, options))
    if origin == "smoothcache":
        blocks: Any = arguments.pop("blocks", None)
        rows = {name: str(value) for name, value in arguments.items()}
        made = importers.smoothcache(source, rows, blocks)
    elif origin == "steps-mask":
        made = _called(importers.steps_mask, source, arguments)
    elif origin == "magcache":
        return _called(importers.magcache, source, {"steps": steps, **arguments})
    else:
        raise PlanError(f"--from {origin}: known are smoothcache, steps-mask and magcache")
    return made if steps is None else made.resample(steps)


def _called(importer: Callable[..., Plan], source: str, arguments: Mapping[str, Value | None]) -> Plan:
    accepted = list(signatures.signature(importer).parameters)[1:]
    for name in arguments:
        if name not in accepted:
            raise PlanError(f"{importer.__name__} takes {', '.join(accepted)}, not {name!r}")
    given = {name: _numbers(value) if isinstance(value, str) else value for name, value in arguments.items()}
    return importer(_numbers(source), **given)


def _numbers(text: str) -> list[Value]:
    values = [parse_value(word) for word in text.split(",")]
    if any(isinstance(value, (bool, str)) for value in values):
        raise PlanError(f"'{text}' is no list of numbers such as 1,0,0,1")
    return values


add_commands(app)
for command in (auto, price, bench, warmup, package):
    app.command()(command)


def main() -> None:
    """Entry point: errors of graphcache's own are one line, without a traceback."""
    try:
        app()
    except GraphCacheError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True)
        raise SystemExit(2) from None
