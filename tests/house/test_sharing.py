"""Captures that tests share: one for alike models, each with its weights; another for what differs."""

import torch

import graphcache
from inside import only_program
from reference import assert_same
from sharing import Sharing
from tiny import TinyDiT, arguments, tiny


class Louder(TinyDiT):
    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.gain = 1.0

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return super().forward(x, timestep, text) * self.gain


def results(model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [
            graphcache.transform(model, graphcache.presets.compute(1))(**arguments()),
            model(**arguments()),
        ]


def test_alike_models_share_a_capture_and_keep_their_weights(sharing: Sharing) -> None:
    one, other = tiny(1, Louder), tiny(1, Louder)
    with torch.no_grad():
        other.blocks[0].up.weight.mul_(3)
    first = results(one)
    known = len(sharing.captures)
    second = results(other)
    assert len(sharing.captures) == known
    assert_same(first[0], first[1])
    assert_same(second[0], second[1])
    assert not torch.equal(first[0], second[0])


def test_what_tracing_would_see_is_told_apart(sharing: Sharing) -> None:
    one, other = tiny(1, Louder), tiny(1, Louder)
    other.gain = 3.0
    assert_same(*results(one))
    known = len(sharing.captures)
    assert_same(*results(other))
    assert len(sharing.captures) == known + 1


def test_traces_with_symbols_are_shared_and_have_their_weights(sharing: Sharing) -> None:
    models, plan = [tiny(1, Louder) for _ in range(2)], graphcache.presets.compute(1)
    with torch.no_grad():
        models[1].blocks[0].up.weight.mul_(3)
        for model, traced in zip(models, (1, 0), strict=True):
            known = len(sharing.traces)
            cached = graphcache.transform(model, plan)
            for tokens in (3, 4, 5, 6):
                assert_same(cached(**arguments(tokens=tokens)), model(**arguments(tokens=tokens)))
            assert len(sharing.traces) == known + traced


class Idle(TinyDiT):
    """With a weight that no result needs, as last blocks of two streams have."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.idle = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        self.idle(text)
        return super().forward(x, timestep, text)


def test_unread_weights_are_shared_too(sharing: Sharing) -> None:
    """They are part of what a plan knows a model by."""
    fingerprints = []
    for model in (tiny(1, Idle), tiny(1, Idle)):
        cached = graphcache.transform(model, graphcache.presets.compute(1))
        cached(**arguments())
        fingerprints.append(only_program(cached).fingerprint)
    assert fingerprints[0] == fingerprints[1]
