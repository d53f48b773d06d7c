"""Models that look at the values of their conditions: masks, embeddings, sizes given as tensors."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import graphcache
from graphcache import CaptureError, Plan, presets
from inside import engine_of, programs_of
from reference import Reference, assert_same, capture_call, runner_tensors
from reference_guidance import GuidedReference
from tiny import TinyBlock
from zoo import DECIDING

TEXT = 5
Ask = Callable[[Tensor, Tensor], Tensor]
"""Makes another text of a text and its mask."""


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


class Asking(nn.Module):
    """Tokens of a picture behind those of a text, which it prepares after a look at the mask."""

    def __init__(self, ask: Ask, dim: int = 4) -> None:
        super().__init__()
        self.ask = ask
        self.time = nn.Linear(1, dim, bias=False)
        self.block = TinyBlock(dim)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        read = self.ask(text, mask)
        joined = torch.cat([read.expand(x.shape[0], -1, -1), tokens], dim=1)
        joined = self.block(joined, self.time(timestep[:, None])[:, None])
        return joined[:, read.shape[1] :].transpose(1, 2).reshape(x.shape)


def asking(ask: Ask) -> Asking:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Asking(ask).eval()


def mask_of(*lengths: int) -> Tensor:
    return torch.arange(TEXT)[None] < torch.tensor(lengths)[:, None]


def text_of(batch: int = 2) -> Tensor:
    return torch.randn(batch, TEXT, 4)


def generation(call: Any, text: Tensor, mask: Tensor, steps: int = 2) -> list[Tensor]:
    made = torch.Generator().manual_seed(steps)
    results, x = [], torch.randn(mask.shape[0], 4, 2, 2, generator=made)
    for step in range(steps):
        results.append(call(x, torch.full((mask.shape[0],), 1 - step / steps), text, mask))
        x = x - results[-1] / steps
    return results


def programs(model: Any) -> int:
    return len(programs_of(model))


def sorted_by_mask(text: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([torch.cat([row[keep], row[~keep]]) for row, keep in zip(text, mask, strict=True)])


def shortened(text: Tensor, mask: Tensor) -> Tensor:
    return text[:, : mask.sum(dim=1).max()]


def padded(text: Tensor, mask: Tensor) -> Tensor:
    cut = [F.pad(text[i, :n], (0, 0, 0, TEXT - n)) for i, n in enumerate(mask.sum(dim=1).tolist())]
    return torch.stack(cut)


def written(text: Tensor, mask: Tensor) -> Tensor:
    text = text.clone()
    text[mask] = text[mask].flip(0)
    return text


def masked_rows(text: Tensor, mask: Tensor) -> Tensor:
    rows = torch.zeros(mask.shape, dtype=torch.bool)
    lengths = mask.sum(dim=1)
    for i in range(len(mask)):
        rows[i, : lengths[i]] = True
    return text * rows[..., None]


def halted(text: Tensor, mask: Tensor) -> Tensor:
    for length in mask.sum(dim=1):
        for _ in range(length):
            text = text * 1.1
    return text


def asked_twice(text: Tensor, mask: Tensor) -> Tensor:
    """The second question is about as much as the first one says."""
    length = mask.sum(dim=1).max().item()
    return text[:, :length] * 2 if mask[:, :length].all() else text[:, :length]


def counted(text: Tensor, mask: Tensor) -> Tensor:
    """What is asked about is written to afterwards."""
    count = mask.sum(dim=1)
    doubled = text * 2 if count[0] > 2 else text
    count += 1
    return doubled[:, : count[1]]


def lengths_of(mask: Tensor) -> Tensor:
    return mask.sum(dim=1)


NUMBERS: dict[str, Ask] = {
    "any": lambda text, mask: text * 2 if (~mask[1]).any() else text,
    "a truth": lambda text, mask: text + 1 if mask[1, -1] else text,
    "equal": lambda text, mask: text - 1 if torch.equal(mask[0], mask[1]) else text,
    "in": lambda text, mask: text * 2 if 2 in lengths_of(mask) else text,
    "item": lambda text, mask: text.roll(lengths_of(mask)[0].item(), 1),
    "int": lambda text, mask: text * len(range(int(mask.sum()))),
    "float": lambda text, mask: text if float(mask.float().mean()) > 0.7 else text + 1,
    "a set of a list": lambda text, mask: text * len(set(lengths_of(mask).tolist())),
    "a list of lists": lambda text, mask: (
        text * sum(a * b for a, b in torch.stack([lengths_of(mask), lengths_of(~mask)], dim=1).tolist())
    ),
    "a list of lengths": padded,
    "a loop": halted,
    "two questions": asked_twice,
    "what is changed later": counted,
}
SIZES: dict[str, Ask] = {
    "a slice": shortened,
    "a range": lambda text, mask: text[:, torch.arange(lengths_of(mask).max())],
    "narrow": lambda text, mask: text.narrow(1, 0, lengths_of(mask)[0] - 1),
    "split": lambda text, mask: text.split([lengths_of(mask)[0], TEXT - lengths_of(mask)[0]], dim=1)[0],
    "a view": lambda text, mask: torch.zeros(lengths_of(mask).max(), 4) + text[:, :1],
    "unique": lambda text, mask: text[:, : len(torch.unique(lengths_of(mask)))],
    "bincount": lambda text, mask: text + torch.bincount(lengths_of(mask)).sum(),
    "one_hot": lambda text, mask: text + F.one_hot(lengths_of(mask)).sum(),
    "repeats": lambda text, mask: text.repeat_interleave(mask[0].long() + 1, dim=1),
    "rows": lambda text, mask: text + torch.repeat_interleave(lengths_of(mask)).sum(),
    "a mask of lengths": masked_rows,
}
PLACES: dict[str, Ask] = {
    "nonzero": lambda text, mask: text.flatten(0, 1)[mask.flatten().nonzero()[:, 0]][None],
    "nonzero as a tuple": lambda text, mask: text[mask.nonzero(as_tuple=True)][None],
    "where": lambda text, mask: text[torch.where(mask)][None],
    "reading": lambda text, mask: text[mask][None],
    "reading among others": lambda text, mask: (
        text[None, ..., mask[0], :2].mean(-1).view(1, -1, 1) + text[:1, :1]
    ),
    "a truth as an index": lambda text, mask: text[mask[0, 1]][0, :1],
    "reading one channel": lambda text, mask: text[..., 0, None][mask, 0][None, :, None] + text[:1, :1],
    "reading inside and outside": sorted_by_mask,
    "writing": written,
    "masked_select": lambda text, mask: torch.masked_select(text, mask[..., None]).view(1, -1, 4),
}


def added(asked: Mapping[str, Ask]) -> Ask:
    """All of them, each of the whole text."""

    def ask(text: Tensor, mask: Tensor) -> Tensor:
        read = [one(text, mask).expand(len(mask), -1, -1) for one in asked.values()]
        return torch.cat(read, dim=1)

    return ask


@pytest.mark.parametrize("asked", [NUMBERS, SIZES, PLACES], ids=["numbers", "sizes", "places"])
def test_ragged_masks_give_the_models_bits(asked: Mapping[str, Ask]) -> None:
    text = text_of()
    model = asking(added(asked))
    exact: Any = graphcache.transform(model, presets.compute(2))
    for mask in (mask_of(3, 5), mask_of(2, 2), mask_of(3, 5)):
        assert_same(generation(exact, text, mask), generation(model, text, mask))
    step = programs_of(exact)[0].captured.step
    assert [branch.role for branch in step.branches] == ["self", "mlp"]
    assert programs(exact) == 2, "nothing is captured for a mask that returns"


def test_a_caching_plan_gives_what_the_reference_gives() -> None:
    plan = presets.fora(4, interval=2)
    model, text = asking(sorted_by_mask), text_of()
    cached: Any = graphcache.transform(model, plan)
    for mask in (mask_of(3, 5), mask_of(1, 4), mask_of(3, 5)):
        kwargs = {"x": torch.zeros(2, 4, 2, 2), "timestep": torch.ones(2), "text": text, "mask": mask}
        reference = Reference(capture_call(model, kwargs, None), plan)

        def call(*args: Tensor, reference: Reference = reference) -> Any:
            names = ("x", "timestep", "text", "mask")
            return reference(runner_tensors(model, dict(zip(names, args, strict=True))))

        assert_same(generation(cached, text, mask, 4), generation(call, text, mask, 4))
    assert programs(cached) == 2


class TestOtherValues:
    """Another answer is another program; what comes back finds its own."""

    def test_the_same_tensor_written_in_place(self) -> None:
        model, text, mask = asking(shortened), text_of(), mask_of(3, 5)
        exact = graphcache.transform(model, presets.compute(2))
        for lengths, count in (((3, 5), 1), ((3, 2), 2), ((3, 5), 2), ((1, 3), 2)):
            mask.copy_(mask_of(*lengths))
            assert_same(generation(exact, text, mask), generation(model, text, mask))
            assert programs(exact) == count, "only the longest text is asked for"

    def test_within_a_generation(self, caplog: pytest.LogCaptureFixture) -> None:
        model, text, mask = asking(shortened), text_of(), mask_of(3, 5)
        cached = graphcache.transform(model, presets.fora(4, interval=4))
        x = torch.randn(2, 4, 2, 2)
        cached(x, torch.full((2,), 1.0), text, mask)
        mask[1, 2:] = False
        changed = cached(x, torch.full((2,), 0.9), text, mask)
        assert_same(changed, model(x, torch.full((2,), 0.9), text, mask))
        assert "what forward asks of its inputs' values" in caplog.text
        assert "the caches begin anew" in caplog.text

    @pytest.mark.parametrize("inference", [False, True])
    def test_a_new_tensor_for_every_call(self, inference: bool) -> None:
        model, text = asking(sorted_by_mask), text_of()
        exact = graphcache.transform(model, presets.compute(2))
        with torch.inference_mode() if inference else torch.no_grad():
            for lengths in ((3, 5), (2, 4), (3, 5)):
                results = [generation(call, text, mask_of(*lengths)) for call in (exact, model)]
                assert_same(*results)
        assert programs(exact) == 2

    def test_tensors_without_a_version_are_looked_at_when_a_generation_begins(self) -> None:
        model = asking(shortened)
        exact = graphcache.transform(model, presets.compute(2))
        with torch.inference_mode():
            text, mask = text_of(), mask_of(3, 5)
            for lengths in ((3, 5), (2, 3), (3, 5)):
                mask.copy_(mask_of(*lengths))
                assert_same(generation(exact, text, mask), generation(model, text, mask))
        assert programs(exact) == 2

    def test_weights_that_are_asked_about(self) -> None:
        class Gated(Asking):
            def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
                text = text * 2 if (self.time.weight * mask.sum()).max() > 0 else text
                return super().forward(x, timestep, text, mask)

        model, text = Gated(lambda text, mask: text).eval(), text_of()
        exact = graphcache.transform(model, presets.compute(2))
        for sign in (1.0, -1.0, 1.0):
            model.time.weight.data.copy_(sign * torch.arange(1.0, 5)[:, None])
            assert_same(generation(exact, text, mask_of(3, 5)), generation(model, text, mask_of(3, 5)))
        assert programs(exact) == 2

    def test_gradients_share_the_capture(self) -> None:
        model, text = asking(shortened).requires_grad_(False), text_of()
        exact: Any = graphcache.transform(model, presets.compute(2))
        generation(exact, text, mask_of(3, 5))
        with torch.enable_grad():
            assert_same(generation(exact, text, mask_of(3, 5)), generation(model, text, mask_of(3, 5)))
        assert len({id(program.captured) for program in programs_of(exact)}) == 1

    def test_two_prompts_in_turn_in_sessions_of_their_own(self) -> None:
        model = asking(sorted_by_mask)
        cached = graphcache.transform(model, presets.fora(4, interval=2))
        alone = graphcache.transform(model, presets.fora(4, interval=2))
        prompts = [(text_of(), mask_of(3, 5)), (text_of(), mask_of(4, 1))]
        expected = [generation(alone, *prompt, 4) for prompt in prompts]
        sessions = [cached.session() for _ in prompts]
        found: list[list[Tensor]] = [[], []]
        latents = [torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(4)) for _ in prompts]
        for step in range(4):
            for i, session in enumerate(sessions):
                with session:
                    found[i].append(cached(latents[i], torch.full((2,), 1 - step / 4), *prompts[i]))
                latents[i] = latents[i] - found[i][-1] / 4
        assert_same(found, expected)
        assert programs(cached) == 2


def test_threads_that_begin_at_once_with_masks_of_their_own() -> None:
    """While one of them captures, PyTorch computes without oneDNN in all, which may change the last bit."""
    model = asking(sorted_by_mask)
    cached: Any = graphcache.transform(model, presets.compute(2))
    prompts = [(text_of(), mask_of(*lengths)) for lengths in ((3, 5), (4, 1), (3, 5), (2, 2))]
    together = threading.Barrier(len(prompts))

    def run(prompt: tuple[Tensor, Tensor]) -> list[list[Tensor]]:
        with torch.no_grad(), cached.session():
            results = []
            for _ in range(2):
                together.wait()
                results.append(generation(cached, *prompt))
            return results

    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(run, prompts))
    for (during, after), prompt in zip(found, prompts, strict=True):
        expected = generation(model, *prompt)
        torch.testing.assert_close(during, expected)
        assert_same(after, expected)
    assert programs(cached) == 3


def test_two_calls_a_step_with_masks_of_their_own() -> None:
    plan, model = presets.fora(4, interval=2), asking(sorted_by_mask)
    prompts = [(text_of(), mask_of(3, 5)), (text_of(), mask_of(4, 1))]
    alone: Any = graphcache.transform(model, plan)
    expected = [generation(alone, *prompt, 4) for prompt in prompts]
    cached: Any = graphcache.transform(model, plan, branches=2)
    for _ in range(2):
        found: list[list[Tensor]] = [[], []]
        latents = [torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(4)) for _ in prompts]
        for step in range(4):
            for i, prompt in enumerate(prompts):
                found[i].append(cached(latents[i], torch.full((2,), 1 - step / 4), *prompt))
                latents[i] = latents[i] - found[i][-1] / 4
        assert_same(found, expected)


class TestGuidance:
    PLAN = "guidance ##..\n@self ####\n@mlp #.#."

    def answers(self, model: Asking, plan: Plan, texts: list[Tensor], masks: list[Tensor]) -> list[Any]:
        """Of both branches, from a reference interpreter for each."""

        def reference(text: Tensor, mask: Tensor) -> Reference:
            kwargs = {"x": torch.zeros(1, 4, 2, 2), "timestep": torch.ones(1), "text": text, "mask": mask}
            kwargs = {name: value.double() for name, value in kwargs.items()} | {"mask": mask}
            rows = tuple(row for row in plan.rows if not row.selector.is_guidance)
            return Reference(capture_call(model, kwargs, None), replace(plan, rows=rows))

        branches = GuidedReference(*map(reference, texts, masks), plan, 4)  # type: ignore[arg-type]

        def call(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            both = zip(texts, masks, strict=True)
            return branches(*([x[:1], t[:1], text, mask] for text, mask in both))

        return [call(x, t) for x, t in self.steps()]

    def steps(self) -> list[tuple[Tensor, Tensor]]:
        made = torch.Generator().manual_seed(9)
        return [
            (
                torch.randn(1, 4, 2, 2, generator=made, dtype=torch.float64),
                torch.full((1,), 1 - step / 4).double(),
            )
            for step in range(4)
        ]

    def test_a_batch_of_both_branches_with_masks_of_their_own(self) -> None:
        plan = Plan.parse(f"plan steps=4 conditional=last\n{self.PLAN}")
        self.check(asking(sorted_by_mask).double(), plan, [(3, 5), (1, 2)])

    def check(self, model: Asking, plan: Plan, lengths: list[tuple[int, int]]) -> None:
        """For masks of the unconditional and the conditional branch, one pair after the other and again."""
        texts = [text_of(1).double(), text_of(1).double()]
        guided = graphcache.transform(model, plan)
        for pair in (*lengths, lengths[0]):
            masks = [mask_of(length) for length in pair[::-1]]
            expected = self.answers(model, plan, texts, masks)
            text, mask = torch.cat(texts[::-1]), torch.cat(masks[::-1])
            for (x, t), both in zip(self.steps(), expected, strict=True):
                found = guided(x.repeat(2, 1, 1, 1), t.repeat(2), text, mask)
                torch.testing.assert_close(found, torch.cat(both[::-1]), rtol=1e-11, atol=1e-11)
        assert programs(guided) == len(lengths)

    def test_a_half_whose_answers_are_others_than_the_batchs(self) -> None:
        """Of (2, 5) and (5, 2) the batch says the same, a short text, but its last half does not."""

        def masked(text: Tensor, mask: Tensor) -> Tensor:
            return text if mask.all() else text * mask[..., None]

        plan = Plan.parse(f"plan steps=4 conditional=last\n{self.PLAN}")
        self.check(asking(masked).double(), plan, [(2, 5), (5, 2)])


@pytest.mark.parametrize(("ask", "graphs"), [(sorted_by_mask, 2), (shortened, 4)], ids=["alike", "sized"])
def test_one_graph_a_phase_and_no_second_one_for_values_that_return(ask: Ask, graphs: int) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model, text = asking(ask), text_of()
    plan = presets.fora(4, interval=2)
    compiled: Any = graphcache.transform(model, plan, backend=counter, signatures=1)
    plain = graphcache.transform(model, plan)
    for lengths in ((3, 5), (2, 1), (3, 5)):
        found = generation(compiled, text, mask_of(*lengths), 4)
        torch.testing.assert_close(found, generation(plain, text, mask_of(*lengths), 4))
    assert programs(compiled) == 1, "the capture was dropped and made again"
    assert counter.frame_count == graphs, "what masks only choose is computed before"


class TestRefusals:
    BRANCHES = "A step must not branch on tensor values"

    def refused(self, ask: Callable[[Tensor, Tensor, Tensor], Tensor], *words: str) -> None:
        class Looking(Asking):
            def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
                return super().forward(ask(x, timestep, mask), timestep, text, mask)

        model = Looking(shortened).eval()
        with pytest.raises(CaptureError) as error:
            generation(graphcache.transform(model, presets.compute(2)), text_of(), mask_of(3, 5))
        for word in (f"in {ask.__name__}: `", *words, self.BRANCHES):
            assert word in str(error.value)

    def test_answers_that_depend_on_the_latents(self) -> None:
        def looks(x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
            return x * 2 if x.max() > mask.sum() else x

        self.refused(looks, "test_masks_and_sizes.py:", "depends on x,", "another value at each step")

    def test_answers_that_depend_on_the_time(self) -> None:
        def waits(x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
            return x * 2 if mask.any() and t[0] > 0.5 else x

        self.refused(waits, "depends on timestep,")


def test_sizes_of_latents_and_of_masks_in_one_forward() -> None:
    """What depends on the latents keeps an unknown size, what depends on the mask does not."""

    class Both(Asking):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            scale = x[x > 0].view(1, -1).mean()
            return super().forward(x, timestep, text, mask) * scale

    model, text = Both(sorted_by_mask).eval(), text_of()
    exact = graphcache.transform(model, presets.compute(2))
    for lengths in ((3, 5), (2, 1)):
        mask = mask_of(*lengths)
        assert_same(generation(exact, text, mask), generation(model, text, mask))


def test_a_model_that_asks_for_nothing_is_called_and_traced_once() -> None:
    calls = itertools.count()

    def plain(text: Tensor, mask: Tensor) -> Tensor:
        next(calls)
        return text * mask[..., None]

    exact: Any = graphcache.transform(asking(plain), presets.compute(2))
    generation(exact, text_of(), mask_of(3, 5))
    assert next(calls) == 2
    assert not engine_of(exact).maker.decisions


@pytest.mark.few(3)
@pytest.mark.parametrize("name", DECIDING)
class TestDiffusersModels:
    def test_bits_and_sites(self, name: str) -> None:
        case = DECIDING[name]
        model, plan = case.make(), presets.compute(2)
        exact: Any = graphcache.transform(model, plan, timestep=case.timestep)
        static = case.static(2)
        for t in (1.0, 0.5):
            kwargs = case.call(static, case.latents(2, int(t)), t)
            assert_same(exact(**kwargs), model(**kwargs))
        step = programs_of(exact)[0].captured.step
        assert step.blocks == case.blocks
        assert roles(step.branches) == case.roles

    def test_a_caching_plan_gives_what_the_reference_gives(self, name: str) -> None:
        case, plan = DECIDING[name], presets.fora(4, interval=2)
        model, static = case.make(), case.static(2)
        captured = capture_call(model, case.call(static, case.latents(2), 1.0), case.timestep)
        reference = Reference(captured, plan)
        cached: Any = graphcache.transform(model, plan, timestep=case.timestep)
        for step in range(4):
            kwargs = case.call(static, case.latents(2, step), 1 - step / 4)
            assert_same(cached(**kwargs), reference(runner_tensors(model, kwargs)))


def roles(branches: Any) -> Mapping[str, int]:
    names = [branch.role + ".context" * branch.context for branch in branches]
    return {name: names.count(name) for name in names}
