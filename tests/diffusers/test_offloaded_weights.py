"""Weights that accelerate and diffusers keep elsewhere, or that are streamed: right results, and only what a
step reads is moved.

There is one device: what is kept in memory may not be computed with there (`afar.Moves` sees every
operation), what accelerate keeps has no values on the model, and what diffusers keeps on a disk is rubbish in
memory. Streams are stood in for, so that their order is tested and not that they run beside each other.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import group_offloading
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphcache
from afar import CPU, HookMoves, Moves, in_groups, nbytes, sequentially, streams
from graphcache import CaptureError, GraphCacheError, Plan, StateError, presets
from inside import programs_of
from pipelines import PIPELINES
from reference import assert_same
from seeding import own_numbers
from tiny_pipelines import variant_of
from zoo import CASES

WAN, STEPS = PIPELINES["wan"], 4
FORA = Plan.parse("plan steps=4 preset=none\n* #.#.")
KINDS: dict[str, Callable[[Path], Callable[[nn.Module], None]]] = {
    "sequential": lambda _: sequentially,
    "blocks": lambda _: in_groups("block_level"),
    "leafs": lambda _: in_groups("leaf_level"),
    "blocks on disk": lambda folder: in_groups("block_level", folder),
    "leafs on disk": lambda folder: in_groups("leaf_level", folder),
    "blocks by stream": lambda _: in_groups("block_level", stream=True),
    "leafs by stream": lambda _: in_groups("leaf_level", stream=True),
}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad(), streams():
        yield


@functools.cache
@own_numbers
def plain() -> Tensor:
    """Of the untouched pipeline."""
    return WAN.generate(WAN.make(), STEPS)


@functools.cache
@own_numbers
def cached() -> tuple[Tensor, Counter[str]]:
    """Under the plan with all weights at hand, and how often the evaluations read each of them."""
    pipe = graphcache.transform(WAN.make(), FORA)
    WAN.generate(pipe, STEPS)
    with Reads(pipe.transformer) as reads:
        return WAN.generate(pipe, STEPS), reads.counts


class Reads(TorchDispatchMode):
    """Counts in how many graphs each weight is read."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {tensor.untyped_storage()._cdata: name for name, tensor in weights(model).items()}
        self.counts: Counter[str] = Counter()
        self.seen: set[str] = set()
        for program in programs_of(model):
            for runnable in (program.prologue, *program.phases.values()):
                self._counted(runnable)

    def _counted(self, runnable: Any) -> None:
        call = runnable.call

        def counting(*tensors: Tensor) -> Any:
            self.seen.clear()
            result = call(*tensors)
            self.counts.update(self.seen)
            return result

        object.__setattr__(runnable, "call", counting)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in filter(lambda item: isinstance(item, Tensor), args):
            name = self.names.get(tensor.untyped_storage()._cdata)
            if name is not None:
                self.seen.add(name)
        return func(*args, **(kwargs or {}))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def at_home(model: nn.Module) -> dict[str, Any]:
    """Where every weight is: identity of the tensor, its memory and device."""
    return {name: (id(t), t.data_ptr(), t.device) for name, t in weights(model).items()}


def kept_of(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """The weights as they are kept in memory, by name."""
    if kind != "sequential":
        return {} if "disk" in kind else weights(model)
    found: dict[str, Tensor] = {}
    for module in model.modules():
        hook: Any = module.__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "offload", False):
                found |= getattr(one.weights_map, "dataset", one.weights_map)
    return found


