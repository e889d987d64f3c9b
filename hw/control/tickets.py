"""Tickets: how instructions name one another's completion.

Each domain (the four units with a queue, and the fetch engine) numbers its instructions as they issue, modulo
2^ticket_bits, and publishes the number of the last one that is done. Domains complete in order, so one ticket for each
domain says all that an instruction has to wait for. A ticket is wide enough that those outstanding span less than
half its range, and whoever keeps one drops it in the cycle in which it is done, so it is never read when stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from amaranth.hdl import Module, Mux, Signal, Value, unsigned
from amaranth.lib import data

from typebar.isa.instructions import Unit
from typebar.isa.machine import Machine
from typebar.isa.timing import longest_latency, matmul_latency, timing_parameters


class Domain(IntEnum):
    """What issues tickets: the units with a queue in the order of `Unit`, then the fetch engine."""

    MATRIX = 0
    VECTOR = 1
    MEMORY = 2
    RING = 3
    FETCH = 4


UNIT_DOMAINS = (Domain.MATRIX, Domain.VECTOR, Domain.MEMORY, Domain.RING)
"""Domains that have hazards on the register file."""
_UNITS = (Unit.MATRIX, Unit.VECTOR, Unit.MEMORY, Unit.RING)
assert tuple(unit.name for unit in _UNITS) == tuple(domain.name for domain in UNIT_DOMAINS)
assert all(int(unit) == int(domain) + 1 for unit, domain in zip(_UNITS, UNIT_DOMAINS, strict=True))


def most_outstanding(machine: Machine) -> int:
    """Instructions of one domain that can have issued but not be done.

    A unit starts at most one instruction a cycle, so those waiting (`queue_depth`), the one in occupancy and one for
    each cycle of the longest latency bound them.
    """
    p = timing_parameters(machine)
    return p.queue_depth + 2 + max(longest_latency(p), matmul_latency(p), p.hbm_latency, p.ddr_latency)


def ticket_bits(machine: Machine) -> int:
    """Width of a ticket: all outstanding ones, and those done in the very last cycle, span less than half its range."""
    return (2 * most_outstanding(machine) + 2).bit_length() + 1


def waits_layout(bits: int, domains: Sequence[Domain] = tuple(Domain)) -> data.StructLayout:
    """For each domain whether there is a ticket to wait for, and which."""
    entry = data.StructLayout({"valid": unsigned(1), "ticket": unsigned(bits)})
    return data.StructLayout({domain.name.lower(): entry for domain in domains})


def owed(ticket: Value, completed: Value) -> Value:
    """Whether a ticket is not yet done, given the last one that is."""
    distance = (ticket - completed - 1)[: len(completed)]
    return ~distance[-1]


def youngest(m: Module, candidates: Sequence[tuple[Value, Value]], bits: int) -> tuple[Value, Value]:
    """The youngest of (valid, ticket) pairs, none valid if all are not: a tree of modular comparisons."""
    level = list(candidates)
    while len(level) > 1:
        following = []
        for (left_valid, left), (right_valid, right) in zip(level[::2], level[1::2], strict=False):
            valid, ticket = Signal(), Signal(bits)
            right_younger = ~(right - left)[bits - 1]
            m.d.comb += valid.eq(left_valid | right_valid)
            m.d.comb += ticket.eq(Mux(right_valid & (~left_valid | right_younger), right, left))
            following.append((valid, ticket))
        if len(level) % 2:
            following.append(level[-1])
        level = following
    return level[0]
