"""What diffusers promises of its models, and tests on each of them, holds of transformed ones.

The plan computes every step and has one, so that each call is a generation of its own and every result can be
held against the original's, bit for bit.
"""

import copy
import inspect
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import hooks
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

import graphcache
from graphcache import CaptureError, presets
from inside import programs_of
from pipelines import PIPELINES
from reference import assert_same, cast
from zoo import CASES

MODELS = ["dit", "sd3", "flux", "wan", "qwen_image"]
LORA_FILE = "pytorch_lora_weights.safetensors"


def every_model(test: Any) -> Any:
    """A test of two models in each run."""
    return pytest.mark.few(2)(pytest.mark.parametrize("name", MODELS)(test))


@pytest.fixture(autouse=True)
def inference() -> Any:
    with torch.no_grad():
        yield


def transformed(model: nn.Module) -> Any:
    return graphcache.transform(model, presets.compute(1))


def pair(name: str) -> tuple[Any, Any]:
    """A model and the same under a plan."""
    model = CASES[name].make()
    return model, transformed(model)


def inputs(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    """One call's arguments, newly built, in the structure that the model returns by default."""
    arguments: dict[str, Any] = cast(CASES[name].kwargs(), dtype)
    del arguments["return_dict"]
    return {**arguments, **changes}


def assert_right(name: str, cached: Any, model: Any, dtype: torch.dtype = torch.float32) -> None:
    assert_same(cached(**inputs(name, dtype))[0], model(**inputs(name, dtype))[0])


def captures(cached: Any) -> list[Any]:
    """What stays the same object for as long as nothing is captured again."""
    return [program.captured for program in programs_of(cached)]


@every_model
def test_it_is_the_model_to_whoever_looks(name: str) -> None:
    model, cached = pair(name)
    assert isinstance(cached, type(model))
    assert type(cached).__name__ == type(model).__name__
    assert repr(cached) == repr(model)
    assert cached.config is model.config
    assert [path for path, _ in cached.named_modules()] == [path for path, _ in model.named_modules()]
    assert [*cached.state_dict()] == [*model.state_dict()]
    assert cached.get_memory_footprint() == model.get_memory_footprint()
    for choice in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert cached.num_parameters(**choice) == model.num_parameters(**choice)
    assert inspect.signature(cached.forward) == inspect.signature(model.forward)
    assert next(iter(inspect.signature(cached.forward).parameters)) == CASES[name].latent


def test_attributes_are_found_where_the_model_has_them(recwarn: pytest.WarningsRecorder) -> None:
    _, cached = pair("dit")
    cached.noted = 5
    cached.register_to_config(written=6)
    recwarn.clear()
    assert cached.noted == 5
    assert cached.save_pretrained == cached.save_pretrained
    assert not recwarn
    with pytest.warns(FutureWarning, match="written"):
        assert cached.written == 6
    with pytest.raises(AttributeError, match=r"^'DiTTransformer2DModel' object has no attribute 'missing'$"):
        _ = cached.missing


@every_model
def test_equal_inputs_give_equal_results_of_the_models_own_kind(name: str) -> None:
    model, cached = pair(name)
    expected = model(**inputs(name))
    for _ in range(2):
        result = cached(**inputs(name))
        assert type(result) is type(expected)
        assert_same(dict(result), dict(expected))


def test_a_tuple_is_returned_where_one_is_asked_for() -> None:
    model, cached = pair("dit")
    expected = model(**inputs("dit"))
    assert_same(cached(**inputs("dit"), return_dict=False), expected.to_tuple())


def save_sharded(model: Any, folder: Path, **how: Any) -> None:
    model.save_pretrained(folder, max_shard_size=model.get_memory_footprint() * 3 // 4, **how)


def shards(folder: Path, index: str) -> set[str]:
    return set(json.loads((folder / index).read_text())["weight_map"].values())


STEM = "diffusion_pytorch_model"


@every_model
def test_whole_files_hold_what_the_model_holds(name: str, tmp_path: Path) -> None:
    model, cached = pair(name)
    for safe, ending in ((True, "safetensors"), (False, "bin")):
        cached.save_pretrained(tmp_path / ending, variant="fp16", safe_serialization=safe)
        assert {path.name for path in (tmp_path / ending).iterdir()} == {
            "config.json",
            f"{STEM}.fp16.{ending}",
        }
        loaded = type(model).from_pretrained(tmp_path / ending, variant="fp16")
        assert_same(loaded.state_dict(), model.state_dict())
        assert type(loaded) is type(model)
        with pytest.raises(OSError, match="no file named"):
            type(model).from_pretrained(tmp_path / ending)


@every_model
def test_shards_hold_what_the_model_holds(name: str, tmp_path: Path) -> None:
    model, cached = pair(name)
    save_sharded(cached, tmp_path / "plain")
    save_sharded(cached, tmp_path / "variant", variant="fp16")
    names = shards(tmp_path / "plain", f"{STEM}.safetensors.index.json")
    assert names == {path.name for path in (tmp_path / "plain").glob("*.safetensors")}
    assert len(names) > 1
    names = shards(tmp_path / "variant", f"{STEM}.safetensors.index.fp16.json")
    assert all(shard.startswith(f"{STEM}.fp16-") for shard in names)
    for folder, variant in (("plain", None), ("variant", "fp16")):
        loaded = type(model).from_pretrained(tmp_path / folder, variant=variant)
        assert_same(loaded.state_dict(), model.state_dict())


def test_a_saved_model_is_found_by_its_name_and_transformed_again(tmp_path: Path) -> None:
    model, cached = pair("sd3")
    cached.save_pretrained(tmp_path)
    loaded = diffusers.AutoModel.from_pretrained(str(tmp_path), device_map="cpu")
    assert type(loaded) is type(model)
    assert_right("sd3", transformed(loaded), model)


def test_a_saved_pipeline_names_the_models_own_class(tmp_path: Path) -> None:
    tiny_pipe = PIPELINES["dit"]
    pipe = graphcache.transform(tiny_pipe.make(), presets.compute(2))
    expected = tiny_pipe.generate(pipe, 2)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_same(tiny_pipe.generate(loaded, 2), expected)


@pytest.mark.parametrize("device_map", [-1, "nowhere"])
def test_a_wrong_device_map_is_diffusers_own_error(device_map: Any, tmp_path: Path) -> None:
    model, cached = pair("dit")
    cached.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device_map"):
        type(model).from_pretrained(tmp_path, device_map=device_map)


def test_weights_saved_in_a_dtype_load_in_it(tmp_path: Path) -> None:
    (model, cached), dtype = pair("sd3"), torch.bfloat16
    assert cached.to(dtype) is cached
    cached.save_pretrained(tmp_path)
    for sparing in (True, False):
        loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=sparing)
        assert loaded.dtype == dtype
    assert_right("sd3", transformed(loaded), cached, dtype)


CONVERSIONS: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "to": (lambda model: model.to("cpu", torch.float64), torch.float64),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_conversion_in_place_is_seen(conversion: str) -> None:
    model, cached = pair("dit")
    cached(**inputs("dit"))
    convert, dtype = CONVERSIONS[conversion]
    assert convert(cached) is cached
    assert cached.dtype == model.dtype == dtype
    assert_right("dit", cached, model, dtype)


def test_a_move_moves_the_original_too() -> None:
    model, cached = pair("dit")
    assert cached.to("meta") is cached
    assert cached.device == model.device == torch.device("meta")


def test_modules_kept_in_float32_stay_so(tmp_path: Path) -> None:
    model, cached = pair("wan")
    cached.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    again = transformed(loaded)
    for path, parameter in again.named_parameters():
        kept = any(part in path.split(".") for part in model._keep_in_fp32_modules)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16)
    assert_right("wan", again, loaded, torch.bfloat16)


