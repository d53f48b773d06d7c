"""The command `auto`: from a folder and prompts to a plan, in one call that may be interrupted.

`make test-models` takes every kind of folder.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from typer.testing import CliRunner, Result

import graphcache
from folders import FOLDERS, Folder
from graphcache.cli.automatic import nearer_at_fewer_steps
from graphcache.cli.main import app
from graphcache.libraries.quiet import quiet_loading
from graphcache.planning.comparison import Contender, load_rows
from graphcache.planning.rivals import rivals
from graphcache.runtime.closeness import psnr

FACTORY = """
from linear import Sampler, linear
def made():
    return linear(2), Sampler(tokens=8), [1, 2, 3, 4]
def single():
    return linear(2), Sampler(), [1]
"""
FILES = {
    "settings.json", "profile.json", "families.json", "plan.txt", "tuned.txt", "comparison.json",
    "report.html",
}  # fmt: skip


@pytest.fixture(autouse=True)
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "auto_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(folder: Path, *arguments: str, rivals: str = "--no-rivals") -> Result:
    options = (rivals, "--output", str(folder), "--backend", "none", "--steps", "6", "--iterations", "2")
    return CliRunner().invoke(app, ["auto", *options, "--threads", "1", *arguments], env={"COLUMNS": "200"})


@pytest.mark.few(1)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_and_prompts_give_a_plan_and_a_report(name: str, tmp_path: Path) -> None:
    prompts = ["a fox", "a red fox", "the fox"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts))
    given, out = FOLDERS[name], tmp_path / "out"
    place = given.saved(tmp_path / "pipe")
    options = ("--call", json.dumps(given.arguments), "--prompts", str(tmp_path / "prompts.txt"))
    result = run(out, place, *options, "--speedup", "1.2", "--steps", "4", *given.options, rivals="--rivals")
    assert result.exception is None, result.exception
    assert {path.name for path in out.iterdir() if not path.name.startswith("family-")} == FILES
    profile = graphcache.load_profile(out / "profile.json")
    assert profile.provenance.samples == 2, "of three prompts the last one judges"
    assert (len(profile.handovers) > 0) is (name == "wan_2_2")
    plan = graphcache.Plan.load(out / "tuned.txt")
    assert plan.steps == 4
    assert plan.graph == profile.provenance.graph
    assert plan.promise is not None
    assert (plan.promise.samples, plan.promise.results) == (1, "latent")
    assert f"The plan promises {plan.promise}" in " ".join(result.output.split())
    assert all(row.actions[step] == "#" for row in plan.rows for step in (0, *profile.handovers))
    rows = {row.name: row for row in load_rows(out / "comparison.json")}
    assert {"found", "fora", "taylorseer", "3 steps"} < rows.keys()
    assert "One generation takes" in result.output
    for part in ("profile", "search", "tune", "compare"):
        assert re.search(rf"{part} +\d+ +[\d.]+ +[\d.]+ \w+ +[\d.]+ \w+", result.output), result.output
    rivals_are_told(rows, result.output)
    assert f'plan = graphcache.Plan.load("{out / "tuned.txt"}")' in result.output
    with quiet_loading():
        pipe = diffusers.DiffusionPipeline.from_pretrained(place, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    plain = generated(pipe, given, prompts[2])
    cached = generated(graphcache.transform(pipe, plan), given, prompts[2])
    assert rows["found"].psnr == pytest.approx(float(psnr(cached, plain).mean()))


def rivals_are_told(rows: Mapping[str, Contender], output: str) -> None:
    assert {row.kind for name, row in rows.items() if name in rivals()} == {"rival"}
    for name in rivals():
        ran = rows[name].failure is None
        assert ran == (rows[name].psnr is not None) == (rows[name].speedup > 0)
        assert (f"{name} does not run here: " in output) != ran


def generated(pipe: Any, given: Folder, prompt: str) -> torch.Tensor:
    """The latents of the third prompt, by the pipeline's own call."""
    made = torch.Generator().manual_seed(2)
    arguments = {**given.arguments, "prompt": prompt, "num_inference_steps": 4, "generator": made}
    result = pipe(**arguments, output_type="latent", return_dict=False)[0]
    return result if isinstance(result, torch.Tensor) else torch.stack(result)


def test_a_later_call_goes_on_where_the_first_one_was(tmp_path: Path) -> None:
    arguments = (tmp_path / "out", "auto_factory:made", "--speedup", "1.5")
    first = run(*arguments)
    assert first.exception is None, first.exception
    before = {name: (tmp_path / "out" / name).read_bytes() for name in FILES}
    for name in ("tuned.txt", "comparison.json", "report.html"):
        (tmp_path / "out" / name).unlink()
    again = run(*arguments)
    assert again.exception is None, again.exception
    assert again.output.count("is there") == 2
    after = {name: (tmp_path / "out" / name).read_bytes() for name in FILES}
    for name in ("settings.json", "profile.json", "plan.txt", "tuned.txt"):
        assert after[name] == before[name]


def test_results_for_other_settings_are_not_mixed_up(tmp_path: Path) -> None:
    assert run(tmp_path / "out", "auto_factory:made", "--speedup", "1.5").exception is None
    result = run(tmp_path / "out", "auto_factory:made", "--speedup", "1.6")
    assert isinstance(result.exception, graphcache.GraphCacheError)
    assert "holds results for other settings" in str(result.exception)


def test_fewer_steps_that_come_nearer_are_named() -> None:
    found = Contender("found", "searched", 2.0, 40.0)
    nearer, slower, farther = (
        Contender(f"{n} steps", "fewer steps", *figures)
        for n, figures in enumerate([(2.1, 40.5), (1.9, 60.0), (3.0, 39.0)])
    )
    preset = Contender("fora", "preset", 2.5, 50.0)
    assert nearer_at_fewer_steps([found, nearer, slower, farther, preset]) == [nearer]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("auto_factory:single",), "two samples or more"),
        (("auto_factory:made", "--prompts", "prompts.txt"), "samples of its own"),
        (("auto_factory:made", "--prompts", "empty.txt"), "has no prompt"),
        (("auto_factory:made", "--prompts", "absent.txt"), "cannot be read"),
        (("auto_factory:made", "--detail", "all"), "known are steps, sites, tokens"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a fox\n")
    Path("empty.txt").write_text("\n")
    result = run(tmp_path / "out", *arguments)
    assert isinstance(result.exception, graphcache.GraphCacheError), result.output
    assert words in str(result.exception)
    assert run(tmp_path / "out", "auto_factory:made").exception is None, (
        "nothing is in the way of a right call"
    )
