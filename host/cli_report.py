"""`typebar report`: a performance report as a web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from typebar.host.cli_model import KvOption, WeightFormat, one_source
from typebar.host.cli_output import note, print_json, progress, settings
from typebar.host.cli_tools import Json


def report(
    image: Annotated[str | None, typer.Argument(metavar="[IMAGE]", help="An image.")] = None,
    shape: Annotated[str | None, typer.Option(help="A shape without weights, such as gpt2-xl.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page to write; default: report.html, or none with --json."),
    ] = None,
    machine: Annotated[str | None, typer.Option(help="Default: the image's, or u280.")] = None,
    devices: Annotated[int | None, typer.Option(help="Default: the image's, or 4.")] = None,
    weights: Annotated[WeightFormat | None, typer.Option("--weights", help="Default: the image's, or fp16.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a machine parameter.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate, at least 2.")] = 64,
    kv: KvOption = None,
    as_json: Json = False,
) -> None:
    """Write a page on where the time goes: roofline, causes, layers, HBM and ring, scaling, limits."""
    source = one_source("report", image, shape)
    from typebar.host.page import report as write

    target = output if output is not None or as_json else Path("report.html")
    with progress(f"simulating {source}", as_json) as show:
        study = write(
            source,
            target,
            machine=machine,
            devices=devices,
            weights=None if weights is None else weights.value,
            settings=settings(changes or []),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            progress=show,
            kv=None if kv is None else kv.value,
        )
    if as_json:
        print_json(study.to_json())
    else:
        note(f"wrote {target}")
