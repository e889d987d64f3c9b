"""The points at which an image's values can be compared: sums in its graph, on the simulator and in the interpreter.

A point is one `tb.add` in one pass of its loop. The emitter comments every instruction group with its operation's kind
and node, so the `vadd` that computes the sum, and the register words it writes, are found in the program itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from xdsl.dialects.builtin import ModuleOp, SymbolRefAttr
from xdsl.ir import Operation

from typebar.compiler import ir
from typebar.compiler.interpreter import StepInterpreter
from typebar.compiler.passes.quantise import origin
from typebar.compiler.pipeline import parse
from typebar.compiler.problems import node_name
from typebar.host.driver import DeviceEngine
from typebar.host.simulator import SimulatedDevice
from typebar.isa.image import Image
from typebar.isa.program import Op, Operand

Lookup = Callable[[str], NDArray[np.float32]]
Values = dict["Point", NDArray[np.float64]]
"""Values [positions, width] by point, in the order of computation."""


@dataclass(frozen=True)
class Point:
    """A place to compare: `name` is the weight before it, `layer` the pass of its loop or "", `node` the exporter's."""

    index: int
    """Number of the operation in the module; -1 for the logits."""
    turn: int
    """Pass of the loop, 0 outside loops."""
    name: str
    layer: str
    node: str


LOGITS = Point(-1, 0, "logits", "", "")


@dataclass(frozen=True)
class Site:
    """A sum in the program: the instruction, the first word it writes and how many."""

    pc: int
    word: int
    words: int


@dataclass(frozen=True)
class Points:
    """Every sum of a module with the points it makes, one for each pass of its loop, and its site if there is one."""

    module: ModuleOp
    sums: dict[Operation, tuple[Point, ...]]
    sites: dict[Operation, Site]


@dataclass(frozen=True)
class Fed:
    """What a comparison feeds: the decoder's tokens and, for a model with an encoder, the source text's."""

    tokens: list[int]
    source: list[int] | None = None

    @property
    def positions(self) -> int:
        """Positions in all."""
        return len(self.tokens) + len(self.source or ())


def find_points(image: Image) -> Points:
    """The points of an image."""
    module = parse(image.graph)
    ops = [op for op in module.walk() if isinstance(op, ir.AddOp)]
    return Points(module, {op: _points(op, index) for index, op in enumerate(ops)}, _sites(image, ops))


def _points(op: Operation, index: int) -> tuple[Point, ...]:
    loop = op.parent_op()
    encoder = any(isinstance(parent, ir.EncoderOp) for parent in _parents(op))
    template, node = _weight_before(op), node_name(op)
    stack = "encoder " if encoder else ""
    if not isinstance(loop, ir.RepeatOp):
        return (Point(index, 0, template or node, stack.strip(), node),)
    start, count = loop.start.value.data, loop.count.value.data
    return tuple(
        Point(index, turn, ir.layer_name(template, start, turn) or node, f"{stack}layer {start + turn}", node)
        for turn in range(count)
    )


def _parents(op: Operation) -> Iterable[Operation]:
    parent = op.parent_op()
    while parent is not None:
        yield parent
        parent = parent.parent_op()


def _weight_before(op: Operation) -> str:
    """The name of the last matrix or table read before the sum, without ".weight"; "" if there is none."""
    before: Operation | None = op
    while before is not None:
        weight = before.properties.get("weight")
        if isinstance(before, ir.LinearOp | ir.EmbeddingOp) and isinstance(weight, SymbolRefAttr):
            return origin(ir.text(weight)).removesuffix(".weight")
        before = before.prev_op
    return ""


def _sites(image: Image, sums: Sequence[Operation]) -> dict[Operation, Site]:
    """Sums of one node stand in the program in the graph's order; one split over the devices has no site."""
    program, comments = image.program, image.manifest.comments
    places: dict[str, list[Site]] = defaultdict(list)
    for pc in sorted(comments):
        kind, _, node = comments[pc].partition(" ")
        if kind == "add" and program.ops[pc].kind.name in ("vadd", "vchain"):
            places[node.strip("()")].append(_site(program.ops[pc], pc))
    found: dict[Operation, Site] = {}
    for op in sums:
        waiting = places[node_name(op)]
        if waiting:
            site = waiting.pop(0)
            if site.words == ir.width(op.results[0]):
                found[op] = site
    return found


def _site(op: Op, pc: int) -> Site:
    word, words = op.get("dst"), op.get("n")
    assert isinstance(word, Operand) and isinstance(words, Operand)
    return Site(pc, word.immediate, words.immediate)


class _Recorder:
    """Collects vectors by point."""

    def __init__(self) -> None:
        self.rows: dict[Point, list[NDArray[np.float64]]] = defaultdict(list)

    def add(self, point: Point, value: torch.Tensor | NDArray[np.float32]) -> None:
        array = value.double().cpu().numpy() if isinstance(value, torch.Tensor) else value.astype(np.float64)
        self.rows[point].append(array.reshape(-1, array.shape[-1]))

    def values(self) -> Values:
        return {point: np.concatenate(rows) for point, rows in self.rows.items()}


def interpret(points: Points, fed: Fed, lookup: Lookup, dtype: torch.dtype) -> Values:
    """The values at every point in torch; `dtype` is the type of all arithmetic and weights."""
    recorder = _Recorder()

    def trace(op: Operation, turn: int, value: torch.Tensor) -> None:
        if op in points.sums:
            recorder.add(points.sums[op][turn], value)

    step = StepInterpreter(points.module, lambda name: torch.from_numpy(lookup(name)), dtype, trace=trace)
    if fed.source is not None:
        step.encode(fed.source)
    for position, token in enumerate(fed.tokens):
        recorder.add(LOGITS, step.step(token, position))
    return recorder.values()


def simulate_points(image: Image, points: Points, fed: Fed) -> Values:
    """The values at every point that has a site, and the logits, on the functional simulator."""
    recorder, visits = _Recorder(), defaultdict[Operation, int](int)
    owners = {site.pc: op for op, site in points.sites.items()}

    def hook(rank: int, pc: int) -> None:
        if rank == 0:
            op = owners[pc]
            site, turns = points.sites[op], points.sums[op]
            value = device.vector_registers(0)[site.word : site.word + site.words]
            recorder.add(turns[_turn(op, visits[op], len(turns), fed)], value)
            visits[op] += 1

    device = SimulatedDevice(image.machine, image.manifest.devices)
    device.watch(owners, hook)
    engine = DeviceEngine(image, device, "sim")
    if fed.source is not None:
        engine.encode(fed.source)
    for token in fed.tokens:
        recorder.add(LOGITS, engine.logits([token]))
    return recorder.values()


def _turn(op: Operation, visit: int, turns: int, fed: Fed) -> int:
    """The pass of the loop in which an instruction is executed for the `visit`-th time.

    A decoder goes through all layers with one token after another; an encoder with all positions through one layer
    after another, for its attention needs them all.
    """
    if fed.source is not None and any(isinstance(parent, ir.EncoderOp) for parent in _parents(op)):
        return visit // len(fed.source)
    return visit % turns
