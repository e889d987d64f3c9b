"""`check`: whether a model compiles for a ring of machines, and everything that stands in the way, before any image."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typebar.isa.errors import TypebarError
from typebar.isa.machine import MAX_DEVICES, Machine

if TYPE_CHECKING:
    import torch

    from typebar.compiler.driver import Compiled
    from typebar.compiler.frontend import FrontendModel
    from typebar.compiler.problems import Problem
    from typebar.isa.instructions import Format

_PAIR = "is_encoder_decoder"
GRAPH, MACHINE, WEIGHTS = "graph", "machine", "weights"


@dataclass(frozen=True)
class Finding:
    """One thing that cannot be lowered.

    `stage` is graph (no machine could run it), machine (this ring cannot) or weights (this format cannot hold them);
    `node` the operation as imported, or what does not fit; `module` the path of the source's module, "" if unknown.
    """

    stage: str
    node: str
    module: str
    reason: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """What `check` found.

    `fallback` says what runs on torch instead; nothing does where the model compiles. A model falls back whole: images
    hold no half-lowered ones. `commands` get it running, in order.
    """

    model: str
    machine: str
    devices: int
    weights: str
    findings: tuple[Finding, ...]
    fallback: str
    commands: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether it compiles."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {**asdict(self), "ok": self.ok}


def check(
    model: str | os.PathLike[str] | torch.nn.Module,
    machine: str | os.PathLike[str] | Machine = "u280",
    devices: int = 4,
    weights: str = "fp16",
    config: Mapping[str, Any] | None = None,
) -> Report:
    """Find everything that keeps a model from compiling for `devices` of `machine`; writes nothing.

    The arguments are those of `typebar.compile`. The machine is looked at only once the graph lowers, for until then
    there is no program to fit; the weights' values are read last.

    Raises:
        TypebarError: the model or an argument cannot be read at all.
    """
    from typebar.compiler import driver
    from typebar.host.api import model_source

    target = machine if isinstance(machine, Machine) else Machine.load(os.fspath(machine))
    fmt = driver.weights_format(weights)
    driver.check_devices(devices)
    source, config = model_source(model, config)
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else type(model).__name__
    lowered, findings = _graph_findings(source, config)
    fallback = "nothing: the machine runs the whole model"
    commands: tuple[str, ...] = (_compile(name, target.name, devices, weights),)
    if lowered is None:
        fallback, commands = _outside(source)
    else:
        compiled, findings = _machine_findings(lowered, target, devices, fmt)
        if compiled is None:
            fallback, commands = _elsewhere(name, lowered, target, devices, weights, fmt)
        elif found := list(_weight_findings(compiled)):
            findings, fallback = found, "the whole model, in a format that holds its weights"
            commands = (_compile(name, target.name, devices, "bf16"),)
    return Report(name, target.name, devices, weights, tuple(findings), fallback, commands)


def _graph_findings(
    source: str | Path | torch.nn.Module, config: Mapping[str, Any] | None
) -> tuple[FrontendModel | None, list[Finding]]:
    """The lowered model, or all that the frontend and its passes refuse."""
    from typebar.compiler.frontend import import_model
    from typebar.compiler.pipeline import lower
    from typebar.compiler.problems import LoweringError, module_paths, placed

    paths: dict[str, str] = {}
    try:
        imported = import_model(source, config)
        paths = module_paths(imported.module)
        lower(imported.module, imported.lookup, imported.weights.define)
    except LoweringError as error:
        return None, list(dict.fromkeys(_finding(GRAPH, item) for item in placed(error.items, paths)))
    return imported, []


def _finding(stage: str, item: Problem) -> Finding:
    return Finding(stage, item.node, item.module, item.reason, item.remedy)


def _machine_findings(
    model: FrontendModel, machine: Machine, devices: int, fmt: Format
) -> tuple[Compiled | None, list[Finding]]:
    """The program for this ring, or why there is none."""
    from typebar.compiler import driver
    from typebar.compiler.problems import LoweringError

    try:
        return driver.build(model, machine, devices, fmt), []
    except LoweringError as error:
        return None, [_finding(MACHINE, item) for item in error.items]
    except TypebarError as error:
        return None, [_split(MACHINE, f"{devices} x {machine.name}", str(error))]


def _split(stage: str, node: str, message: str) -> Finding:
    """A message of the form "reason: remedy" as a finding."""
    reason, _, remedy = message.rpartition(": ")
    return Finding(stage, node, "", reason or message, remedy if reason else "")


def _weight_findings(compiled: Compiled) -> Iterator[Finding]:
    """Every parameter that the format cannot hold, once."""
    from typebar.compiler.packing import Packer, WeightError

    packer = Packer(compiled.machine, compiled.format, compiled.model.lookup)
    seen = set[str]()
    for plan in compiled.memory.plans:
        try:
            packer.payload(plan)
        except WeightError as error:
            if str(error) not in seen:
                seen.add(str(error))
                yield _split(WEIGHTS, plan.name, str(error))


def _elsewhere(
    name: str, model: FrontendModel, machine: Machine, devices: int, weights: str, fmt: Format
) -> tuple[str, tuple[str, ...]]:
    """The first larger ring that takes the model: from its image the torch device runs everything."""
    larger = [machine.name] if machine.name == "u280" else [machine.name, "u280"]
    rings = chain.from_iterable(((kind, count) for count in _more(kind, machine.name, devices)) for kind in larger)
    for kind, count in rings:
        target = machine if kind == machine.name else Machine.load(kind)
        if _machine_findings(model, target, count, fmt)[0] is not None:
            commands = (_compile(name, kind, count, weights), "typebar run IMAGE --prompt TEXT --device torch")
            return f"the whole model, to the torch device, from an image for {count} x {kind}", commands
    return "the whole model: no ring makes an image of it, so it runs in torch outside Typebar only", ()


def _more(kind: str, given: str, devices: int) -> list[int]:
    return [n for n in (1, 2, 4, 8, 16, MAX_DEVICES) if kind != given or n > devices]


def _outside(source: str | Path | torch.nn.Module) -> tuple[str, tuple[str, ...]]:
    """A graph that does not lower has no image, and so no torch device either."""
    from typebar.compiler.frontend.facts import read_json

    text = "the whole model, to torch outside Typebar: --device torch runs images, and this graph makes none"
    if not isinstance(source, str | Path) or not Path(source, "config.json").is_file():
        return text, ()
    place = json.dumps(str(source))
    load = f"transformers.AutoModel.from_pretrained({place})"
    if Path(source, "tokenizer.json").is_file() and not read_json(Path(source, "config.json")).get(_PAIR):
        load = f'print(transformers.pipeline("text-generation", {place})("TEXT", max_new_tokens=32))'
    return text, (f"python -c {shlex.quote(f'import transformers; {load}')}",)


def _compile(name: str, machine: str, devices: int, weights: str) -> str:
    suffix = "" if weights == "fp16" else f" --weights {weights}"
    return f"typebar compile {name} -o IMAGE --machine {machine} --devices {devices}{suffix}"
