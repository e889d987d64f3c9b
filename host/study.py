"""The figures of a performance report: one generation, its parts, and how it scales; all from the timing simulator.

Definitions, beside those of `typebar.host.report`:

- a point at context C is the pass that attends to C tokens: one token after C - 1 stored ones.
- limit_ms is the larger of bytes_ms and compute_ms: the model's own bytes over the peak bandwidth of all devices
  (`limit_ms_per_token`), and the model's own multiply-accumulates over the peak of all devices' matrix units.
- declared_ms is bytes_ms over the share of HBM's cycles that the machine gives to fetches.
- kv_ms is what the products with K and V take of the matrix unit's time, waits included; kv_limit_ms the larger of
  their bytes over the peak bandwidth and their multiply-accumulates over the peak.
- a layer with a window reads no more positions than that, and the limits of a point count no more.
- a product's operations (two a multiply-accumulate) a second are over all cycles charged to it, waits included; its
  operations per byte are over the bytes that it reads from HBM.
- prefill is profiled over the last 64 tokens of the prompt at most; with an encoder, over the source text and a token.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typebar.compiler import ir
from typebar.host.caching import check_kv
from typebar.host.profile import SCORES, VALUES, Layer, Product, Profile, Share
from typebar.host.report import SimulationReport, Subject, compiled_subject, measure, model_of, subject_of
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.instructions import Format
from typebar.isa.machine import LINE_BYTES, Machine

if TYPE_CHECKING:
    from typebar.compiler.frontend import FrontendModel
    from typebar.sim.timing import TimingResult

DEVICE_COUNTS = (1, 2, 3, 4, 6, 8)
FIRST_CONTEXT, PREFILL_TOKENS, BINS = 64, 64, 160
_WORD = 4
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Point:
    """One decode pass, in ms; `refused` says in one line why there is none."""

    devices: int
    context: int
    command: str
    ms: float | None = None
    limit_ms: float | None = None
    bytes_ms: float | None = None
    declared_ms: float | None = None
    compute_ms: float | None = None
    kv_ms: float | None = None
    kv_limit_ms: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class ProductFigures:
    """A product in one phase: device 0's time and traffic for it, and its place under the roofs."""

    phase: str
    role: str
    kind: str
    node: str
    cycles: int
    busy: int
    causes: dict[str, int]
    macs: int
    fetched_bytes: int
    useful_bytes: int
    operations_per_byte: float
    operations_per_s: float


@dataclass(frozen=True)
class Study:
    """Everything that the report shows, as plain data."""

    source: str
    weights: str
    context: int
    machine: dict[str, Any]
    program_sha256: str
    command: str
    simulate_command: str
    ttft_ms: float
    simulation: dict[str, Any]
    roofs: dict[str, float]
    products: list[ProductFigures]
    layers: list[dict[str, Any]]
    timeline: dict[str, Any]
    detail: dict[str, Any]
    devices: list[Point]
    contexts: list[Point]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class _Case:
    """What is studied: a model that compiles for any number of devices, and the subject itself."""

    model: FrontendModel
    subject: Subject
    format: Format
    prompt: int
    new: int
    options: list[str]
    """The command line's words that name it, but for the devices."""

    @property
    def source_tokens(self) -> int:
        """The prompt of a point at a stored context: a token, or with an encoder the source text."""
        return 1 if self.subject.source_context is None else self.prompt