@pytest.mark.few(2)
@pytest.mark.parametrize("away", KINDS)
def test_only_what_a_step_reads_is_moved(away: str, tmp_path: Path) -> None:
    """Offloading enabled before `transform`."""
    pipe = WAN.make()
    KINDS[away](tmp_path)(pipe.transformer)
    graphcache.transform(pipe, FORA)
    expected, reads = cached()
    assert_same(WAN.generate(pipe, STEPS), expected)
    before = at_home(pipe.transformer)
    kept = kept_of(pipe.transformer, away)
    with Moves(kept) as moves, HookMoves() as by_hooks:
        assert_same(WAN.generate(pipe, STEPS), expected)
    assert by_hooks.bytes == 0
    assert at_home(pipe.transformer) == before
    if "disk" not in away:  # accelerate leaves buffers that are in no file where the model computes
        reads = Counter({name: count for name, count in reads.items() if name in kept})
        assert moves.counts == reads
    sizes = {name: nbytes(tensor) for name, tensor in weights(pipe.transformer).items()}
    assert moves.bytes == sum(count * sizes[name] for name, count in reads.items())
    graphcache.restore(pipe)
    with HookMoves() as by_hooks:
        assert_same(WAN.generate(pipe, STEPS), plain())
    assert by_hooks.bytes > moves.bytes
    assert_same(WAN.generate(pipe, STEPS), plain())


class Stop(Exception):
    pass


@pytest.mark.few(1)
@pytest.mark.parametrize("away", KINDS)
def test_offloading_enabled_afterwards_and_an_accident(away: str, tmp_path: Path) -> None:
    pipe = graphcache.transform(WAN.make(), FORA)
    expected, _ = cached()
    KINDS[away](tmp_path)(pipe.transformer)
    assert_same(WAN.generate(pipe, STEPS), expected)
    before = at_home(pipe.transformer)

    def stop(pipe: Any, step: int, *_: Any) -> Any:
        if step == 2:
            raise Stop
        return {}

    with pytest.raises(Stop):
        WAN.generate(pipe, STEPS, callback=stop)
    assert at_home(pipe.transformer) == before
    with Moves(kept_of(pipe.transformer, away)), HookMoves() as by_hooks:
        assert_same(WAN.generate(pipe, STEPS), expected)
    assert by_hooks.bytes == 0
    with pipe.transformer.disabled():
        assert_same(WAN.generate(pipe, STEPS), plain())
    graphcache.restore(pipe)
    for _ in range(2):
        assert_same(WAN.generate(pipe, STEPS), plain())


@pytest.mark.few(1)
@pytest.mark.parametrize("first", ["offloading", "plan"])
def test_a_model_offloaded_as_a_whole_by_its_pipeline(first: str) -> None:
    pipe = WAN.make()
    if first == "plan":
        graphcache.transform(pipe, FORA)
    pipe.enable_model_cpu_offload(device="cpu")
    if first == "offloading":
        graphcache.transform(pipe, FORA)
    hooked = []
    for _ in range(2):  # the pipeline takes its hooks off and puts them on again behind each generation
        hooked.append(vars(pipe.transformer)["_hf_hook"])
        assert_same(WAN.generate(pipe, STEPS), cached()[0])
    assert hooked[0] is not hooked[1]
    assert len(programs_of(pipe.transformer)) == 1
    original = graphcache.restore(pipe).transformer
    assert hasattr(original, "_hf_hook")
    for _ in range(2):
        assert_same(WAN.generate(pipe, STEPS), plain())
    pipe.remove_all_hooks()
    assert not hasattr(pipe.transformer, "_hf_hook")
    assert_same(WAN.generate(pipe, STEPS), plain())


def test_offloading_is_undone_by_the_pipeline() -> None:
    pipe = WAN.make()
    sequentially(pipe.transformer)
    graphcache.transform(pipe, FORA)
    assert_same(WAN.generate(pipe, STEPS), cached()[0])
    assert all(tensor.is_meta for tensor in pipe.transformer.parameters())
    pipe.remove_all_hooks()
    assert_same(WAN.generate(pipe, STEPS), cached()[0])
    assert not any(tensor.is_meta for tensor in graphcache.restore(pipe).transformer.parameters())


