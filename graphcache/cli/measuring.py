"""The command line's part that measures: profile, search, tune, compare."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from rich.progress import Progress
from rich.table import Table

from graphcache.cli.arguments import (
    Backend,
    Call,
    Device,
    Dtype,
    Latents,
    Plans,
    Threads,
    Timestep,
    backend_argument,
    json_argument,
)
from graphcache.cli.console import console
from graphcache.cli.sharing import Mesh, Ray, spread
from graphcache.cli.sources import Placement, Sampled, load_object, load_sampled
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.ir.plantext import write_bytes
from graphcache.planning.agreement import done_by_first
from graphcache.planning.automatic import checker
from graphcache.planning.candidates import Candidate
from graphcache.planning.comparison import Contender
from graphcache.planning.comparison import compare as compare_runs
from graphcache.planning.gradient_memory import MEMORY
from graphcache.planning.pipeline_sampler import solved_by
from graphcache.planning.profile_file import load_profile
from graphcache.planning.profiling import Detail
from graphcache.planning.profiling import profile as profile_model
from graphcache.planning.rivals import rivals as known_rivals
from graphcache.planning.sampling import Sampler, Sampling
from graphcache.planning.search import Found
from graphcache.planning.search import search as search_plan
from graphcache.planning.tuning import tune as tune_plan
from graphcache.planning.tuning import with_corrections
from graphcache.planning.turns import handovers
from graphcache.presets.written import plan_argument

Subject = Annotated[
    str,
    typer.Argument(
        help="package.module:factory of (model, sampler, samples), or a local pipeline folder",
        metavar="MODEL",
    ),
]
Count = Annotated[int, typer.Option("--samples", help="a pipeline's samples: the call with seeds 0, 1, …")]
Steps = Annotated[int, typer.Option(help="model evaluations of one generation")]
Memory = Annotated[
    int, typer.Option(help="bytes beside the model; what does not fit is computed again, or estimated")
]
Output = Annotated[Path, typer.Option(help="write here")]


def profile(
    model: Subject,
    steps: Steps,
    output: Output = Path("profile.json"),
    conditional: Annotated[
        str | None, typer.Option(help="first or last: the conditional half of a doubled batch")
    ] = None,
    detail: Annotated[str, typer.Option(help="steps, sites or tokens: what is looked at")] = "tokens",
    probes: Annotated[int | None, typer.Option(help="random vectors carried back")] = None,
    window: Annotated[int, typer.Option(help="steps back to which effects are followed")] = 12,
    seed: Annotated[int, typer.Option(help="of the probes")] = 0,
    memory: Memory = MEMORY,
    backend: Backend = "inductor",
    call: Call = None,
    samples: Count = 2,
    timestep: Timestep = None,
    latents: Latents = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    ray: Ray = None,
    mesh: Mesh = None,
) -> None:
    """Measure a model's sensitivity; an interrupted run goes on where it was."""
    with spread(mesh, ray, device) as (ranks, run):
        found = _sampled(model, call, samples, threads, Placement(device, dtype))
        sampling = Sampling.of(
            found.model_or_pipe, found.sampler, timestep, latents or (), conditional, mesh=ranks
        )
        with Progress(console=console) as bar:
            task = bar.add_task("profiling", total=len(found.samples))
            made = profile_model(
                sampling,
                found.samples,
                steps=steps,
                detail=cast(Detail, detail),
                probes=probes,
                window=window,
                seed=seed,
                memory=memory,
                backend=backend_argument(backend),
                path=output,
                progress=lambda done, total: bar.update(task, completed=done),
                run=run,
            )
        told = f"{len(made.sites)} sites, {made.steps} steps, {len(found.samples)} samples"
        console.print(f"wrote {output}: {told}")


