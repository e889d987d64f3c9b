"""From a model to a program and its memory plan, and from those to an image file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from typebar.compiler import device_ir as dev
from typebar.compiler import ir
from typebar.compiler.emit import ENTRIES, emit
from typebar.compiler.frontend import FrontendModel
from typebar.compiler.memory import MemoryPlan, plan_memory, program_of
from typebar.compiler.packing import Packer, stored_format
from typebar.compiler.passes.allocate import AllocatePass, AllocationError
from typebar.compiler.passes.fuse import FusePass
from typebar.compiler.passes.halve import HalvePass
from typebar.compiler.passes.partition import PartitionPass
from typebar.compiler.passes.phases import PhasesPass
from typebar.compiler.plan import COLUMNS, Plan
from typebar.compiler.quantisation import quantise
from typebar.compiler.rows import tokens_of
from typebar.isa.errors import TypebarError
from typebar.isa.image_manifest import Manifest
from typebar.isa.image_writer import write_image
from typebar.isa.instructions import FORMAT_BYTES, Format
from typebar.isa.machine import MAX_DEVICES, Machine
from typebar.isa.program import Program, encode


@dataclass(frozen=True)
class Compiled:
    """A program with everything it needs but the weights themselves; `graph` is the step it was made from, as text.

    `model` is the one compiled: with `format` int8, that whose products have int8 weights.
    """

    program: Program
    memory: MemoryPlan
    model: FrontendModel
    machine: Machine
    devices: int
    format: Format
    graph: str
    plan: Plan = COLUMNS


def weights_format(name: str) -> Format:
    """The format called `name` on command lines.

    Raises:
        TypebarError: it is not a format that weights can have.
    """
    if name not in ("fp16", "bf16", "int8"):
        raise TypebarError(f"weights cannot be {name!r}: choose fp16, bf16 or int8")
    return Format[name.upper()]


def back_passes(
    machine: Machine,
    devices: int,
    hoist: bool = True,
    shape: Callable[[str], tuple[int, ...]] | None = None,
    plan: Plan = COLUMNS,
) -> list[ModulePass]:
    """The passes from a re-rolled step to an allocated program, as `build` runs them; `shape` is a parameter's."""
    halve = [] if machine.control.barriers else [HalvePass.of(machine, devices)]
    return [
        PartitionPass(devices, machine.vector.align, machine.control.barriers, plan.replicate, plan.rows, shape),
        FusePass(hoist, machine.vector.chains),
        *halve,
        PhasesPass(hoist),
        AllocatePass.of(machine),
    ]


def check_devices(devices: int) -> None:
    """Refuse a ring of an impossible size, before anything long is done for it.

    Raises:
        TypebarError: the device count is no integer or out of range.
    """
    if isinstance(devices, bool) or not isinstance(devices, int) or not 1 <= devices <= MAX_DEVICES:
        raise TypebarError(f"a ring has 1 to {MAX_DEVICES} devices, not {devices!r}: give an integer in that range")


def as_stored(model: FrontendModel, fmt: Format) -> tuple[FrontendModel, Format]:
    """The model whose weights have the format `fmt`, and that of everything else."""
    return (quantise(model).model if fmt is Format.INT8 else model), stored_format(fmt)


def allocated(model: FrontendModel, machine: Machine, devices: int, plan: Plan = COLUMNS) -> ModuleOp:
    """A model's step as an allocated program of a ring of `devices` machines; int8 weights have their scales already.

    Raises:
        TypebarError: the device count is out of range, or the model does not fit or cannot be lowered.
    """
    check_devices(devices)
    context = dev.context()
    for hoist in (True, False):
        module = model.module.clone()
        try:
            for step in back_passes(machine, devices, hoist, model.weights.shape, plan):
                step.apply(context, module)
                module.verify()
        except AllocationError:
            if not hoist:
                raise
            continue
        break
    return module