@pytest.mark.few(1)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_caching_moves_two_fifths_of_the_bytes(backend: str | None) -> None:
    """In a model that consists of blocks, as large ones do."""
    make = variant_of("wan", 0, num_layers=8)
    plan = presets.fora(6, interval=3)
    case = CASES["wan"]
    static = case.static(1)

    def generate(model: Any) -> None:
        for step in range(6):
            model(**case.call(static, case.latents(1), 1 - step / 6))

    model = make()
    in_groups("block_level")(model)
    with HookMoves() as uncached:
        generate(model)
    planned: Any = graphcache.transform(model, plan, backend=backend)
    generate(planned)
    with Moves(weights(model)) as moves:
        generate(planned)
    assert moves.bytes <= 0.4 * uncached.bytes


@pytest.mark.few(1)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_weights_come_block_by_block(backend: str | None) -> None:
    """No more of them are there at a time than those of two blocks, and what is read along the way."""
    model = variant_of("wan", 0, num_layers=8)()
    in_groups("block_level")(model)
    case = CASES["wan"]
    planned: Any = graphcache.transform(model, presets.compute(1), backend=backend)
    call = case.kwargs(1)
    planned(**call)
    with Held() as held:
        planned(**call)
    block = sum(map(nbytes, model.blocks[0].parameters()))
    others = sum(map(nbytes, model.parameters())) - 8 * block
    assert block < held.most <= 2 * block + others
    assert held.now == 0


class Held(TorchDispatchMode):
    """How many bytes of fetched weights are there, and the most that were."""

    now = most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.graphcache.fetch:
            size = nbytes(result)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(result.untyped_storage(), self._gone, size)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["blocks", "leafs", "blocks by stream"])
def test_adapters_come_and_go(kind: str, tmp_path: Path) -> None:
    def adapted(model: Any, add: bool) -> None:
        torch.manual_seed(0)
        if add:
            model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
            group_offloading._maybe_remove_and_reapply_group_offloading(model)  # as `load_lora_adapter` does
            return
        model.delete_adapters("default")

    untouched = WAN.make()
    adapted(untouched.transformer, True)
    expected = WAN.generate(graphcache.transform(untouched, FORA), STEPS)
    pipe = WAN.make()
    KINDS[kind](tmp_path)(pipe.transformer)
    graphcache.transform(pipe, FORA)
    assert_same(WAN.generate(pipe, STEPS), cached()[0])
    adapted(pipe.transformer, True)
    assert_same(WAN.generate(pipe, STEPS), expected)
    adapted(pipe.transformer, False)
    assert_same(WAN.generate(pipe, STEPS), cached()[0])
    graphcache.restore(pipe)
    with HookMoves() as by_hooks:
        assert_same(WAN.generate(pipe, STEPS), plain())
    assert by_hooks.bytes >= STEPS * sum(map(nbytes, pipe.transformer.parameters()))


def test_weights_changed_where_they_are_kept_are_seen() -> None:
    pipe, changed = WAN.make(), WAN.make()
    in_groups("leaf_level")(pipe.transformer)
    graphcache.transform(pipe, FORA)
    WAN.generate(pipe, STEPS)
    for model in (pipe.transformer, changed.transformer):
        model.blocks[0].attn1.to_q.weight.mul_(1.5)
        model.blocks[1].ffn.net[2].weight = nn.Parameter(model.blocks[1].ffn.net[2].weight * 2)
    assert_same(WAN.generate(pipe, STEPS), WAN.generate(graphcache.transform(changed, FORA), STEPS))
    assert len(programs_of(pipe.transformer)) == 1


def test_streamed_weights_stay_in_host_memory() -> None:
    pipe = WAN.make()
    before = at_home(pipe.transformer)
    graphcache.transform(pipe, FORA, stream_weights=True)
    expected, reads = cached()
    assert_same(WAN.generate(pipe, STEPS), expected)
    with Moves(weights(pipe.transformer)) as moves:
        assert_same(WAN.generate(pipe, STEPS), expected)
    assert moves.counts == reads
    with pipe.transformer.disabled(), Moves(weights(pipe.transformer)):
        assert_same(WAN.generate(pipe, STEPS), plain())
    assert at_home(pipe.transformer) == before
    assert not any(module._forward_hooks for module in pipe.transformer.modules())
    assert_same(WAN.generate(graphcache.restore(pipe), STEPS), plain())