def search(
    profile: Annotated[Path, typer.Argument(help="of graphcache profile", metavar="PROFILE")],
    output: Output = Path("plan.txt"),
    steps: Annotated[int | None, typer.Option(help="of the plan, if not as many as were profiled")] = None,
    speedup: Annotated[float | None, typer.Option(help="at least so many times as fast")] = None,
    max_error: Annotated[float | None, typer.Option(help="at most this root mean square error")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="at most so many bytes cached")] = None,
    model: Annotated[
        str | None, typer.Option(help="run the best plans on its samples, as for profile", metavar="MODEL")
    ] = None,
    call: Call = None,
    samples: Count = 2,
    timestep: Timestep = None,
    latents: Latents = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    ray: Ray = None,
    mesh: Mesh = None,
) -> None:
    """Solve for the best plan that a profile promises, and with --model of those that hold it."""
    check, known = None, tuple[int, ...]()
    if model is None and (ray or mesh or device or dtype):
        raise GraphCacheError(
            "--ray, --mesh, --device and --dtype are for the runs of --model, which is missing; name one, or "
            "leave them out"
        )
    with spread(mesh, ray, device) as (ranks, run):
        made = done_by_first(ranks, lambda: load_profile(profile))
        if model is not None:
            given = _sampled(model, call, samples, threads, Placement(device, dtype))
            sampling = Sampling.of(given.model_or_pipe, given.sampler, timestep, latents or (), mesh=ranks)
            check = checker(sampling, given.samples, steps or made.steps)
            known = handovers(sampling, given.samples[0], steps or made.steps)
        found = search_plan(
            made,
            steps=steps,
            handovers=known,
            speedup=speedup,
            max_error=max_error,
            max_bytes=max_bytes,
            check=check,
            run=run,
        )
        _print_front(found)
        chosen = replace(found.plan, graph=made.provenance.graph)
        done_by_first(ranks, lambda: chosen.save(output))
        console.print(f"wrote {output}: {_describe(found.chosen)}")


def tune(
    model: Subject,
    plan: Annotated[str, typer.Argument(help="a plan file with listed coefficients", metavar="PLAN")],
    output: Output = Path("tuned.txt"),
    reference: Annotated[str, typer.Option(help="uncached or converged")] = "uncached",
    iterations: Annotated[int, typer.Option(help="at most")] = 80,
    held_out: Annotated[int, typer.Option(help="samples that judge the plan, the last ones")] = 1,
    corrections: Annotated[bool, typer.Option(help="correct computed steps too")] = True,
    memory: Memory = MEMORY,
    call: Call = None,
    samples: Count = 4,
    timestep: Timestep = None,
    latents: Latents = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    mesh: Mesh = None,
) -> None:
    """Train a plan's coefficients through the sampler."""
    if reference not in ("uncached", "converged"):
        raise GraphCacheError(f"--reference {reference}: must be uncached or converged")
    with spread(mesh, None, device) as (ranks, _):
        found = _sampled(model, call, samples, threads, Placement(device, dtype))
        if not 0 < held_out < len(found.samples):
            raise GraphCacheError(
                f"--held-out {held_out}: there are {len(found.samples)} samples, one must be left"
            )
        given = done_by_first(ranks, lambda: Plan.load(plan))
        sampling = Sampling.of(found.model_or_pipe, found.sampler, timestep, latents or (), mesh=ranks)
        if corrections and given.letter("c") is None:
            given = with_corrections(given, handovers=handovers(sampling, found.samples[0], given.steps))
        with Progress(console=console) as bar:
            task = bar.add_task("tuning", total=iterations)
            result = tune_plan(
                sampling,
                given,
                found.samples[:-held_out],
                found.samples[-held_out:],
                reference="converged" if reference == "converged" else "uncached",
                iterations=iterations,
                memory=memory,
                progress=lambda now: bar.update(task, completed=now.number + 1),
            )
        done_by_first(ranks, lambda: result.plan.save(output))
        reached = f"held out {result.before:.2f} dB before, {result.after:.2f} dB after"
        console.print(f"wrote {output}: {reached}")


