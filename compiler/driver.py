"""From a model to a program and its memory plan, and from those to an image file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xdsl.passes import ModulePass

from typebar.compiler import device_ir as dev
from typebar.compiler.emit import emit
from typebar.compiler.frontend import FrontendModel
from typebar.compiler.memory import MemoryPlan, plan_memory
from typebar.compiler.packing import Packer
from typebar.compiler.passes.allocate import AllocatePass, AllocationError
from typebar.compiler.passes.fuse import FusePass
from typebar.compiler.passes.partition import PartitionPass
from typebar.isa.errors import TypebarError
from typebar.isa.image_manifest import Manifest
from typebar.isa.image_writer import write_image
from typebar.isa.instructions import Format
from typebar.isa.machine import MAX_DEVICES, Machine
from typebar.isa.program import Program, encode


@dataclass(frozen=True)
class Compiled:
    """A program with everything it needs but the weights themselves; `graph` is the step it was made from, as text."""

    program: Program
    memory: MemoryPlan
    model: FrontendModel
    machine: Machine
    devices: int
    format: Format
    graph: str


def weights_format(name: str) -> Format:
    """The format called `name` on command lines.

    Raises:
        TypebarError: it is not a format that weights can have.
    """
    if name not in ("fp16", "bf16"):
        raise TypebarError(f"weights cannot be {name!r}: choose fp16 or bf16")
    return Format[name.upper()]


def back_passes(machine: Machine, devices: int, hoist: bool = True) -> list[ModulePass]:
    """The passes from a re-rolled step to an allocated program, as `build` runs them."""
    return [
        PartitionPass(devices, machine.vector.align),
        FusePass(hoist),
        AllocatePass(machine.vector.words, machine.segment_words, machine.attention_block, machine.column_block),
    ]


def check_devices(devices: int) -> None:
    """Refuse a ring of an impossible size, before anything long is done for it.

    Raises:
        TypebarError: the device count is no integer or out of range.
    """
    if isinstance(devices, bool) or not isinstance(devices, int) or not 1 <= devices <= MAX_DEVICES:
        raise TypebarError(f"a ring has 1 to {MAX_DEVICES} devices, not {devices!r}: give an integer in that range")


def build(model: FrontendModel, machine: Machine, devices: int, fmt: Format) -> Compiled:
    """Compile a model's step for a ring of `devices` machines, without touching its weights.

    Raises:
        TypebarError: the device count is out of range, or the model does not fit or cannot be lowered.
    """
    check_devices(devices)
    context = dev.context()
    for hoist in (True, False):
        module = model.module.clone()
        try:
            for step in back_passes(machine, devices, hoist):
                step.apply(context, module)
                module.verify()
        except AllocationError:
            if not hoist:
                raise
            continue
        break
    memory = plan_memory(module, machine, model.weights, fmt)
    program = emit(module, machine, memory, fmt)
    return Compiled(program, memory, model, machine, devices, fmt, str(model.module))


def write(compiled: Compiled, path: str | Path, progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Pack the weights and write the image, streaming; the file appears complete or not at all.

    Raises:
        TypebarError: weights that the format cannot hold, or a file that cannot be written.
    """
    model, memory = compiled.model, compiled.memory
    packer = Packer(compiled.machine, compiled.format, model.lookup)
    names = _source_names(memory)
    fields: dict[str, Any] = {
        "name": model.name,
        "machine": compiled.machine,
        "devices": compiled.devices,
        "weights_format": compiled.format.name.lower(),
        "entries": {"main": 0},
        "labels": compiled.program.labels,
        "comments": compiled.program.comments,
        "regions": {"kv": memory.kv_bytes, "io": memory.io.bytes},
        "io": asdict(memory.io),
        "model": {
            "name": model.name,
            "vocab": model.config["vocab"],
            "context": model.config["context"],
            "eos": model.config.get("eos_token_id"),
        },
        "accounting": memory.accounting,
        "sources": {name: {"shape": list(model.weights.shape(name)), "dtype": "float32"} for name in names},
        "source_hash": hashlib.sha256(compiled.graph.encode()).hexdigest(),
    }
    words = encode(compiled.program)
    tokenizer = model.tokenizer_json or b""
    return write_image(path, fields, words, compiled.graph, tokenizer, memory.plans, packer.payload, progress)


def _source_names(memory: MemoryPlan) -> list[str]:
    names: dict[str, None] = {}
    for plan in memory.plans:
        meta = plan.meta
        if "symbol" in meta:
            names[meta["symbol"]] = None
        for item in meta.get("segments", ()):
            for key in ("weight", "bias"):
                if item[key] is not None:
                    names[item[key]] = None
    return list(names)