@pytest.fixture
def diffusers_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        yield caplog
    diffusers_logging.disable_propagation()


def test_a_bare_conversion_of_such_a_model_warns(diffusers_log: pytest.LogCaptureFixture) -> None:
    pair("wan")[1].to(torch.float16)
    assert "modules in WanTransformer3DModel that should be kept in float32" in diffusers_log.text


def test_loaded_weights_and_averaged_ones_are_used() -> None:
    model, cached = pair("sd3")
    before = cached(**inputs("sd3"))[0]
    cached.load_state_dict({path: value * 1.1 for path, value in model.state_dict().items()})
    average = EMAModel(cached.parameters())
    assert_right("sd3", cached, model)
    assert not torch.equal(cached(**inputs("sd3"))[0], before)
    for parameter in cached.parameters():
        parameter.mul_(0.5)
    average.copy_to(cached.parameters())
    assert_right("sd3", cached, model)


def test_gradient_checkpointing_changes_nothing_in_eval_mode() -> None:
    model, cached = pair("sd3")
    assert not cached.is_gradient_checkpointing
    cached.enable_gradient_checkpointing()
    assert cached.is_gradient_checkpointing
    assert model.is_gradient_checkpointing
    with torch.enable_grad():
        assert_right("sd3", cached, model)
    cached.disable_gradient_checkpointing()
    assert not cached.is_gradient_checkpointing
    assert_right("sd3", cached, model)


