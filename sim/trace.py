"""Traces for Perfetto (ui.perfetto.dev) and chrome://tracing: one process a device, one track a unit."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine
from typebar.isa.program import Program
from typebar.isa.timing import UNIT_NAMES
from typebar.sim.timing import TimingResult


def write_perfetto(result: TimingResult, machine: Machine, program: Program, path: str | Path) -> None:
    """Write the trace of a timing run as Chrome trace events in JSON; times are in microseconds.

    A slice is named after its instruction and the program's comment on it; its arguments are the instruction's index
    and its first and last cycle. The file appears whole or not at all.

    Raises:
        TypebarError: the run recorded no trace, or the file cannot be written.
    """
    if result.trace is None:
        raise TypebarError("the run recorded no trace: call run_timing with trace=True")
    target = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise TypebarError(f"cannot write trace {str(path)!r}: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
            file.write(",\n".join(_metadata(result, machine)))
            for event in _slices(result, machine, program):
                file.write(",\n")
                file.write(event)
            file.write("\n]}\n")
        os.chmod(name, 0o644)
        os.replace(name, target)
    except OSError as error:
        raise TypebarError(f"cannot write trace {str(path)!r}: {error.strerror}") from None
    finally:
        Path(name).unlink(missing_ok=True)


def _metadata(result: TimingResult, machine: Machine) -> Iterator[str]:
    for device in range(result.devices):
        process = {"name": f"device {device} ({machine.name})"}
        yield json.dumps({"ph": "M", "pid": device, "name": "process_name", "args": process})
        for unit, name in enumerate(UNIT_NAMES):
            if unit == 0:
                continue  # the scalar core's cycles are not recorded
            yield json.dumps({"ph": "M", "pid": device, "tid": unit, "name": "thread_name", "args": {"name": name}})


def _slices(result: TimingResult, machine: Machine, program: Program) -> Iterator[str]:
    trace = result.trace
    assert trace is not None
    names = []
    for index, op in enumerate(program.ops):
        comment = program.comments.get(index)
        names.append(json.dumps(f"{op.kind.name}: {comment}" if comment else op.kind.name))
    microseconds = 1.0 / machine.clock_mhz
    rows = zip(trace.device, trace.unit, trace.start, trace.end, trace.pc, strict=True)
    for device, unit, start, end, pc in rows:
        yield (
            f'{{"ph": "X", "pid": {device}, "tid": {unit}, "name": {names[pc]}, "ts": {start * microseconds:.4f},'
            f' "dur": {(end - start) * microseconds:.4f},'
            f' "args": {{"instruction": {pc}, "first_cycle": {start}, "last_cycle": {end - 1}}}}}'
        )
