"""Sharding over Ray: the same results as in one process, whatever becomes of a worker."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphcache.ir.errors import GraphCacheError
from graphcache.ir.plan import Plan
from graphcache.planning.automatic import checker
from graphcache.planning.cluster import Cluster, Settings
from graphcache.planning.comparison import compare
from graphcache.planning.profile import Profile
from graphcache.planning.profiling import profile
from graphcache.planning.sampling import Sampling
from tiny import tiny

SAMPLES = (3, 4, 5)
STEPS = 4

FROM_ELSEWHERE = """
import sys
from graphcache.planning.cluster import Cluster
factor = 10
def scaled(number):
    return factor * number
with Cluster(sys.argv[1], cpus_per_task=1) as cluster:
    print(list(cluster.map(scaled, [3])))
"""


def euler(model: nn.Module, seed: int, steps: int) -> Tensor:
    """A generation of the tiny model from a seed's noise."""
    made = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 3, 4, generator=made), torch.randn(2, 4, generator=made)
    for step in range(steps):
        x = x + model(x, timestep=torch.full((2,), 1 - step / steps), text=text) / steps
    return x


def runs(folder: Path, number: int) -> int:
    """How often an item began, counted by the marks that it leaves."""
    return len(list(folder.glob(f"{number}.*")))


def marking(folder: Path, lost: Callable[[int, int], bool]) -> Callable[[int], int]:
    """Squares a number; its worker dies where `lost` says so of the number and the runs before."""

    def square(number: int) -> int:
        before = runs(folder, number)
        (folder / f"{number}.{before}").touch()
        if lost(number, before):
            os.kill(os.getpid(), signal.SIGKILL)
        return number**2

    return square


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="needs graphcache-dit[ray]")
    with Cluster(num_cpus=2, cpus_per_task=1, retries=1) as found:
        yield found


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def assert_same(left: Profile, right: Profile) -> None:
    """Every bit of two profiles but the seconds that measuring took."""
    untimed = [tuple(replace(site, seconds=0.0) for site in made.sites) for made in (left, right)]
    assert untimed[0] == untimed[1]
    for name in {field.name for field in fields(Profile)} - {"sites", "timings"}:
        np.testing.assert_equal(getattr(left, name), getattr(right, name), err_msg=name)


def test_a_profile_is_that_of_one_process_bit_for_bit(cluster: Cluster) -> None:
    alone = profile(tiny(2), SAMPLES, steps=STEPS, sampler=euler)
    assert_same(profile(tiny(2), SAMPLES, steps=STEPS, sampler=euler, run=cluster.map), alone)


def test_candidates_are_checked_alike(cluster: Cluster) -> None:
    plans = [Plan.parse(f"plan steps={STEPS} preset=none\n* {actions}\n") for actions in ("#.#.", "##..")]
    check = checker(Sampling.of(tiny(2), euler), SAMPLES, STEPS)
    errors = list(map(check, plans))
    assert list(cluster.map(check, plans)) == errors
    assert all(errors)


def test_rows_are_alike_but_for_the_times(cluster: Cluster) -> None:
    plans = {"half": Plan.parse(f"plan steps={STEPS} preset=none\n* #.#.\n")}
    options: dict[str, Any] = {"steps": STEPS, "sampler": euler, "fewer": {"two": (None, 2)}, "backend": None}
    found = [compare(tiny(2), plans, SAMPLES[:2], run=run, **options) for run in (map, cluster.map)]
    here, there = ([replace(row, speedup=0.0, ms=None) for row in rows] for rows in found)
    assert here == there
    assert {row.name for row in here if row.psnr} == {"half", "two"}


@pytest.mark.usefixtures("two_threads")
def test_workers_take_over_the_threads_so_that_sums_have_the_same_bits(cluster: Cluster) -> None:
    numbers = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))

    def total(scale: int) -> tuple[int, float]:
        return torch.get_num_threads(), float((scale * numbers).sum())

    assert list(cluster.map(total, [1, 3])) == list(map(total, [1, 3]))
    torch.set_num_threads(1)
    assert list(cluster.map(total, [1, 3])) == list(map(total, [1, 3]))


def test_results_keep_the_items_order(cluster: Cluster, tmp_path: Path) -> None:
    def late_first(number: int) -> int:
        while number == 0 and not (tmp_path / "1").exists():
            pass
        (tmp_path / str(number)).touch()
        return number

    assert list(cluster.map(late_first, [0, 1, 2])) == [0, 1, 2]


