"""Plans on several processes beside one, each with one thread: what sharing tokens out gains and costs.

python -m examples.benchmark_ranks [--ranks 2]
"""

import argparse

from examples.benchmark_models import many_tokens_dit, many_tokens_pixart
from examples.records import Cell, Column, add_json_option, report
from graphcache import presets
from graphcache.planning.ranks import SharedBench

STEPS = 6
PLANS = {"compute": presets.compute(STEPS), "fora": presets.fora(STEPS, interval=3)}
MODELS = {"DiT": many_tokens_dit, "PixArt": many_tokens_pixart}
COLUMNS = (
    Column("model"),
    Column("plan"),
    Column("a step alone", "ms", 0),
    Column("quartiles alone", "ms"),
    Column("a step shared", "ms", 0),
    Column("quartiles shared", "ms"),
    Column("speed-up", "×", 2),
    Column("caches alone", "KiB", 0),
    Column("caches of a rank", "KiB", 0),
)


def rows(ranks: int, rounds: int) -> list[list[Cell]]:
    """Medians of a step over interleaved generations of each plan."""
    found = list[list[Cell]]()
    for model, load in MODELS.items():
        for timing in SharedBench(load, PLANS, ranks, rounds=rounds, threads=1).run() or ():
            alone = f"{timing.alone_low:.0f} to {timing.alone_high:.0f}"
            shared = f"{timing.low:.0f} to {timing.high:.0f}"
            times: list[Cell] = [timing.alone_ms, alone, timing.ms, shared, timing.speedup]
            held: list[Cell] = [timing.alone_bytes / 2**10, timing.rank_bytes / 2**10]
            found.append([model, timing.name, *times, *held])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    add_json_option(parser)
    arguments = parser.parse_args()
    report("Several ranks", COLUMNS, rows(arguments.ranks, arguments.rounds), arguments.json)


if __name__ == "__main__":
    main()
