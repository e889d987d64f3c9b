"""The functional simulator's scalar, vector, memory and ring instructions, each decoded once into a closure.

`decode` turns an instruction into a function of a device's state that checks the operands, executes the instruction
and returns the next instruction's index; `HALTED` and `AT_RING` stand for the two events that end a device's run.
An instruction reads all its inputs before it writes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from typebar.isa.instructions import (
    FORMAT_BYTES,
    Activation,
    Factor,
    Format,
    Function,
    Kind,
    Operation,
    Reduction,
    Source,
    Trap,
)
from typebar.isa.machine import LINE_BYTES
from typebar.isa.program import Op, Operand
from typebar.sim import kernels
from typebar.sim.functional_state import DeviceState, strided

HALTED = -1
AT_RING = -2

Step = Callable[[DeviceState], int]
"""Executes one instruction on a device and returns the next index, or an event."""
Builder = Callable[[Op, int], Step]
"""Decodes an instruction at an index into its step."""

_SIGN = 1 << 31
_MASK = (1 << 32) - 1


def signed(value: int) -> int:
    """A value modulo 2^32, read as a signed 32-bit integer."""
    return ((value + _SIGN) & _MASK) - _SIGN


def operand_pairs(op: Op) -> tuple[tuple[int, int], ...]:
    """The (register, immediate) pairs of an instruction's operands in the order of its fields."""
    pairs = []
    for item in op.kind.fields:
        if item.kind is Kind.OPERAND:
            value = op.get(item.name)
            assert isinstance(value, Operand)
            pairs.append((value.register, value.immediate))
    return tuple(pairs)


def modifier(op: Op, name: str) -> int:
    """The value of a field that is no operand."""
    value = op.get(name)
    assert isinstance(value, int)
    return value


# System and scalar --------------------------------------------------------------------------------------
def _halt(op: Op, index: int) -> Step:
    return lambda state: HALTED


def _fence(op: Op, index: int) -> Step:
    following = index + 1
    return lambda state: following


def _trap(op: Op, index: int) -> Step:
    ((register, immediate),) = operand_pairs(op)

    def step(state: DeviceState) -> int:
        raise state.stop(Trap.SOFTWARE, signed(state.registers[register] + immediate))

    return step


def _set(op: Op, index: int) -> Step:
    rd, value, following = modifier(op, "rd"), modifier(op, "value"), index + 1

    def step(state: DeviceState) -> int:
        if rd:
            state.registers[rd] = value
        return following

    return step


def float_greater(a: int, b: int) -> int:
    """1 if the float32 with bits a is greater than that with bits b, else 0; NaN is never, subnormals are zeros."""

    def order(bits: int) -> int | None:
        magnitude = bits & 0x7FFFFFFF
        if magnitude > 0x7F800000:
            return None
        if magnitude < 0x00800000:
            return 0
        return -magnitude if bits & _SIGN else magnitude

    left, right = order(a), order(b)
    return int(left is not None and right is not None and left > right)


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "sadd": lambda a, b: a + b,
    "ssub": lambda a, b: a - b,
    "smul": lambda a, b: a * b,
    "smin": min,
    "smax": max,
    "sand": lambda a, b: a & b,
    "sshl": lambda a, b: a << (b & 31),
    "sshr": lambda a, b: a >> (b & 31),
    "sfgt": float_greater,
}


def _arithmetic(op: Op, index: int) -> Step:
    (ra, ia), (rb, ib) = operand_pairs(op)
    rd, following, function = modifier(op, "rd"), index + 1, _ARITHMETIC[op.kind.name]

    def step(state: DeviceState) -> int:
        registers = state.registers
        a = ((registers[ra] + ia + _SIGN) & _MASK) - _SIGN
        b = ((registers[rb] + ib + _SIGN) & _MASK) - _SIGN
        if rd:
            registers[rd] = ((function(a, b) + _SIGN) & _MASK) - _SIGN
        return following

    return step


_CONDITION: dict[str, Callable[[int, int], bool]] = {
    "beq": lambda a, b: a == b,
    "bne": lambda a, b: a != b,
    "blt": lambda a, b: a < b,
    "bge": lambda a, b: a >= b,
}


def _branch(op: Op, index: int) -> Step:
    (ra, ia), (rb, ib) = operand_pairs(op)
    to, following, condition = modifier(op, "to"), index + 1, _CONDITION[op.kind.name]

    def step(state: DeviceState) -> int:
        a, b = signed(state.registers[ra] + ia), signed(state.registers[rb] + ib)
        return to if condition(a, b) else following

    return step