def build(model: FrontendModel, machine: Machine, devices: int, fmt: Format, plan: Plan = COLUMNS) -> Compiled:
    """Compile a model's step for a ring of `devices` machines, without touching its weights.

    With int8 the products' weights are quantised when they are packed; tables, K and V are fp16. A model of
    `caches.int8_caches` has K and V in int8.

    Raises:
        TypebarError: the device count is out of range, the plan names no matrices of the model's, or the model does
            not fit or cannot be lowered.
    """
    check_devices(devices)
    model, stored = as_stored(model, fmt)
    module = allocated(model, machine, devices, plan)
    memory = plan_memory(module, machine, model.weights, stored)
    program = emit(module, machine, memory, stored)
    tokens = tokens_of(program_of(module)) if "prompt" in program.labels else None
    rows, groups = (1, 1) if tokens is None else (tokens.rows, tokens.groups)
    memory.accounting |= {"prompt_rows": rows, "prompt_groups": groups}
    return Compiled(program, memory, model, machine, devices, fmt, str(model.module), plan)


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
        "entries": {name: compiled.program.labels[name] for name in ENTRIES if name in compiled.program.labels},
        "labels": compiled.program.labels,
        "comments": compiled.program.comments,
        "regions": {"kv": memory.kv_bytes, "io": memory.io.bytes},
        "io": asdict(memory.io),
        "model": _facts(model),
        "accounting": {**memory.accounting, "plan": compiled.plan.to_json(), "kv_format": kv_format(compiled)},
        "sources": {name: {"shape": list(model.weights.shape(name)), "dtype": dtype} for name, dtype in names.items()},
        "source_hash": hashlib.sha256(compiled.graph.encode()).hexdigest(),
    }
    words = encode(compiled.program)
    tokenizer = model.tokenizer_json or b""
    return write_image(path, fields, words, compiled.graph, tokenizer, memory.plans, packer.payload, progress)


def kv_format(compiled: Compiled) -> str:
    """The name of the format that K and V are stored in."""
    formats = {cache.format for cache in compiled.memory.caches.values()}
    return min(formats, key=lambda fmt: FORMAT_BYTES[fmt], default=stored_format(compiled.format)).name.lower()


def source_context(model: FrontendModel) -> int | None:
    """The most source positions of a lowered model with an encoder; None for one without."""
    encoder = model.module.body.block.first_op
    return encoder.context.value.data if isinstance(encoder, ir.EncoderOp) else None


def _facts(model: FrontendModel) -> dict[str, Any]:
    """What the host needs to know of a model.

    Raises:
        TypebarError: it has an encoder, and nobody says which token its decoder starts from.
    """
    config = model.config
    facts = {
        "name": model.name,
        "vocab": config["vocab"],
        "context": config["context"],
        "eos": config.get("eos_token_id"),
    }
    encoder = model.module.body.block.first_op
    if isinstance(encoder, ir.EncoderOp):
        start = config.get("decoder_start_token_id")
        if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < config["vocab"]:
            raise TypebarError(
                f"the decoder's first token is {start!r}: give config={{'decoder_start_token_id': N}}, "
                f"0 to {config['vocab'] - 1}"
            )
        facts |= {
            "is_encoder_decoder": True,
            "source_vocab": encoder.vocab.value.data,
            "source_context": encoder.context.value.data,
            "decoder_start_token_id": start,
        }
    return facts | {key: config[key] for key in ("chat_template", "special_tokens") if config.get(key)}


def _source_names(memory: MemoryPlan) -> dict[str, str]:
    """The source parameters that tensors are made from, and their types."""
    names: dict[str, str] = {}
    for plan in memory.plans:
        meta = plan.meta
        names |= {meta[key]: "float32" for key in ("symbol", "cos", "sin") if key in meta}
        for item in meta.get("segments", ()):
            names |= {item[key]: "float32" for key in ("bias", "scale") if item[key] is not None}
            if meta["kind"] == "matrix":
                names[item["weight"]] = meta.get("format", "float32")
    return names
