"""What ranks do in tests of planning under a mesh, beside what one process does."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import graphcache
from graphcache import GraphCacheError, Plan, with_corrections
from graphcache.cli.main import app
from graphcache.compiler.captured import Captured
from graphcache.planning import profile_memory, recording, tuning
from graphcache.planning.automatic import checker
from graphcache.planning.evaluation import Evaluation
from graphcache.planning.recording import Recording
from graphcache.planning.sampling import Sampling
from graphcache.tracing.symbolic import Symbolic
from linear import Sampler
from mesh_work import kill, mesh_of
from relay import STEPS, relay
from sharing import Sharing
from tiny import tiny
from zoo import CASES
from zoo.case import Case

PLAN = Plan.parse("""
    plan steps=4 preset=none
    f = fitted order=1
    @mlp       ##f#
      step 2 = 1.5 -0.5
    range(1..2) ###f
      step 3 = 1.25 -0.25
""")
BUDGETED = Plan.parse("""
    plan steps=5 preset=none
    a = tokens 3 by random multiple=1
    k = tokens 2 by cluster multiple=1 blend=0.5
    f = fitted order=1
    @self ##af#
      step 3 = 1.25 -0.25
    @mlp  #k#af
      step 4 = 1.5 -0.5
""")
TOKENS = 4
"""As many as a head is wide."""


class Generation:
    """Steps of one of the zoo's models, as a sampler."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, model: Any, sample: int, steps: int) -> Tensor:
        static, x = self.case.static(2), self.case.latents(2) + 0.1 * sample
        for step in range(steps):
            result = tree_leaves(model(**self.case.call(static, x, 1 - step / steps)))[0]
            x = x - result[:, : x.shape[1]] / steps
        return x


def profiled(sizes: Mapping[str, int], mode: str | None, options: Mapping[str, Any]) -> list[Any]:
    """The profiles of one process and of each rank; values are sketched in few numbers."""
    _few_buckets()
    given: dict[str, Any] = {"steps": 4, "detail": "sites", **options}
    given["sampler"] = Sampler(mode, tokens=TOKENS)
    conditional = mode if mode in ("first", "last") else None
    meshes = None, mesh_of(**sizes)
    return [graphcache.profile(tiny(3), [5, 8], conditional=conditional, mesh=m, **given) for m in meshes]


def profiled_models(names: Sequence[str]) -> dict[str, list[Any]]:
    """The same of models of the zoo."""
    _few_buckets()
    Captured.of = Sharing(Captured.of, Symbolic.of)  # type: ignore[method-assign]
    found, mesh = dict[str, list[Any]](), mesh_of(tokens=2)
    for name in names:
        case = CASES[name]
        given: dict[str, Any] = {"steps": 3, "sampler": Generation(case), "probes": 1}
        found[name] = [graphcache.profile(case.make(), [1], mesh=m, **given) for m in (None, mesh)]
    return found


def relayed() -> list[Any]:
    """The same of a pipeline whose models take turns, each with two calls a step."""
    given: dict[str, Any] = {"steps": STEPS, "detail": "sites"}
    meshes = None, mesh_of(guidance=2)
    return [graphcache.profile(relay(calls=True), [{"seed": 5}], mesh=mesh, **given) for mesh in meshes]


def _few_buckets() -> None:
    recording.SKETCH = profile_memory.SKETCH = 16


def tuned(sizes: Mapping[str, int], plan: Plan, memories: Sequence[int]) -> list[Any]:
    """What one process and each rank came to, with so many bytes each."""
    Captured.of = Sharing(Captured.of, Symbolic.of)  # type: ignore[method-assign]
    plan, sampler = with_corrections(plan), Sampler("first", tokens=TOKENS)
    given: dict[str, Any] = {"sampler": sampler, "iterations": 3, "every": 2}
    cases = [(memory, mesh) for memory in memories for mesh in (None, mesh_of(**sizes))]
    return [
        graphcache.tune(tiny(3), plan, [1, 2], [3], mesh=m, memory=memory, **given) for memory, m in cases
    ]


def compared(sizes: Mapping[str, int]) -> list[Any]:
    """The rows of one process and of each rank."""
    plans = {"fora": graphcache.presets.fora(4, 2), "taylorseer": graphcache.presets.taylorseer(4, 2, 1)}
    given: dict[str, Any] = {
        "steps": 4, "sampler": Sampler("first", tokens=TOKENS), "fewer": {"2 steps": (None, 2)},
        "backend": None,
    }  # fmt: skip
    meshes = None, mesh_of(**sizes)
    return [graphcache.compare(tiny(3), plans, [1, 2], mesh=mesh, **given) for mesh in meshes]


