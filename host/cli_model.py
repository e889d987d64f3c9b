"""Commands that take a model through: compile, run, simulate."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from typebar.host.cli_errors import as_options
from typebar.host.cli_output import note, print_facts, print_json, print_table, progress, settings, status_line
from typebar.host.cli_tools import Json
from typebar.isa.errors import TypebarError

if TYPE_CHECKING:
    from typebar.host.engine import Engine
    from typebar.host.report import SimulationReport
    from typebar.host.select import Candidate
    from typebar.isa.image import Image


class WeightFormat(StrEnum):
    """Formats that weights are stored in; K and V too, but with int8 weights they are fp16."""

    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"


class KvFormat(StrEnum):
    """Formats that K and V may be given apart from weights."""

    INT8 = "int8"


class PlanChoice(StrEnum):
    """What chooses how matrices go to the devices."""

    MODEL = "model"
    SIMULATE = "simulate"
    COLUMNS = "columns"


class SplitChoice(StrEnum):
    """What a plan may do: keep the order of all additions, or split rows too."""

    EXACT = "exact"
    FASTEST = "fastest"


class PhaseChoice(StrEnum):
    """What a plan is fast for."""

    DECODE = "decode"
    PREFILL = "prefill"


class DeviceChoice(StrEnum):
    """What runs an image."""

    AUTO = "auto"
    SIM = "sim"
    RTL = "rtl"
    TORCH = "torch"


_HBM_LABELS = {
    "weight_bytes": "weights",
    "weight_padding_bytes": "padding of weights",
    "kv_bytes": "K and V read",
    "kv_padding_bytes": "padding of K and V",
    "kv_stored_bytes": "K and V stored",
    "kv_partial_write_bytes": "rest of rows partly written",
    "total_bytes": "total",
}
_LONGEST = 2**31 - 1
SAMPLING_OPTIONS = {
    "input_ids": "--prompt-ids",
    "messages": "--chat",
    "max_new_tokens": "--max-new-tokens",
    "do_sample": "--do-sample",
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "seed": "--seed",
}
"""Options by the names that Python's interface has for them, for messages."""
FACT_OPTIONS = {
    "config={'context': N}": "--context N",
    "config={'decoder_start_token_id': N}": "--decoder-start N",
    "source_context": "--source-context",
    "eos_token_id": "--eos",
    "decoder_start_token_id": "--decoder-start",
}
_CACHE_OPTIONS = {"kv": "--kv", "calibrate": "--calibrate"}
_LENGTH_OPTIONS = {"prompt_tokens": "--prompt-tokens", "new_tokens": "--new-tokens", "settings": "--set"}
Weights = Annotated[
    WeightFormat, typer.Option("--weights", help="Format of weights, K and V; with int8, K and V are fp16.")
]
KvOption = Annotated[
    KvFormat | None, typer.Option("--kv", help="Format of K and V, where it is not to be that of embeddings.")
]
PlanOption = Annotated[
    PlanChoice | None,
    typer.Option(
        "--plan",
        help="How matrices go to the devices: as a cost model or the simulator finds fastest, or all by columns and"
        " heads. Default: columns, or the model with --split or --phase.",
    ),
]
SplitOption = Annotated[
    SplitChoice | None,
    typer.Option(
        "--split",
        help="What plans may do: exact (default) keeps all bits on any number of devices; fastest may split rows too.",
    ),
]
PhaseOption = Annotated[
    PhaseChoice | None, typer.Option("--phase", help="What a plan is to be fast for: decode (default) or prefill.")
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context", min=1, max=_LONGEST, help="Positions to hold, where the model does not say or fewer will do."
    ),
]
SourceContextOption = Annotated[
    int | None, typer.Option("--source-context", min=1, max=_LONGEST, help="The same for an encoder's text.")
]
EndOption = Annotated[
    list[int] | None,
    typer.Option(
        "--eos", help="Token that ends a text, where the model does not say; repeat it for several, -1: none."
    ),
]
DecoderStartOption = Annotated[
    int | None, typer.Option("--decoder-start", help="Token that a decoder with an encoder starts from.")
]


def model_facts(
    context: int | None, source_context: int | None, eos: list[int] | None, decoder_start: int | None
) -> dict[str, int | list[int]]:
    """The options that say what a model's files do not, by the names of configurations."""
    facts: dict[str, int | list[int] | None] = {
        "context": context,
        "source_context": source_context,
        "eos_token_id": eos or None,
        "decoder_start_token_id": decoder_start,
    }
    return {name: value for name, value in facts.items() if value is not None}


