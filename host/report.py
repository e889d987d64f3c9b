"""What `simulate` reports: the time of a generation, where it goes, and how near it is to the memory's limit.

Definitions, for a prompt of P tokens and N new ones on D devices, S positions being stored already (`start`, else 0):

- prefill: cycles until device 0 stores the first new token: all passes over the prompt.
- decode: the other N - 1 passes, from there to the last device's halt; figures per token are None if N = 1.
- useful bytes per token: the unpadded weights that a pass reads, and the K and V of the position + 1 tokens it attends
  to, averaged over the decode passes (positions S + P to S + P + N - 2); all devices. `hbm_bytes_per_token` is this
  number.
- limit_ms_per_token: useful bytes per token / (D x HBM bytes per second of one device).
- hbm_utilization: limit_ms_per_token / ms_per_token.
- a prompt goes through in blocks: the tokens of a group share a reading of the weights, and one of K and V up to the
  group's last; what follows the last attention is read once, for the last token.
- hbm: bytes that all devices move in the whole run. weight_bytes, kv_bytes and kv_stored_bytes are the model's own;
  what is fetched beyond them is padding (of shapes that do not divide, of rows and of blocks), and what is written
  beyond them are partial writes (a row holds more than the elements stored).
- host_ms: both directions' latency, and the prompt, descriptor and new tokens at the link's rate.
- total_ms: all cycles at the clock, and host_ms.
- device_cycles_per_s: D x total cycles over the seconds that the timing run itself took; wall_s is all of `simulate`.
- plan: the matrices that every device holds whole, and those that go by rows; copies count as padding of the weights.
- breakdown: cycles of device 0's matrix unit by cause; they sum to total_cycles, as every unit's do.

With an encoder the prompt is the source text: P counts its tokens, and decoding starts from one token. Then

- encode: cycles until device 0 has encoded the source text, and K and V of every cross-attention are stored; prefill
  includes them. Figures of a model without an encoder are None.
- useful bytes per token include K and V of the P source positions for cross-attention; bytes of the whole run include
  the encoder's weights, read once for each source position, and what its attentions read and store.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from typebar.compiler.emit.head import DESCRIPTOR_WORDS
from typebar.compiler.memory import IoMap
from typebar.compiler.plan import COLUMNS, Plan
from typebar.host.caching import check_kv
from typebar.host.facts import image_facts
from typebar.host.generation import count_of
from typebar.host.planning import Planning
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.image_manifest import check_machine
from typebar.isa.instructions import Format
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.program import Program, encode, op
from typebar.sim.timing import TimingResult, run_timing

if TYPE_CHECKING:
    from typebar.compiler.driver import Compiled
    from typebar.compiler.frontend import FrontendModel

_WORD = 4
_UNPLANNED = Planning()
_DEFAULT_MACHINE, _DEFAULT_DEVICES, _DEFAULT_WEIGHTS = "u280", 4, "fp16"


@dataclass(frozen=True)
class SimulationReport:
    """The figures of one simulated generation; the module says how each is defined."""

    machine: str
    devices: int
    clock_mhz: int
    prefill: dict[str, Any]
    decode: dict[str, Any]
    breakdown: dict[str, int]
    units: dict[str, dict[str, int]]
    hbm: dict[str, int]
    program_bytes: int
    program_sha256: str
    instructions: int
    total_cycles: int
    host_ms: float
    total_ms: float
    device_cycles_per_s: float
    wall_s: float
    encode: dict[str, Any]
    plan: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """What is simulated; `entry` is where a generation begins, `main` where it goes on from stored positions."""

    program: Program
    machine: Machine
    devices: int
    context: int
    entry: int
    main: int
    io: IoMap
    accounting: Mapping[str, int]
    source_context: int | None = None
    """Source positions at most, for a model with an encoder; `entry` is then where a source text is encoded."""
    plan: Plan = COLUMNS

    def fed(self, prompt: int) -> int:
        """Tokens that decoding starts from."""
        return prompt if self.source_context is None else 1

    @property
    def block(self) -> int:
        """Tokens of a prompt that go through together; 1 if they go one by one."""
        return self.accounting["prompt_rows"] * self.accounting["prompt_groups"]

    def account(self, name: str) -> int:
        """A figure of the accounting; those of an encoder are 0 where there is none."""
        return self.accounting.get(name, 0)


def simulate(
    source: str | os.PathLike[str],
    machine: str | os.PathLike[str] | Machine | None = None,
    devices: int | None = None,
    weights: str | None = None,
    settings: Mapping[str, str | int] | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    trace: str | os.PathLike[str] | None = None,
    start: int = 0,
    plan: str | None = None,
    split: str | None = None,
    phase: str | None = None,
    kv: str | None = None,
) -> SimulationReport:
    """Time a generation on a ring of devices, without computing it.

    Args:
        source: an image, the name of a shape such as `gpt2-xl`, a checkpoint directory, or a shipped model's name.
        machine: where to run it; an image's own by default, `u280` for the others. For an image, one that differs from
            its own only in timing will do.
        devices: devices on the ring; an image's own number, 4 for the others.
        weights: fp16, bf16 or int8; an image's own format, fp16 for the others.
        settings: machine parameters to override, such as {"hbm.latency": 80}.
        prompt_tokens: tokens of the prompt; with an encoder, of the source text.
        new_tokens: tokens to generate; none of them ends the text.
        trace: a file to write a Perfetto trace to.
        start: positions whose K and V are stored already, so that the prompt is at `start`; a token at a long context
            need not wait for all before it. With an encoder, a `start` other than 0 finds the source text encoded.
        plan, split, phase: how matrices go to the devices, as for `compile`; an image has its own plan.
        kv: int8 K and V, whose scales cost no time; an image's own format, else that of embeddings.

    Raises:
        TypebarError: in one line, for anything that the caller can mend.
    """
    began = time.perf_counter()
    planning = Planning(plan, split, phase)
    check_kv(kv)
    if trace is not None:
        check_output(trace, "trace")
    subject = subject_of(source, machine, devices, weights, _texts(settings), planning, kv)
    report, result = measure(subject, prompt_tokens, new_tokens, start, trace=trace is not None)
    if trace is not None:
        from typebar.sim.trace import write_perfetto

        write_perfetto(result, subject.machine, subject.program, Path(trace))
    return replace(report, wall_s=time.perf_counter() - began)


def measure(
    subject: Subject, prompt: int, new: int, start: int = 0, *, trace: bool = False, profile: bool = False
) -> tuple[SimulationReport, TimingResult]:
    """Time a generation: its figures, and the run they come from, with a trace or a profile of device 0 if wanted.

    Raises:
        TypebarError: the tokens exceed the model's context, or the program stops with a trap.
    """
    began = time.perf_counter()
    _check_lengths(prompt, new, start, subject)
    io = _io_words(subject, prompt, new, start)
    # A first run that only halts brings in the compiled simulator, so that the rate measured is the simulator's own.
    run_timing(Program([op("halt")]), subject.machine, 1, io[:1])
    running = time.perf_counter()
    entry = subject.main if start else subject.entry
    result = run_timing(
        subject.program, subject.machine, subject.devices, io, entry=entry, trace=trace, profile=profile
    )
    seconds = time.perf_counter() - running
    return _report(subject, result, (prompt, new, start), seconds, began), result


def check_output(out: str | os.PathLike[str], what: str) -> None:
    """Refuse, before a long run, a file that could not be written after it; `what` is what the caller calls it.

    Raises:
        TypebarError: it is no path, or is a directory, or its folder is missing or not writable.
    """
    if not isinstance(out, str | os.PathLike):
        raise TypebarError(f"{what} must be a path, not {out!r}: name a file")
    path, name = Path(out), os.fspath(out)
    if path.is_dir():
        raise TypebarError(f"{what} {name!r} is a directory: name a file")
    if not path.parent.is_dir():
        raise TypebarError(f"{what} {name!r} cannot be written: No such folder; create it or name another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise TypebarError(f"{what} {name!r} cannot be written: its folder is not writable; name another")


def _texts(settings: Mapping[str, str | int] | None) -> dict[str, str]:
    """Settings as the command line gives them."""
    if settings is None:
        return {}
    if not isinstance(settings, Mapping):
        raise TypebarError(f'settings must be a mapping, not {settings!r}: for example {{"hbm.latency": 80}}')
    return {key: str(value) for key, value in settings.items()}


def subject_of(
    source: str | os.PathLike[str],
    machine: str | os.PathLike[str] | Machine | None,
    devices: int | None,
    weights: str | None,
    settings: Mapping[str, str],
    planning: Planning = _UNPLANNED,
    kv: str | None = None,
) -> Subject:
    """What the arguments of `simulate` name.

    Raises:
        TypebarError: there is no such thing, or it does not go with the machine, the devices or the weights.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypebarError(
            f"cannot simulate {source!r}: give an image, a checkpoint directory, or a shape's or model's name"
        )
    if not isinstance(machine, str | os.PathLike | Machine | None):
        raise TypebarError(f"machine cannot be {machine!r}: give a shipped machine's name, a .toml file or a machine")
    target = machine if isinstance(machine, Machine) or machine is None else Machine.load(os.fspath(machine))
    path = Path(source)
    if path.is_dir() or not path.exists():
        chosen = (target or Machine.load(_DEFAULT_MACHINE)).override(settings)
        return _compiled(source, chosen, _DEFAULT_DEVICES if devices is None else devices, weights, planning, kv)
    if planning != _UNPLANNED:
        raise TypebarError("an image has its plan already: leave out plan, split and phase, or compile again with them")
    with Image.open(path, verify=False) as image:
        manifest = image.manifest
        chosen = (target or image.machine).override(settings)
        check_machine(manifest, chosen)
        if devices not in (None, manifest.devices):
            raise TypebarError(
                f"the image is for {count_of(manifest.devices, 'device')}, not {devices}: compile it for {devices}"
            )
        if weights not in (None, manifest.weights_format):
            raise TypebarError(
                f"the image has {manifest.weights_format} weights, not {weights}: leave it out or compile for {weights}"
            )
        stored = manifest.accounting.get("kv_format")
        if kv not in (None, stored):
            raise TypebarError(f"the image's K and V are not {kv}: leave kv out, or compile again with it")
        facts = image_facts(image)
        return Subject(
            image.program,
            chosen,
            manifest.devices,
            facts.context,
            facts.entry if facts.encoder is None else facts.encoder.entry,
            facts.entry,
            facts.io,
            facts.accounting,
            None if facts.encoder is None else facts.encoder.context,
            Plan.from_json(manifest.accounting.get("plan", COLUMNS.to_json())),
        )