@every_model
def test_training_mode_is_refused_until_it_is_left(name: str) -> None:
    _, cached = pair(name)
    assert cached.train() is cached
    with pytest.raises(CaptureError, match=r"training mode.*model.eval\(\)"):
        cached(**inputs(name))


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_weights_get_the_originals_gradients(name: str) -> None:
    model, cached = pair(name)
    gradients = []
    for either in (cached, model):
        with torch.enable_grad():
            either(**inputs(name))[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_attention_processors_can_be_read_and_set(name: str) -> None:
    model, cached = pair(name)
    own = cached.attn_processors
    assert own == model.attn_processors
    cached.set_attn_processor(AttnProcessor())
    assert {type(processor) for processor in cached.attn_processors.values()} == {AttnProcessor}
    with pytest.raises(ValueError, match="number of processors"):
        cached.set_attn_processor({next(iter(own)): AttnProcessor()})
    cached.set_attn_processor(dict(own))
    assert model.attn_processors == own
    assert_right(name, cached, model)


def test_the_default_attention_processor_is_used() -> None:
    model, cached = pair("pixart")
    before = cached(**inputs("pixart"))[0]
    cached.set_default_attn_processor()
    after = cached(**inputs("pixart"))[0]
    assert_same(after, model(**inputs("pixart"))[0])
    torch.testing.assert_close(after, before, atol=1e-3, rtol=0)


def is_fused(model: Any) -> bool:
    return any(getattr(module, "fused_projections", False) for module in model.modules())


def test_projections_are_fused_and_unfused() -> None:
    model, cached = pair("flux")
    before = cached(**inputs("flux"))[0]
    cached.fuse_qkv_projections()
    assert is_fused(cached)
    fused = cached(**inputs("flux"))[0]
    assert_same(fused, model(**inputs("flux"))[0])
    torch.testing.assert_close(fused, before, atol=1e-3, rtol=0)
    cached.unfuse_qkv_projections()
    assert not is_fused(cached)
    assert_same(cached(**inputs("flux"))[0], before)


CACHES: dict[str, Callable[[], Any]] = {
    "pab": lambda: hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "first_block": lambda: hooks.FirstBlockCacheConfig(threshold=1.0),
    "faster": lambda: hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        tensor_format="BCHW",
        attention_weight_callback=lambda module: 0.5,
        current_timestep_callback=lambda: 500,
    ),
    "mag": lambda: hooks.MagCacheConfig(num_inference_steps=2, mag_ratios=[1.0, 1.0]),
    "taylorseer": lambda: hooks.TaylorSeerCacheConfig(cache_interval=3),
}