def _vread(op: Op, index: int) -> Step:
    ((ra, ia),) = operand_pairs(op)
    rd, following = modifier(op, "rd"), index + 1

    def step(state: DeviceState) -> int:
        a = signed(state.registers[ra] + ia)
        trap = state.checker.word(a)
        if trap:
            raise state.stop(trap)
        if rd:
            state.registers[rd] = int(state.words[a])
        return following

    return step


# Vector -------------------------------------------------------------------------------------------------
_BINARY = {"vadd": kernels.add, "vsub": kernels.sub, "vmul": kernels.mul, "vmax": kernels.maximum}


def _binary(op: Op, index: int) -> Step:
    (rd, d0), (ra, a0), (rb, b0), (rn, n0) = operand_pairs(op)
    source, following, kernel = modifier(op, "b_from"), index + 1, _BINARY[op.kind.name]
    one_word, immediate = source == Source.WORD, source == Source.IMMEDIATE
    constant = np.array([modifier(op, "imm")], np.uint32).view(np.float32)

    def step(state: DeviceState) -> int:
        registers = state.registers
        dst, a = signed(registers[rd] + d0), signed(registers[ra] + a0)
        b, n = signed(registers[rb] + b0), signed(registers[rn] + n0)
        trap = state.checker.binary(one_word, immediate, dst, a, b, n)
        if trap:
            raise state.stop(trap)
        if n:
            vector = state.vector
            right = constant if immediate else vector[b : b + 1] if one_word else vector[b : b + n]
            vector[dst : dst + n] = kernel(vector[a : a + n], right)
        return following

    return step


def _move(op: Op, index: int) -> Step:
    (rd, d0), (rb, b0), (rn, n0) = operand_pairs(op)
    source, following = modifier(op, "b_from"), index + 1
    one_word, immediate = source == Source.WORD, source == Source.IMMEDIATE
    constant = signed(modifier(op, "imm"))

    def step(state: DeviceState) -> int:
        registers, words = state.registers, state.words
        dst, b, n = signed(registers[rd] + d0), signed(registers[rb] + b0), signed(registers[rn] + n0)
        trap = state.checker.move(one_word, immediate, dst, b, n)
        if trap:
            raise state.stop(trap)
        if n:
            words[dst : dst + n] = constant if immediate else words[b] if one_word else words[b : b + n]
        return following

    return step


def _vwrite(op: Op, index: int) -> Step:
    (rd, d0), (rb, b0) = operand_pairs(op)
    following = index + 1

    def step(state: DeviceState) -> int:
        dst = signed(state.registers[rd] + d0)
        trap = state.checker.word(dst)
        if trap:
            raise state.stop(trap)
        state.words[dst] = signed(state.registers[rb] + b0)
        return following

    return step


def _unary(op: Op, index: int) -> Step:
    (rd, d0), (ra, a0), (rn, n0) = operand_pairs(op)
    function, following = Function(modifier(op, "function")), index + 1

    def step(state: DeviceState) -> int:
        registers = state.registers
        dst, a, n = signed(registers[rd] + d0), signed(registers[ra] + a0), signed(registers[rn] + n0)
        trap = state.checker.unary(dst, a, n)
        if trap:
            raise state.stop(trap)
        if n:
            state.vector[dst : dst + n] = kernels.unary(function, state.vector[a : a + n])
        return following

    return step


_REDUCE = {"vsum": kernels.tree_sum, "vsumsq": kernels.sum_squares, "vrmax": kernels.reduce_max}


def _reduce(op: Op, index: int) -> Step:
    (rd, d0), (ra, a0), (rn, n0) = operand_pairs(op)
    following, kernel = index + 1, _REDUCE[op.kind.name]

    def step(state: DeviceState) -> int:
        registers = state.registers
        dst, a, n = signed(registers[rd] + d0), signed(registers[ra] + a0), signed(registers[rn] + n0)
        trap = state.checker.reduce(dst, a, n)
        if trap:
            raise state.stop(trap)
        state.vector[dst] = kernel(state.vector[a : a + n])
        return following

    return step


