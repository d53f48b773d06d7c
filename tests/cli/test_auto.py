"""The command `auto`: from a folder and prompts to a plan, in one call that may be interrupted."""

import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner, Result

import graphcache
from graphcache.cli.main import app
from graphcache.planning.comparison import load_rows
from graphcache.planning.rivals import rivals
from pipelines import PIPELINES

FACTORY = """
from linear import Sampler, linear
def made():
    return linear(2), Sampler(tokens=8), [1, 2, 3, 4]
def single():
    return linear(2), Sampler(), [1]
"""
FILES = {"settings.json", "profile.json", "plan.txt", "tuned.txt", "comparison.json", "report.html"}


@pytest.fixture(autouse=True)
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "auto_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(folder: Path, *arguments: str, rivals: str = "--no-rivals") -> Result:
    options = (
        rivals,
        "--output",
        str(folder),
        "--backend",
        "none",
        "--steps",
        "6",
        "--iterations",
        "2",
        "--threads",
        "1",
    )
    return CliRunner().invoke(app, ["auto", *arguments, *options], env={"COLUMNS": "200"})


def text_encoder(channels: int) -> tuple[object, object]:
    """A tokenizer of four words and an encoder with random weights."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "fox": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=8, **special)
    sizes = {"d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=8, d_model=channels, **sizes)
    return tokenizer, transformers.T5EncoderModel(config).eval()


def saved(folder: Path) -> str:
    """A whole pipeline with text encoder and decoder, all tiny."""
    torch.manual_seed(0)
    parts = PIPELINES["pixart"].make()
    tokenizer, encoder = text_encoder(parts.transformer.config.caption_channels)
    decoder = diffusers.AutoencoderKL(
        latent_channels=4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    whole = diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=decoder, transformer=parts.transformer,
        scheduler=parts.scheduler,
    )  # fmt: skip
    whole.save_pretrained(folder)
    return str(folder)


def test_a_folder_and_prompts_give_a_plan_and_a_report(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a fox\n\na red fox\nthe fox\n")
    call = {"height": 16, "width": 16, "max_sequence_length": 8, "use_resolution_binning": False}
    given = (
        "--call",
        json.dumps({**call, "clean_caption": False}),
        "--prompts",
        str(tmp_path / "prompts.txt"),
    )
    result = run(
        tmp_path / "out", saved(tmp_path / "pipe"), *given, "--conditional", "last", "--speedup", "1.3",
        rivals="--rivals",
    )  # fmt: skip
    assert result.exception is None, result.exception
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    profile = graphcache.load_profile(tmp_path / "out" / "profile.json")
    assert profile.provenance.samples == 2, "of three prompts the last one judges"
    plan = graphcache.Plan.load(tmp_path / "out" / "tuned.txt")
    assert plan.steps == 6
    assert plan.graph == profile.provenance.graph
    rows = {row.name: row for row in load_rows(tmp_path / "out" / "comparison.json")}
    assert {"found", "fora", "taylorseer", "5 steps"} < rows.keys()
    kinds = {row.kind for name, row in rows.items() if name in rivals()}
    assert kinds == {"rival"}
    for name in rivals():
        ran = rows[name].failure is None
        assert ran == (rows[name].psnr is not None) == (rows[name].speedup > 0)
        assert (f"{name} does not run here: " in result.output) != ran
    assert "PixArtTransformer2DModel has no enable_cache" in str(rows["FirstBlockCache"].failure)
    assert "One generation takes" in result.output
    for part in ("profile", "search", "tune", "compare"):
        assert re.search(rf"{part} +\d+ +[\d.]+ +[\d.]+ \w+ +[\d.]+ \w+", result.output), result.output
    assert f'plan = graphcache.Plan.load("{tmp_path / "out" / "tuned.txt"}")' in result.output


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