def test_what_an_item_leaves_behind_reaches_no_other(cluster: Cluster) -> None:
    kept: list[int] = []

    def remember(values: np.ndarray) -> tuple[int, float, np.ndarray]:
        kept.append(1)
        values += 1
        return len(kept), float(torch.rand(())), values

    (first, a, values), (second, b, _) = cluster.map(remember, [np.zeros(100_000), np.zeros(3)])
    values += 1
    assert (first, second, kept) == (1, 1, [])
    assert [a, b] == [row[1] for row in cluster.map(remember, [np.zeros(1), np.zeros(1)])]


def test_an_error_is_raised_as_it_is_and_names_its_item(cluster: Cluster) -> None:
    results = cluster.map(lambda text: int(text), ["7", "seven", "8"])
    assert next(results) == 7
    with pytest.raises(ValueError, match="invalid literal") as caught:
        next(results)
    (note,) = caught.value.__notes__
    assert note.startswith("item 1 of 3: 'seven'; on its worker:\nTraceback")


def test_an_error_that_cannot_be_sent_keeps_its_words(cluster: Cluster) -> None:
    class Odd(Exception):
        def __init__(self, left: str, right: str) -> None:
            super().__init__(f"{left} and {right}")

    def fail(number: int) -> None:
        raise Odd("this", "that")

    with pytest.raises(GraphCacheError, match="Odd: this and that"):
        list(cluster.map(fail, [0]))


def test_a_function_that_cannot_be_sent_is_refused(cluster: Cluster) -> None:
    lock = threading.Lock()
    with pytest.raises(GraphCacheError, match="the function cannot be sent"):
        list(cluster.map(lambda number: lock.locked(), [0]))


def test_another_processs_cluster_is_left_running(cluster: Cluster) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", FROM_ELSEWHERE, address]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[30]\n", done.stderr
    assert list(cluster.map(abs, [-1])) == [1]


def test_a_connection_that_the_process_has_is_used_and_kept(cluster: Cluster) -> None:
    with Cluster(cpus_per_task=1) as again:
        assert list(again.map(abs, [-1])) == [1]
    assert list(cluster.map(abs, [-2])) == [2]
    with pytest.raises(GraphCacheError, match="connected to a Ray cluster already"), Cluster("host:1"):
        pass


def test_items_too_large_for_every_machine_are_refused(cluster: Cluster) -> None:
    with pytest.raises(GraphCacheError, match=r"3 CPUs and 1 GPUs.*the most CPUs of one: 2"):
        Cluster(cpus_per_task=3, gpus_per_task=1).__enter__()


def test_an_address_where_nothing_listens_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs graphcache-dit[ray]")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(
        GraphCacheError, match=r"no Ray cluster answers at 127\.0\.0\.1:1: .*ray start --head"
    ):
        Cluster("127.0.0.1:1").__enter__()


def test_a_cluster_that_is_not_entered_says_so() -> None:
    with pytest.raises(GraphCacheError, match="with Cluster"):
        Cluster().map(abs, [1])


def test_other_versions_are_refused() -> None:
    other = replace(Settings.current(), versions=(("torch", "1.0"),))
    with pytest.raises(GraphCacheError, match=r"a machine of the cluster has .*sends the work torch 1\.0"):
        other.take_over()


def test_missing_ray_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(GraphCacheError, match=r"pip install graphcache-dit\[ray\]"), Cluster():
        pass


def test_a_lost_worker_costs_its_item_only(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    square = marking(tmp_path, lambda number, before: number == 1 and before == 0)
    with caplog.at_level(logging.WARNING, "graphcache"):
        assert list(cluster.map(square, range(4))) == [0, 1, 4, 9]
    assert [runs(tmp_path, number) for number in range(4)] == [1, 2, 1, 1]
    assert caplog.messages == [
        "item 1 of 4 lost its worker (WorkerCrashedError) on attempt 1 of 2; it is run again"
    ]


def test_an_item_that_always_loses_its_worker_is_told_after_those_before_it(
    cluster: Cluster, tmp_path: Path
) -> None:
    with Cluster(cpus_per_task=1, retries=0) as impatient:
        results = impatient.map(marking(tmp_path, lambda number, before: number == 1), range(2))
        assert next(results) == 0
        with pytest.raises(
            GraphCacheError, match=r"item 1 of 2 lost its worker .* attempt 1 of 1; .*cpus_per_task"
        ):
            next(results)