def hooked(model: Any) -> int:
    registries = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    return sum(len(registry.hooks) for registry in registries if registry)


def test_caches_of_diffusers_are_refused_until_they_are_disabled() -> None:
    model, cached = pair("qwen_image")
    assert_right("qwen_image", cached, model)
    for make in CACHES.values():
        assert not cached.is_cache_enabled
        cached.enable_cache(make())
        assert cached.is_cache_enabled
        assert model.is_cache_enabled
        assert hooked(cached)
        with pytest.raises(ValueError, match="already been enabled"):
            cached.enable_cache(make())
        with pytest.raises(CaptureError, match=r"model.disable_cache\(\)"):
            cached(**inputs("qwen_image"))
        cached.disable_cache()
        assert not hooked(cached)
    assert_right("qwen_image", cached, model)


def test_cache_contexts_are_those_of_the_result() -> None:
    model, cached = pair("flux")
    for context in ("cond", "uncond"):
        with cached.cache_context(context, step_index=0, num_inference_steps=1):
            assert_right("flux", cached, model)
    kept = captures(cached)
    cached._reset_stateful_cache()
    assert_right("flux", cached, model)
    assert captures(cached) == kept


class Counting(hooks.ModelHook):
    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def test_hooks_registered_after_restoring_are_called() -> None:
    tiny_pipe, hook = PIPELINES["wan"], Counting()
    pipe = graphcache.transform(tiny_pipe.make(), presets.compute(1))
    tiny_pipe.generate(pipe, 1, guided=False)
    transformer = graphcache.restore(pipe).transformer
    hooks.HookRegistry.check_if_exists_or_initialize(transformer).register_hook(hook, "counting")
    tiny_pipe.generate(pipe, 1, guided=False)
    assert hook.calls == 1


def lora(rank: int = 4) -> LoraConfig:
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    torch.manual_seed(rank)
    return LoraConfig(r=rank, lora_alpha=4, target_modules=targets, init_lora_weights=False)


def has_adapter(model: Any) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def test_an_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model, cached = pair("sd3")
    without = cached(**inputs("sd3"))[0]
    cached.add_adapter(lora())
    assert has_adapter(model)
    settings = cached.peft_config["default"].to_dict()
    expected = cached(**inputs("sd3"))[0]
    assert not torch.allclose(expected, without, atol=1e-4)
    cached.save_lora_adapter(tmp_path)
    saved = get_peft_model_state_dict(cached)
    cached.unload_lora()
    assert not has_adapter(model)
    assert_same(cached(**inputs("sd3"))[0], without)
    cached.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert_same(get_peft_model_state_dict(cached, adapter_name="default_0"), saved)
    assert cached.peft_config["default_0"].to_dict() == settings
    assert_same(cached(**inputs("sd3"))[0], expected)


def test_an_adapter_that_is_not_there_is_diffusers_own_error(tmp_path: Path) -> None:
    _, cached = pair("sd3")
    cached.add_adapter(lora())
    with pytest.raises(ValueError, match="Adapter name other not found"):
        cached.save_lora_adapter(tmp_path, adapter_name="other")
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        cached.enable_lora_hotswap(target_rank=8)


