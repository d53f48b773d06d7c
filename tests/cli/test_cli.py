"""The command line, run as a user runs it."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from diffusers.utils.logging import is_progress_bar_enabled
from typer.testing import CliRunner, Result

import graphcache
from folders import FOLDERS
from graphcache import importers, presets
from graphcache.cli.main import app, main
from graphcache.cli.sources import Placement, load_model, load_sampled
from graphcache.cli.warming import starts
from graphcache.cost.pricing import load_prices
from graphcache.ir.plan import Plan
from pipelines import PIPELINES
from unbuilt import unbuilt
from zoo import CASES

FACTORY = """
def made():
    from zoo import CASES
    case = CASES["dit"]
    return case.make(), case.kwargs(batch=1)
def bare():
    from zoo import CASES
    return CASES["dit"].make()
def inputs(model):
    from zoo import CASES
    return CASES["dit"].kwargs(batch=2)
def nothing():
    return 3
def beside(model):
    return model
def experts():
    import untraced
    return untraced.holding(), untraced.arguments()
def without_diffusers():
    from tiny import arguments, tiny
    return tiny(2), arguments(tokens=8)
"""


@pytest.fixture(autouse=True)
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cli_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def refusal(*arguments: str) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, graphcache.GraphCacheError), result.output
    return str(result.exception)


def test_inspect_lists_every_site_with_its_share() -> None:
    output = run("inspect", "cli_factory:made").output
    for name in ("transformer_blocks.0.self", "transformer_blocks.1.mlp"):
        assert name in output
    assert "2 blocks, 4 sites (2 self, 2 mlp)" in output


def test_inspect_says_what_is_called_because_it_cannot_be_traced() -> None:
    lines = run("inspect", "cli_factory:experts").output.splitlines()
    assert "2 modules 'blocks.*.inner' (Experts) cannot be traced" in lines[-1]


def test_inspect_takes_the_inputs_from_a_function_of_the_model() -> None:
    assert "f32[2,16,32]" in run("inspect", "cli_factory:bare", "--inputs", "cli_factory:inputs").output


def test_price_marks_the_cheapest_plan_at_every_size(tmp_path: Path) -> None:
    asked = ("price", "cli_factory:made", "--plan", "fora:6:interval=2", "--plan", "fora:6:interval=3")
    target = tmp_path / "prices.json"
    lines = run(*asked, "--at", "batch=1", "--at", "batch=4", "--output", str(target)).output.splitlines()
    assert [line.split()[:3] for line in lines[2::2]] == [
        ["→", f"f32[{batch},4,8,8]", "fora:6:interval=3"] for batch in (1, 4)
    ]
    found = load_prices(target)
    assert [(item.plan[-1], item.sizes["batch"]) for item in found] == [
        ("2", 1),
        ("3", 1),
        ("2", 4),
        ("3", 4),
    ]
    assert found[2].flops == 4 * found[0].flops
    assert "f32[1,4,8,8]" in run(*asked).output


def test_price_takes_the_arguments_of_a_pipeline(tmp_path: Path) -> None:
    PIPELINES["dit"].make().save_pretrained(tmp_path / "pipe")
    call = ("--call", '{"class_labels": [1], "guidance_scale": 1.0}')
    output = run("price", str(tmp_path / "pipe"), *call, "--at", '{"class_labels": [1, 2, 3]}').output
    assert "f32[3,4,8,8]" in output
    assert "is no pipeline's folder" in refusal("price", "cli_factory:made", "--at", "{}")
    assert "--at is not JSON" in refusal("price", str(tmp_path / "pipe"), "--at", "{")
    assert "height is no whole number" in refusal("price", "cli_factory:made", "--at", "height=1.5")
    assert "'height' is no name=value" in refusal("price", "cli_factory:made", "--at", "height")


def test_a_folder_with_a_transformer_is_loaded(tmp_path: Path) -> None:
    CASES["dit"].make().save_pretrained(tmp_path / "dit")
    model, kwargs = load_model(str(tmp_path / "dit"), "cli_factory:inputs")
    with torch.no_grad():
        ours, expected = model(**kwargs)[0], CASES["dit"].make()(**kwargs)[0]
    assert torch.equal(ours, expected)


def test_a_folder_with_a_pipeline_is_called_to_learn_the_inputs(tmp_path: Path) -> None:
    PIPELINES["dit"].make().save_pretrained(tmp_path / "pipe")
    result = run("inspect", str(tmp_path / "pipe"), "--call", '{"class_labels": [1]}')
    assert "self" in result.output, result.exception
    message = refusal("inspect", str(tmp_path / "pipe"))
    assert "failed before it called its denoiser" in message
    assert "--call" in message


def test_other_libraries_say_nothing_in_between(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    PIPELINES["dit"].make().save_pretrained(tmp_path / "pipe")
    capsys.readouterr()
    call = '{"class_labels": [1], "guidance_scale": 1.0}'
    lines = run("inspect", str(tmp_path / "pipe"), "--call", call).output.splitlines()
    assert lines[0].startswith("┏")
    assert lines[-1].startswith("2 blocks, 4 sites")
    assert not [warning for warning in recwarn if warning.category is FutureWarning]
    assert "".join(capsys.readouterr()) == ""
    assert is_progress_bar_enabled()


@pytest.mark.parametrize("text", ["root:x:0", "[red]"])
def test_a_users_text_is_no_markup(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is a long message broken into lines."""
    given = text + "long" * 50
    monkeypatch.setattr(sys, "argv", ["graphcache", "plan", given])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    assert capsys.readouterr().out == f"error: '{given}' cannot name a preset\n"


