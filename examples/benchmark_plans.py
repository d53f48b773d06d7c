"""Plans beside the plain compiled model: one model whose time is FLOPs, one whose time is launches.

python -m examples.benchmark_plans compute-bound [--threads 1]
python -m examples.benchmark_plans launch-bound [--rivals]
"""

import argparse
from typing import Any

import torch

from examples.benchmark_models import (
    compute_bound_pixart,
    compute_with_cpp_wrapper,
    dbcache,
    first_block_cache,
    launch_bound_flux,
)
from examples.records import TIMES, add_json_option, report, time_rows
from graphcache import presets
from graphcache.planning.bench import Timing, benchmark


def compute_bound(rounds: int) -> tuple[Timing, ...]:
    """What of the skipped FLOPs becomes time."""
    plans = {"compute": presets.compute(30), "fora": presets.fora(30), "taylorseer": presets.taylorseer(30)}
    return benchmark(*compute_bound_pixart(), plans, rounds=rounds)


def launch_bound(rounds: int, rivals: bool) -> tuple[Timing, ...]:
    """What the runner costs where nothing is skipped; the rivals decide as they run, and never skip."""
    makers = [compute_with_cpp_wrapper] + [first_block_cache, dbcache] * rivals
    beside: dict[str, Any] = {make.__name__: make(launch_bound_flux()[0]) for make in makers}
    plans = {"compute": presets.compute(50)}
    return benchmark(*launch_bound_flux(), plans, rounds=rounds, beside=beside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bound", choices=("compute-bound", "launch-bound"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rivals", action="store_true", help="time caches that decide as they run too")
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.bound == "compute-bound":
        timings = compute_bound(arguments.rounds)
    else:
        timings = launch_bound(arguments.rounds, arguments.rivals)
    report(arguments.bound, TIMES, time_rows(timings), arguments.json)


if __name__ == "__main__":
    main()