def _compiled(
    source: str | os.PathLike[str],
    machine: Machine,
    devices: int,
    weights: str | None,
    planning: Planning,
    kv: str | None,
) -> Subject:
    from typebar.compiler import driver
    from typebar.compiler.caches import int8_caches

    fmt = driver.weights_format(_DEFAULT_WEIGHTS if weights is None else weights)
    driver.check_devices(devices)
    model = model_of(source) if kv is None else int8_caches(model_of(source), None)
    return subject_from(driver.build(model, machine, devices, fmt, planning.plan(model, machine, devices, fmt)))


def model_of(source: str | os.PathLike[str]) -> FrontendModel:
    """The model that a shape's name, a shipped model's name or a checkpoint directory stands for; no weights are read.

    Raises:
        TypebarError: there is none, or it cannot be lowered.
    """
    from typebar.compiler.frontend import SHAPES, load_model, no_model
    from typebar.models import shipped

    name = os.fspath(source)
    places = {model.name: model.path for model in shipped()}
    if not Path(name).exists() and name not in SHAPES and name not in places:
        raise TypebarError(no_model(name, [*SHAPES, *places], image=True))
    return load_model(places.get(name, source)) if name not in SHAPES else _shape(name)


def compiled_subject(model: FrontendModel, machine: Machine, devices: int, fmt: Format) -> Subject:
    """A model compiled as far as its program.

    Raises:
        TypebarError: it does not fit, or cannot be lowered.
    """
    from typebar.compiler import driver

    return subject_from(driver.build(model, machine, devices, fmt))


