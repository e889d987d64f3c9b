"""How long a device may go without progress: the limit of its watchdog, worked out from the timing contract.

Progress is an instruction that issues, starts or is done, and a word that passes any port of a memory or a link.
Between two of these a legal instruction only works on what is already inside the device, which takes a bounded time;
how late the outside world may be is not the contract's to say, so two constants do.
"""

from __future__ import annotations

from typebar.isa.timing import (
    TimingParameters,
    last_hold,
    longest_latency,
    matmul_latency,
    vector_rows,
)

MEMORY_PATIENCE = 1 << 14
"""Cycles that a memory may take to answer, beyond its latency: 80 microseconds at 200 MHz."""
NEIGHBOUR_PATIENCE = 1 << 20
"""Cycles by which another device may reach a gather later: 5 milliseconds at 200 MHz. All devices run one program on
shards of one size, so only their launches lie apart; a program whose devices differ by more needs a higher limit."""


def vector_silence(p: TimingParameters) -> int:
    """Cycles of the longest vector instruction: a chain with every step over the whole register file."""
    return vector_rows(p, p.words) + 1 + longest_latency(p)


def matrix_silence(p: TimingParameters) -> int:
    """Cycles in which the matrix unit works off a full FIFO, every step with all that can delay one.

    A row feeds at most row_bytes / (lanes x columns) steps, at int8. A step lasts as long as one of a block's last
    chunk with the most vectors, and waits for an accumulator and for a first chunk's operands of every kind.
    """
    steps = max(1, p.row_bytes // (p.lanes * p.columns))
    hold = max(last_hold(p, vectors, size) for vectors in (1, p.vectors) for size in (1, 2, 4))
    chunk = max(1, p.lanes // p.vector_lanes) * (p.vectors + 1)
    block = -(-p.column_block // p.vector_lanes) * (p.vectors + 3) + 1
    return p.fifo_rows * steps * (hold + p.accumulate_latency + chunk + block) + matmul_latency(p)


def memory_silence(p: TimingParameters) -> int:
    """Cycles in which a store puts one memory row together, an element a cycle, and waits for its write slot."""
    return p.row_bytes + p.write_period


def watchdog_cycles(p: TimingParameters, devices: int) -> int:
    """Cycles without progress that no legal program reaches on `devices` devices."""
    inside = max(vector_silence(p), matrix_silence(p), memory_silence(p))
    latencies = p.hbm_latency + p.ddr_latency + p.hop_latency + p.setup_latency
    return inside + latencies + MEMORY_PATIENCE + (NEIGHBOUR_PATIENCE if devices > 1 else 0)
