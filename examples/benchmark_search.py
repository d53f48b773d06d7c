"""Searched and tuned plans against presets and fewer steps, on the trained models: quality at equal time.

python -m examples.benchmark_search digits profile plans quality time converged judged table
python -m examples.benchmark_search digits profile predicted ablations

Stages write what they find into `--workdir`, and the plans beside the example; each takes up what is there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

import graphcache
from examples.records import Cell, Column, add_json_option, report
from examples.samplers import EXAMPLES, Example
from examples.sweep import at_equal_time, mean_and_spread, swept
from graphcache import Plan, PlanError
from graphcache.planning import prediction
from graphcache.planning.automatic import checker
from graphcache.planning.bench import TimedGeneration
from graphcache.planning.calibration import step_seconds
from graphcache.planning.candidates import Candidate
from graphcache.planning.convergence import converged
from graphcache.planning.profile import families
from graphcache.planning.sampling import Sampling
from graphcache.planning.search import search
from graphcache.planning.site_sensitivity import sensitivity
from graphcache.planning.timeline import meet
from graphcache.planning.tuning import tune, with_corrections
from graphcache.runtime.closeness import psnr

SPEEDUPS = (1.5, 2.0, 3.0, 4.0)
TRAINED, HELD, TEST, JUDGED = 1_000, 2_000, 3_000, 4_000
"""First seeds of what is profiled and tuned on, of what judges tuning, of what the tables show, and of what
is judged on its own."""
TABLES = {"judged", "predicted", "converged", "table"}
"""Stages that end in a table."""
NO_LOSS = 0.4
"""Share of the evaluations that a plan tuned against the converged solution may use."""
console = Console()


class Bench:
    """One example and the folder of its figures."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.example: Example = EXAMPLES[name]()
        self.name = name
        self.arguments = arguments
        self.folder: Path = arguments.workdir / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sampling = Sampling.of(self.example.model, self.example.sampler())

    def items(self, first: int, count: int) -> list[Any]:
        return self.example.items(count, self.arguments.size, first)

    def generate(self, model: Any, item: Any, solver: str | None = None, steps: int | None = None) -> Tensor:
        with torch.no_grad():
            return self.example.sampler(solver)(model, item, steps or self.example.steps)

    def plan_path(self, speedup: float | str) -> Path:
        return self.example.plans / f"{speedup}.txt"

    # stages

    def profile(self) -> None:
        """Profile, with times of compiled steps."""
        graphcache.profile(
            self.example.model,
            self.items(TRAINED, self.arguments.samples),
            steps=self.example.steps,
            sampler=self.example.sampler(),
            conditional=self.example.conditional,
            backend="inductor",
            path=self.folder / "profile.json",
            progress=lambda done, total: console.print(f"profiled {done} of {total}"),
        )

    def plans(self) -> None:
        """Search and tune a plan for every speed-up, and one against the converged solution."""
        profile = graphcache.load_profile(self.folder / "profile.json")
        check = checker(self.sampling, self.items(TRAINED, 1), self.example.steps)
        self.example.plans.mkdir(exist_ok=True)
        for speedup in self.arguments.speedups:
            if not self.plan_path(speedup).exists():
                found = search(profile, speedup=speedup, check=check)
                self._tuned(found.chosen, self.plan_path(speedup), profile.provenance.graph, "uncached")

    def no_loss(self) -> None:
        """Tune a plan of few evaluations against the converged solution."""
        profile = graphcache.load_profile(self.folder / "profile.json")
        few = int(NO_LOSS * self.example.steps)
        front = search(profile, speedup=1.0).front
        chosen = next(item for item in front if item.family == "output" and len(item.computed) == few)
        self._tuned(chosen, self.plan_path("no-loss"), profile.provenance.graph, "converged")

    def _tuned(self, found: Candidate, path: Path, graph: str, reference: Any) -> None:
        console.print(f"{path.name}: {found.family}, {len(found.computed)} computed, {found.speedup:.2f}")
        result = tune(
            self.example.model,
            with_corrections(found.plan),
            self.items(TRAINED, self.arguments.samples),
            self.items(HELD, 2),
            sampler=self.example.sampler(),
            reference=reference,
            iterations=self.arguments.iterations,
            rate=self.arguments.rate,
            progress=lambda now: console.print(now) if now.held_out else None,
        )
        console.print(f"{result.before:.2f} -> {result.after:.2f} dB, held out")
        replace(result.plan, graph=graph).save(path)

    def quality(self) -> None:
        """PSNR of every contender to the uncached run, seed by seed."""
        items = self.items(TEST, self.arguments.seeds)
        references = [self.generate(self.example.model, item) for item in items]
        figures = self._load("quality")
        for name, results in self._results(items, figures):
            figures[name] = [_db(result, ref) for result, ref in zip(results, references, strict=True)]
            self._save("quality", figures)
            console.print(f"{name:32} {statistics.fmean(figures[name]):6.2f}")

    def judged(self) -> None:
        """What samples look like, whatever the uncached ones are: of all contenders and of those."""
        judge = self.example.judge
        if judge is None:
            console.print("nobody judges these samples")
            return
        items = self.items(JUDGED, self.arguments.seeds)
        figures = self._load("judged")
        if "uncached" not in figures:
            made = [self.generate(self.example.model, item) for item in items]
            figures["uncached"] = judge(items, torch.cat(made))
        for name, results in self._results(items, figures):
            figures[name] = judge(items, torch.cat(results))
            self._save("judged", figures)
        names = list(figures["uncached"])
        rows = [[name, *(found[key] for key in names)] for name, found in figures.items()]
        self._report("judged", [Column("contender"), *(Column(key, digits=3) for key in names)], rows)

    def _results(self, items: list[Any], known: dict[str, Any]) -> Iterator[tuple[str, list[Tensor]]]:
        """Generations of the contenders and of fewer steps that are not known yet."""
        for name, plan in self.contenders().items():
            if name not in known:
                model = self.sampling.planned(plan)
                yield name, [self.generate(model, item) for item in items]
        for solver in self.example.solvers:
            for count in self.arguments.fewer:
                name = f"{count} steps {solver}"
                if name not in known:
                    yield name, [self.generate(self.example.model, item, solver, count) for item in items]

    def time(self) -> None:
        """How much faster than the uncached run all contenders are."""
        figures = self._load("time")
        for name, speedup in self._speedups(self.contenders()).items():
            figures[name] = speedup
            console.print(f"{name:32} {speedup:.2f}")
        self._save("time", figures)

    def _speedups(self, contenders: dict[str, Plan]) -> dict[str, float]:
        """Of one generation: each kind of step is timed once, compiled, all plans interleaved."""
        item = self.items(TEST, 1)[0]
        steps = TimedGeneration(
            self.sampling.first_call(item, self.example.steps), "timestep", self.example.steps
        )
        keys = {name: self._keys(plan, item) for name, plan in contenders.items()}
        models: dict[str, Any] = {"plain": torch.compile(self.example.model, dynamic=False)}
        known: dict[Any, list[float]] = {"plain": []}
        for name, plan in contenders.items():
            if not keys[name].keys() <= known.keys():
                models[name] = graphcache.transform(self.example.model, plan, backend="inductor")
                known.update((key, []) for key in keys[name])
        plain: dict[Any, list[int]] = {"plain": list(range(self.example.steps))}
        with torch.no_grad():
            for turn in range(self.arguments.rounds + 1):
                for name in random.Random(turn).sample(list(models), len(models)):
                    parts = steps.run(models[name])
                    for key, places in keys.get(name, plain).items():
                        known[key] += [parts[place] for place in places if turn]
        uncached = statistics.median(known["plain"]) * self.example.steps
        spent = {
            name: sum(statistics.median(known[key]) * len(places) for key, places in kinds.items())
            for name, kinds in keys.items()
        }
        return {name: uncached / seconds for name, seconds in spent.items()}

    def predicted(self) -> None:
        """Predicted and measured speed-ups of the found plans, from steps that are timed right before."""
        profile = graphcache.load_profile(self.folder / "profile.json")
        inputs = self.sampling.first_call(self.items(TEST, 1)[0], self.example.steps)
        sites = {name: [site.name for site in group] for name, group in families(profile).items()}
        rounds = self.arguments.rounds
        seconds = step_seconds(
            self.example.model, inputs, sites, backend="inductor", names=self.sampling.names, rounds=rounds
        )
        plans = self.tuned()
        rows: list[list[Cell]] = []
        for name, measured in self._speedups(plans).items():
            promised = prediction.speedup(meet(name, plans[name], replace(profile, timings=seconds)))
            rows.append([name, promised, measured])
        columns = (Column("plan"), Column("predicted", "×", 2), Column("measured", "×", 2))
        self._report("predicted", columns, rows)

    def ablations(self) -> None:
        """How the adjoint's estimates rank real errors: one site reused at one step of a profiled run."""
        (item,), steps = self.items(TRAINED, 1), self.example.steps
        sampler, conditional = self.example.sampler(), self.example.conditional
        profile = graphcache.profile(
            self.example.model, [item], steps=steps, sampler=sampler, conditional=conditional, window=1
        )
        uncached = self.generate(self.example.model, item)
        branches = [site.name for site in profile.sites if site.kind == "branch"]
        sensitive = sensitivity(profile)
        estimated, real = [], []
        for site in branches[:: -(-len(branches) // 8)]:
            for step in (round(share * steps) for share in (0.12, 0.3, 0.5, 0.7, 0.9)):
                row = "#" * step + "." + "#" * (steps - step - 1)
                model = self.sampling.planned(Plan.parse(f"plan steps={steps} preset=none\n{site} {row}"))
                estimated.append(float(sensitive[profile.index(site), step]) ** 2)
                real.append(float((self.generate(model, item) - uncached).double().square().sum()))
        # reusing what does not change, as attention to a single token of text, is no error at all
        pairs = torch.tensor([pair for pair in zip(estimated, real, strict=True) if pair[1]])
        rank, ratio = float(spearman_corrcoef(*pairs.T)), float((pairs[:, 0] / pairs[:, 1]).sqrt().median())
        console.print(
            f"{len(pairs)} ablations: rank correlation {rank:.2f}, estimated by real error {ratio:.2f}"
        )

    def _keys(self, plan: Plan, item: Any) -> dict[Any, list[int]]:
        """Steps of the plan by what their graph does."""
        model: Any = self.sampling.planned(plan)
        self.generate(model, item)
        (state,) = model._graphcache.surroundings.session.states.values()
        schedule = state.schedule
        places: dict[Any, list[int]] = {}
        for place, step in enumerate(schedule.steps):
            key = schedule.phases[step.phase], schedule.ranges, schedule.guided, schedule.memories
            places.setdefault(key, []).append(place)
        return places

    def converged(self) -> None:
        """Distances to the converged solution, of the uncached run, plans and fewer steps."""
        figures: dict[str, list[float]] = {}
        few = int(NO_LOSS * self.example.steps)
        for item in self.items(TEST, self.arguments.seeds):
            target = converged(self.sampling, item, self.example.steps)
            made = {"uncached": self.generate(self.example.model, item)}
            for path in sorted(self.example.plans.glob("*.txt")):
                made[f"tuned {path.stem}"] = self.generate(self.sampling.planned(Plan.load(path)), item)
            for solver in self.example.solvers:
                made[f"{few} steps {solver}"] = self.generate(self.example.model, item, solver, few)
            for name, result in made.items():
                figures.setdefault(name, []).append(_db(result, target))
            self._save("converged", figures)
        columns = (Column("contender"), Column("PSNR to the converged solution", "dB", 2))
        self._report(
            "converged", columns, [[name, mean_and_spread(values)] for name, values in figures.items()]
        )

    def table(self) -> None:
        """For every speed-up the best setting of each rival whose time is within 2 % of the plan's."""
        figures = self._load("quality"), self._load("time")
        self._report("equal time", *at_equal_time(*figures, self.arguments.speedups, self.example.steps))

    def _report(self, what: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
        report(f"{self.name}, {what}", columns, rows, self.arguments.json)

    def tuned(self) -> dict[str, Plan]:
        """The plans that were found, by names for the tables."""
        return {f"tuned {speedup}": Plan.load(self.plan_path(speedup)) for speedup in self.arguments.speedups}

    def contenders(self) -> dict[str, Plan]:
        """Tuned plans, and presets swept over their settings."""
        found = self.tuned()
        found.update(swept(self.example.steps, self.example.conditional))
        usable = {}
        for name, plan in found.items():
            if not name.startswith(tuple(self.arguments.methods)):
                continue
            try:
                first = self.sampling.first_call(self.items(TEST, 1)[0], self.example.steps)
                model: Any = graphcache.transform(self.example.model, plan)
                model.warmup(first, progress=False)
                usable[name] = plan
            except PlanError as error:
                console.print(f"{name}: {error}")
        return usable

    def _load(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _save(self, name: str, figures: dict[str, Any]) -> None:
        (self.folder / f"{name}.json").write_text(json.dumps(figures, indent=1))


def _db(result: Tensor, reference: Tensor) -> float:
    return float(psnr(result, reference).mean())


def main() -> None:
    """Run the stages asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("example", choices=list(EXAMPLES))
    parser.add_argument("stages", nargs="+")
    parser.add_argument("--workdir", type=Path, default=Path(".cache/search"))
    parser.add_argument("--size", type=int, default=8, help="samples of one generation")
    parser.add_argument("--samples", type=int, default=4, help="generations profiled and tuned on")
    parser.add_argument("--seeds", type=int, default=5, help="generations in the tables")
    parser.add_argument("--iterations", type=int, default=60, help="of tuning")
    parser.add_argument("--rounds", type=int, default=2, help="timed generations of each kind of plan")
    parser.add_argument(
        "--fewer", type=int, nargs="*", default=[34, 25, 17, 12], help="numbers of fewer steps"
    )
    parser.add_argument("--speedups", type=float, nargs="*", default=SPEEDUPS, help="that plans are made for")
    parser.add_argument(
        "--methods", nargs="*", default=[""], help="names of contenders begin with one of these"
    )
    parser.add_argument("--rate", type=float, help="of tuning; by default its own choice")
    parser.add_argument("--threads", type=int, default=2)
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.json and len(TABLES & set(arguments.stages)) != 1:
        parser.error(f"a record is written of one of the stages {', '.join(sorted(TABLES))}")
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.example, arguments)
    for stage in arguments.stages:
        getattr(bench, stage)()


if __name__ == "__main__":
    main()