def study(
    source: str | os.PathLike[str],
    machine: str | os.PathLike[str] | Machine | None = None,
    devices: int | None = None,
    weights: str | None = None,
    settings: Mapping[str, str | int] | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    progress: Progress | None = None,
    kv: str | None = None,
) -> Study:
    """Measure a generation on a ring of devices, its parts, and how it scales; no weights are read.

    Args:
        source, machine, devices, weights, settings, prompt_tokens, kv: as `simulate` takes them.
        new_tokens: tokens to generate, at least 2.
        progress: called with simulations done and in total.

    Raises:
        TypebarError: in one line, for anything that the caller can mend.
    """
    if new_tokens == 1:
        raise TypebarError("new_tokens = 1 leaves no token to decode: ask for at least 2")
    check_kv(kv)
    texts = {key: str(value) for key, value in (settings or {}).items()}
    case = _case(source, machine, devices, weights, texts, prompt_tokens, new_tokens, kv)
    subject, total = case.subject, case.prompt + case.new
    counts = sorted({*DEVICE_COUNTS, subject.devices})
    lengths = _contexts(subject)
    steps = iter(range(1, 3 + len(counts) + len(lengths)))

    def done() -> None:
        if progress is not None:
            progress(next(steps), 2 + len(counts) + len(lengths))

    simulation, _ = measure(subject, case.prompt, case.new)
    done()
    profile = _profiled(case)
    done()
    place = min(total - 1 if subject.source_context is None else case.new, subject.context - 1)
    by_devices = []
    for count in counts:
        by_devices.append(_on_devices(case, count, place))
        done()
    by_context = []
    for context in lengths:
        by_context.append(_point(case, subject, context))
        done()
    return _assembled(case, source, simulation, profile, by_devices, by_context)


