"""The table, on screen and in files."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from examples.demo.measure import Row

HEADERS = (
    "method",
    "calls",
    "ms per\nimage",
    "times\nfaster",
    "in\nFLOPs",
    "PSNR\ndB",
    "SSIM",
    "Fréchet\ndist.",
    "class\nacc.",
    "cache\nMiB",
)
WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was run, where and when."""

    digits: int
    rounds: int
    seed: int
    cpu: str
    cores: int
    threads: int
    torch: str
    date: str

    @classmethod
    def here(cls, digits: int, rounds: int, seed: int) -> Setting:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        cores = os.cpu_count() or 1
        return cls(digits, rounds, seed, cpu_model(), cores, torch.get_num_threads(), torch.__version__, now)

    @property
    def samples(self) -> int:
        return self.digits * self.rounds

    @property
    def hardware(self) -> str:
        return f"{self.cpu}, {self.cores} cores, torch {self.torch}, {self.date[:10]}"

    @property
    def caption(self) -> str:
        return (
            f"Calls: of the model, in one generation of {self.digits} digits. Times: medians of "
            f"{self.rounds} interleaved rounds, after compilation and warm-up. Times faster than uncached: "
            f"measured, and what the FLOPs alone would give. PSNR and SSIM: {self.samples} images' means, "
            "against the uncached ones of the same noise. Fréchet distance (to held-out digits, in a "
            "classifier's embedding; few samples bias it upwards) and accuracy: of the same images. "
            f"{self.hardware}."
        )


def cpu_model() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(rows: Sequence[Row], setting: Setting) -> Table:
    """The rows as a rich table."""
    made = Table(
        caption=setting.caption,
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for index, header in enumerate(HEADERS):
        made.add_column(header, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        made.add_row(*_cells(row))
    return made


def write(folder: Path, rows: Sequence[Row], setting: Setting) -> list[Path]:
    """Write table.txt and demo.json."""
    text, data = folder / "table.txt", folder / "demo.json"
    with text.open("w", encoding="utf-8") as file:
        Console(file=file, width=WIDTH).print(table(rows, setting))
    contents = {
        "setting": dataclasses.asdict(setting),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    data.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [text, data]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        str(row.model_calls),
        f"{row.ms_per_image:.1f}",
        f"{row.speedup:.2f}×",
        f"{row.ideal_speedup:.2f}×",
        _or_dash(row.psnr_db, ".1f"),
        _or_dash(row.ssim, ".3f"),
        f"{row.frechet_distance:.2f}",
        f"{row.accuracy:.1%}",
        _or_dash(row.peak_cache_mib, ".1f"),
    )


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