def compile_(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint directory, an .onnx or .gguf file, a directory with encoder.onnx and decoder.onnx,"
            " or a model by name.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The image to write.")],
    machine: Annotated[str, typer.Option(help="A shipped machine or a .toml file.")] = "u280",
    devices: Annotated[int, typer.Option(help="Devices on the ring.")] = 4,
    weights: Weights = WeightFormat.FP16,
    context: ContextOption = None,
    source_context: SourceContextOption = None,
    eos: EndOption = None,
    decoder_start: DecoderStartOption = None,
    plan: PlanOption = None,
    split: SplitOption = None,
    phase: PhaseOption = None,
    kv: KvOption = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="TEXTFILE", help="With --kv int8: a text like those to be run, to find the ranges of K and V."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile a model to an image for a ring of devices."""
    from typebar.host import api
    from typebar.isa.image import Image
    from typebar.isa.instructions import WORD_BYTES
    from typebar.isa.program import encode

    start = time.perf_counter()
    config = model_facts(context, source_context, eos, decoder_start)
    with progress(f"compiling {model}", as_json) as update, as_options(FACT_OPTIONS | _CACHE_OPTIONS):
        made = api.compile(
            model,
            output,
            machine=machine,
            devices=devices,
            weights=weights.value,
            progress=update,
            config=config or None,
            kv=None if kv is None else kv.value,
            calibrate=calibrate,
            **_planning(plan, split, phase),
        )
    manifest, accounting = made.manifest, made.manifest.accounting
    with Image.open(output, verify=False) as image:
        program = encode(image.program).tobytes()
    facts = {
        "image": str(output),
        "model": manifest.name,
        "machine": manifest.machine.name,
        "devices": manifest.devices,
        "weights": manifest.weights_format,
        "kv": accounting["kv_format"],
        "image_bytes": output.stat().st_size,
        "instructions": len(program) // WORD_BYTES,
        "program_bytes": len(program),
        "program_sha256": hashlib.sha256(program).hexdigest(),
        "weight_bytes": accounting["weight_bytes"],
        "packed_weight_bytes": accounting["packed_weight_bytes"],
        "plan": accounting["plan"],
        "wall_s": time.perf_counter() - start,
    }
    if as_json:
        print_json(facts)
    else:
        shown = {**facts, "plan": plan_text(accounting["plan"]), "wall_s": f"{facts['wall_s']:.1f}"}
        print_facts("Compiled", [(key.replace("_", " "), _grouped(value)) for key, value in shown.items()])


def run(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue; to an encoder, the source text.")] = None,
    chat: Annotated[str | None, typer.Option(help="What to say to a model trained to answer, instead.")] = None,
    system: Annotated[str | None, typer.Option(help="With --chat: the system's message before it.")] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(metavar="ID,ID,...", help="The token ids to continue, instead of text.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    device: Annotated[DeviceChoice, typer.Option(help="What runs it.")] = DeviceChoice.AUTO,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="Sample; greedy otherwise.")] = False,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the K most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the tokens that make up this probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    wave: Annotated[
        Path | None, typer.Option(help="With --device rtl: write every signal to this .fst or .vcd file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate text from a prompt."""
    if sum(item is not None for item in (prompt, chat, prompt_ids)) != 1:
        raise TypebarError("run takes one of --prompt TEXT, --chat TEXT and --prompt-ids ID,ID,...: give exactly one")
    if system is not None and chat is None:
        raise TypebarError("--system goes before a message: give --chat TEXT too")
    if wave is not None and device is not DeviceChoice.RTL:
        raise TypebarError(f"--wave dumps the hardware's signals, which --device {device} has not: give --device rtl")
    from typebar.host import api

    ids = None if prompt_ids is None else token_ids(prompt_ids)
    shown: str | None = None

    def stream(piece: str) -> None:
        nonlocal shown
        show("")
        print((shown or "") + piece, end="", flush=True)
        shown = None

    slow = device is DeviceChoice.RTL
    # One terminal cannot show a line that grows and one that is written anew.
    held = slow and sys.stdout.isatty() and sys.stderr.isatty()
    with status_line(slow) as show, api.load(image, _rtl(wave, show) if slow else device.value) as model:
        if not model.has_encoder:
            shown = prompt  # the text goes on from it; an encoder's output does not
        with as_options(SAMPLING_OPTIONS):
            result = model.generate(
                prompt,
                messages=None if chat is None else conversation(chat, system),
                input_ids=ids,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                streamer=None if as_json or held or not model.image.tokenizer else stream,
            )
    if as_json:
        print_json(result.to_json())
        return
    if held and result.text is not None:
        stream(result.text)
    print("" if result.text is not None else " ".join(map(str, result.tokens)))
    for line in (*result.reasons, *result.flags):
        note(line)
    note(f"{len(result.tokens)} tokens on {result.device_name}, ended by {result.finish_reason}")


def conversation(message: str, system: str | None) -> list[dict[str, str]]:
    """A user's message, after the system's if there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": message}]


def _rtl(wave: Path | None, show: Callable[[str], None]) -> list[Candidate]:
    """The hardware's source as the only device, with a waveform and a line that says how far it is."""
    from typebar.host.select import Candidate, compiled

    def progress(cycles: int, rate: float) -> None:
        show(f"{cycles:,} cycles, {rate:,.0f} a second")

    def make(image: Image) -> Engine:
        from typebar.host.rtl import check_machine
        from typebar.hw.native.build import is_built

        check_machine(image.machine)
        if not is_built(image.machine, None if wave is None else wave.suffix.lower()):
            text = f"building the model of {image.machine.name}; this takes minutes, once"
            (show if sys.stderr.isatty() else note)(text)
        return compiled(image, wave, progress)

    return [Candidate("rtl", make)]


