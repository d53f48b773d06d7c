"""What `graphcache auto` will take for published transformers in their own sizes, by their graphs alone.

python -m examples.benchmark_outlook [--models FLUX.1-dev] [--speedup 2] [--memory-gib 16] [--json FILE]
"""

import argparse

from examples.architectures import MODELS, STEPS
from examples.records import Cell, Column, add_json_option, report
from graphcache.analysis.cost import graph_flops
from graphcache.cost.pricing import without_weights
from graphcache.ir.roles import UNNAMED
from graphcache.ir.units import size, work
from graphcache.planning.outlook import Outlook

TRAINED, JUDGES, PROFILED, ITERATIONS, RIVALS = 12, 4, 8, 30, 4
"""Of 16 prompts, as `auto` shares them out."""
TWO_CALLS = ("Qwen-Image", "Wan 2.1 1.3B", "Wan 2.1 14B")
"""Models whose pipelines call once for each branch of guidance."""
COLUMNS = (
    Column("model"),
    Column("uncached generation"),
    Column("profile", "generations", 0),
    Column("its least memory"),
    Column("search", "generations", 0),
    Column("tune", "generations", 0),
    Column("its least memory"),
    Column("compare", "generations", 0),
    Column("its memory"),
    Column("all", "generations", 0),
)


def foreseen(name: str, speedup: float, memory: int) -> list[Cell]:
    """A row."""
    model, call = MODELS[name]()
    program = without_weights(model, call, UNNAMED)
    calls = 2 if name in TWO_CALLS else 1
    outlook = Outlook(
        program, STEPS, speedup, calls, PROFILED, TRAINED, JUDGES, ITERATIONS, memory, rivals=RIVALS
    )
    profile, search, tune, compare = parts = outlook.parts()
    flops = graph_flops(program.captured.step) * STEPS * calls
    return [
        name, work(flops), profile.generations, size(profile.least), search.generations, tune.generations,
        size(tune.least), compare.generations, size(compare.most), sum(part.generations for part in parts),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--memory-gib", type=int, default=16)
    add_json_option(parser)
    arguments = parser.parse_args()
    rows = [foreseen(name, arguments.speedup, arguments.memory_gib << 30) for name in arguments.models]
    report("What auto will take", COLUMNS, rows, arguments.json)


if __name__ == "__main__":
    main()
