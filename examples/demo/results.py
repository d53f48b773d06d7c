"""The table, on screen and in files."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from examples.demo.measure import Row
from examples.records import cpu_model


class Column(NamedTuple):
    """A column of the table: its header, the row's field, and the format of its cells."""

    header: str
    field: str
    form: str


COLUMNS = (
    Column("method", "method", "{}"),
    Column("calls", "model_calls", "{}"),
    Column("ms per\n{sample}", "ms_per_sample", "{:.1f}"),
    Column("times\nfaster", "speedup", "{:.2f}×"),
    Column("in\nFLOPs", "ideal_speedup", "{:.2f}×"),
    Column("PSNR\ndB", "psnr_db", "{:.1f}"),
    Column("SSIM", "ssim", "{:.3f}"),
    Column("Fréchet\ndist.", "frechet_distance", "{:.2f}"),
    Column("class\nacc.", "accuracy", "{:.1%}"),
    Column("cache\nMiB", "peak_cache_mib", "{:.1f}"),
)
WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was run, where and when. A sample is an image or a clip of one digit."""

    sample: str
    count: int
    rounds: int
    seed: int
    cpu: str
    cores: int
    threads: int
    torch: str
    date: str

    @classmethod
    def here(cls, sample: str, count: int, rounds: int, seed: int) -> Setting:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        cores, threads = os.cpu_count() or 1, torch.get_num_threads()
        return cls(sample, count, rounds, seed, cpu_model(), cores, threads, torch.__version__, now)

    @property
    def hardware(self) -> str:
        return f"{self.cpu}, {self.cores} cores, torch {self.torch}, {self.date[:10]}"

    @property
    def footnote(self) -> str:
        return f"dB: PSNR to the uncached {self.sample}s of the same noise. {self.hardware}"

    def caption(self, judged: bool) -> str:
        """What the columns mean; `judged` if the classifier's are among them."""
        judgement = (
            "Fréchet distance (to held-out digits, in a classifier's embedding; few samples bias it upwards) "
            f"and accuracy: of the same {self.sample}s. "
        )
        return (
            f"Calls: of the model, in one generation of {self.count} {self.sample}s. Times: medians of "
            f"{self.rounds} interleaved rounds, after compilation and warm-up. Times faster than uncached: "
            f"measured, and what the FLOPs alone would give. PSNR and SSIM: {self.count * self.rounds} "
            f"{self.sample}s' means, against the uncached ones of the same noise. "
            f"{judgement if judged else ''}{self.hardware}."
        )


def table(rows: Sequence[Row], setting: Setting) -> Table:
    """The rows as a rich table."""
    columns = _columns(rows)
    made = Table(
        caption=setting.caption(judged=any(column.field == "accuracy" for column in columns)),
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for index, column in enumerate(columns):
        header = column.header.format(sample=setting.sample)
        made.add_column(header, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        made.add_row(*(_cell(row, column) for column in columns))
    return made


def write(text: Path, data: Path, rows: Sequence[Row], setting: Setting) -> None:
    """Write the table as text and its numbers as JSON."""
    with text.open("w", encoding="utf-8") as file:
        Console(file=file, width=WIDTH).print(table(rows, setting))
    columns = _columns(rows)
    contents = {
        "setting": dataclasses.asdict(setting),
        "rows": [{column.field: getattr(row, column.field) for column in columns} for row in rows],
    }
    data.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _columns(rows: Sequence[Row]) -> list[Column]:
    """Those for which some row has a value."""
    return [column for column in COLUMNS if any(getattr(row, column.field) is not None for row in rows)]


def _cell(row: Row, column: Column) -> str:
    value = getattr(row, column.field)
    return "–" if value is None else column.form.format(value)
