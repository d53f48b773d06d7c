"""Take what does not change over the steps out of the step."""

from dataclasses import dataclass, replace

from graphcache.ir.graph import Hoisted, StepGraph
from graphcache.passes.prune import pruned


@dataclass(frozen=True)
class Hoist:
    """Turn the named values into inputs, to be computed once per generation by `Prologue`."""

    values: tuple[str, ...]

    def __call__(self, step: StepGraph) -> StepGraph:
        graph, _ = step.copy()
        nodes = {node.name: node for node in graph.nodes}
        first = next(node for node in graph.nodes if node.op != "placeholder")
        ports, renamed = list(step.inputs), dict[str, str]()
        for name in self.values:
            with graph.inserting_before(first):
                held = graph.placeholder(f"hoisted_{name}")
            held.meta["val"] = nodes[name].meta["val"]
            nodes[name].replace_all_uses_with(held)
            ports.append(Hoisted(name))
            renamed[name] = held.name
        branches = tuple(replace(b, stream=renamed.get(b.stream, b.stream)) for b in step.branches)
        return pruned(step.rebuilt(graph, inputs=tuple(ports), branches=branches))


@dataclass(frozen=True)
class Prologue:
    """The other half of `Hoist`: the graph that computes the named values and nothing else."""

    values: tuple[str, ...]

    def __call__(self, step: StepGraph) -> StepGraph:
        graph, _ = step.copy()
        nodes = {node.name: node for node in graph.nodes}
        graph.erase_node(graph.output_node())
        graph.output(tuple(nodes[name] for name in self.values))
        outputs = tuple(Hoisted(name) for name in self.values)
        return pruned(step.rebuilt(graph, outputs=outputs, branches=()))
