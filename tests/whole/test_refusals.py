"""Everything that is refused, by message: what is wrong, where, and what to do."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphcache
from graphcache import CaptureError, GraphCacheError, Plan, PlanError, StateError, presets
from graphcache.ir.call import OutputSpec
from tiny import TinyDiT, arguments, tiny


def attempt(model: nn.Module, rows: str = "", steps: int = 3, **changes: Any) -> Any:
    """Transform with example inputs, so that whatever is refused is refused now."""
    plan = Plan.parse(f"plan steps={steps} preset=none\n{rows}")
    return graphcache.transform(model, plan, example_inputs={**arguments(), **changes})


def refused(kind: type[GraphCacheError], *parts: str) -> Any:
    """An error of exactly this kind whose message holds all parts, in order."""
    return pytest.raises(kind, match="(?s)" + ".*".join(map(re.escape, parts)))


class Dropping(TinyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.1), timestep, text)


class Noisy(TinyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x), timestep, text)


class Counting(TinyDiT):
    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x + self.calls, timestep, text)


class Scaling(TinyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x.mul_(2), timestep, text)


class Branching(TinyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        if timestep.max() > 0.5:
            x = x * 2
        return super().forward(x, timestep, text)


class Variadic(TinyDiT):
    def forward(self, *args: Tensor) -> Tensor:
        return super().forward(*args)


class Optional(TinyDiT):
    def forward(self, x: Tensor, text: Tensor, timestep: Any = None, extra: Any = None) -> Tensor:
        return super().forward(x, torch.ones(x.shape[0]), text)


class Quiet(TinyDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> None:
        super().forward(x, timestep, text)


class Leaking(TinyDiT):
    """Its result also reads the first branch by itself."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        kept: list[Tensor] = []
        block = self.blocks[0]
        gate = (self.time(timestep[:, None]) + self.text(text))[:, None]
        q, k, v = block.qkv(x).chunk(3, dim=-1)
        branch = block.out(F.scaled_dot_product_attention(q, k, v))
        kept.append(branch)
        x = x + gate * branch
        x = x + block.down(F.gelu(block.up(x)))
        return x + kept[0]


