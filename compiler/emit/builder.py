"""A program under construction, and the scalar registers that compiled programs use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import TypeVar

from typebar.compiler.emit.chain import Chain, chain_of, joined
from typebar.isa.instructions import COUNT_REGISTER, DEVICE_REGISTER, IMMEDIATE_BITS
from typebar.isa.program import Op, Operand, Program, Value, op

Item = TypeVar("Item")
_IMMEDIATE_LIMIT = 1 << IMMEDIATE_BITS - 1


class R(IntEnum):
    """Scalar registers of compiled programs. WEIGHTS to KV hold lines to add for the current layer of a loop.

    SOURCE, tokens of the source text, takes the place of the number of devices, which the compiler knows.
    LOW, SKIP and BIAS are attention's; the end of a token has other uses for them. ROWS and ROWS_NEXT are the tokens
    in the two groups of a prompt's block, which has no one TOKEN and patches nothing; HIGH is where a mask ends in it.
    FACTOR is a chain's, outside of attention.
    """

    ZERO = 0
    RANK = DEVICE_REGISTER
    SOURCE = COUNT_REGISTER
    POSITION = 3
    LAST = 4
    LEFT = 5
    EOS = 6
    FLAGS = 7
    TOKEN = 8
    LAYER = 9
    WEIGHTS = 10
    PARAMS = 11
    LOCAL = 12
    KV = 13
    LENGTH = 14
    GROUP = 15
    OFFSET = 16
    K_LINE = 17
    V_LINE = 18
    K_BYTE = 19
    V_BYTE = 20
    T0 = 21
    T1 = 22
    T2 = 23
    BEST = 24
    INDEX = 25
    CHUNK = 26
    BLOCK = 27
    BLOCK_LENGTH = 28
    PATCH = 29
    GENERATED = 30
    VALID = 31
    LOW = 24
    SKIP = 25
    BIAS = 31
    BYTE = 15
    FACTOR = 15
    ROWS = 8
    ROWS_NEXT = 29
    HIGH = 19


def reg(register: R, immediate: int = 0) -> Operand:
    """`R[register] + immediate` as an operand."""
    return Operand(int(register), immediate)


class Builder:
    """Collects instructions, labels and comments; with `chains` it joins vector instructions to chains."""

    def __init__(self, chains: bool = False) -> None:
        """Start empty."""
        self.chains = chains
        self._last: Chain | None = None
        self._ops: list[tuple[str, dict[str, Value]]] = []
        self._targets: dict[int, str] = {}
        self._labels: dict[str, int] = {}
        self._comments: dict[int, str] = {}
        self._note = ""
        self._serial = 0

    def note(self, text: str) -> None:
        """Comment on the next instruction."""
        self._note = text

    def add(self, name: str, **values: Value) -> None:
        """Append an instruction; integers stand for immediate operands."""
        chain = chain_of(name, values) if self.chains else None
        whole = joined(self._last, chain) if self._last is not None and chain is not None else None
        if whole is not None and chain is not None:
            self._join(whole, named=chain.dst is not None)
            return
        self._last = chain
        if self._note:
            self._comments[len(self._ops)] = self._note
            self._note = ""
        self._ops.append((name, values))

    def each(self, items: Iterable[Item], *steps: Callable[[Item], None]) -> None:
        """Append the steps of every item.

        Each step for all items, so that one's latency passes while the others compute; as chains, where all steps of
        an item are one instruction, item by item.
        """
        items = list(items)
        if self.chains:
            for item in items:
                for step in steps:
                    step(item)
            return
        for step in steps:
            for item in items:
                step(item)

    def _join(self, whole: Chain, named: bool) -> None:
        """Replace the last instruction; `named`: a pending comment is this one's, not the next one's."""
        at = len(self._ops) - 1
        if whole.constant is not None and (self._last is None or self._last.constant is None):
            self._ops.insert(at, ("sli", {"rd": int(R.FACTOR), "value": whole.constant - (whole.constant >> 31 << 32)}))
            if at in self._comments:
                self._comments[at + 1] = self._comments.pop(at)
            at += 1
        self._ops[at] = ("vchain", whole.values(int(R.FACTOR)))
        if self._note and named:
            self._comments[at], self._note = self._note, ""
        self._last = whole

    def label(self, name: str) -> None:
        """Name the next instruction, which joins none before it."""
        self._last = None
        self._labels[name] = len(self._ops)

    def fresh(self, name: str) -> str:
        """A label name not used before."""
        self._serial += 1
        return f"{name}_{self._serial}"

    def branch(self, name: str, label: str, a: Value, b: Value) -> None:
        """Append a branch to a label, which may come later."""
        self._targets[len(self._ops)] = label
        self.add(name, a=a, b=b)

    def constant(self, register: R, value: int) -> None:
        """Load a constant."""
        self.add("sli", rd=int(register), value=value)

    def increase(self, register: R, amount: int, temporary: R = R.T0) -> None:
        """Add a constant of any size to a register."""
        if amount:
            self.add("sadd", rd=int(register), a=reg(register), b=self.any_size(amount, temporary))

    def any_size(self, value: int, temporary: R) -> Operand:
        """An operand for a constant, loaded to `temporary` where it does not fit an immediate."""
        if -_IMMEDIATE_LIMIT <= value < _IMMEDIATE_LIMIT:
            return Operand(0, value)
        self.constant(temporary, value)
        return reg(temporary)

    def line(self, value: int, base: R, temporary: R = R.T0) -> Operand:
        """An operand for line `value` + R[base], using `temporary` where it does not fit an immediate."""
        if value < _IMMEDIATE_LIMIT:
            return reg(base, value)
        self.constant(temporary, value)
        if base is not R.ZERO:
            self.add("sadd", rd=int(temporary), a=reg(temporary), b=reg(base))
        return reg(temporary)

    def program(self) -> Program:
        """The finished program, branches resolved."""
        ops: list[Op] = []
        for index, (name, values) in enumerate(self._ops):
            if index in self._targets:
                values = values | {"to": self._labels[self._targets[index]]}
            ops.append(op(name, **values))
        return Program(ops, dict(self._labels), dict(self._comments))
