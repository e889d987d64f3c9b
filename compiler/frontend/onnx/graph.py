"""The structure of an ONNX graph: what reads what, in which order, and what is missing, doubled or circular."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, NodeProto

from typebar.compiler.frontend.onnx.files import StoredTensor, stored_tensor
from typebar.compiler.problems import Problem
from typebar.isa.errors import TypebarError

_SHOWN = 60
_EXPORT = "export the model again"


@dataclass(frozen=True)
class Graph:
    """A graph's operations that its wanted results need, in an order in which they can be run, and its initialisers."""

    nodes: list[NodeProto]
    tensors: dict[str, StoredTensor]
    outputs: list[str]


def node_label(node: NodeProto) -> str:
    """How messages name a node: by its name, else by its first result."""
    label = node.name or next((o for o in node.output if o), "") or node.op_type
    return " ".join(label.split())[:_SHOWN]


def domain_of(node: NodeProto) -> str:
    """The node's operator set; the standard one is empty."""
    return "" if node.domain == "ai.onnx" else node.domain


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the functions that it defines written out; raises TypebarError if they cannot be."""
    if not model.functions:
        return model
    from onnx import inliner

    try:
        return inliner.inline_local_functions(model)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        line = (str(error).splitlines() or [""])[0][:_SHOWN]
        raise TypebarError(f"the model's functions cannot be written out: {line}; export it without them") from error


def structure(graph: GraphProto, wanted: Iterable[str], outer: Iterable[str], folder: Path) -> Graph:
    """Check a graph and order what `wanted` needs; `outer` are the names known from outside.

    Raises TypebarError for the first initialiser that is wrong, and ProblemsError with everything else.
    """
    problems: list[Problem] = []
    tensors = _initialisers(graph, folder, problems)
    known = {v.name for v in graph.input} | set(outer)
    makers: dict[str, NodeProto] = {}
    for node in graph.node:
        for name in filter(None, node.output):
            if name in makers or name in tensors or name in {v.name for v in graph.input}:
                problems.append(Problem(node_label(node), f"{name!r} is made twice", _EXPORT))
            makers[name] = node
    results = list(wanted)
    for name in results:
        if name not in makers and name not in known and name not in tensors:
            problems.append(Problem(name[:_SHOWN], "it is a result that no operation makes", _EXPORT))
    if problems:
        raise ProblemsError(problems)
    nodes = _ordered(results, makers, known | set(tensors), problems)
    if problems:
        raise ProblemsError(problems)
    return Graph(nodes, tensors, results)


class ProblemsError(Exception):
    """Carries problems out of nested checks."""

    def __init__(self, problems: list[Problem]) -> None:
        """Remember them."""
        super().__init__(f"{len(problems)} problems")
        self.problems = problems


def _initialisers(graph: GraphProto, folder: Path, problems: list[Problem]) -> dict[str, StoredTensor]:
    if graph.sparse_initializer:
        problems.append(Problem("sparse initialisers", "they are not supported", "store the weights densely"))
    tensors: dict[str, StoredTensor] = {}
    for proto in graph.initializer:
        if proto.name in tensors:
            problems.append(Problem(proto.name[:_SHOWN], "two initialisers have this name", _EXPORT))
        tensors[proto.name] = stored_tensor(proto, folder)
    return tensors


def read_names(node: NodeProto) -> list[str]:
    """Every name that a node reads, those that its inner graphs take from outside included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
        for inner in graphs:
            names.extend(_captured(inner))
    return names


def _captured(graph: GraphProto) -> list[str]:
    own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    own |= {name for node in graph.node for name in node.output}
    names = [name for node in graph.node for name in read_names(node)] + [v.name for v in graph.output]
    return [name for name in names if name not in own]


def _ordered(
    wanted: list[str], makers: Mapping[str, NodeProto], known: set[str], problems: list[Problem]
) -> list[NodeProto]:
    """The nodes that `wanted` needs, each after those that it reads: in the file's order unless a tool re-sorted it.

    Quantisers put every node as early as it can run, far from its layer; such a file is ordered by use instead.
    """
    state: dict[int, bool] = {}  # by a node's identity: False while what it reads is being visited
    order: list[NodeProto] = []
    stack = [(makers[name], False) for name in reversed(wanted) if name in makers]
    while stack:
        node, finished = stack.pop()
        key = id(node)
        if finished:
            state[key] = True
            order.append(node)
            continue
        if key in state:
            continue
        state[key] = False
        stack.append((node, True))
        for name in dict.fromkeys(reversed(read_names(node))):
            maker = makers.get(name)
            if maker is None:
                if name not in known:
                    reason = f"it reads {name[:_SHOWN]!r}, which no input, initialiser or operation makes"
                    problems.append(Problem(node_label(node), reason, _EXPORT))
            elif id(maker) not in state:
                stack.append((maker, False))
            elif not state[id(maker)]:
                problems.append(Problem(node_label(node), f"it is part of a cycle through {name[:_SHOWN]!r}", _EXPORT))
    place = {id(node): i for i, node in enumerate(makers.values())}
    filed = sorted(order, key=lambda node: place[id(node)])
    resorted = any(node.op_type == "DynamicQuantizeLinear" for node in order)
    return filed if not resorted and _runs(filed, makers) else order


def _runs(nodes: list[NodeProto], makers: Mapping[str, NodeProto]) -> bool:
    """Whether every node stands after those that it reads."""
    done: set[str] = set()
    for node in nodes:
        if any(name in makers and name not in done for name in read_names(node)):
            return False
        done.update(node.output)
    return True