_OPERATION = {
    Operation.ADD: kernels.add,
    Operation.SUB: kernels.sub,
    Operation.MUL: kernels.mul,
    Operation.MAX: kernels.maximum,
}
_CHAIN_REDUCE = {
    Reduction.SUM: kernels.tree_sum,
    Reduction.SUMSQ: kernels.sum_squares,
    Reduction.MAX: kernels.reduce_max,
}


def _chain(op: Op, index: int) -> Step:
    pairs, following = operand_pairs(op), index + 1
    flags = {name: modifier(op, name) for name in ("b_from", "scale_from", "operation", "write", "reduce")}
    operation = _OPERATION.get(Operation(flags["operation"]))
    reduction = _CHAIN_REDUCE.get(Reduction(flags["reduce"]))
    activation = modifier(op, "function")
    constant = np.array([modifier(op, "imm")], np.uint32).view(np.float32)

    def elements(vector: kernels.F32Array, a: int, b: int, n: int, scale: int) -> kernels.F32Array:
        x = vector[a : a + n]
        if flags["scale_from"] == Factor.WORD:
            x = kernels.mul(x, vector[scale : scale + 1])
        elif flags["scale_from"] == Factor.VALUE:
            x = kernels.mul(x, np.array([scale], np.int32).view(np.float32))
        if operation is not None:
            words = {Source.VECTOR: n, Source.WORD: 1}.get(Source(flags["b_from"]))
            x = operation(x, constant if words is None else vector[b : b + words])
        return x if activation == Activation.NONE else kernels.unary(Function(activation - 1), x)

    def step(state: DeviceState) -> int:
        values = [signed(state.registers[register] + immediate) for register, immediate in pairs]
        trap = state.checker.chain(**flags, operands=values)
        if trap:
            raise state.stop(trap)
        dst, a, b, n, scale, result = values
        if n or reduction is not None:
            x = elements(state.vector, a, b, n, scale) if n else state.vector[:0]
            word = None if reduction is None else reduction(x)
            if flags["write"]:
                state.vector[dst : dst + n] = x
            if word is not None:
                state.vector[result] = word
        return following

    return step


def _argmax(op: Op, index: int) -> Step:
    (rd, d0), (ra, a0), (rn, n0), (rb, b0) = operand_pairs(op)
    following = index + 1

    def step(state: DeviceState) -> int:
        registers = state.registers
        dst, a, n = signed(registers[rd] + d0), signed(registers[ra] + a0), signed(registers[rn] + n0)
        trap = state.checker.reduce(dst, a, n, results=2)
        if trap:
            raise state.stop(trap)
        place, value, flags = kernels.argmax(state.vector[a : a + n])
        state.vector[dst] = value
        state.words[dst + 1] = signed(registers[rb] + b0 + place)
        if flags:
            state.raise_flags(flags)
        return following

    return step


# Memory -------------------------------------------------------------------------------------------------
def _load(op: Op, index: int) -> Step:
    (rd, d0), (rl, l0), (ry, y0), (rn, n0) = operand_pairs(op)
    element, region, following = Format(modifier(op, "format")), modifier(op, "region"), index + 1

    def step(state: DeviceState) -> int:
        registers = state.registers
        dst, line = signed(registers[rd] + d0), signed(registers[rl] + l0)
        byte, n = signed(registers[ry] + y0), signed(registers[rn] + n0)
        trap = state.checker.load(element, region, dst, line, byte, n)
        if trap:
            raise state.stop(trap)
        if n:
            start = LINE_BYTES * line + byte
            state.vector[dst : dst + n] = kernels.load(state.memory[region], start, element, n)
        return following

    return step


def _overlapping(outer: int, inner: int, outer_bytes: int, inner_bytes: int, size: int) -> bool:
    """True if elements of a strided store may share bytes, so that their order matters."""
    if min(outer, inner) <= 1:
        return (outer > 1 and outer_bytes < size) or (inner > 1 and inner_bytes < size)
    rows_apart = inner_bytes >= size and outer_bytes >= (inner - 1) * inner_bytes + size
    columns_apart = outer_bytes >= size and inner_bytes >= (outer - 1) * outer_bytes + size
    return not (rows_apart or columns_apart)