def test_adapters_are_swapped_without_another_capture(tmp_path: Path) -> None:
    for rank in (2, 4):
        donor: Any = CASES["flux"].make()
        donor.add_adapter(lora(rank))
        donor.save_lora_adapter(tmp_path / str(rank))
    model, cached = pair("flux")
    cached.enable_lora_hotswap(target_rank=4)
    load = {"adapter_name": "swapped", "prefix": None}
    cached.load_lora_adapter(tmp_path / "2" / LORA_FILE, **load)
    first = cached(**inputs("flux"))[0]
    kept = captures(cached)
    cached.load_lora_adapter(tmp_path / "4" / LORA_FILE, hotswap=True, **load)
    assert_right("flux", cached, model)
    assert not torch.allclose(cached(**inputs("flux"))[0], first, atol=1e-4)
    assert captures(cached) == kept


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
def test_torch_compile_compiles_once() -> None:
    model, cached = pair("sd3")
    compiled = torch.compile(cached, backend="aot_eager")
    expected = model(**inputs("sd3"))[0]
    for _ in range(2):
        torch.testing.assert_close(compiled(**inputs("sd3"))[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("dynamo")
def test_repeated_blocks_compile_once() -> None:
    model, cached = pair("qwen_image")
    expected = model(**inputs("qwen_image"))[0]
    cached.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(cached(**inputs("qwen_image"))[0], expected, atol=1e-5, rtol=1e-5)


def test_a_compiled_model_saves_as_the_original(tmp_path: Path) -> None:
    model, cached = pair("dit")
    torch.compile(cached).save_pretrained(tmp_path)
    assert_same(type(model).from_pretrained(tmp_path).state_dict(), model.state_dict())


def test_export_is_refused_with_advice() -> None:
    _, cached = pair("dit")
    with pytest.raises(CaptureError, match=r"cannot be exported.*restore"):
        torch.export.export(cached, args=(), kwargs=inputs("dit"))


def footprint(storage: torch.dtype) -> int:
    cached = pair("sd3")[1]
    cached.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert cached.transformer_blocks[0].attn.to_q.weight.dtype == storage
    return int(cached.get_memory_footprint())


def test_layerwise_casting_saves_memory() -> None:
    assert footprint(torch.float8_e4m3fn) < footprint(torch.float16) < footprint(torch.float32)


@pytest.mark.parametrize("run_first", [False, True])
def test_layerwise_casting_is_part_of_the_graph(run_first: bool) -> None:
    model, cached = pair("sd3")
    if run_first:
        cached(**inputs("sd3"))
    cached.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert_right("sd3", cached, model)
    assert not captures(cached)[0].step.opaque


def test_weights_left_on_disk_are_read_there(tmp_path: Path) -> None:
    model, cached = pair("flux")
    save_sharded(cached, tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path,
        device_map="auto",
        max_memory={"cpu": cached.get_memory_footprint() // 2},
        offload_folder=str(tmp_path / "left"),
    )
    assert "disk" in loaded.hf_device_map.values()
    assert_right("flux", loaded, model)
    assert_right("flux", transformed(loaded), model)
    assert any(tensor.is_meta for tensor in loaded.parameters())


COPIES: dict[str, Callable[[Any, Path], Any]] = {
    "copy": lambda cached, path: copy.copy(cached),
    "deepcopy": lambda cached, path: copy.deepcopy(cached),
    "pickle": lambda cached, path: pickle.loads(pickle.dumps(cached)),
    "torch.save": lambda cached, path: torch.save(cached, path) or torch.load(path, weights_only=False),
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_a_model_under_the_plan(way: str, tmp_path: Path) -> None:
    model, cached = pair("dit")
    cached(**inputs("dit"))
    again = COPIES[way](cached, tmp_path / "model")
    assert again.plan == cached.plan
    assert_same(again.state_dict(), model.state_dict())
    assert dict(again.config) == dict(model.config)
    assert_right("dit", again, model)


@pytest.mark.parametrize("way", ["class", "from_config", "from_pretrained"])
def test_the_class_of_the_result_makes_plain_models(way: str, tmp_path: Path) -> None:
    model, cached = pair("dit")
    cached.save_pretrained(tmp_path)
    settings = {key: value for key, value in model.config.items() if not key.startswith("_")}
    made = {
        "class": lambda: type(cached)(**settings),
        "from_config": lambda: cached.from_config(cached.config),
        "from_pretrained": lambda: cached.from_pretrained(tmp_path),
    }[way]()
    assert type(made) is type(model)