def automatic(folder: str) -> list[tuple[Any, Tensor]]:
    """What one process and each rank found, and a generation under that plan."""
    found, sampler = [], Sampler("first", tokens=TOKENS)
    for mesh, name in ((None, f"alone{dist.get_rank()}"), (mesh_of(tokens=2), "shared")):
        place = Path(folder, name)
        place.mkdir(exist_ok=True)
        made = graphcache.auto(
            tiny(3), [1, 2, 3, 4], steps=6, speedup=1.5, sampler=sampler, iterations=2, conditional="first",
            mesh=mesh, backend=None, folder=place,
        )  # fmt: skip
        with torch.no_grad():
            found.append(((made.plan, made.found.chosen.family), sampler(made.model, 4, 6)))
    return found


def checked() -> list[float]:
    """The errors of two plans that two ranks can share by guidance, and of one that they cannot."""
    sampler = Sampler("first", tokens=TOKENS)
    sampling = Sampling.of(tiny(3), sampler, conditional="first", mesh=mesh_of(guidance=2))
    check = checker(sampling, [1], 4)
    head = "plan steps=4 preset=none conditional=first\n"
    rows = "@mlp ##.#", "a = tokens 2 by random multiple=1\n@mlp ##a#", "guidance ##.#"
    return [check(Plan.parse(head + row)) for row in rows]


def interrupted(path: str) -> list[Any]:
    """Samples that were known at first, and the profile: one that was cut off, and one that goes on."""
    mesh, told = mesh_of(tokens=2), list[tuple[int, int]]()

    def run(function: Any, numbers: Sequence[int]) -> Any:
        yield function(numbers[0])
        raise KeyboardInterrupt

    given: dict[str, Any] = {
        "steps": 3, "sampler": Sampler(tokens=TOKENS), "detail": "steps", "mesh": mesh, "path": path,
    }  # fmt: skip
    with suppress(KeyboardInterrupt):
        graphcache.profile(tiny(2), [1, 2], run=run, **given)
    dist.barrier()
    there = sorted(place.name for place in Path(path).parent.iterdir())
    dist.barrier()
    made = graphcache.profile(tiny(2), [1, 2], progress=lambda *now: told.append(now), **given)
    return [there, told, made, graphcache.load_profile(path)]


def disagreeing() -> list[str]:
    """What is said where the second rank was given something else."""
    mesh, odd = mesh_of(tokens=2), dist.get_rank()
    given: dict[str, Any] = {"sampler": Sampler(tokens=TOKENS), "mesh": mesh}
    plan = with_corrections(PLAN)
    calls: list[Any] = [
        lambda: graphcache.profile(tiny(2), [1], steps=3, detail="steps", memory=10**9 + odd, **given),
        lambda: graphcache.profile(tiny(2), [1], steps=3, detail="steps", seed=odd, **given),
        lambda: graphcache.tune(tiny(3), plan, [1], [2], iterations=1 + odd, **given),
        lambda: graphcache.compare(tiny(3), {}, [1] * (1 + odd), steps=3, **given),
    ]
    return [_said(call) for call in calls]


def dying(what: str, within: str) -> None:
    """The last of two ranks is killed while something is profiled or tuned."""
    if dist.get_rank() and within == "evaluation":
        Evaluation.back = kill  # type: ignore[method-assign]
    elif dist.get_rank():
        Recording.part = tuning.add_up = kill  # type: ignore[method-assign]
    given: dict[str, Any] = {"sampler": Sampler(tokens=TOKENS), "mesh": mesh_of(tokens=2)}
    if what == "profile":
        graphcache.profile(tiny(2), [1, 2], steps=3, detail="steps", **given)
    else:
        graphcache.tune(tiny(3), with_corrections(PLAN), [1], [2], iterations=1, **given)


def _said(call: Any) -> str:
    try:
        call()
    except GraphCacheError as error:
        return str(error)
    return "nothing"


def commanded(folder: str, commands: Mapping[int, str]) -> tuple[list[tuple[str, str]], list[str]]:
    """What commands print in processes that torchrun would have started, and what they raise; each has a port
    of its own. Then what lies in the folder that the rank stood in.
    """
    rank, count = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    Captured.of = Sharing(Captured.of, Symbolic.of)  # type: ignore[method-assign]
    place = Path(folder, str(rank))
    place.mkdir()
    os.chdir(place)
    told = []
    for port, command in commands.items():
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        }  # fmt: skip
        asked = [*command.split(), "--mesh", "tokens", "--threads", "1"]
        result = CliRunner().invoke(app, asked, env={"COLUMNS": "200"})
        told.append((result.output, str(result.exception)))
    return told, sorted(path.name for path in place.iterdir())


def factory() -> tuple[Any, Any, list[int]]:
    """For the command line."""
    return tiny(3), Sampler(tokens=TOKENS), [1, 2, 3]