def test_guidance_from_one_branch_over_offloaded_weights() -> None:
    """The half of a doubled batch is compared with the whole, weights fetched."""
    tiny = PIPELINES["dit"]
    plan = Plan.parse("plan steps=4 preset=none conditional=first\nguidance #.#.")
    expected = tiny.generate(graphcache.transform(tiny.make(), plan), STEPS)
    pipe = tiny.make()
    in_groups("block_level")(pipe.transformer)
    graphcache.transform(pipe, plan)
    assert_same(tiny.generate(pipe, STEPS), expected)
    with Moves(weights(pipe.transformer)):
        assert_same(tiny.generate(pipe, STEPS), expected)


def model_in_blocks(**options: Any) -> tuple[Any, dict[str, Any]]:
    model = CASES["wan"].make()
    in_groups("block_level")(model)
    return graphcache.transform(model, presets.compute(1), **options), CASES["wan"].kwargs(1)


def test_gradients_are_refused() -> None:
    model, call = model_in_blocks()
    with torch.enable_grad(), pytest.raises(CaptureError, match=r"under torch.no_grad\(\)"):
        model(**call)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "backend", [{"mode": "reduce-overhead"}, {"backend": "inductor", "options": {"freezing": True}}]
)
def test_code_that_holds_its_weights_is_refused(backend: Any) -> None:
    model, call = model_in_blocks(backend=backend)
    with pytest.raises(CaptureError, match="leave out CUDA graphs, frozen weights"):
        model(**call)


def test_streaming_what_is_moved_or_elsewhere_is_refused() -> None:
    model, call = model_in_blocks(stream_weights=True)
    with pytest.raises(CaptureError, match="leave out one of both"):
        model(**call)
    model = CASES["wan"].make()
    model.proj_out.to("meta")
    made: Any = graphcache.transform(model, presets.compute(1), stream_weights=True)
    with pytest.raises(CaptureError, match=r"'weight' is on meta: leave the model in host memory"):
        made(**call)
    with pytest.raises(GraphCacheError, match="leave out regions=False"):
        graphcache.transform(model, presets.compute(1), stream_weights=True, regions=False, backend="eager")


def test_another_weight_in_a_file_is_told(tmp_path: Path) -> None:
    import safetensors.torch

    model = CASES["wan"].make()
    in_groups("leaf_level", tmp_path)(model)
    made: Any = graphcache.transform(model, presets.compute(1))
    call = CASES["wan"].kwargs(1)
    made(**call)
    group = model.proj_out._diffusers_hook.hooks["group_offloading"].group
    other = {key: torch.zeros(3) for key in group.key_to_tensor}
    safetensors.torch.save_file(other, group.safetensors_file_path)
    with pytest.raises(StateError, match=r"shape \(3,\) .* was put where one of shape"):
        made(**call)


def test_weights_that_are_cast_once_they_are_offloaded_are_told() -> None:
    model = CASES["wan"].make()
    in_groups("leaf_level", stream=True)(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(StateError, match=r"float8.* was captured; .*cast them before they are offloaded"):
        graphcache.transform(model, presets.compute(1))(**CASES["wan"].kwargs(1))


def test_inputs_come_to_where_weights_are_computed_with() -> None:
    """Hooks inside of a model move its inputs, and the one around it its result."""
    model = CASES["wan"].make()
    sequentially(model)
    made: Any = graphcache.transform(model, presets.compute(1))
    call = CASES["wan"].kwargs(1)
    expected = made(**call)[0]
    made._graphcache.maker.homes.look()
    assert made._graphcache.maker.homes.device == CPU
    assert_same(made(**call)[0], expected)
    remove_hook_from_module(made, recurse=True)
    assert_same(made(**call)[0], expected)
