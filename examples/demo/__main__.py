"""``python -m examples.demo``: sample digits under several plans and compare them."""

from __future__ import annotations

import argparse
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from examples.demo import measure, methods, picture, results
from examples.digits.evaluate import balanced_labels
from examples.digits.model import load_classifier, load_model

README_IMAGE = Path(__file__).parents[2] / "docs" / "images" / "demo.png"


@dataclass(frozen=True)
class Size:
    """Digits of one generation, generations of each method, and how many of these the picture shows."""

    digits: int
    rounds: int
    rounds_shown: int


FULL = Size(digits=64, rounds=4, rounds_shown=1)
SMALL = Size(digits=16, rounds=2, rounds_shown=1)

SHOWN = 2
"""Position of the method whose plan and summary are printed."""


def main() -> None:
    arguments = _parse_arguments()
    # torch's own compile cache triggers it; nothing here or in the model can change that.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    console = Console()
    size = SMALL if arguments.small else FULL
    setting = results.Setting.here(size.digits, size.rounds, arguments.seed)
    rows, shown = _run(size, arguments.seed, console)
    arguments.output.mkdir(parents=True, exist_ok=True)
    image = arguments.output / "demo.png"
    picture.draw(image, rows, shown, f"dB: PSNR to the uncached images of the same noise. {setting.hardware}")
    console.print(results.table(rows, setting))
    written = [image, *results.write(arguments.output, rows, setting)]
    if arguments.readme:
        README_IMAGE.parent.mkdir(parents=True, exist_ok=True)
        written.append(Path(shutil.copy(image, README_IMAGE)))
    console.print("written: " + ", ".join(map(str, written)), soft_wrap=True)


def _run(size: Size, seed: int, console: Console) -> tuple[list[measure.Row], dict[str, Tensor]]:
    """The table's rows, and each method's images of the rounds that are shown."""
    labels = balanced_labels(size.digits)
    model, classifier = load_model(), load_classifier()
    with _stage("compiling", methods.model_count(), console) as advance:
        contenders = methods.compiled_methods(model, labels, advance)
    calls = size.rounds * sum(contender.steps for contender in contenders)
    with _stage(f"sampling, {size.rounds} rounds", calls, console) as advance:
        runs = measure.run_rounds(contenders, labels, size.rounds, seed, advance)
    with _stage("measuring quality", len(contenders), console) as advance:
        rows = measure.table_rows(contenders, runs, labels, classifier, advance)
    _show_plan(contenders[SHOWN], console)
    return rows, {name: torch.cat(run.images[: size.rounds_shown]) for name, run in runs.items()}


def _show_plan(method: methods.Method, console: Console) -> None:
    """A plan's text, and the head of the summary of its latest generation."""
    (branch,) = method.model.summary().branches
    head = "\n".join(str(branch).splitlines()[:2])
    console.print(f"\n{method.name}\n{str(method.plan).rstrip()}\n{head}", highlight=False, markup=False)


@contextmanager
def _stage(title: str, total: int, console: Console) -> Iterator[methods.Progress]:
    """A progress bar; calling what it yields is one step of `total`."""
    columns = (TextColumn(f"{title:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=2) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--small", action="store_true", help="fewer digits and rounds")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=0, help="of the noise of the first round")
    parser.add_argument(
        "--readme", action="store_true", help=f"also write {README_IMAGE.name} in docs/images"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
