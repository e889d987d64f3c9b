"""A study as one HTML page: no script, nothing from elsewhere; charts, the tables behind them, and the commands.

The page forbids itself everything but its own style, so that a name in a model or an image can do nothing but be read.
All figures of the study lie in it as JSON too, in the element `data`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from typebar.host import charts
from typebar.host.charts import Axis, Bar, Dot, Line, Part, number
from typebar.host.cli_output import write_file
from typebar.host.report import check_output
from typebar.host.study import PREFILL_TOKENS, Point, Study, study
from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine

_STYLE = """
body { font: 15px/1.5 Helvetica, Arial, sans-serif; color: #1a1a1a; background: #fff; max-width: 960px;
  margin: 24px auto; padding: 0 20px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 4px; }
h3 { font-size: 15px; margin: 18px 0 4px; } p { margin: 4px 0 10px; }
svg { display: block; width: 100%; height: auto; margin: 8px 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 6px 0 12px; }
th, td { padding: 3px 10px 3px 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }
th { font-weight: 600; } td.n, th.n { text-align: right; } details { margin: 6px 0; overflow-x: auto; }
summary { cursor: pointer; color: #0072B2; } code { font-size: 11px; overflow-wrap: anywhere; }
.facts td:first-child { color: #555; padding-right: 24px; } .note { color: #555; font-size: 13px; }
@media print { body { margin: 0; max-width: none; } section { break-inside: avoid; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_CAUSES = (
    Part("computes", charts.BLUE),
    Part("waits for weights or K, V", charts.ORANGE),
    Part("waits for its operands", charts.SKY),
    Part("waits for matrix results", charts.PURPLE),
    Part("waits for vector results", charts.GREEN),
    Part("waits for the ring", charts.RED),
    Part("waits for memory results", charts.BLACK),
    Part("other", charts.GREY),
)
_CAUSE_OF = {
    "compute": 0,
    "weights": 1,
    "operands": 2,
    "accumulate": 2,
    "matrix": 3,
    "vector": 4,
    "ring": 5,
    "memory": 6,
}
_KIND_COLOURS = {
    "linear": charts.BLUE,
    "attention scores": charts.RED,
    "attention values": charts.GREEN,
    "LM head": charts.ORANGE,
}
_USES = (
    ("hbm", "HBM, % of peak", charts.BLUE),
    ("ring", "ring, % of links", charts.RED),
    ("matrix", "matrix unit, %", charts.GREEN),
)
_SHOWN_ROWS = 20
"""Tables with more rows are folded away."""
Cell = str | float | int | None


def report(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = "report.html",
    machine: str | os.PathLike[str] | Machine | None = None,
    devices: int | None = None,
    weights: str | None = None,
    settings: Mapping[str, str | int] | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    progress: Callable[[int, int], None] | None = None,
    kv: str | None = None,
) -> Study:
    """Study a generation on a ring of devices and write a page on it; the file appears complete or not at all.

    Args:
        source, machine, devices, weights, settings, prompt_tokens, kv: as `simulate` takes them.
        out: the page to create or replace; None writes none. Not the image itself.
        new_tokens: tokens to generate, at least 2.
        progress: called with simulations done and in total.

    Raises:
        TypebarError: in one line, for anything that the caller can mend.
    """
    if out is not None:
        check_output(out, "output")
        if Path(source).exists() and Path(out).exists() and Path(source).samefile(out):
            raise TypebarError(f"output {os.fspath(out)!r} is the image itself: name another file")
    found = study(source, machine, devices, weights, settings, prompt_tokens, new_tokens, progress, kv)
    if out is not None:
        write_file(Path(out), page(found).encode())
    return found


def page(study: Study) -> str:
    """The page, as HTML text."""
    title = f"{study.source} on {study.simulation['devices']} x {study.simulation['machine']}"
    sections = [
        _configuration(study),
        _roofline(study),
        _causes(study),
        _layers(study),
        _over_time(study),
        _devices(study),
        _contexts(study),
        _commands(study),
    ]
    data = json.dumps(study.to_json(), allow_nan=False).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n"
        f'<script type="application/json" id="data">{data}</script>\n</body>\n</html>\n'
    )


def _section(name: str, title: str, *content: str) -> str:
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n' + "\n".join(content) + "\n</section>"


def _paragraph(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _cell(value: Cell) -> str:
    if value is None:
        return '<td class="n">-</td>'
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    return f'<td class="n">{text}</td>'


def _table(header: Sequence[str], rows: Iterable[Sequence[Cell]], summary: str = "The figures") -> str:
    body = [list(row) for row in rows]
    numeric = [any(isinstance(row[n], int | float) for row in body) for n in range(len(header))]
    head = "".join(
        f'<th class="n">{escape(name)}</th>' if right else f"<th>{escape(name)}</th>"
        for name, right in zip(header, numeric, strict=True)
    )
    lines = "\n".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in body)
    shown = " open" if len(body) <= _SHOWN_ROWS else ""
    return (
        f"<details{shown}><summary>{escape(summary)}</summary>\n<table><thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{lines}\n</tbody></table></details>"
    )


# Sections -----------------------------------------------------------------------------------------------------
def _configuration(study: Study) -> str:
    figures = study.simulation
    decode, prefill = figures["decode"], figures["prefill"]
    facts = [
        ("model", f"{study.source}, {study.weights} weights, context {study.context:,}"),
        ("machine", f"{figures['machine']} x {figures['devices']} at {figures['clock_mhz']} MHz"),
        ("program", f"{figures['program_bytes']:,} bytes, SHA-256 {figures['program_sha256']}"),
        ("generation", f"{prefill['tokens']} prompt tokens, {decode['tokens'] + 1} new ones"),
        ("time per token", f"{decode['ms_per_token']:.4f} ms (bytes over peak bandwidth: "
                           f"{decode['limit_ms_per_token']:.4f} ms)"),
        ("tokens per second", f"{decode['tokens_per_s']:.1f}"),
        ("HBM utilisation", f"{decode['hbm_utilization']:.1%} of the peak bandwidth"),
        ("time to first token", f"{study.ttft_ms:.3f} ms"),
        ("whole generation", f"{figures['total_ms']:.3f} ms"),
    ]  # fmt: skip
    rows = "\n".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in facts)
    return (
        '<section id="configuration">\n'
        + _paragraph("Cycles of the timing simulator, which the RTL keeps to the cycle; nothing has run on a card.")
        + f'\n<table class="facts"><tbody>\n{rows}\n</tbody></table>\n</section>'
    )


def _roofline(study: Study) -> str:
    roofs = study.roofs
    peak, declared = roofs["hbm_peak_bytes_per_s"] / 1e9, roofs["hbm_declared_bytes_per_s"] / 1e9
    compute = roofs["compute_operations_per_s"] / 1e9
    places = [(item.operations_per_byte, item.operations_per_s / 1e9) for item in study.products]
    ridge = compute / peak
    low = 10 ** _floor_half(min([x for x, _ in places] + [ridge]) / 1.5)
    high = max([x for x, _ in places] + [ridge, compute / declared]) * 2.5
    bottom = 10 ** _floor_half(min([y for _, y in places] + [declared * low]) / 1.2)
    x = Axis("operations per byte read from HBM", low, high, log=True)
    y = Axis("billions of operations a second, one device", bottom, compute * 1.6, log=True)

    def roof(name: str, slope: float, colour: str, dash: str) -> Line:
        edge = max(low, bottom / slope)
        return Line(name, colour, [(edge, edge * slope), (compute / slope, compute)], dash, marks=False)

    drawn = [
        roof(f"peak bandwidth, {number(peak)} GB/s", peak, charts.GREY, "6 3"),
        roof(f"declared bandwidth, {number(declared)} GB/s", declared, charts.BLACK, ""),
        Line(f"compute, {number(compute)} Gop/s", charts.BLACK, [(ridge, compute), (high, compute)], "2 3", False),
    ]
    points = [
        Dot(f"{item.role}, {item.phase}", _KIND_COLOURS[item.kind], px, py, item.phase == "prefill")
        for item, (px, py) in zip(study.products, places, strict=True)
    ]
    header = ("phase", "product", "operations/byte", "Gop/s", "cycles", "of them occupied", "MACs", "bytes read",
              "without padding")  # fmt: skip
    rows = [
        (p.phase, p.role, p.operations_per_byte, p.operations_per_s / 1e9, p.cycles, p.busy, p.macs, p.fetched_bytes,
         p.useful_bytes)
        for p in study.products
    ]  # fmt: skip
    return _section(
        "roofline",
        "Roofline",
        charts.dots(x, y, drawn, points),
        _paragraph(
            "Each product of device 0 with its weights, or with K and V: filled for a decoded token, hollow for the "
            f"prompt (its last {PREFILL_TOKENS} tokens at most). Operations are two a multiply-accumulate, over all "
            "cycles charged to the product, waits included: how far a point lies below the roof is what was lost. "
            "Declared bandwidth leaves out the cycles kept for refresh and writes. A point may cross the bandwidth's "
            "roof where the memory had run ahead."
        ),
        _table(header, rows),
    )


def _floor_half(value: float) -> float:
    return math.floor(math.log10(value) * 2) / 2


def _by_part(causes: Mapping[str, int], scale: float) -> list[float]:
    amounts = [0.0] * len(_CAUSES)
    for cause, cycles in causes.items():
        amounts[_CAUSE_OF.get(cause, len(_CAUSES) - 1)] += cycles * scale
    return amounts


def _used(bars: Sequence[Bar]) -> tuple[list[Part], list[Bar]]:
    """The parts that some bar has, and the bars with those alone."""
    kept = [n for n in range(len(_CAUSES)) if any(bar.amounts[n] for bar in bars)]
    return [_CAUSES[n] for n in kept], [Bar(bar.label, [bar.amounts[n] for n in kept]) for bar in bars]


def _cause_table(first: str, named: Sequence[tuple[str, int, Mapping[str, int]]]) -> str:
    causes = sorted({cause for _, _, found in named for cause in found})
    rows: list[list[Cell]] = [
        [name, cycles, *(found.get(cause, 0) for cause in causes)] for name, cycles, found in named
    ]
    total: list[Cell] = ["sum", sum(cycles for _, cycles, _ in named)]
    total += [sum(found.get(cause, 0) for _, _, found in named) for cause in causes]
    return _table((first, "cycles", *causes), [*rows, total], "The figures, in cycles")


def _causes(study: Study) -> str:
    scale = 1 / study.simulation["clock_mhz"]
    mine = [item for item in study.products if item.phase == "decode"]
    parts, bars = _used([Bar(item.role, _by_part(item.causes, scale)) for item in mine])
    longest = max(sum(bar.amounts) for bar in bars)
    return _section(
        "causes",
        "Time by cause",
        charts.bars(Axis("microseconds of a decoded token", 0, longest * 1.02), parts, bars, "microseconds"),
        _paragraph(
            "The matrix unit of device 0 in one decoded token, product by product, all layers together. What it waits "
            "for before a product is charged to that product, so that the bars add up to the token."
        ),
        _cause_table("product", [(item.role, item.cycles, item.causes) for item in mine]),
    )


def _layers(study: Study) -> str:
    scale = 1 / study.simulation["clock_mhz"]
    named = ["rest" if item["layer"] is None else str(item["layer"]) for item in study.layers]
    made = zip(named, study.layers, strict=True)
    parts, bars = _used([Bar(name, _by_part(item["causes"], scale)) for name, item in made])
    y = Axis("microseconds", 0, max(sum(bar.amounts) for bar in bars) * 1.05)
    rows = [(name, item["cycles"], item["causes"]) for name, item in zip(named, study.layers, strict=True)]
    return _section(
        "layers",
        "Time by layer",
        charts.columns("layer", y, parts, bars, "microseconds"),
        _paragraph(
            'The same cycles by layer, in the order of the token; "rest" has the products outside of loops over '
            "layers. Where layers of several kinds take turns, a bar is a turn."
        ),
        _cause_table("layer", rows),
    )


def _over_time(study: Study) -> str:
    return _section(
        "timeline",
        "HBM, ring and matrix unit over a decoded token",
        _panels(study, study.timeline),
        _paragraph(
            f"Device 0, in {len(study.timeline['hbm'])} equal stretches. HBM: bytes read and written over the peak; "
            "ring: bytes sent over what its links carry in both directions; matrix unit: the share of cycles in which "
            "a product occupies it. Bytes are spread evenly over the time that an instruction takes to move them. "
            "Reads keep to the declared bandwidth; writes have the cycles beyond it."
        ),
        "<h3>About two layers in the middle of it</h3>",
        _panels(study, study.detail),
    )


def _panels(study: Study, line: Mapping[str, Any]) -> str:
    """HBM, ring and matrix unit, one above another, and their table."""
    start, length = (line[key] / study.simulation["clock_mhz"] for key in ("first", "cycles"))
    x = Axis("microseconds since the token before", start, start + length)
    share = 100 * study.roofs["hbm_declared_bytes_per_s"] / study.roofs["hbm_peak_bytes_per_s"]
    ends = [(start, share), (start + length, share)]
    declared = Line(f"declared bandwidth, {share:.1f} %", charts.BLACK, ends, "4 3", marks=False)
    panels = []
    for key, name, colour in _USES:
        values = [100 * value for value in line[key]]
        highest = max(values)
        most = 100.0 if highest > 50 else 10.0 if highest <= 10 else 50.0
        y = Axis(name, 0, most, ticks=(0, most / 2, most))
        panels.append(charts.bins(x, y, values, colour, [declared] if key == "hbm" else []))
    bins = len(line["hbm"])
    rows = [(start + length * n / bins, *(100 * line[key][n] for key, _, _ in _USES)) for n in range(bins)]
    return "\n".join([*panels, _table(("from, microseconds", *(name for _, name, _ in _USES)), rows)])


_POINT_HEADER = ("devices", "context", "ms/token", "limit", "bytes", "bytes, declared", "compute", "K and V",
                 "K and V, limit", "")  # fmt: skip


def _point_row(point: Point) -> tuple[Cell, ...]:
    return (point.devices, point.context, point.ms, point.limit_ms, point.bytes_ms, point.declared_ms,
            point.compute_ms, point.kv_ms, point.kv_limit_ms, point.refused or "")  # fmt: skip


def _series(points: Sequence[Point], key: str, against: str) -> list[tuple[float, float]]:
    return [(getattr(p, against), getattr(p, key)) for p in points if getattr(p, key) is not None]


def _devices(study: Study) -> str:
    found = [point for point in study.devices if point.ms is not None]
    if not found:
        return _section("devices", "Over devices", _table(_POINT_HEADER, map(_point_row, study.devices)))
    values = [v for p in found for v in (p.ms, p.limit_ms) if v is not None]
    counts = tuple(float(point.devices) for point in study.devices)
    x = Axis("devices on the ring", min(counts) / 1.15, max(counts) * 1.15, log=True, ticks=counts)
    y = Axis("ms per token", min(values) / 1.2, max(values) * 1.2, log=True)
    drawn = [
        Line("simulated", charts.BLUE, _series(found, "ms", "devices")),
        Line("limit: bytes over declared bandwidth", charts.ORANGE, _series(found, "declared_ms", "devices"), "7 3"),
        Line("physical limit", charts.BLACK, _series(found, "limit_ms", "devices"), "2 3"),
    ]
    return _section(
        "devices",
        "Over devices",
        charts.lines(x, y, drawn),
        _paragraph(
            f"One token that attends to {found[0].context:,}. The physical limit is the larger of the model's own "
            "bytes over the peak bandwidth of all devices and its operations over their peak."
        ),
        _table(_POINT_HEADER, map(_point_row, study.devices), "The figures, in ms per token"),
    )


def _contexts(study: Study) -> str:
    found = [point for point in study.contexts if point.ms is not None]
    if not found:
        return _section("contexts", "Over context lengths", _paragraph("The model's context is too short to vary it."))
    lengths = tuple(float(point.context) for point in found)
    x = Axis("tokens attended to", lengths[0] / 1.1, lengths[-1] * 1.1, log=True, ticks=lengths)
    y = Axis("ms per token", 0, max(point.ms or 0 for point in found) * 1.1)
    drawn = [
        Line("simulated", charts.BLUE, _series(found, "ms", "context")),
        Line("physical limit", charts.BLACK, _series(found, "limit_ms", "context"), "2 3"),
        Line("K and V, simulated", charts.RED, _series(found, "kv_ms", "context")),
        Line("K and V, physical limit", charts.GREY, _series(found, "kv_limit_ms", "context"), "2 3"),
    ]
    return _section(
        "contexts",
        "Over context lengths",
        charts.lines(x, y, drawn),
        _paragraph(
            "One token after all others but itself. K and V: all cycles of the matrix unit charged to the products "
            "with them, waits included; their limit is the larger of their bytes over the peak bandwidth and their "
            "operations over the peak. The last point is the longest context that leaves room for a new token."
        ),
        _table(_POINT_HEADER, map(_point_row, found), "The figures, in ms per token"),
    )


def _commands(study: Study) -> str:
    rows: list[tuple[Cell, ...]] = [
        ("this page", study.command),
        ("the generation", study.simulate_command),
    ]
    rows += [(f"{p.devices} devices, context {p.context}", p.command) for p in study.devices if p.command]
    rows += [(f"context {p.context}", p.command) for p in study.contexts]
    lines = "\n".join(f"<tr><td>{escape(str(a))}</td><td><code>{escape(str(b))}</code></td></tr>" for a, b in rows)
    return _section(
        "commands",
        "Commands",
        _paragraph(
            "Each prints its figures again, the first one with --json; simulations are exact, so they are the same to "
            "the last digit."
        ),
        f"<table><tbody>\n{lines}\n</tbody></table>",
    )