def subject_from(made: Compiled) -> Subject:
    """A compiled model as what is simulated."""
    from typebar.compiler import driver

    context, memory = int(made.model.config["context"]), made.memory
    main = made.program.labels["main"]
    entry, source = made.program.labels.get("encode", main), driver.source_context(made.model)
    return Subject(
        made.program,
        made.machine,
        made.devices,
        context,
        entry,
        main,
        memory.io,
        memory.accounting,
        source,
        made.plan,
    )


@functools.lru_cache(maxsize=2)
def _shape(name: str) -> FrontendModel:
    """A shape's step, kept for the next machine: `build` leaves it as it is."""
    from typebar.compiler.frontend import load_model

    return load_model(name)


def _check_lengths(prompt: int, new: int, start: int, subject: Subject) -> None:
    for name, value in (("prompt_tokens", prompt), ("new_tokens", new)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise TypebarError(f"{name} must be an integer, at least 1, not {value!r}")
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise TypebarError(f"start must be an integer, at least 0, not {start!r}")
    most, context = subject.source_context, subject.context
    if most is not None and prompt > most:
        raise TypebarError(f"prompt_tokens = {prompt} exceed the encoder's context of {most} tokens: ask for less")
    before = f"start = {start}, " if start else ""
    if most is not None and start + 1 + new > context:
        raise TypebarError(f"{before}new_tokens = {new} exceed the decoder's context of {context} tokens: ask for less")
    if most is None and start + prompt + new > context:
        raise TypebarError(
            f"{before}prompt_tokens = {prompt} and new_tokens = {new} exceed the context of {context} tokens: "
            "ask for less"
        )


def _io_words(subject: Subject, prompt: int, new: int, start: int) -> NDArray[np.int32]:
    """The IO region of every device before the launch; the prompt's tokens are zeros."""
    words = np.zeros((subject.devices, subject.io.bytes // _WORD), np.int32)
    first = subject.io.descriptor_line * LINE_BYTES // _WORD
    source = 0 if subject.source_context is None else prompt
    given = {"start": start, "count": subject.fed(prompt), "new": new, "eos": -1, "source": source}
    for name, value in given.items():
        words[:, first + DESCRIPTOR_WORDS[name]] = value
    return words


def _report(
    subject: Subject, result: TimingResult, lengths: tuple[int, int, int], seconds: float, began: float
) -> SimulationReport:
    machine, (prompt, new, start) = subject.machine, lengths
    words = encode(subject.program).tobytes()
    io = subject.io
    prefill = _stored(result, io.tokens_line * LINE_BYTES + (start + subject.fed(prompt)) * _WORD)
    encoded = None
    if subject.source_context is not None and not start:
        encoded = _stored(result, io.descriptor_line * LINE_BYTES + DESCRIPTOR_WORDS["encoded"] * _WORD)
    per_cycle = 1 / (machine.clock_mhz * 1e3)
    link = 2 * machine.host.latency_ns * 1e-6
    link += (LINE_BYTES + (prompt + new) * _WORD) / (machine.host.megabytes_per_second * 1e3)
    return SimulationReport(
        machine=machine.name,
        devices=subject.devices,
        clock_mhz=machine.clock_mhz,
        prefill={"tokens": prompt, "cycles": prefill, "ms": prefill * per_cycle},
        decode=_decode(subject, lengths, result.total_cycles - prefill),
        breakdown=dict(result.causes[0]["matrix"]),
        units={unit: dict(causes) for unit, causes in result.causes[0].items()},
        hbm=_hbm(subject, result, lengths),
        program_bytes=len(words),
        program_sha256=hashlib.sha256(words).hexdigest(),
        instructions=sum(counters.instructions for counters in result.counters),
        total_cycles=result.total_cycles,
        host_ms=link,
        total_ms=result.total_cycles * per_cycle + link,
        device_cycles_per_s=result.total_cycles * result.devices / seconds,
        wall_s=time.perf_counter() - began,
        encode={
            "tokens": None if encoded is None else prompt,
            "cycles": encoded,
            "ms": None if encoded is None else encoded * per_cycle,
        },
        plan=subject.plan.to_json(),
    )


def _stored(result: TimingResult, place: int) -> int:
    """Cycle from which the host can see the word that device 0 stores at a byte of IO."""
    for store in result.stores:
        if store.device == 0 and store.line * LINE_BYTES + store.byte == place:
            return store.cycle
    raise AssertionError(f"the program stored nothing at byte {place}")


def _decode(subject: Subject, lengths: tuple[int, int, int], cycles: int) -> dict[str, Any]:
    prompt, new, start = lengths
    tokens = new - 1
    figures: dict[str, Any] = dict.fromkeys(
        ("ms_per_token", "tokens_per_s", "hbm_bytes_per_token", "hbm_utilization", "limit_ms_per_token")
    )
    if tokens:
        # Positions start + prompt to start + prompt + tokens - 1 attend to one token more than their number.
        attended = start + subject.fed(prompt) + (tokens + 1) / 2
        useful = subject.accounting["weight_bytes"] + subject.accounting["kv_bytes_per_position"] * attended
        useful += subject.account("cross_kv_bytes_per_position") * prompt
        seconds = cycles / (subject.machine.clock_mhz * 1e6) / tokens
        limit = useful / (subject.devices * subject.machine.hbm_bytes_per_second)
        figures = {
            "ms_per_token": seconds * 1e3,
            "tokens_per_s": 1 / seconds,
            "hbm_bytes_per_token": useful,
            "hbm_utilization": limit / seconds,
            "limit_ms_per_token": limit * 1e3,
        }
    return {"tokens": tokens, "cycles": cycles, **figures}


def _prompt_passes(subject: Subject, fed: int) -> list[int]:
    """Positions that each reading of the weights sees at the end, over `fed` tokens: groups of blocks, or one token."""
    rows, seen = subject.account("prompt_rows"), [0]
    while seen[-1] < fed:
        block = min(subject.block, fed - seen[-1])
        first = seen[-1]
        seen += [min(first + done + rows, first + block) for done in range(0, block, rows)]
    return seen[1:]


def _hbm(subject: Subject, result: TimingResult, lengths: tuple[int, int, int]) -> dict[str, int]:
    """Bytes that HBM moved in the whole run, all devices together: the model's own, and the others apart."""

    def total(name: str) -> int:
        return sum(int(getattr(counters, name)) for counters in result.counters)

    prompt, new, start = lengths
    fed, per_position = subject.fed(prompt), subject.accounting["kv_bytes_per_position"]
    passes, seen = fed + new - 1, _prompt_passes(subject, fed)
    inside = subject.accounting["head_bytes" if subject.block == 1 else "tail_bytes"]
    turns = len(seen) + new - 1
    weights = subject.accounting["weight_bytes"] * turns - inside * (len(seen) - 1)
    kv = per_position * (start * turns + sum(seen) + sum(range(fed + 1, passes + 1)))
    stored = per_position * passes
    if subject.source_context is not None:
        own, cross = subject.account("source_kv_bytes_per_position"), subject.account("cross_kv_bytes_per_position")
        kv += cross * prompt * turns
        if not start:
            weights += subject.account("source_weight_bytes") * prompt
            kv += own * prompt * prompt
            stored += (own + cross) * prompt
    moved = {name: total(f"{name}_bytes") for name in ("weights_fetched", "kv_fetched", "kv_written")}
    return {
        "weight_bytes": weights,
        "weight_padding_bytes": moved["weights_fetched"] - weights,
        "kv_bytes": kv,
        "kv_padding_bytes": moved["kv_fetched"] - kv,
        "kv_stored_bytes": stored,
        "kv_partial_write_bytes": moved["kv_written"] - stored,
        "total_bytes": sum(moved.values()),
    }