def _case(
    source: str | os.PathLike[str],
    machine: str | os.PathLike[str] | Machine | None,
    devices: int | None,
    weights: str | None,
    settings: Mapping[str, str],
    prompt: int,
    new: int,
    kv: str | None,
) -> _Case:
    """The subject, compiled once or read from its image, with the model that it was compiled from."""
    name = machine.name if isinstance(machine, Machine) else machine
    options = ["--machine", os.fspath(name)] if name is not None else []
    options = [*options, *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    if path is not None and path.is_file():
        subject = subject_of(source, machine, devices, weights, settings, kv=kv)
        with Image.open(path, verify=False) as image:
            model, fmt = model_of_image(image), Format[image.manifest.weights_format.upper()]
        return _Case(model, subject, fmt, prompt, new, [os.fspath(path), *options])
    from typebar.compiler import driver
    from typebar.compiler.caches import int8_caches

    target = machine if isinstance(machine, Machine) else Machine.load(os.fspath(machine or "u280"))
    target = target.override(dict(settings))
    fmt = driver.weights_format(weights or "fp16")
    count = 4 if devices is None else devices
    driver.check_devices(count)
    model = model_of(source)
    options = ["--shape", os.fspath(source), *options, "--weights", fmt.name.lower()]
    if kv is not None:
        model, options = int8_caches(model, None), [*options, "--kv", kv]
    return _Case(model, compiled_subject(model, target, count, fmt), fmt, prompt, new, options)


def model_of_image(image: Image) -> FrontendModel:
    """The model that an image was compiled from, without its weights: for compiling it for another ring.

    Raises:
        TypebarError: the image's graph is damaged.
    """
    from typebar.compiler.frontend import FrontendModel
    from typebar.compiler.frontend.weights import DerivedSource, ShapeSource
    from typebar.compiler.pipeline import parse

    manifest = image.manifest
    shapes = {name: tuple(facts.shape) for name, facts in manifest.sources.items()}
    config = {**manifest.model, "eos_token_id": manifest.model.get("eos")}
    return FrontendModel(parse(image.graph), DerivedSource(ShapeSource(shapes)), None, config, manifest.name)


def _contexts(subject: Subject) -> list[int]:
    """Powers of two from 64 to the longest context that a pass can attend to, and that one."""
    most, context = subject.context - 1, FIRST_CONTEXT
    found = []
    while context < most:
        found.append(context)
        context *= 2
    return [*found, most] if most >= 3 else []


def _on_devices(case: _Case, count: int, context: int) -> Point:
    """The point at a context on `count` devices, or why there is none."""
    if count == case.subject.devices:
        return _point(case, case.subject, context)
    try:
        subject = compiled_subject(case.model, case.subject.machine, count, case.format)
    except TypebarError as error:
        return Point(count, context, "", refused=" ".join(str(error).split()))
    return _point(case, subject, context)


def _command(case: _Case, devices: int, prompt: int, new: int, start: int = 0) -> str:
    """What prints a simulation's figures: an image is for one number of devices, and for others the report is."""
    if case.options[0] != "--shape" and devices != case.subject.devices:
        return _report_command(case) + " --json"
    lengths = ["--prompt-tokens", str(prompt), "--new-tokens", str(new), *(["--start", str(start)] if start else [])]
    return shlex.join(["typebar", "simulate", *case.options, *_devices(case, devices), *lengths, "--json"])


def _report_command(case: _Case) -> str:
    lengths = ["--prompt-tokens", str(case.prompt), "--new-tokens", str(case.new)]
    return shlex.join(["typebar", "report", *case.options, *_devices(case, case.subject.devices), *lengths])


def _devices(case: _Case, devices: int) -> list[str]:
    return ["--devices", str(devices)] if case.options[0] == "--shape" else []


def _point(case: _Case, subject: Subject, context: int) -> Point:
    """The pass that attends to `context` tokens, alone: the second of two after context - 2 stored tokens."""
    start = context - 2
    report, result = measure(subject, case.source_tokens, 2, start, profile=True)
    machine, decode = subject.machine, report.decode
    shares = _profile(subject, result).by_product(1)
    seconds = 1 / (machine.clock_mhz * 1e6)
    peak_macs = machine.matrix.lanes * machine.matrix.columns * machine.matrix.rows
    kv = [share for product, share in shares.items() if product.kind in (SCORES, VALUES)]
    kv_macs, unseen = _attention(case.model, context, case.source_tokens)
    unseen_bytes = subject.accounting["kv_bytes_per_position"] * context * unseen
    kv_bytes = subject.accounting["kv_bytes_per_position"] * context - unseen_bytes
    kv_bytes += subject.account("cross_kv_bytes_per_position") * case.source_tokens
    bandwidth = subject.devices * machine.hbm_bytes_per_second
    to_ms = seconds * 1e3 / peak_macs / subject.devices
    compute_ms = (subject.account("macs_per_token") + kv_macs) * to_ms
    bytes_ms = float(decode["limit_ms_per_token"]) - unseen_bytes / bandwidth * 1e3
    return Point(
        devices=subject.devices,
        context=context,
        command=_command(case, subject.devices, case.source_tokens, 2, start),
        ms=float(decode["ms_per_token"]),
        limit_ms=max(bytes_ms, compute_ms),
        bytes_ms=bytes_ms,
        declared_ms=bytes_ms / _declared(machine),
        compute_ms=compute_ms,
        kv_ms=sum(share.cycles for share in kv) * seconds * 1e3,
        kv_limit_ms=max(kv_bytes / bandwidth * 1e3, kv_macs * to_ms),
    )


def _attention(model: FrontendModel, context: int, source_tokens: int) -> tuple[int, float]:
    """What a pass does with K and V: multiply-accumulates, and the part of all stored K and V beyond windows.

    Every query head meets its positions twice, for scores and for values.
    """
    macs, stored, read = 0, 0, 0
    for op in model.module.walk():
        if not isinstance(op, ir.AttentionOp | ir.CrossAttentionOp):
            continue
        layers, parent = 1, op.parent_op()
        while parent is not None and not isinstance(parent, ir.EncoderOp):
            layers *= parent.count.value.data if isinstance(parent, ir.RepeatOp) else 1
            parent = parent.parent_op()
        if parent is not None:
            continue
        positions = source_tokens
        if isinstance(op, ir.AttentionOp):
            positions = context if op.window is None else min(context, int(op.window.value.data))
            cached = layers * (ir.width(op.k) + ir.width(op.v))
            stored, read = stored + cached * context, read + cached * positions
        macs += layers * (int(op.heads.value.data) * int(op.head_dim.value.data) + ir.width(op.out)) * positions
    return macs, 1 - read / stored if stored else 0.0


def _declared(machine: Machine) -> float:
    """The share of HBM's cycles in which rows may be fetched."""
    rows = machine.hbm.rows_per_write_slot
    return rows / (rows + 1)


def _profile(subject: Subject, result: TimingResult) -> Profile:
    assert result.trace is not None
    first = subject.io.tokens_line * LINE_BYTES
    last = first + subject.context * _WORD
    tokens = [
        store.cycle
        for store in result.stores
        if store.device == 0 and first <= store.line * LINE_BYTES + store.byte <= last
    ]
    return Profile(result.trace, subject.program, subject.machine, tokens)


def _profiled(case: _Case) -> Profile:
    """The end of the prompt and three tokens after it; the last of them stands for decoding."""
    fed = case.prompt if case.subject.source_context is not None else min(case.prompt, PREFILL_TOKENS)
    start = 0 if case.subject.source_context is not None else case.prompt - fed
    spare = case.subject.context - start - case.subject.fed(fed)
    _, result = measure(case.subject, fed, max(2, min(3, spare)), start, profile=True)
    return _profile(case.subject, result)


def _figures(phase: str, product: Product, share: Share, machine: Machine) -> ProductFigures:
    seconds = share.cycles / (machine.clock_mhz * 1e6)
    return ProductFigures(
        phase, product.role, product.kind, product.node, share.cycles, share.busy, share.causes, share.macs,
        share.fetched_bytes, share.useful_bytes, 2 * share.macs / share.fetched_bytes, 2 * share.macs / seconds,
    )  # fmt: skip


def _middle(layers: list[Layer]) -> tuple[float, float]:
    """About two layers in the middle of a pass, as parts of its time."""
    numbered = [layer for layer in layers if layer.number is not None]
    width = min(1.0, 2 / len(numbered)) if numbered else 1.0
    return 0.5 - width / 2, 0.5 + width / 2


def _layer(layer: Layer) -> dict[str, Any]:
    return {"layer": layer.number, "cycles": layer.share.cycles, "causes": layer.share.causes}


def _assembled(
    case: _Case,
    source: str | os.PathLike[str],
    simulation: SimulationReport,
    profile: Profile,
    by_devices: list[Point],
    by_context: list[Point],
) -> Study:
    subject, machine = case.subject, case.subject.machine
    last = len(profile.stored) - 1
    layers = profile.by_layer(last)
    shares = {"prefill": profile.by_product(0), "decode": profile.by_product(last)}
    compute = 2 * machine.matrix.lanes * machine.matrix.columns * machine.matrix.rows * machine.clock_mhz * 1e6
    return Study(
        source=os.fspath(source),
        weights=case.format.name.lower(),
        context=subject.context,
        machine=machine.to_mapping(),
        program_sha256=simulation.program_sha256,
        command=_report_command(case),
        simulate_command=_command(case, subject.devices, case.prompt, case.new),
        ttft_ms=float(simulation.prefill["ms"]) + machine.host.latency_ns * 2e-6,
        simulation=replace(simulation, wall_s=0.0, device_cycles_per_s=0.0).to_json(),
        roofs={
            "compute_operations_per_s": compute,
            "hbm_peak_bytes_per_s": machine.hbm_bytes_per_second,
            "hbm_declared_bytes_per_s": machine.hbm_bytes_per_second * _declared(machine),
        },
        products=[
            _figures(phase, product, share, machine)
            for phase, found in shares.items()
            for product, share in found.items()
            if share.fetched_bytes
        ],
        layers=[_layer(layer) for layer in layers],
        timeline=asdict(profile.timeline(last, BINS)),
        detail=asdict(profile.timeline(last, BINS, _middle(layers))),
        devices=by_devices,
        contexts=by_context,
    )
