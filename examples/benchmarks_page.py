"""Writes docs/benchmarks.md of the records in docs/benchmarks; a record's file has its title as name.

python -m examples.benchmarks_page
"""

import re
import textwrap
from collections.abc import Sequence

from examples.records import FOLDER, ROOT, Record, load

PAGE = ROOT / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Made by `make benchmarks-page` of the records in [benchmarks/](benchmarks): every table names the command that
made it, its commit, date, machine and versions. Figures from before 0.2 were written down by hand; their
commit is the one that recorded them, their versions are those that it pins, and *not recorded* is what nobody
wrote down.

The baseline is the same model under `torch.compile`. Contenders run in one process, shuffled within each
round; times are medians over rounds, speed-ups are ratios of medians. *Ideal* is the ratio of FLOPs. PSNR is
to the uncached result of the same noise, ± is a standard deviation. Models with random weights tell about
time, never about quality.

## Found plans, at equal time

Plans that were searched and tuned for three small models trained here, judged on five seeds that neither
search nor tuning saw. A rival's cell is its best setting whose time is at most 1.02 times the found plan's;
empty where none is fast enough.

{found-plans-on-digits}
{found-plans-on-pictures-for-words}
{found-plans-on-clips}
{digits-beside-held-out-ones}
{nearer-to-the-converged-solution}
{the-demo}

## What a profile tells

{predicted-and-measured-speed-ups}
{estimates-beside-real-errors}
{profiling-within-a-limit}
{plans-for-other-numbers-of-steps-digits}
{plans-for-other-settings-digits}
{plans-for-other-settings-pictures-for-words}
{plans-for-other-settings-clips}
{few-steps-digits}
{few-steps-pictures-for-words}
{few-steps-clips}
{chosen-families-digits}
{chosen-families-pictures-for-words}
{further-coefficients-digits}

## Published methods

{presets-on-digits}
{token-budgets-on-digits}
{presets-on-clips}
{fastercache-beside-diffusers-hooks}
{token-budgets-timed}

## Time

{where-time-is-flops}
{where-time-is-launches}
{shared-by-two-processes}
{any-size}

On a CPU under glibc, freed cache entries go back to the system and are faulted in again at the next full
step; commands that set `MALLOC_` variables keep that out. PyTorch's own allocator on a GPU has no such cost.

## Without weights

{at-full-size}
{what-auto-will-take}

## On a GPU

{pixart-and-flux-on-an-h100}
{cogvideox-on-an-h100}
{launches-on-an-h100}
"""


def slug(title: str) -> str:
    """A title as a heading's link has it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def records() -> dict[str, Record]:
    return {path.stem: load(path) for path in sorted(FOLDER.glob("*.json"))}


def page(known: dict[str, Record]) -> str:
    """The whole page."""
    text = HEAD.format_map({name: section(record) for name, record in known.items()})
    return text.replace("\n\n\n", "\n\n").rstrip() + "\n"


def section(record: Record) -> str:
    """A record as text: its question, its rows, what they say and where they come from."""
    rows = [
        [column.show(cell) for column, cell in zip(record.columns, row, strict=True)] for row in record.rows
    ]
    table = "\n".join(
        map(_line, [[column.header for column in record.columns], ["---"] * len(record.columns), *rows])
    )
    parts = [
        f"### {record.title}",
        _wrapped(record.question),
        table,
        _wrapped(record.answer),
        _wrapped(origin(record)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def origin(record: Record) -> str:
    """What made a record, and what of it is not known."""
    machine = record.machine
    told = {
        "command": record.command and f"`{record.command}`",
        "processor": machine.cpu,
        "cores": machine.cores and f"{machine.cores} cores",
        "threads": machine.threads and f"{machine.threads} thread{'s' * (machine.threads > 1)}",
        "memory": machine.memory_gib and f"{machine.memory_gib} GiB",
        "GPU": machine.gpu and ("no GPU" if machine.gpu == "none" else machine.gpu),
        **{name: version and f"{name} {version}" for name, version in record.versions.items()},
    }
    unknown = [name for name, text in told.items() if not text]
    parts = [
        f"{record.date.replace('/', ' to ')}, commit {record.commit}",
        *(text for text in told.values() if text),
    ]
    return "; ".join(parts) + "." + f" Not recorded: {', '.join(unknown)}." * bool(unknown)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 110, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    PAGE.write_text(page(records()), encoding="utf-8")


if __name__ == "__main__":
    main()
