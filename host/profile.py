"""Where the time of a pass goes, by matrix product, by layer and over time, from a profile of device 0.

The matrix unit's cycles are the measure: each has one cause, and the cycles between the end of one matrix instruction
and the end of the next are all charged to the next, those it waits and those it computes. So the parts sum to the time
from the end of one pass's last product to the end of the next one's, which is the time of a token once tokens follow
one another.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from typebar.isa.instructions import Region, Unit
from typebar.isa.machine import Machine
from typebar.isa.program import Program
from typebar.isa.timing import COUNTERS, FETCH_UNIT, Cause
from typebar.sim.timing import Trace

Ints = NDArray[np.int64]
SCORES, VALUES, HEAD, LINEAR = "attention scores", "attention values", "LM head", "linear"
_LAYER_LABEL = "layer"
_CACHED, _WEIGHTS = ("attention", "attend"), ("matrix", "logits")
"""First words of the comments on products with K and V, and on those with weights."""
_ROWS = "rows of "
"""Before the comments of blocks of a prompt's tokens."""
_FETCHED = [COUNTERS.index("weights_fetched_bytes"), COUNTERS.index("kv_fetched_bytes")]
_USEFUL = [COUNTERS.index("weights_useful_bytes"), COUNTERS.index("kv_useful_bytes")]
_WRITTEN, _RING, _MACS = (COUNTERS.index(name) for name in ("kv_written_bytes", "ring_bytes", "macs"))


@dataclass(frozen=True)
class Product:
    """A matrix product of the model: `role` names its weights, `kind` is one of the four above.

    `node` is the program's comment on it, the first one's if several products have one role.
    """

    role: str
    kind: str
    node: str


@dataclass
class Share:
    """What device 0 spent on a product, or in a layer, and moved for it.

    `causes` are the matrix unit's cycles by cause; `busy` those of them in which the product occupied the unit. Bytes
    are read from HBM: all of them, and those without padding. `macs` are multiply-accumulates.
    """

    causes: dict[str, int] = field(default_factory=dict)
    busy: int = 0
    fetched_bytes: int = 0
    useful_bytes: int = 0
    macs: int = 0

    @property
    def cycles(self) -> int:
        """All cycles charged."""
        return sum(self.causes.values())


@dataclass(frozen=True)
class Layer:
    """A turn of a loop over layers: its number, counted over all loops, or None for what lies outside of them.

    A turn is a layer, or one of each kind where layers of several kinds take turns.
    """

    number: int | None
    share: Share


@dataclass(frozen=True)
class Timeline:
    """A stretch of time in equal bins: shares of the most that could be, 0 to 1, on device 0.

    It is `cycles` long and begins `first` cycles after the token before was stored.

    `hbm` are bytes read and written over the memory's peak, `ring` bytes sent over the rate of the links in both
    directions, `matrix` cycles in which the matrix unit is occupied. Bytes of an instruction are spread evenly over the
    time in which its unit is occupied by it.
    """

    first: float
    cycles: float
    hbm: list[float]
    ring: list[float]
    matrix: list[float]


def products(program: Program) -> dict[int, Product]:
    """The product of every matrix instruction, by its index; roles come from the compiler's comments."""
    notes = sorted(program.comments)
    known: dict[tuple[str, str], Product] = {}
    found = {}
    for pc, op in enumerate(program.ops):
        if op.kind.unit is not Unit.MATRIX:
            continue
        cached = op.get("region") == Region.KV
        before = [program.comments[at].removeprefix(_ROWS) for at in reversed(notes[: bisect_right(notes, pc)])]
        node = next((note for note in before if note.split(" ")[0] in (_CACHED if cached else _WEIGHTS)), "")
        if cached:
            kind = SCORES if op.get("full") else VALUES
            role = kind + (", source text" if node.startswith("attend") else "")
        elif node == "logits":
            role = kind = HEAD
        else:
            role, kind = _role(node) or f"instruction {pc}", LINEAR
        found[pc] = known.setdefault((role, kind), Product(role, kind, node))
    return found