def test_the_version_is_the_packages() -> None:
    assert run("--version").output.startswith(f"graphcache {metadata.version('graphcache-dit')}, PyTorch")


def test_a_folders_weights_go_where_the_options_say(tmp_path: Path) -> None:
    PIPELINES["dit"].make().save_pretrained(tmp_path / "pipe")
    call = '{"class_labels": [1], "guidance_scale": 1.0}'
    output = run("inspect", str(tmp_path / "pipe"), "--call", call, "--dtype", "bfloat16").output
    assert "bf16[1,16,32]" in output
    found = load_sampled(str(tmp_path / "pipe"), {}, 1, Placement("meta", "float64"))
    weights = next(found.model_or_pipe.transformer.parameters())
    assert (weights.device.type, weights.dtype) == ("meta", torch.float64)
    asked = ("profile", str(tmp_path / "pipe"), "--steps", "3", "--call", call)
    assert "returns no tensors" in refusal(*asked)
    assert "leave the number out" in refusal(*asked, "--device", "cpu:0", "--ray", "local")


def test_plan_prints_what_parse_reads(tmp_path: Path) -> None:
    assert Plan.parse(run("plan", "fora", "--steps", "7").output) == graphcache.presets.fora(7)
    target = tmp_path / "plan.json"
    run(
        "plan",
        "taylorseer",
        "--steps",
        "9",
        "--set",
        "order=1",
        "--set",
        "lite=true",
        "--output",
        str(target),
    )
    assert Plan.load(target) == graphcache.presets.taylorseer(9, order=1, lite=True)


def test_plan_imports_the_schedules_of_other_tools(tmp_path: Path) -> None:
    source, target = tmp_path / "schedule.json", tmp_path / "plan.txt"
    source.write_text('{"attn1-1": [1, 0, 0, 1], "own": [1, 0, 1, 0]}')
    sites = ("--set", "own=@parallel", "--set", "blocks=2")
    run("plan", "--from", "smoothcache", str(source), *sites, "--output", str(target))
    assert Plan.load(target) == importers.smoothcache(source, {"own": "@parallel"}, blocks=2)
    bounds = ("--set", "front=1", "--set", "back=1", "--set", "blocks=3,4")
    mask = run("plan", "--from", "steps-mask", "1,0,0,1", *bounds).output
    assert Plan.parse(mask) == importers.steps_mask([1, 0, 0, 1], front=1, back=1, blocks=(3, 4))
    other = run("plan", "--from", "steps-mask", "1,0,1,0", "--steps", "6").output
    assert Plan.parse(other).rows == importers.steps_mask([1, 0, 1, 0, 1, 0]).rows
    ratios = run(
        "plan", "--from", "magcache", "1,1.02,1,0.99", "--steps", "8", "--set", "threshold=0.1"
    ).output
    assert Plan.parse(ratios) == importers.magcache([1, 1.02, 1, 0.99], steps=8, threshold=0.1)


