"""Commands that look before and after: `check` a model, `compare` an image with torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from typebar.host.cli_errors import FAILED, as_options
from typebar.host.cli_model import (
    FACT_OPTIONS,
    ContextOption,
    DecoderStartOption,
    EndOption,
    SourceContextOption,
    WeightFormat,
    Weights,
    model_facts,
    token_ids,
)
from typebar.host.cli_output import print_facts, print_json, print_table, progress, write_file
from typebar.host.cli_tools import Json
from typebar.isa.errors import TypebarError

if TYPE_CHECKING:
    from typebar.host.check import Report
    from typebar.host.compare import Comparison


def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="What `typebar compile` takes.")],
    machine: Annotated[str, typer.Option(help="A shipped machine or a .toml file.")] = "u280",
    devices: Annotated[int, typer.Option(help="Devices on the ring.")] = 4,
    weights: Weights = WeightFormat.FP16,
    context: ContextOption = None,
    source_context: SourceContextOption = None,
    eos: EndOption = None,
    decoder_start: DecoderStartOption = None,
    as_json: Json = False,
) -> None:
    """List everything in a model that cannot be lowered, and what would fall back; status 1 if anything."""
    from typebar.host.check import check as run

    facts = model_facts(context, source_context, eos, decoder_start)
    with progress(f"checking {model}", as_json), as_options(FACT_OPTIONS):
        report = run(model, machine, devices, weights.value, facts)
    if as_json:
        print_json(report.to_json())
    else:
        _print_report(report)
    if not report.ok:
        raise typer.Exit(FAILED)


def _print_report(report: Report) -> None:
    verdict = "compiles" if report.ok else f"{len(report.findings)} in the way"
    rows = [
        ("model", report.model),
        ("ring", f"{report.devices} x {report.machine}, weights in {report.weights}"),
        ("verdict", verdict),
        ("falls back", report.fallback),
        *(("command", command) for command in report.commands),
    ]
    print_facts("Check", rows)
    if report.findings:
        found = [(f.stage, f.node, f.module, f.reason, f.remedy) for f in report.findings]
        print_table("What cannot be lowered", ("stage", "node", "module", "reason", "remedy"), found)


def compare(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image.")],
    prompt: Annotated[str | None, typer.Option(help="The text to run; the source text of an encoder.")] = None,
    prompt_ids: Annotated[
        str | None, typer.Option(metavar="ID,ID,...", help="The token ids to run, instead of text.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Take torch's weights from this model, not from the image.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the errors into this .svg file.")] = None,
    as_json: Json = False,
) -> None:
    """Compare an image with torch, layer by layer; status 1 if a layer diverges beyond what its formats explain."""
    if (prompt is None) == (prompt_ids is None):
        raise TypebarError("compare takes one of --prompt TEXT and --prompt-ids ID,ID,...: give exactly one")
    if plot is not None and plot.suffix != ".svg":
        raise TypebarError(f"--plot {str(plot)!r}: drawings are SVG, name a file that ends in .svg")
    from typebar.host.compare import compare as run

    ids = None if prompt_ids is None else token_ids(prompt_ids)
    with progress(f"comparing {image}", as_json), as_options({"input_ids": "--prompt-ids", "against": "--against"}):
        found = run(image, prompt, ids, against)
    if plot is not None:
        from typebar.host.compare_plot import draw

        write_file(plot, draw(found).encode())
    if as_json:
        print_json(found.to_json())
    else:
        _print_comparison(found)
    if found.first is not None:
        raise typer.Exit(FAILED)


def _print_comparison(found: Comparison) -> None:
    rows = []
    for row in found.rows:
        runs = (row.image, row.explained, row.float32, row.float16)
        rows.append(
            (
                row.layer,
                row.name,
                f"{row.value:.3g}",
                *(f"{errors.largest:.1e}" for errors in runs),
                f"{row.image.relative:.1e}",
                f"{row.image.rms / row.bound:.2f}",
                "diverges" if row.diverges else "",
            )
        )
    header = ("layer", "after", "largest", "image", "explained", "float32", "float16", "relative", "of bound", "")
    title = f"Largest errors against float64, {found.positions} positions, {found.against}"
    print_table(title, header, rows, numbers=range(2, 9))
    first = found.first
    if first is None:
        print("no layer diverges: the formats explain every error")
    else:
        where = f"{first.layer}, " if first.layer else ""
        print(f"first to diverge: {where}after {first.name} (node {first.node}, error {first.image.largest:.2e})")
