"""The command line's auto: from a model and some prompts to a plan, with the report that judges it."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, TypeVar, cast

import torch
import typer
from rich.progress import Progress, TaskID
from rich.table import Table

from graphcache import presets
from graphcache.cli.arguments import (
    Backend,
    Call,
    Device,
    Dtype,
    Latents,
    Threads,
    Timestep,
    backend_argument,
    json_argument,
)
from graphcache.cli.console import console
from graphcache.cli.measuring import Memory, Steps, Subject, fewer_steps, print_rows
from graphcache.cli.sharing import Mesh, Ray, spread
from graphcache.cli.sources import Placement, Sampled, load_sampled
from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.ir.plantext import read_bytes, read_rows, write_bytes
from graphcache.ir.units import size
from graphcache.page import write_page
from graphcache.planning.agreement import done_by_first
from graphcache.planning.automatic import Parts, Trial, best
from graphcache.planning.candidates import candidates
from graphcache.planning.comparison import Contender, compare, load_rows
from graphcache.planning.gradient_memory import MEMORY
from graphcache.planning.outlook import Part
from graphcache.planning.profile import Profile
from graphcache.planning.profile_file import load_profile
from graphcache.planning.profiling import Detail, versions
from graphcache.planning.rivals import Rival
from graphcache.planning.rivals import rivals as known_rivals
from graphcache.planning.sampling import Sampler, Sampling

Made = TypeVar("Made")
FILES = {
    "profile": "profile.json",
    "search": "families.json",
    "tune": "tuned.txt",
    "compare": "comparison.json",
}
"""What each part leaves behind."""


@dataclass(frozen=True)
class _Bars:
    """A progress bar for every part."""

    bar: Progress
    tasks: Mapping[str, TaskID]

    def told(self, part: str, done: int, total: int) -> None:
        self.bar.start_task(self.tasks[part])
        self.bar.update(self.tasks[part], completed=done, total=total or None)

    def finished(self, part: str) -> None:
        self.told(part, 1, 1)


def auto(
    model: Subject,
    steps: Steps,
    output: Annotated[Path, typer.Option(help="a folder for what is found")] = Path("out"),
    speedup: Annotated[float, typer.Option(help="at least so many times as fast")] = 2.0,
    prompts: Annotated[Path | None, typer.Option(help="a text file, a prompt on every line")] = None,
    samples: Annotated[int, typer.Option(help="of a folder's pipeline without --prompts: seeds")] = 4,
    conditional: Annotated[
        str | None, typer.Option(help="first or last: the conditional half of a doubled batch")
    ] = None,
    detail: Annotated[str, typer.Option(help="steps, sites or tokens: what is profiled")] = "steps",
    iterations: Annotated[int, typer.Option(help="of tuning, at most; 0 for none")] = 30,
    solver: Annotated[
        list[str] | None, typer.Option(help="also fewer steps by this diffusers scheduler; pipelines only")
    ] = None,
    rivals: Annotated[bool, typer.Option(help="also other libraries' caches that are installed")] = True,
    memory: Memory = MEMORY,
    backend: Backend = "inductor",
    call: Call = None,
    timestep: Timestep = None,
    latents: Latents = None,
    threads: Threads = None,
    device: Device = None,
    dtype: Dtype = None,
    ray: Ray = None,
    mesh: Mesh = None,
) -> None:
    """Profile, search, tune and compare: the best plan for a model. Called again it goes on where it was."""
    if threads:
        torch.set_num_threads(threads)
    given = json_argument(call) or {}
    texts = None if prompts is None else _prompts(prompts)
    settings = {
        "model": model, "steps": steps, "speedup": speedup, "prompts": texts, "samples": samples,
        "conditional": conditional, "detail": detail, "iterations": iterations, "solver": solver,
        "backend": backend, "call": dict(given), "timestep": timestep, "latents": latents, "dtype": dtype,
        "rivals": rivals, "memory": memory, "versions": versions(),
        **({} if mesh is None else {"mesh": mesh}),
    }  # fmt: skip
    with spread(mesh, ray, device) as (ranks, run), _progress() as bar:
        done_by_first(ranks, lambda: _claim(output, settings))
        found = load_sampled(model, given, samples, Placement(device, dtype))
        if texts is not None:
            found = replace(found, samples=_of_prompts(found, texts, given))
        sampling = Sampling.of(
            found.model_or_pipe, found.sampler, timestep, latents or (), conditional, mesh=ranks
        )
        fewer = fewer_steps(found, [max(1, round(steps / speedup))], solver or [])
        bars = _Bars(bar, {name: bar.add_task(name, total=None, start=False) for name in FILES})
        parts = Parts(
            sampling, found.samples, steps, speedup, iterations=iterations, detail=cast(Detail, detail),
            memory=memory, backend=backend_argument(backend), progress=bars.told, run=run,
        )  # fmt: skip
        if rivals and ranks is not None:
            console.print("--mesh: other libraries' caches run on one device, and are left out")
            rivals = False
        _Run(output, parts, fewer, known_rivals() if rivals else {}, bars).everything()


def _progress() -> Progress:
    return Progress(*Progress.get_default_columns(), console=console)


def _prompts(path: Path) -> list[str]:
    lines = read_bytes(path, what="list of prompts").decode(errors="replace").splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise GraphCacheError(f"{path} has no prompt: write one on every line")
    return found


def _of_prompts(found: Sampled, prompts: Sequence[str], call: Mapping[str, Any]) -> list[dict[str, Any]]:
    if found.sampler is not None:
        raise GraphCacheError("--prompts are for pipelines; this factory returns samples of its own")
    return [{**call, "prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder this run's, or refuse one that has results of another."""
    place, text = folder / "settings.json", json.dumps(settings, indent=1, sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    has_results = any(path != place for path in folder.iterdir())
    if has_results and place.exists() and read_bytes(place).decode() != text:
        raise GraphCacheError(
            f"{folder} holds results for other settings or versions ({place}); name another folder with "
            "--output, or remove it"
        )
    write_bytes(text.encode(), place)


def nearer_at_fewer_steps(rows: Sequence[Contender]) -> list[Contender]:
    """Rows of fewer steps that are no slower than the found plan and no further from the plain results."""
    (found,) = (row for row in rows if row.name == "found")
    return [
        row
        for row in rows
        if row.kind == "fewer steps"
        and row.speedup >= found.speedup
        and (row.psnr or -math.inf) >= (found.psnr or -math.inf)
    ]


@dataclass(frozen=True)
class _Family:
    """The best plan, as text, of a family that may be the best one, and decibels after a few iterations."""

    family: str
    plan: str
    decibels: tuple[float, ...] = ()


def _load_families(path: Path) -> tuple[_Family, ...]:
    found = read_rows(path, _Family, "list of families")
    if not found:
        raise GraphCacheError(f"{path} names no family: remove it, and it is made again")
    return found


def _save_families(found: Sequence[_Family], path: Path) -> None:
    write_bytes(json.dumps([asdict(item) for item in found], indent=1).encode(), path)


@dataclass(frozen=True)
class _Run:
    """One run of the command; every part leaves a file, by which a later run goes on."""

    folder: Path
    parts: Parts
    fewer: Mapping[str, tuple[Sampler | None, int]]
    rivals: Mapping[str, Rival]
    bars: _Bars

    def _first(self, work: Callable[[], Made]) -> Made:
        """What the first rank of a mesh does for all: it reads and writes the files."""
        return done_by_first(self.parts.sampling.mesh, work)

    def everything(self) -> None:
        """All parts, one after the other."""
        self._announce()
        measured = self._part("profile", load_profile, self.parts.profiled)
        near = self._part("search", _load_families, lambda path: self._searched(path, measured))
        tuned = self._part("tune", Plan.load, lambda path: self._tuned(path, near, measured))
        rows = self._part("compare", load_rows, lambda path: self._compared(path, tuned))
        print_rows(rows)
        for row in nearer_at_fewer_steps(rows):
            console.print(
                f"{row.name} of the plain model are as fast as the plan and come nearer to its result: at "
                f"{self.parts.steps} steps nothing is gained by caching"
            )
        page = self.folder / "report.html"
        plans = {"tuned": tuned, "searched": Plan.parse(near[0].plan)}
        given: dict[str, Any] = {"rows": rows, "candidates": candidates(measured), "title": self.folder.name}
        self._first(lambda: write_page(page, measured, plans, **given))
        console.print(f"wrote {page}. The plan promises {tuned.promise}; it is used like this:")
        console.print("    import graphcache")
        console.print(f'    plan = graphcache.Plan.load("{self.folder / "tuned.txt"}")')
        shared = ", mesh=mesh" if self.parts.sampling.ranks else ""
        console.print(f"    pipe = graphcache.transform(pipe, plan, backend={self.parts.backend!r}{shared})")

    def _part(self, name: str, load: Callable[[Path], Made], make: Callable[[Path], Made]) -> Made:
        path = self.folder / FILES[name]
        if self._first(path.exists):
            console.print(f"{path} is there")
            made = self._first(lambda: load(path))
        else:
            began = time.perf_counter()
            made = make(path)
            console.print(f"wrote {path} after {time.perf_counter() - began:.0f} s")
        self.bars.finished(name)
        return made

    def _announce(self) -> None:
        """Say how long what is left will take, by the time of one generation, and how much memory."""
        parts = self.parts
        there = self._first(lambda: [part for part, name in FILES.items() if (self.folder / name).exists()])
        if len(there) == len(FILES):
            return
        foreseen = [part for part in parts.outlook(len(self.rivals)) if part.name not in there]
        began = time.perf_counter()
        parts.sampling.generate(parts.sampling.plain(parts.steps), parts.samples[0], parts.steps)
        seconds = time.perf_counter() - began
        total = sum(part.generations for part in foreseen)
        console.print(
            f"One generation takes {seconds:.1f} s without compilation. Ahead is the work of about "
            f"{total:.0f}, {total * seconds / 60:.0f} minutes on one worker, and what compilation takes:"
        )
        print_outlook(foreseen, seconds)

    def _counted(self, function: Callable[[Any], Any], samples: Sequence[Any]) -> Iterator[Any]:
        """The run's map, which tells of every sample that all contenders have done."""
        self.parts.progress("compare", 0, len(samples))
        for done, result in enumerate(self.parts.run(function, samples), 1):
            yield result
            self.parts.progress("compare", done, len(samples))

    def _searched(self, path: Path, measured: Profile) -> tuple[_Family, ...]:
        near = self.parts.near(self.parts.searched(measured))
        found = tuple(_Family(item.family, str(item.plan)) for item in near)
        self._first(lambda: _save_families(found, path))
        return found

    def _tuned(self, path: Path, near: Sequence[_Family], measured: Profile) -> Plan:
        """The best plan of the near families after a few iterations each, or the only one, tuned in full."""
        plan = Plan.parse(near[0].plan)
        if len(near) > 1:
            trials = [
                self._tried(self.folder / f"family-{place}.json", item, measured)
                for place, item in enumerate(near, 1)
            ]
            told = (f"{trial.family} {fmean(trial.decibels):.2f} dB" for trial in trials)
            console.print(f"tuned shortly: {', '.join(told)}")
            plan = best(trials).plan
        self._first(lambda: plan.save(self.folder / "plan.txt"))
        result = self.parts.tuned(plan, measured.handovers)
        found = self.parts.promised(plan if result is None else result.plan)
        self._first(lambda: found.save(path))
        return found

    def _tried(self, path: Path, item: _Family, measured: Profile) -> Trial:
        """A family's trial, taken up where it is there."""
        if not self._first(path.exists):
            trial = self.parts.tried(item.family, Plan.parse(item.plan), measured.handovers)
            made = _Family(trial.family, str(trial.plan), trial.decibels)
            self._first(lambda: _save_families([made], path))
        (found,) = self._first(lambda: _load_families(path))
        return Trial(found.family, Plan.parse(found.plan), found.decibels)

    def _compared(self, path: Path, plan: Plan) -> tuple[Contender, ...]:
        parts, every = self.parts, max(2, round(self.parts.speedup))
        plans = {
            "found": plan,
            "fora": presets.fora(parts.steps, interval=every),
            "taylorseer": presets.taylorseer(parts.steps, interval=every),
        }
        rows = compare(
            parts.sampling,
            plans,
            parts.judges,
            steps=parts.steps,
            fewer=self.fewer,
            rivals=self.rivals,
            optional=("fora", "taylorseer"),
            backend=parts.backend,
            memory=parts.memory,
            run=self._counted,
        )
        text = json.dumps([asdict(row) for row in rows], indent=1)
        self._first(lambda: write_bytes(text.encode(), path))
        return rows


def print_outlook(parts: Sequence[Part], seconds: float) -> None:
    table = Table("", "uncached generations", "minutes", "memory, at least", "at most", box=None)
    for part in parts:
        minutes = f"{part.generations * seconds / 60:.1f}"
        table.add_row(part.name, f"{part.generations:.0f}", minutes, size(part.least), size(part.most))
    console.print(table)