def compare(
    model: Subject,
    steps: Steps,
    plan: Plans = None,
    fewer: Annotated[list[int] | None, typer.Option(help="the plain model with so many steps")] = None,
    solver: Annotated[
        list[str] | None, typer.Option(help="also fewer steps by this diffusers scheduler; pipelines only")
    ] = None,
    rivals: Annotated[bool, typer.Option(help="also other libraries' caches that are installed")] = False,
    backend: Backend = "inductor",
    features: Annotated[
        str | None, typer.Option(help="package.module:function from results to features (N, D)")
    ] = None,
    memory: Memory = MEMORY,
    output: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
    promise: Annotated[
        bool,
        typer.Option("--promise", help="write into the plans' files what they reached, as their promise"),
    ] = False,
    call: Call = None,
    samples: Count = 2,
    timestep: Timestep = None,
    latents: Latents = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    ray: Ray = None,
    mesh: Mesh = None,
) -> None:
    """Time plans and fewer steps against the plain compiled model, and measure how near they come to it."""
    with spread(mesh, ray, device) as (ranks, run):
        texts = plan or []
        plans = done_by_first(ranks, lambda: {text: plan_argument(text, steps) for text in texts})
        files = done_by_first(ranks, lambda: {text: Plan.load(text) for text in texts if promise})
        found = _sampled(model, call, samples, threads, Placement(device, dtype))
        sampling = Sampling.of(found.model_or_pipe, found.sampler, timestep, latents or (), mesh=ranks)
        with console.status("starting") as status:
            rows = compare_runs(
                sampling,
                plans,
                found.samples,
                steps=steps,
                fewer=fewer_steps(found, fewer or [], solver or []),
                rivals=known_rivals() if rivals else {},
                backend=backend_argument(backend),
                features=None if features is None else load_object(features),
                memory=memory,
                progress=status.update,
                run=run,
            )
        print_rows(rows)
        done_by_first(ranks, lambda: _written(rows, output, files))


def _written(rows: Sequence[Contender], output: Path | None, files: Mapping[str, Plan]) -> None:
    """Write the figures, and into these plans' files what they reached."""
    if output is not None:
        write_bytes(json.dumps([asdict(row) for row in rows], indent=1).encode(), output)
    for row in rows:
        if row.name in files and row.promise is not None:
            files[row.name].promising(row.promise).save(row.name)
            console.print(f"wrote {row.name}: it promises {row.promise}")


def fewer_steps(
    found: Sampled, counts: Sequence[int], solvers: Sequence[str]
) -> dict[str, tuple[Sampler | None, int]]:
    """Rows of fewer steps by the own solver and others."""
    if solvers and not counts:
        raise GraphCacheError("--solver: there is nothing to solve; give --fewer a number of steps")
    if solvers and found.sampler is not None:
        raise GraphCacheError("--solver: a bare module's sampler has its own solver; give a pipeline")
    rows: dict[str, tuple[Sampler | None, int]] = {f"{count} steps": (None, count) for count in counts}
    for name in solvers:
        sampler = solved_by(found.model_or_pipe, name)
        rows |= {f"{count} steps {name}": (sampler, count) for count in counts}
    return rows


def add_commands(app: typer.Typer) -> None:
    """Give an application these commands."""
    for command in (profile, search, tune, compare):
        app.command()(command)


def _sampled(model: str, call: str | None, count: int, threads: int | None, placement: Placement) -> Sampled:
    if threads:
        torch.set_num_threads(threads)
    return load_sampled(model, json_argument(call), count, placement)


def _describe(item: Candidate) -> str:
    computed = f"{item.family}, {len(item.computed)} of {item.plan.steps} steps computed"
    known = "estimated" if item.measured is None else "measured"
    return f"{computed}, {item.speedup:.2f}×, {known} error {item.known_error:.3g}, {item.bytes:,} bytes"


def _print_front(found: Found) -> None:
    table = Table("", "family", "computed", "speed-up", "error", "bytes", box=None)
    for item in found.front:
        mark = "→" if item.plan == found.chosen.plan else ""
        cells = f"{item.speedup:.2f}", f"{item.known_error:.3g}", f"{item.bytes:,}"
        table.add_row(mark, item.family, str(len(item.computed)), *cells)
    console.print(table)


def print_rows(rows: Sequence[Contender]) -> None:
    table = Table("", "steps", "ms", "speed-up", "ideal", "PSNR", "±", "SSIM", "Fréchet", box=None)
    forms = ("{}", "{:.1f}", "{:.2f}", "{:.2f}", "{:.2f}", "{:.2f}", "{:.4f}", "{:.3g}")
    for row in rows:
        values = (row.steps, row.ms, row.speedup, row.ideal, row.psnr, row.spread, row.ssim, row.frechet)
        cells = ["" if v is None else form.format(v) for form, v in zip(forms, values, strict=True)]
        table.add_row(row.name, *(cells if row.failure is None else ()))
    console.print(table)
    for row in rows:
        if row.failure is not None:
            console.print(f"{row.name} does not run here: {row.failure}", markup=False)