def token_ids(text: str) -> list[int]:
    """Token ids separated by commas.

    Raises:
        TypebarError: an item that is no integer.
    """
    try:
        return [int(item) for item in text.split(",")] if text.strip() else []
    except ValueError:
        raise TypebarError(f"--prompt-ids {text!r} are no token ids: write integers separated by commas") from None


def simulate(
    image: Annotated[str | None, typer.Argument(metavar="[IMAGE]", help="An image.")] = None,
    shape: Annotated[str | None, typer.Option(help="A shape without weights, such as gpt2-xl.")] = None,
    machine: Annotated[str | None, typer.Option(help="Default: the image's, or u280.")] = None,
    devices: Annotated[int | None, typer.Option(help="Default: the image's, or 4.")] = None,
    weights: Annotated[WeightFormat | None, typer.Option("--weights", help="Default: the image's, or fp16.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a machine parameter.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    trace: Annotated[Path | None, typer.Option(help="Write a Perfetto trace here.")] = None,
    start: Annotated[int, typer.Option(help="Positions before the prompt, stored already.")] = 0,
    plan: PlanOption = None,
    split: SplitOption = None,
    phase: PhaseOption = None,
    kv: KvOption = None,
    as_json: Json = False,
) -> None:
    """Count the cycles of a generation, without computing it."""
    source = one_source("simulate", image, shape)
    from typebar.host import api

    with progress(f"simulating {source}", as_json), as_options(_LENGTH_OPTIONS | _CACHE_OPTIONS):
        report = api.simulate(
            source,
            machine=machine,
            devices=devices,
            weights=None if weights is None else weights.value,
            settings=settings(changes or []),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            trace=trace,
            start=start,
            kv=None if kv is None else kv.value,
            **_planning(plan, split, phase),
        )
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report)


def one_source(command: str, image: str | None, shape: str | None) -> str:
    """What a command simulates: an image, or a shape by name.

    Raises:
        TypebarError: neither is given, or both.
    """
    source = image if image is not None else shape
    if source is None or (image is not None and shape is not None):
        raise TypebarError(f"{command} takes one of IMAGE and --shape NAME: give exactly one")
    return source


def print_report(report: SimulationReport) -> None:
    """The tables of a simulation."""
    data = report.to_json()
    prefill, decode = data["prefill"], data["decode"]
    rows: list[tuple[str, object]] = [
        ("machine", f"{data['machine']} x {data['devices']} at {data['clock_mhz']} MHz"),
        ("program", f"{data['program_bytes']:,} bytes, SHA-256 {data['program_sha256'][:16]}..."),
        ("plan", plan_text(data["plan"])),
        ("prefill", f"{prefill['tokens']} tokens, {prefill['cycles']:,} cycles, {prefill['ms']:.3f} ms"),
        ("decode", f"{decode['tokens']} tokens, {decode['cycles']:,} cycles"),
    ]
    if decode["ms_per_token"] is not None:
        rows += [
            ("ms/token", f"{decode['ms_per_token']:.4f} (limit {decode['limit_ms_per_token']:.4f})"),
            ("tokens/s", f"{decode['tokens_per_s']:.1f}"),
            ("HBM bytes/token", f"{decode['hbm_bytes_per_token']:,.0f}"),
            ("HBM utilisation", f"{decode['hbm_utilization']:.1%}"),
        ]
    rows += [
        ("total", f"{data['total_ms']:.3f} ms, of which host link {data['host_ms']:.3f} ms"),
        ("wall", f"{data['wall_s']:.2f} s, {data['device_cycles_per_s'] / 1e6:.0f} M device-cycles/s"),
    ]
    print_facts("Simulation", rows)
    moved = [(_HBM_LABELS.get(key, key), f"{value:,}") for key, value in data["hbm"].items()]
    print_table("HBM bytes of the whole run, all devices", ("", "bytes"), moved, numbers=(1,))
    total = sum(data["breakdown"].values())
    shares = [(cause, f"{count:,}", f"{count / total:.1%}") for cause, count in data["breakdown"].items() if count]
    print_table("Cycles of device 0's matrix unit by cause", ("cause", "cycles", "share"), shares, numbers=(1, 2))


def _planning(plan: PlanChoice | None, split: SplitChoice | None, phase: PhaseChoice | None) -> dict[str, str | None]:
    """The planner's options as the Python interface takes them."""
    given = {"plan": plan, "split": split, "phase": phase}
    return {name: None if value is None else value.value for name, value in given.items()}


def plan_text(plan: Mapping[str, Any]) -> str:
    """A plan in a few words."""
    from typebar.compiler.plan import Plan

    return str(Plan.from_json(plan))


def _grouped(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


__all__ = ["compile_", "print_report", "run", "simulate"]