def _role(note: str) -> str:
    """`matrix a.{}.b.weight a.{}.c.weight (node)` as `b + c`: what tells weights of one layer apart."""
    words = note.partition(" (")[0].split()[1:]
    ends = [word.rpartition("}.")[2].removesuffix(".weight") for word in words]
    head = ends[0].rpartition(".")[0] + "." if ends else ""
    return " + ".join([*ends[:1], *(end.removeprefix(head) for end in ends[1:])])


class Profile:
    """A profiled run of a program, cut into passes at the cycles in which tokens were stored."""

    def __init__(self, trace: Trace, program: Program, machine: Machine, stored: Iterable[int]) -> None:
        """Take the run's trace, with causes and counters, and the cycle of every token's store on device 0."""
        assert trace.causes is not None and trace.counters is not None
        self.program, self.machine = program, machine
        self.stored = np.array(sorted(stored), np.int64)
        self._trace = trace
        self._causes, self._counters = trace.causes, trace.counters
        self._products = products(program)
        self._rows = {unit: np.flatnonzero(trace.unit == unit) for unit in (*map(int, Unit), FETCH_UNIT)}

    def _of_pass(self, unit: int, number: int) -> tuple[Ints, Ints, Ints]:
        """Slices of a unit in a pass (rows of the trace), and what each cost by cause and moved by counter.

        A pass's first instruction issues when the token before is stored, and its last one starts before its own is.
        """
        rows = self._rows[unit]
        causes = np.diff(self._causes[rows], axis=0, prepend=np.zeros((1, len(Cause)), np.int64))
        counters = np.diff(self._counters[rows], axis=0, prepend=np.zeros((1, len(COUNTERS)), np.int64))
        mine = np.searchsorted(self.stored, self._trace.start[rows], side="right") == number
        return rows[mine], causes[mine], counters[mine]

    def by_product(self, number: int) -> dict[Product, Share]:
        """Matrix products of a pass, in their order, summed over layers; pass 0 is everything up to the first token."""
        rows, causes, counters = self._of_pass(Unit.MATRIX, number)
        shares: dict[Product, Share] = {}
        pcs, first = np.unique(self._trace.pc[rows], return_index=True)
        for pc in pcs[np.argsort(first)]:
            here = self._trace.pc[rows] == pc
            share = shares.setdefault(self._products[int(pc)], Share())
            _add(share, self._trace, rows[here], causes[here], counters[here])
        return shares

    def by_layer(self, number: int) -> list[Layer]:
        """The layers of a pass, in order, and what lies outside of their loops."""
        rows, causes, counters = self._of_pass(Unit.MATRIX, number)
        layers = layer_numbers(self.program, self._trace.pc[rows], set(self._products))
        found = []
        for layer in np.unique(layers):
            here = layers == layer
            share = Share()
            _add(share, self._trace, rows[here], causes[here], counters[here])
            found.append(Layer(None if layer < 0 else int(layer), share))
        return sorted(found, key=lambda item: (item.number is None, item.number or 0))

    def timeline(self, number: int, bins: int, part: tuple[float, float] = (0.0, 1.0)) -> Timeline:
        """Use of HBM, ring and matrix unit from one token's store to the next one's, or in a part of that time."""
        before, whole = int(self.stored[number - 1]), int(self.stored[number] - self.stored[number - 1])
        first, last = before + part[0] * whole, before + part[1] * whole
        width, machine = (last - first) / bins, self.machine

        def spread(unit: int, amounts: Ints | None, counter: int | None = None) -> NDArray[np.float64]:
            rows = self._rows[unit]
            starts, ends = self._trace.start[rows], self._trace.end[rows]
            if counter is not None:
                amounts = np.diff(self._counters[rows, counter], prepend=0)
            return _binned(starts, ends, ends - starts if amounts is None else amounts, first, width, bins)

        requests = np.diff(self._causes[self._rows[FETCH_UNIT], Cause.TRANSFER], prepend=0)
        hbm = spread(FETCH_UNIT, requests * machine.row_bytes) + spread(Unit.MEMORY, None, _WRITTEN)
        links = 2 * machine.ring.megabits_per_second / 8 / machine.clock_mhz  # bytes a cycle, in both directions
        return Timeline(
            first - before,
            last - first,
            (hbm / (width * machine.row_bytes)).tolist(),
            (spread(Unit.RING, None, _RING) / (width * links)).tolist(),
            (spread(Unit.MATRIX, None) / width).tolist(),
        )