def _store(op: Op, index: int) -> Step:
    pairs = operand_pairs(op)
    element, region, following = Format(modifier(op, "format")), modifier(op, "region"), index + 1
    size = FORMAT_BYTES[element]

    def step(state: DeviceState) -> int:
        registers = state.registers
        a, line, byte, outer, inner, outer_bytes, inner_bytes = (
            signed(registers[register] + immediate) for register, immediate in pairs
        )
        trap = state.checker.store(element, region, a, line, byte, outer, inner, outer_bytes, inner_bytes)
        if trap:
            raise state.stop(trap)
        count = outer * inner
        if count == 0:
            return following
        start, memory, source = LINE_BYTES * line + byte, state.memory[region], state.vector[a : a + count]
        if _overlapping(outer, inner, outer_bytes, inner_bytes, size):
            flags = kernels.store(memory, start, element, source, inner, outer_bytes, inner_bytes)
        else:
            raw, flags = kernels.encode(source, element)
            strides = (outer_bytes, inner_bytes)
            strided(memory, raw.dtype, start, (outer, inner), strides)[...] = raw.reshape(outer, inner)
        if flags:
            state.raise_flags(flags)
        return following

    return step


def _sload(op: Op, index: int) -> Step:
    (rl, l0), (ry, y0) = operand_pairs(op)
    rd, region, following = modifier(op, "rd"), modifier(op, "region"), index + 1

    def step(state: DeviceState) -> int:
        line, byte = signed(state.registers[rl] + l0), signed(state.registers[ry] + y0)
        trap = state.checker.scalar(region, line, byte, write=False)
        if trap:
            raise state.stop(trap)
        if rd:
            start = LINE_BYTES * line + byte
            word = state.memory[region][start : start + 4].tobytes()
            state.registers[rd] = int.from_bytes(word, "little", signed=True)
        return following

    return step


def _sstore(op: Op, index: int) -> Step:
    (rl, l0), (ry, y0), (rv, v0) = operand_pairs(op)
    region, following = modifier(op, "region"), index + 1

    def step(state: DeviceState) -> int:
        registers = state.registers
        line, byte = signed(registers[rl] + l0), signed(registers[ry] + y0)
        trap = state.checker.scalar(region, line, byte, write=True)
        if trap:
            raise state.stop(trap)
        start, value = LINE_BYTES * line + byte, signed(registers[rv] + v0)
        state.memory[region][start : start + 4] = np.frombuffer(value.to_bytes(4, "little", signed=True), np.uint8)
        if state.on_store is not None:
            state.on_store(state.rank, line, byte, value)
        return following

    return step


# Ring ---------------------------------------------------------------------------------------------------
def _gather(op: Op, index: int) -> Step:
    (rd, d0), (ra, a0), (rn, n0) = operand_pairs(op)
    following = index + 1

    def step(state: DeviceState) -> int:
        registers = state.registers
        dst, a, n = signed(registers[rd] + d0), signed(registers[ra] + a0), signed(registers[rn] + n0)
        trap = state.checker.gather(dst, a, n, state.devices)
        if trap:
            raise state.stop(trap)
        state.pending, state.resume = (dst, a, n), following
        return AT_RING

    return step


def gather(states: list[DeviceState]) -> None:
    """Carry out the all-gather at which every device of the ring has arrived.

    Raises:
        DeviceTrap: RING_MISMATCH on the first device that halted or sends another length than device 0, or on
            device 0 if it halted and another did not.
    """
    lengths = [None if state.pending is None else state.pending[2] for state in states]
    for state, length in zip(states, lengths, strict=True):
        if length is None or length != lengths[0]:
            raise state.stop(Trap.RING_MISMATCH)
    blocks = []
    for state in states:
        assert state.pending is not None
        _, a, n = state.pending
        blocks.append(state.words[a : a + n])
    joined = np.concatenate(blocks)
    for state in states:
        assert state.pending is not None
        dst, state.pending = state.pending[0], None
        state.words[dst : dst + joined.size] = joined


BUILDERS: dict[str, Builder] = {
    "halt": _halt,
    "trap": _trap,
    "fence": _fence,
    "sli": _set,
    **dict.fromkeys(_ARITHMETIC, _arithmetic),
    **dict.fromkeys(_CONDITION, _branch),
    "vread": _vread,
    **dict.fromkeys(_BINARY, _binary),
    "vmov": _move,
    "vwrite": _vwrite,
    "vunary": _unary,
    **dict.fromkeys(_REDUCE, _reduce),
    "vchain": _chain,
    "vargmax": _argmax,
    "load": _load,
    "store": _store,
    "sload": _sload,
    "sstore": _sstore,
    "gather": _gather,
}
