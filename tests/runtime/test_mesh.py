"""Several processes with one plan: equal to one process, in agreement, and an error where one is gone."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import graphcache
import mesh_work
from graphcache import GraphCacheError, Plan, presets
from lockstep import line
from mesh_work import mesh_of
from processes import together
from reference import assert_same
from seeding import Run
from tiny import arguments, tiny

FORA, TAYLOR = presets.fora(4, 2), presets.taylorseer(4, 2, 1)
FASTER = presets.fastercache(6, start=0.2)
FOUND = Plan.parse("plan steps=4 preset=none\nf = tuned order=1\n@mlp ##f.\n  step 2 = 1.4 -0.4\n* #.#.")
TOCA, CLUSCA = presets.toca(4, interval=3, multiple=1), presets.clusca(4, interval=3, clusters=5)
CHOSEN = Plan.parse("plan steps=5 preset=none\na = tokens 3 by norm multiple=1\n* #aaaa")
MODELS: dict[str, list[tuple[str, Plan]]] = {
    "dit": [("fora", FORA), ("fastercache", FASTER), ("toca", TOCA)],
    "pixart": [("found", FOUND)],
    "flux": [("taylorseer", TAYLOR), ("clusca", CLUSCA)],
    "latte": [("taylorseer", TAYLOR)],
    "sd3": [("taylorseer", TAYLOR), ("found", FOUND), ("toca", TOCA)],
    "wan": [("fora", FORA), ("clusca", CLUSCA)],
    "cogvideox": [("found", FOUND), ("toca", TOCA)],
    "hunyuan_video": [("fora", FORA), ("toca", TOCA)],
}


def test_two_processes(request: pytest.FixtureRequest) -> None:
    """Of all models, or of three that the seed chooses, so that ranks are started once."""
    chosen = random.Random(Run.seed).sample(sorted(MODELS), 3)
    models = {name: MODELS[name] for name in chosen}
    if request.config.getoption("--every-model"):
        models = MODELS
    first, second = together(2, mesh_work.generations, {"tokens": 2}, models, timeout=600)
    assert first == second
    assert len(first) == sum(map(len, models.values()))
    for name, (error, share) in first.items():
        assert error <= 1e-5, name
        # the tiny model's results, kept for guidance, are as wide as its stream
        assert share <= (0.65 if name == "dit fastercache" else 0.55), name


def test_four_processes() -> None:
    """Two by two, and in a row: each of four with a quarter of the tokens."""
    meshes = {"2x2": {"guidance": 2, "tokens": 2}, "4": {"tokens": 4}}
    plans = {"dit": [("fora", FORA), ("toca", TOCA)]}
    results = together(4, mesh_work.by_meshes, meshes, plans)
    assert all(result == results[0] for result in results)
    assert [*results[0]] == ["2x2 dit fora", "2x2 dit toca", "4 dit fora", "4 dit toca"]
    assert all(error <= 1e-5 and share == 0.25 for error, share in results[0].values())


SAID = {
    "noise": "inputs, such as latents or prompts at step 0",
    "later latents": "inputs, such as latents or prompts at step 1",
    "weights": "weights at step 0",
    "plan": "step, branch, plan or shapes of the call at step 0",
    "step": "step, branch, plan or shapes of the call at step ",
    "tokens": "chosen tokens at step 1",
    "gradients": "has no gradients",
}


def test_ranks_that_do_not_agree_say_so_on_all_ranks() -> None:
    for results in together(2, mesh_work.disagreeing):
        assert results.keys() == SAID.keys()
        for what, said in results.items():
            assert SAID[what] in said, what


@pytest.mark.parametrize(("count", "within"), [(2, True), (4, False)])
def test_a_killed_rank_is_an_error_on_all_others(count: int, within: bool) -> None:
    *others, killed = together(count, mesh_work.dying, within, timeout=60)
    assert killed is None
    for result in others:
        assert result.startswith("StateError: a rank of the mesh is gone, or did not answer in time")


@pytest.mark.parametrize(
    ("plan", "backend", "blocks"), [(presets.taylorseer(5, 2, 1), "aot_eager", 2), (CHOSEN, "inductor", 1)]
)
def test_compiled_without_a_break(plan: Plan, backend: str, blocks: int) -> None:
    for error, (alone, graphs) in together(2, mesh_work.compiled, plan, backend, blocks):
        assert error <= 1e-5
        assert graphs == alone


def test_regions_and_caches_in_host_memory() -> None:
    for found in together(2, mesh_work.with_other_options):
        assert all(error <= 1e-5 for error, _ in found.values())
        assert {name: away > 0 for name, (_, away) in found.items()} == {
            "regions": False,
            "offload": True,
            "max_cache_bytes": False,
        }


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
class TestRefused:
    def test_what_is_no_mesh(self) -> None:
        with pytest.raises(GraphCacheError, match=r"mesh= is a int: give .*init_device_mesh"):
            graphcache.transform(tiny(), FORA, mesh=2)

    def test_dimensions_of_other_names(self) -> None:
        for mesh in (mesh_of(dp=1), init_device_mesh("cpu", (1, 1))):
            with pytest.raises(GraphCacheError, match="mesh_dim_names= says what ranks share out"):
                graphcache.transform(tiny(), FORA, mesh=mesh)

    @pytest.mark.parametrize(
        "options",
        [
            {"sizes": "any"},
            {"stream_weights": True},
            {"backend": "aot"},
            {"backend": {"mode": "reduce-overhead"}},
        ],
    )
    def test_what_does_not_go_with_ranks(self, options: dict[str, Any]) -> None:
        with pytest.raises(GraphCacheError, match="does not go with mesh="):
            graphcache.transform(tiny(), FORA, mesh=mesh_of(tokens=1), **options)

    def test_packages(self, tmp_path: Path) -> None:
        model: Any = graphcache.transform(tiny(), FORA)
        model._graphcache.options = replace(model._graphcache.options, mesh=line(2)[0])
        with pytest.raises(GraphCacheError, match="a package is for one process"):
            graphcache.package(model, tmp_path / "made", sizes=[arguments(tokens=4)])

    def test_one_rank_is_one_process(self) -> None:
        model = graphcache.transform(tiny(), FORA, mesh=mesh_of(tokens=1))
        with torch.no_grad():
            assert_same(model(**arguments()), tiny()(**arguments()))