class Projecting(TinyDiT):
    """Between its two blocks the stream itself goes through a projection."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        gate = (self.time(timestep[:, None]) + self.text(text))[:, None]
        x = self.text(self.blocks[0](x, gate))
        return self.blocks[1](x, gate)


def test_training_mode() -> None:
    with refused(CaptureError, "the model is in training mode", "call model.eval()"):
        attempt(tiny().train())


def test_training_mode_entered_after_the_capture_is_refused_at_the_next_generation() -> None:
    cached = attempt(tiny(), steps=1)
    cached(**arguments())
    cached.train()
    with refused(CaptureError, "is in training mode"):
        cached(**arguments())


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_forward_hooks(register: str) -> None:
    model = tiny()
    getattr(model.blocks[0].up, register)(lambda *_: None)
    with refused(CaptureError, "blocks.0.up has forward hooks", "model.disable_cache()"):
        attempt(model)


def test_hooks_added_after_the_capture_are_refused_at_the_next_generation() -> None:
    model = tiny()
    cached = attempt(model, steps=1)
    cached(**arguments())
    model.blocks[0].register_forward_hook(lambda *_: None)
    with refused(CaptureError, "blocks.0 has forward hooks"):
        cached(**arguments())


def test_a_forward_set_on_the_instance() -> None:
    model = tiny()
    block = model.blocks[0]
    block.forward = block.forward  # what diffusers leaves behind: the class's own
    cached = attempt(model, steps=1)
    cached(**arguments())
    block.forward = lambda x, gate: x
    message = ("blocks.0 has a forward of its own", "set on the instance", "accelerate")
    with refused(CaptureError, *message):
        cached(**arguments())
    with refused(CaptureError, *message):
        attempt(model)


def test_exporting_a_transformed_model() -> None:
    with refused(CaptureError, "cannot be exported", "export the original"):
        torch.export.export(attempt(tiny()), (), arguments(), strict=False)


def test_dropout_that_ignores_eval_mode() -> None:
    with refused(CaptureError, "dropout in training mode", "training=self.training"):
        attempt(tiny(kind=Dropping))


def test_random_numbers() -> None:
    with refused(CaptureError, "draws random numbers (aten.randn_like.default)", "pass them in"):
        attempt(tiny(kind=Noisy))


def test_a_buffer_changed_in_place() -> None:
    with refused(CaptureError, "changes the buffer", "calls' in place", "make forward pure"):
        attempt(tiny(kind=Counting))


def test_an_input_changed_in_place() -> None:
    with refused(CaptureError, "changes the input", "in place", "make forward pure"):
        attempt(tiny(kind=Scaling))


def test_a_branch_on_tensor_values_names_the_users_line() -> None:
    with refused(
        CaptureError,
        "cannot be captured because of",
        "test_refusals.py:",
        "in forward: `if timestep.max() > 0.5:`",
        "A step must not branch on tensor values",
    ):
        attempt(tiny(kind=Branching))


@pytest.mark.parametrize(("given", "found"), [({}, "absent"), ({"timestep": "now"}, "a str")])
def test_a_named_timestep_that_is_no_tensor(given: dict[str, Any], found: str) -> None:
    kwargs = arguments()
    del kwargs["timestep"]
    cached = graphcache.transform(tiny(kind=Optional), presets.compute(3), timestep="timestep")
    with refused(
        CaptureError, f"the timestep argument 'timestep' is {found}", "transform(..., timestep=...)", "x"
    ):
        cached(**kwargs, **given)


def test_a_timestep_that_is_not_found() -> None:
    kwargs = arguments()
    del kwargs["timestep"]
    cached = graphcache.transform(tiny(kind=Optional), presets.compute(3))
    with refused(StateError, "nothing tells the step", "looks like a timestep", "this call has x, text"):
        cached(**kwargs)


def test_a_timestep_under_another_name() -> None:
    with refused(CaptureError, "the timestep argument 't' is absent", "this call has x, timestep, text"):
        graphcache.transform(tiny(), presets.compute(3), example_inputs=arguments(), timestep="t")


def test_no_latents() -> None:
    class Classes(nn.Module):
        def forward(self, classes: Tensor, timestep: Tensor) -> Tensor:
            return classes * timestep

    model = graphcache.transform(Classes().eval(), presets.compute(3))
    with refused(
        CaptureError,
        "no argument of this call is a floating-point tensor that could be the latents",
        "transform(..., latents=...): this call has classes, timestep",
    ):
        model(torch.arange(3), torch.ones(3))


def test_variadic_positional_arguments() -> None:
    with refused(CaptureError, "forward takes *args", "give its arguments names"):
        graphcache.transform(tiny(kind=Variadic), presets.compute(3))


def test_an_argument_that_cannot_be_compared() -> None:
    with refused(
        CaptureError, "argument extra.seen is a set", "whose value cannot be compared", "pass tensors"
    ):
        attempt(tiny(kind=Optional), extra={"seen": {1}})


def test_arguments_that_do_not_bind() -> None:
    cached, kwargs = graphcache.transform(tiny(), presets.compute(3)), arguments()
    with pytest.raises(TypeError, match="forward takes 3 arguments, 4 were given"):
        cached(*kwargs.values(), 1)
    with pytest.raises(TypeError, match="forward got several values for x"):
        cached(kwargs["x"], **kwargs)


def test_a_result_without_a_tensor() -> None:
    with refused(CaptureError, "the model returned NoneType without a tensor in it"):
        attempt(tiny(kind=Quiet))
    with refused(CaptureError, "the model returned list without a tensor in it"):
        OutputSpec.of([])


NO_MATCH = [
    ("blocks.0.mpl ##.", "row blocks.0.mpl matches no site; close names: blocks.0.mlp"),
    ("zzz* ##.", "row zzz* matches no site; sites of this model: blocks.0.self, blocks.0.mlp"),
    ("range(0..3) ##.", "range(0..3) ends beyond the last block: the model has blocks 0 to 0"),
    ("range(0.4..0.6) ##.", "range(0.4..0.6) holds none of the model's 1 blocks; widen it"),
    ("@cross ##.", "no row of the plan matches a site: rows @cross; roles of this model: @mlp, @self"),
]


@pytest.mark.parametrize(("row", "message"), NO_MATCH)
def test_rows_that_match_nothing_are_refused_at_transform_or_at_the_first_call(
    row: str, message: str
) -> None:
    with refused(PlanError, message):
        attempt(tiny(), row)
    cached = graphcache.transform(tiny(), Plan.parse(f"plan steps=3 preset=none\n{row}"))
    for _ in range(2):
        with refused(PlanError, message):
            cached(**arguments())


def test_a_guidance_row_that_computes_is_harmless() -> None:
    cached = attempt(tiny(), "guidance ###\n@mlp ##.")
    assert torch.equal(cached(**arguments()), tiny()(**arguments()))


def test_overlapping_ranges_taken_at_one_step() -> None:
    rows = "range(0..1) ##.\nrange(1..2) ##."
    with refused(PlanError, "step 2: range(0..1) and range(1..2) overlap", "let one of them compute there"):
        attempt(tiny(depth=3), rows)


def test_overlapping_ranges_taken_at_different_steps_are_fine() -> None:
    attempt(tiny(depth=3), "range(0..1) ##.#\nrange(1..2) ###.", steps=4)


def test_listed_coefficients_beyond_the_values_computed() -> None:
    rows = "f = fitted order=1\noutput #.##\n@mlp ###f\n  step 3 = 1 2"
    attempt(tiny(), rows, steps=4)
    late = "f = fitted order=2\noutput #.##\n@mlp ###f\n  step 3 = 1 2 3"
    with refused(
        PlanError, "step 3: letter 'f' lists 3 coefficients, but the history holds 2 values by then"
    ):
        attempt(tiny(), late, steps=4)


def test_a_range_that_leaks() -> None:
    with refused(PlanError, "range(0..0) cannot be cached as one", "self inside it is also read outside"):
        attempt(tiny(kind=Leaking), "range(0..0) ##.")


def test_a_range_whose_stream_is_projected() -> None:
    model = tiny(depth=2, kind=Projecting)
    with refused(
        PlanError, "range(0..1) cannot be cached as one", "projects the stream inside it", "split the range"
    ):
        attempt(model, "range(0..1) ##.")
    attempt(model, "range(0..0) ##.\nrange(1..1) ##.")


def test_a_model_without_branches() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return x * timestep[:, None, None] + text[:, None]

    with refused(PlanError, "the model has no residual branches that a plan could speak of"):
        attempt(Plain().eval(), "output ##.")


@pytest.mark.parametrize("plan", ["plan steps=3 preset=none", None, presets.fora])
def test_a_plan_of_the_wrong_type(plan: Any) -> None:
    with refused(PlanError, f"plan is a {type(plan).__name__}, not a Plan", "Plan.parse"):
        graphcache.transform(tiny(), plan)


@pytest.mark.parametrize(
    "backend", ["indutcor", {"options": {"no_such": 1}}, {"mode": "no_such"}, {"no_such": 1}]
)
def test_a_backend_that_torch_does_not_know(backend: Any) -> None:
    with refused(
        GraphCacheError,
        "backend=",
        "is nothing that torch.compile takes",
        "indutcor" if backend == "indutcor" else "no_such",
    ):
        graphcache.transform(tiny(1), Plan(3), backend=backend)
    model: Any = graphcache.transform(tiny(1), Plan(3))
    options = {"backend": backend} if isinstance(backend, str) else backend
    with refused(GraphCacheError, "is nothing that torch.compile takes"):
        model.compile(**options)


def test_a_target_that_is_no_model() -> None:
    with refused(GraphCacheError, "str is neither a module nor a pipeline with a transformer"):
        graphcache.transform("model", presets.fora(3))


def test_a_second_branch_without_a_context() -> None:
    cached = attempt(tiny())
    cached(**arguments())
    with refused(StateError, "step 0: this model was called 2 times at one timestep", "cache_context"):
        cached(**arguments())
    with cached.cache_context("cond"):
        cached(**arguments())
        with refused(StateError, "step 0: branch 'cond' was called 2 times at one timestep"):
            cached(**arguments())


def test_errors_share_a_base_class() -> None:
    assert all(issubclass(kind, GraphCacheError) for kind in (CaptureError, PlanError, StateError))
