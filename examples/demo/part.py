"""A part of the demo: one model, sampled in several ways that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from examples.demo import measure, report, results
from examples.demo.methods import Method
from examples.demo.progress import Progress, stage
from examples.demo.searched import Searched
from graphcache import Plan

Draw = Callable[[Path, Sequence[measure.Row], Mapping[str, Tensor], results.Setting], None]
"""Writes a picture of each method's samples of the first round."""

PLAIN_WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Extent:
    """How much of the demo is run.

    Attributes:
        small: fewer samples and rounds.
        presets: FasterCache, PAB and ToCa beside the searched plans, which compiles many more graphs.
    """

    small: bool
    presets: bool

    def choose(self, small: int, usual: int, longer: int) -> int:
        """The number that goes with this much."""
        return small if self.small else longer if self.presets else usual


@dataclass(frozen=True)
class Part:
    """One model, how it is sampled, and how that is shown.

    Attributes:
        sample: what a sample is called.
        plain: the uncached method, its model not compiled.
        plans: by the names that they have in the table.
        fewer: schedulers of the plain model at the FLOPs of the first plan, by name.
        warm_up_steps: enough for every phase of the plans to be compiled.
        labels: what is asked for in one generation, int64 (N,).
        rounds: generations of each method.
        shown: position of the method whose plan and summary are printed.
        files: names of the picture, the table and the data.
        searched: how the first plan was found, for a page about it.
    """

    sample: str
    plain: Method
    plans: Mapping[str, Plan]
    fewer: Mapping[str, Callable[[], Any]]
    warm_up_steps: int
    labels: Tensor
    rounds: int
    shown: int
    judge: measure.Judge | None
    draw: Draw
    files: tuple[str, str, str]
    searched: Searched | None = None

    def run(self, folder: Path, seed: int, console: Console) -> list[Path]:
        """Sample, compare and print; returns the files written, the picture first."""
        setting = results.Setting.here(self.sample, len(self.labels), self.rounds, seed)
        rows, samples = self._compare(seed, console)
        picture, text, data = (folder / name for name in self.files)
        self.draw(picture, rows, samples, setting)
        console.print(results.table(rows, setting))
        results.write(text, data, rows, setting)
        pages = [] if self.searched is None else [report.write(folder, self.searched, rows, samples)]
        return [picture, text, data, *pages]

    def _compare(self, seed: int, console: Console) -> tuple[list[measure.Row], dict[str, Tensor]]:
        """The table's rows, and each method's samples of the first round."""
        with stage("compiling", 1 + len(self.plans), console) as advance:
            methods = self._compiled_methods(advance)
        calls = self.rounds * sum(method.steps for method in methods)
        with stage(f"sampling, {self.rounds} rounds", calls, console) as advance:
            runs = measure.run_rounds(methods, self.labels, self.rounds, seed, advance)
        with stage("measuring quality", len(methods), console) as advance:
            rows = measure.table_rows(methods, runs, self.judge, advance)
        _show_plan(methods[self.shown], console)
        return rows, {name: run.samples[0] for name, run in runs.items()}

    def _compiled_methods(self, progress: Progress) -> list[Method]:
        """Every method, compiled and warm; the plain model first. Progress counts models."""
        plain = self.plain.compiled(self.labels, PLAIN_WARM_UP_STEPS)
        progress()
        cached = []
        for name, plan in self.plans.items():
            cached.append(self.plain.cached(name, plan, self.labels, self.warm_up_steps))
            progress()
        ideal = cached[0].ideal
        fewer = [plain.shortened(name, scheduler, ideal) for name, scheduler in self.fewer.items()]
        return [plain, *cached, *fewer]


def _show_plan(method: Method, console: Console) -> None:
    """A plan's text without listed coefficients, and the head of the summary of its latest generation."""
    (branch,) = method.model.summary().branches
    head = "\n".join(str(branch).splitlines()[:2])
    lines = [line for line in str(method.plan).splitlines() if not line.startswith("  step ")]
    console.print("\n".join(["", method.name, *lines, head]), highlight=False, markup=False)
