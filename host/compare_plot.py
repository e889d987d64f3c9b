"""The errors of a comparison as a drawing: one line a run over the layers, on a logarithmic scale, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from typebar.host.compare import Comparison, Row

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 900, 420, 70, 40, 130
_RUNS: dict[str, tuple[str, Callable[[Row], float]]] = {
    "image": ("#c0392b", lambda row: row.image.rms),
    "bound": ("#888888", lambda row: row.bound),
    "float16": ("#2980b9", lambda row: row.float16.rms),
    "float32": ("#27ae60", lambda row: row.float32.rms),
}


def draw(found: Comparison) -> str:
    """An SVG document: root-mean-square errors against float64 by layer; a mark where the image diverges first."""
    series = {name: [of(row) for row in found.rows] for name, (_, of) in _RUNS.items()}
    values = [v for line in series.values() for v in line if 0 < v < math.inf]
    low, high = (math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))) if values else (-8, 0)
    span = max(1, high - low)
    step = (_WIDTH - _LEFT - 120) / max(1, len(found.rows) - 1)

    def x(index: int) -> float:
        return _LEFT + index * step

    def y(value: float) -> float:
        level = math.log10(value) if 0 < value < math.inf else (low if value == 0 else high)
        return _TOP + (high - level) / span * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_text(_LEFT, 20, f"RMS error against float64: {found.image}, {found.against}")]
    for power in range(low, high + 1):
        parts.append(_line(_LEFT, y(10.0**power), _WIDTH - 120, y(10.0**power), "#dddddd"))
        parts.append(_text(8, y(10.0**power) + 4, f"1e{power}"))
    for number, (name, (colour, _)) in enumerate(_RUNS.items()):
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(series[name]))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(_WIDTH - 100, _TOP + 20 * number, name, colour))
    for index, row in enumerate(found.rows):
        place = f'transform="rotate(-55 {x(index):.1f} {_HEIGHT - _BOTTOM + 14})" text-anchor="end"'
        parts.append(_text(x(index), _HEIGHT - _BOTTOM + 14, row.name[-24:], "#333333", place))
        if row is found.first:
            parts.append(f'<circle cx="{x(index):.1f}" cy="{y(row.image.rms):.1f}" r="6" fill="#c0392b"/>')
    body = "\n".join(parts)
    frame = f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="11"'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {frame}>\n{paper}\n{body}\n</svg>\n'


def _text(x: float, y: float, text: str, colour: str = "#333333", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" {more}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
