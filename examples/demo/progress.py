"""Progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console

Progress = Callable[[], None]
"""Called after each step of a stage."""


@contextmanager
def stage(title: str, total: int, console: Console) -> Iterator[Progress]:
    """A progress bar; calling what it yields is one step of `total`."""
    columns = (
        progress.TextColumn(f"{title:20}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console, refresh_per_second=2) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