def _add(share: Share, trace: Trace, rows: Ints, causes: Ints, counters: Ints) -> None:
    for cause, cycles in enumerate(causes.sum(axis=0)):
        if cycles:
            name = Cause(cause).name.lower()
            share.causes[name] = share.causes.get(name, 0) + int(cycles)
    share.busy += int((trace.end[rows] - trace.start[rows]).sum())
    share.fetched_bytes += int(counters[:, _FETCHED].sum())
    share.useful_bytes += int(counters[:, _USEFUL].sum())
    share.macs += int(counters[:, _MACS].sum())


def _binned(starts: Ints, ends: Ints, amounts: Ints, first: float, width: float, bins: int) -> NDArray[np.float64]:
    """Amounts, each spread evenly from its start to its end, as sums over bins from `first` on."""
    edges = first + width * np.arange(bins + 1)
    # Up to an edge: all that ended before it, and the part of what is under way; of any unit at most one slice is.
    running = np.concatenate([[0.0], np.cumsum(amounts)])
    place = np.searchsorted(starts, edges, side="right")
    under_way = np.maximum(place - 1, 0)
    length = np.maximum(ends[under_way] - starts[under_way], 1) if len(starts) else np.ones(bins + 1)
    part = np.clip((edges - starts[under_way]) / length, 0, 1) if len(starts) else np.zeros(bins + 1)
    done = running[under_way] + np.where(place > 0, part * amounts[under_way], 0) if len(starts) else running[under_way]
    binned: NDArray[np.float64] = np.diff(done)
    return binned


def layer_numbers(program: Program, pcs: Ints, matrix: set[int]) -> Ints:
    """The layer of each matrix instruction of a pass [instructions], in order; -1 outside of loops over layers.

    A loop over layers begins at a label that the compiler calls `layer`. Of its instructions, one that every turn
    executes exactly once (it lies in no loop within, and no branch leaps over it) tells the turns apart.
    """
    layers = np.full(len(pcs), -1, np.int64)
    branches = [(pc, int(to)) for pc, op in enumerate(program.ops) if isinstance(to := _target(program, pc), int)]
    total = 0
    for name, first in sorted(program.labels.items(), key=lambda item: item[1]):
        turns = [pc for pc, to in branches if to == first and pc > first]
        if name.split("_")[0] != _LAYER_LABEL or not turns:
            continue
        last = max(turns)
        inside = np.flatnonzero((pcs >= first) & (pcs <= last))
        once = [pc for pc in sorted(matrix) if first <= pc <= last and not _skipped_or_repeated(pc, branches, first)]
        if not len(inside) or not once:
            continue
        # In order, and no loop within spans it: what comes before it in the program comes before it in its turn.
        anchor = once[0]
        seen = np.cumsum(pcs[inside] == anchor)
        layers[inside] = total + np.where(pcs[inside] < anchor, seen, seen - 1)
        total += int(seen[-1])
    return layers


def _target(program: Program, pc: int) -> int | None:
    op = program.ops[pc]
    target = op.values.get("to")
    return target if isinstance(target, int) else None


def _skipped_or_repeated(pc: int, branches: list[tuple[int, int]], loop: int) -> bool:
    """Whether a branch within the loop that begins at `loop` leaps over the instruction, or back over it."""
    return any((source < pc < to and source >= loop) or (to <= pc <= source and to > loop) for source, to in branches)
