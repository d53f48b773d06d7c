"""What a capture takes for granted of its inputs' values, and whether it still holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from graphcache.ir.graph import Input, Output, StepGraph, as_bytes
from graphcache.ir.structure import VALUES, structure
from graphcache.passes.transfer import here


@dataclass(frozen=True)
class Conditions:
    """The values that forward asked for, in this order, computed from its inputs by `step`.

    A call for which they are the same takes the same way through forward: the first of them depends on
    nothing that was asked before, and each further one on no more than the answers to those before it.
    """

    step: StepGraph
    expected: tuple[bytes, ...]

    @staticmethod
    def of(step: StepGraph, tensors: Sequence[torch.Tensor]) -> "Conditions":
        """For a graph of what was asked, and the inputs that its capture was made with."""
        return Conditions(step, tuple(Conditions(step, ()).found(tensors)))

    @cached_property
    def leaves(self) -> frozenset[int]:
        """The inputs that the values depend on."""
        return frozenset(
            port.index for port, node in self.step.ports() if isinstance(port, Input) and node.users
        )

    @cached_property
    def reads_weights(self) -> bool:
        """Whether they depend on more than inputs: on what may be written to without notice."""
        held = [str(node.target) for node in self.step.graph.find_nodes(op="get_attr")]
        return not all(name.startswith(VALUES) for name in held)

    @cached_property
    def structure(self) -> str:
        """Equal for graphs that compute the same."""
        return structure(self.step.graph, self.step.root)

    def found(self, tensors: Sequence[torch.Tensor]) -> Iterator[bytes]:
        """The values for these inputs, one after the other; waits for the device.

        None is computed before it is wanted: one that forward asks only after other answers may not exist.
        """
        env: dict[fx.Node, Any] = dict(zip(self.step.placeholders(), tensors, strict=True))
        nodes = iter(self.step.graph.nodes)
        for result in self.step.results():
            while result not in env:
                node = next(nodes)
                if node.op == "get_attr":
                    env[node] = here(self.step, str(node.target))
                elif node.op == "call_function":
                    args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                    with torch.no_grad():
                        env[node] = node.target(*args, **kwargs)
            yield as_bytes(env[result])


def separated(step: StepGraph, count: int) -> tuple[StepGraph, StepGraph]:
    """A graph's first results, and what computes the others alone."""
    results = step.results()
    step.graph.output_node().args = (tuple(results[:count]),)
    asked = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    needed = _behind(results[count:])
    for node in step.graph.nodes:
        if node.op == "placeholder" or node in needed:
            env[node] = asked.node_copy(node, env.__getitem__)
    asked.output(tuple([env[node] for node in results[count:]]))
    ports = tuple([Output(index) for index in range(len(results) - count)])
    outputs = step.outputs[:count]
    return step.rebuilt(step.graph, outputs=outputs), StepGraph(
        step.root, asked, step.inputs, ports, homes=step.homes
    )


def varying(step: StepGraph, result: fx.Node) -> list[Input]:
    """The inputs behind a result that are others at each step: latents and times."""
    behind = _behind([result])
    ports = [port for port, node in step.ports() if node in behind]
    return [port for port in ports if isinstance(port, Input) and port.kind != "constant"]


def _behind(results: Sequence[fx.Node]) -> set[fx.Node]:
    """These nodes and all that they are computed from."""
    found: set[fx.Node] = set()
    todo = list(results)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found
