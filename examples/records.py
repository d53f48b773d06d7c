"""Records of benchmarks: what was measured, and by what command, at which commit, when, where and with what.

A record is a JSON file in docs/benchmarks; `examples.benchmarks_page` makes docs/benchmarks.md of them.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from graphcache.planning.bench import Timing

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "benchmarks"
PACKAGES = ("torch", "diffusers", "cache_dit")
"""Those of them that a benchmark loads are named in its record."""
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "OMP_NUM_THREADS")
"""Variables of the environment that decide about times."""

Cell = str | int | float | list[float] | None
"""A list is a mean and its standard deviation."""


class Column(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A column of a record; `digits` are those behind the point."""

    name: str
    unit: str | None = None
    digits: int | None = None

    @property
    def header(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def show(self, cell: Cell) -> str:
        """The cell as text."""
        if isinstance(cell, list):
            return " ± ".join(map(self.show, cell))
        if isinstance(cell, int | float) and self.digits is not None:
            return f"{cell:,.{self.digits}f}"
        return "" if cell is None else str(cell)


class Machine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a benchmark ran; None is what nobody wrote down."""

    cpu: str | None
    cores: int | None
    threads: int | None
    memory_gib: int | None
    gpu: str | None

    @classmethod
    def here(cls) -> Machine:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        return cls(cpu_model(), os.cpu_count(), torch.get_num_threads(), round(memory / 2**30), gpu)


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table with its circumstances.

    Attributes:
        question: what the figures answer, and how they were taken.
        answer: what they say; each of its figures stands in the rows.
        commit: that of the code that ran, or the one that recorded figures which were taken by hand.
        date: of the run, or first and last day, with a slash between.
    """

    title: str
    question: str
    answer: str
    command: str | None
    commit: str
    date: str
    machine: Machine
    versions: dict[str, str | None]
    columns: list[Column]
    rows: list[list[Cell]]


def load(path: Path) -> Record:
    return msgspec.json.decode(path.read_bytes(), type=Record)


@dataclass(frozen=True)
class Destination:
    """Where this process writes a record, the commit that it began at, and the record that was there."""

    path: Path
    commit: str
    before: Record | None

    @classmethod
    def at(cls, path: str) -> Destination:
        return cls(Path(path), _commit(), load(Path(path)) if Path(path).exists() else None)


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=Destination.at, help="write the table as a record; its words, if any, are kept"
    )


def report(
    title: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], to: Destination | None
) -> None:
    """Print a table, and write it as a record of this run if there is a place for it."""
    table = Table(*(column.header for column in columns), title=title)
    for row in rows:
        table.add_row(*(column.show(cell) for column, cell in zip(columns, row, strict=True)))
    Console(width=120).print(table)
    if to is not None:
        save(_of_this_run(title, columns, rows, to), to.path)


def _of_this_run(
    title: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], to: Destination
) -> Record:
    words = to.before
    return Record(
        title=words.title if words else title,
        question=words.question if words else "",
        answer=words.answer if words else "",
        command=_command(),
        commit=to.commit,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=Machine.here(),
        versions={
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES if name in sys.modules},
        },
        columns=list(columns),
        rows=[[_short(cell) for cell in row] for row in rows],
    )


def save(record: Record, path: Path) -> None:
    """One line a column and a row, so that differences can be read."""
    fields: dict[str, Any] = msgspec.to_builtins(record)
    lines = []
    for name, value in fields.items():
        if name in ("columns", "rows"):
            items = ",\n    ".join(_json(item) for item in value)
            lines.append(f'  "{name}": [\n    {items}\n  ]')
        else:
            lines.append(f'  "{name}": {_json(value)}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _json(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode().replace("\n", " ")


def _short(cell: Cell) -> Cell:
    """Five digits are more than any of these measurements has."""
    if isinstance(cell, list):
        return [float(f"{value:.5g}") for value in cell]
    return float(f"{cell:.5g}") if isinstance(cell, float) else cell


def _command() -> str:
    """The command of this process, without what says where to write."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word == "--json":
            next(words)
        elif not word.startswith("--json="):
            kept.append(word)
    module: Any = sys.modules["__main__"].__spec__
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return shlex.join([*settings, "python", "-m", module.name, *kept])


def _commit() -> str:
    """The commit of this checkout, marked where its code (not its docs) was changed since."""

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=ROOT, check=True, capture_output=True, text=True).stdout

    changed = git("status", "--porcelain", "--", ".", ":!docs").strip()
    return git("rev-parse", "--short", "HEAD").strip() + ("-changed" if changed else "")


def cpu_model() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


TIMES = (
    Column("contender"),
    Column("a step", "ms", 2),
    Column("quartiles", "ms"),
    Column("speed-up", "×", 2),
    Column("ideal", "×", 2),
    Column("realised ÷ ideal", None, 2),
    Column("cache's peak", "KiB", 0),
)


def time_rows(timings: Sequence[Timing]) -> list[list[Cell]]:
    """Rows of `TIMES`."""
    return [
        [
            timing.name,
            timing.ms,
            f"{timing.low:.2f} to {timing.high:.2f}",
            timing.speedup,
            timing.ideal,
            timing.realised,
            None if timing.peak_bytes is None else timing.peak_bytes / 1024,
        ]
        for timing in timings
    ]
