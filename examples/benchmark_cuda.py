"""Plans on a CUDA device in bfloat16, beside the plain compiled model: whole runs and partial steps.

python -m examples.benchmark_cuda [pixart flux cogvideox offload] [--rounds 5] [--cuda-graphs]
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

import graphcache
from examples.benchmark_models import Made, device_sized_flux, device_sized_pixart, guided_cogvideox, on_cuda
from examples.benchmark_toca import time_plans
from examples.records import TIMES, Cell, Column, add_json_option, report
from graphcache import Plan, presets
from graphcache.planning.bench import TimedGeneration

STEPS = 12

Contest = Callable[[Made, Mapping[str, Plan]], list[list[Cell]]]
"""Times plans on a model, and returns rows."""


def pixart(contest: Contest) -> list[list[Cell]]:
    """Whole steps skipped, and half of the tokens computed by MLPs where attention is reused."""
    reused, budget = "#..." * (STEPS // 4), "#aaa" * (STEPS // 4)
    rows = f"@self {reused}\n@cross {reused}\n@mlp {budget}"
    plans = {
        "compute": presets.compute(STEPS),
        "fora 4": presets.fora(STEPS, 4),
        "taylorseer 4": presets.taylorseer(STEPS, 4, 1),
        **{
            f"2048 tokens by {by}": Plan.parse(f"plan steps={STEPS}\na = tokens 2048 by {by}\n{rows}")
            for by in ("random", "entropy", "influence")
        },
    }
    return contest(on_cuda(device_sized_pixart()), plans)


def flux(contest: Contest) -> list[list[Cell]]:
    """FLUX's published ToCa plan, and forecasts."""
    plans = {
        "taylorseer 4": presets.taylorseer(STEPS, 4, 1),
        "toca flux, random": presets.toca("flux", STEPS, by="random"),
    }
    return contest(on_cuda(device_sized_flux()), plans)


def cogvideox(contest: Contest) -> list[list[Cell]]:
    """FasterCache on a doubled batch."""
    plan = presets.fastercache("cogvideox", 25, conditional="last")
    made = on_cuda(guided_cogvideox(30, 64, blocks=6, side=64))
    return contest(made, {"fastercache": plan})


def offload(rounds: int) -> list[list[Cell]]:
    """Entries in pinned host memory: the time of steps that fetch, and the device memory that is left."""
    model, inputs = on_cuda(device_sized_flux())
    plan = presets.taylorseer(STEPS, 3, 1)
    steps = TimedGeneration(inputs, "timestep", STEPS)
    rows: list[list[Cell]] = []
    for host in (False, True):
        made: Any = graphcache.transform(model, plan, backend="inductor", offload=host, wait="never")
        with torch.no_grad():
            steps.run(made)
            made.reset()
            torch.cuda.reset_peak_memory_stats()
            spent = sorted(sum(steps.run(made)) / STEPS for _ in range(rounds))
        peak = torch.cuda.max_memory_allocated() / 2**20
        held = made.summary().branches[0].peak_bytes / 2**10
        ms = 1e3 * spent[rounds // 2]
        print(f"offload {host}: peak of the device's memory {peak:.0f} MiB")
        rows.append([f"taylorseer 3, offload {host}", ms, *[None] * 4, held])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cuda-graphs", action="store_true", help="for plans and the plain model alike")
    add_json_option(parser)
    arguments = parser.parse_args()
    backend: Any = {"mode": "reduce-overhead"} if arguments.cuda_graphs else "inductor"
    contest = partial(time_plans, rounds=arguments.rounds, backend=backend)
    parts: dict[str, Callable[[], list[list[Cell]]]] = {
        "pixart": partial(pixart, contest),
        "flux": partial(flux, contest),
        "cogvideox": partial(cogvideox, contest),
        "offload": partial(offload, arguments.rounds),
    }
    print(torch.cuda.get_device_name(), torch.__version__, backend)
    rows: list[list[Cell]] = []
    for name in arguments.parts or parts:
        start = time.perf_counter()
        rows += [[name, *row] for row in parts[name]()]
        print(f"{name}: {time.perf_counter() - start:.0f} s, compilation included", flush=True)
        torch.compiler.reset()
    report("On a GPU", (Column("model"), *TIMES), rows, arguments.json)


if __name__ == "__main__":
    main()
