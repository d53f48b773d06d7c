"""Which operations belong to a residual branch, and what they cost."""

from collections import Counter

from torch import fx

from graphcache.analysis.cost import flops
from graphcache.analysis.dataflow import LATENT, Dataflow
from graphcache.ir.graph import Branch, StepGraph


def branch_members(step: StepGraph) -> dict[str, list[str]]:
    """Names of the nodes between each branch's stream and its value; several branches may share some."""
    flow, nodes = Dataflow(step), step.nodes()
    return {branch.name: _own_work(flow, branch, nodes) for branch in step.branches}


def owners(members: dict[str, list[str]]) -> Counter[str]:
    """How many branches each node belongs to."""
    return Counter(name for inside in members.values() for name in inside)


def branch_flops(step: StepGraph) -> dict[str, int]:
    """FLOPs between each branch's stream and its value; what they share is divided."""
    members = branch_members(step)
    shared = owners(members)
    cost = {node.name: flops(node) for node in step.graph.nodes}
    return {name: sum(cost[item] // shared[item] for item in inside) for name, inside in members.items()}


def _own_work(flow: Dataflow, branch: Branch, nodes: dict[str, fx.Node]) -> list[str]:
    """Nodes that the branch's value needs and that no residual stream carries."""
    streams = {nodes[b.merge] for b in flow.step.branches} | {nodes[b.stream] for b in flow.step.branches}
    todo, seen = [nodes[branch.value]], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen or node in streams or node.op != "call_function":
            continue
        seen.add(node)
        todo.extend(node.all_input_nodes)
    return [node.name for node in seen if flow.depends[node] & LATENT]