def test_show_prints_the_grid_and_the_letters() -> None:
    output = run("show", "taylorseer:7:order=1").output
    assert "#tt#tt#" in output
    assert "t taylorseer order=1" in output


def test_bench_writes_every_contender_beside_the_plain_model(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    plans = ("--plan", "fora:4:interval=2", "--plan", "compute:4")
    others = ("--beside", "cli_factory:beside", "--backend", "none", "--rounds", "1", "--json", str(target))
    result = run("bench", "cli_factory:made", *plans, *others, "--plain", "--floors", "--threads", "1")
    assert result.exception is None, result.exception
    found = json.loads(target.read_text())
    assert found["versions"]["torch"] == torch.__version__
    assert found["starts"] == []
    rows = {row["name"]: row for row in found["contenders"]}
    plain = {"eager", "torch.compile", "compiled block by block"}
    assert set(rows) == {*plain, "beside", "fora:4:interval=2", "compute:4"}
    computed, reused = (phase["floor"] for phase in rows["fora:4:interval=2"]["phases"])
    assert computed["flops_ms"] > reused["flops_ms"]
    assert rows["compute:4"]["ideal"] == pytest.approx(1, rel=0.05)
    assert 1.5 < rows["fora:4:interval=2"]["ideal"] < 2
    assert rows["fora:4:interval=2"]["graphs"] == 2
    assert rows["torch.compile"]["ideal"] is None


def test_bench_times_plans_on_several_ranks_beside_one(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    asked = ("bench", "cli_factory:without_diffusers", "--plan", "fora:4:interval=2", "--backend", "none")
    result = run(*asked, "--ranks", "2", "--rounds", "1", "--threads", "1", "--json", str(target))
    assert result.exception is None, result.exception
    assert "ms/step on 2" in result.output
    (row,) = json.loads(target.read_text())["contenders"]
    assert row["speedup"] == row["alone_ms"] / row["ms"]
    assert row["rank_bytes"] < 0.7 * row["alone_bytes"]  # with what is computed once, which ranks have whole
    assert "leave out others" in refusal(*asked, "--ranks", "2", "--plain")
    assert "give at least 2" in refusal(*asked, "--ranks", "0")


def test_starts_are_those_of_two_processes_with_one_empty_cache_for_each_plan() -> None:
    caches = list[str]()

    def start(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        caches.append(env["TORCHINDUCTOR_CACHE_DIR"])
        assert not Path(caches[-1]).exists()
        given = command[command.index("warmup") + 1 :]
        result = run("warmup", *given)
        assert result.exception is None, result.exception
        return SimpleNamespace(returncode=0)

    options = {
        "backend": "none",
        "regions": False,
        "inputs": None,
        "threads": 1,
        "latents": ["hidden_states"],
    }
    with patch.object(subprocess, "run", start):
        plans = {"fora": presets.fora(4, interval=2), "compute": presets.compute(4)}
        found = starts(plans, "cli_factory:made", options)
    assert [item["plan"] for item in found] == ["fora", "compute"]
    assert all(item[kind]["seconds"] > 0 for item in found for kind in ("cold", "warm"))
    assert caches[0] == caches[1] != caches[2] == caches[3]


def test_a_process_that_fails_to_get_ready_says_why() -> None:
    with pytest.raises(graphcache.GraphCacheError, match="cannot import no_such_module"):
        starts({"fora": presets.fora(4)}, "no_such_module:made", {"regions": None})


def test_warmup_takes_a_pipelines_sizes(tmp_path: Path) -> None:
    PIPELINES["dit"].make().save_pretrained(tmp_path / "pipe")
    calls = [json.dumps({"class_labels": labels, "guidance_scale": 1.0}) for labels in ([1], [1, 2])]
    target = tmp_path / "ready.json"
    options = (
        "--plan",
        "fora:4",
        "--backend",
        "none",
        "--json",
        str(target),
        "--captures",
        str(tmp_path / "kept"),
    )
    result = run("warmup", str(tmp_path / "pipe"), *options, "--call", calls[0], "--call", calls[1])
    assert result.exception is None, result.exception
    assert len([*(tmp_path / "kept").iterdir()]) == 2
    assert "2 sizes of calls" in result.output
    assert json.loads(target.read_text())["seconds"] > 0


def test_what_other_libraries_miss_when_they_are_imported_is_not_said() -> None:
    code = "from graphcache.cli.sources import load_pipeline; load_pipeline('nowhere')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stderr.startswith("Traceback"), done.stderr
    assert not done.stdout


def test_package_takes_a_pipelines_sizes(tmp_path: Path) -> None:
    PIPELINES["dit"].make().save_pretrained(tmp_path / "pipe")
    calls = [json.dumps({"class_labels": labels, "guidance_scale": 1.0}) for labels in ([1], [1, 2])]
    options = ("--plan", "fora:4", "--output", str(tmp_path / "made"))
    with unbuilt():
        result = run("package", str(tmp_path / "pipe"), *options, "--call", calls[0], "--call", calls[1])
        assert result.exception is None, result.exception
        pipe, other = PIPELINES["dit"].make(), PIPELINES["dit"].make()
        pipe.transformer = graphcache.load(tmp_path / "made", trust=True)
        graphcache.transform(other, presets.fora(4))
        found, expected = (
            made([1, 2], num_inference_steps=4, guidance_scale=1.0, output_type="np",
                 generator=torch.Generator().manual_seed(0)).images
            for made in (pipe, other)
        )  # fmt: skip
    assert "for 2 sizes of calls" in result.output
    assert abs(found - expected).max() < 1e-4
    assert len(pipe.transformer.summary().branches[0].steps) == 4


def test_package_takes_one_of_a_pipelines_denoisers_by_its_name(tmp_path: Path) -> None:
    two = FOLDERS["wan_2_2"]
    call = json.dumps({"prompt": "fox", **two.arguments})
    options = ("package", two.saved(tmp_path / "pipe"), "--plan", "fora:2", "--call", call)
    options += ("--output", str(tmp_path / "made"))
    result = run(*options)
    assert "part= must name one of transformer, transformer_2" in str(result.exception)
    assert not (tmp_path / "made").exists()
    with unbuilt():
        result = run(*options, "--part", "transformer_2")
        assert result.exception is None, result.exception
        graphcache.load(tmp_path / "made", trust=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "cli_factory"), "neither a folder nor package.module:factory"),
        (("inspect", "no_such_module:x"), "cannot import no_such_module"),
        (("inspect", "cli_factory:missing"), "has no missing"),
        (("inspect", "cli_factory:nothing"), "gave a int, not a torch module"),
        (("inspect", "cli_factory:bare"), "does not say how to call the model"),
        (("inspect", "cli_factory:made", "--dtype", "bfloat16"), "makes its model itself"),
        (("profile", "cli_factory:made", "--steps", "3", "--device", "cpu"), "makes its model itself"),
        (("inspect", ".", "--dtype", "half_size"), "'half_size' is no floating-point dtype"),
        (("inspect", ".", "--dtype", "int8"), "'int8' is no floating-point dtype"),
        (("inspect", ".", "--device", "abacus"), "device 'abacus' cannot be used"),
        (("inspect", "cli_factory:made", "--call", "{"), "--call is not JSON"),
        (("inspect", "cli_factory:made", "--call", "3"), "must be a JSON object"),
        (("plan", "fora", "--set", "interval"), "is no name=value"),
        (("plan", "fourier"), "unknown preset"),
        (("plan", "1,0", "--from", "teacache"), "known are smoothcache, steps-mask and magcache"),
        (("plan", "1,a", "--from", "steps-mask"), "'1,a' is no list of numbers such as 1,0,0,1"),
        (("plan", "1", "--from", "magcache", "--set", "retention=0"), "not 'retention'"),
        (("plan", "absent.json", "--from", "smoothcache"), "absent.json: cannot be read"),
        (("show", "fora"), "does not say how many steps"),
        (("show", "fora:x"), "write preset:steps:key=value"),
        (("show", "absent.txt"), "absent.txt"),
    ],
)
def test_mistakes_are_answered_in_words(arguments: tuple[str, ...], words: str) -> None:
    assert words in refusal(*arguments)


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    assert "neither model_index.json nor config.json" in refusal("inspect", str(tmp_path))
