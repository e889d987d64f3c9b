"""`typebar explore`: machine parameters x models x device counts, time against area."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from typebar.host.cli_errors import as_options
from typebar.host.cli_model import WeightFormat
from typebar.host.cli_output import note, print_json, print_table, progress, write_file
from typebar.host.cli_tools import Json
from typebar.isa.errors import TypebarError

if TYPE_CHECKING:
    from typebar.host.explore import Exploration, Point


class ExecutorChoice(StrEnum):
    """What runs the simulations."""

    AUTO = "auto"
    RAY = "ray"
    PROCESSES = "processes"
    INLINE = "inline"


class AreaChoice(StrEnum):
    """The resource whose share of the chip counts as area."""

    LUT = "LUT"
    FF = "FF"
    DSP = "DSP"
    BRAM = "BRAM"
    URAM = "URAM"
    LARGEST = "largest"


_OPTIONS = {"prompt_tokens": "--prompt-tokens", "new_tokens": "--new-tokens"}


def explore(
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="KEY=V,V,...", help="Values of a machine parameter; repeat it for others."),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME", help="A shape, such as gpt2-xl; repeat it for others."),
    ] = None,
    devices: Annotated[
        list[int] | None, typer.Option("--devices", metavar="N", help="Devices, 4 by default; repeat it for others.")
    ] = None,
    machine: Annotated[str, typer.Option(help="Where the grid starts: a shipped machine or a .toml file.")] = "u280",
    weights: Annotated[
        WeightFormat, typer.Option("--weights", help="Format of weights and caches.")
    ] = WeightFormat.FP16,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate, at least 2.")] = 4,
    limit: Annotated[
        float | None, typer.Option(help="Share of each resource that a design may take, 0.7 by default.")
    ] = None,
    area: Annotated[AreaChoice, typer.Option(help="The resource whose share is the area.")] = AreaChoice.LUT,
    everything: Annotated[bool, typer.Option("--all", help="Let what does not fit take part in the front.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Draw time over area into this .svg.")] = None,
    executor: Annotated[ExecutorChoice, typer.Option(help="What runs the simulations.")] = ExecutorChoice.AUTO,
    workers: Annotated[int | None, typer.Option(help="Simulations at a time here; default: one a core.")] = None,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="A running Ray cluster; auto finds this machine's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Vary a machine: token time against area, and the machines that nothing beats in both."""
    if not shapes:
        raise TypebarError("explore needs models: give --shape NAME, such as --shape dfx-1.5b, at least once")
    from typebar.host import explore as exploring
    from typebar.host.explore_run import Executor, cores
    from typebar.host.report import check_output

    if output is not None:
        check_output(output, "output")
    with as_options(_OPTIONS), progress("exploring", as_json) as show:
        found = exploring.explore(
            machine,
            values(vary or []),
            shapes,
            devices or [4],
            weights=weights.value,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            limit=limit,
            area=area.value,
            everything=everything,
            executor=Executor(executor.value, cores() if workers is None else workers, address),
            progress=show,
        )
    if output is not None:
        from typebar.host.explore_plot import draw

        write_file(output, draw(found).encode())
    if as_json:
        print_json(found.to_json())
        return
    print_exploration(found)
    note(f"ran on {found.executor}")


def values(items: Sequence[str]) -> dict[str, list[str]]:
    """`KEY=V,V,...` items as a mapping.

    Raises:
        TypebarError: an item without "=" or with an empty value, or a key given twice.
    """
    found: dict[str, list[str]] = {}
    for item in items:
        key, equals, text = item.partition("=")
        listed = [value.strip() for value in text.split(",")]
        if not key or not equals or "" in listed:
            raise TypebarError(f"--vary {item!r} is no range: write KEY=V,V,..., for example matrix.columns=16,32")
        if key in found:
            raise TypebarError(f"--vary gives {key} twice: give it once, with all its values")
        found[key] = listed
    return found


def print_exploration(found: Exploration) -> None:
    """Tables: every model's points, fastest first; and what cannot be."""
    for shape in found.fronts():
        points = sorted(
            (point for point in found.points if point.shape == shape),
            key=lambda point: (point.ms_per_token, point.area),
        )
        names = list(points[0].varied)
        header = ("devices", *_short(names), "ms/token", "limit", "first token ms", "LUT", "largest", "area", "")
        rows = [
            (
                point.devices,
                *(point.varied[name] for name in names),
                f"{point.ms_per_token:.4f}",
                f"{point.figures.limit_ms_per_token:.4f}",
                f"{point.figures.first_token_ms:.2f}",
                f"{point.shares['LUT']:.1%}",
                _largest(point),
                f"{point.area:.3f}",
                _mark(point, found.limit),
            )
            for point in points
        ]
        lengths = f"{found.prompt_tokens} + {found.new_tokens} tokens"
        title = f"{shape} on {found.machine}, {found.weights}, {lengths}; shares of a U280"
        print_table(title, header, rows, numbers=range(len(header) - 1))
    if found.refused:
        refusals = [
            (
                ", ".join(f"{key}={value}" for key, value in item.varied.items()),
                "" if item.shape is None else f"{item.shape} x {item.devices}",
                item.reason,
            )
            for item in found.refused
        ]
        print_table("Cannot be", ("machine", "model", "reason"), refusals)


def _short(names: Sequence[str]) -> list[str]:
    """Parameters without their sections, where that tells them apart."""
    leaves = [name.rpartition(".")[2] for name in names]
    return leaves if len(set(leaves)) == len(names) else list(names)


def _largest(point: Point) -> str:
    """The resource of which a design takes the largest share."""
    kind = max(point.shares, key=lambda kind: point.shares[kind])
    return f"{kind} {point.shares[kind]:.1%}"


def _mark(point: Point, limit: float) -> str:
    """Whether a point is on the front; else, what it has too much of."""
    over = [kind for kind, share in point.shares.items() if share > limit]
    words = ["front"] * point.front + [f"over in {' and '.join(over)}"] * bool(over)
    return ", ".join(words)
