"""Charts as SVG text: axes, lines, points with labels, stacked bars. Plain shapes and text, no script, no style sheet.

Every mark has a `<title>`, which browsers show where the pointer rests. Colours are those of Okabe and Ito (2008),
which people tell apart whatever colours they see; lines differ in dashes too, for print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#1a1a1a", "#8c8c8c",
)  # fmt: skip
WIDTH = 920
_LEFT, _RIGHT, _BOTTOM, _TOP = 64, 24, 48, 16
_GLYPH = 7.7
"""Pixels of a digit in the widest of the usual fonts at the charts' size, 12 pixels."""


@dataclass(frozen=True)
class Axis:
    """What an axis shows: its label with the unit, its range, and whether it is logarithmic."""

    label: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] | None = None

    def place(self, value: float) -> float:
        """Where a value lies, 0 at `low` and 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def marks(self) -> Sequence[float]:
        """The values to mark, about five, unless they were given."""
        if self.ticks is not None:
            return self.ticks
        if not self.log:
            step = _step((self.high - self.low) / 6)
            first = math.ceil(self.low / step - 1e-9)
            return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5), tuple(range(1, 10))):
            marks = [d * 10.0**n for n in decades for d in digits if self.low <= d * 10.0**n <= self.high * (1 + 1e-9)]
            if len(marks) >= 4:
                break
        return marks[:: -(-len(marks) // 9)] if marks else marks


@dataclass(frozen=True)
class Line:
    """A line through points (x, y); `dash` is SVG's, empty for a solid one; `marks` draws the points too."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    dash: str = ""
    marks: bool = True


@dataclass(frozen=True)
class Dot:
    """A labelled point; hollow or filled."""

    label: str
    colour: str
    x: float
    y: float
    hollow: bool = False


@dataclass(frozen=True)
class Bar:
    """A stacked bar: amounts by part, in the order of the chart's parts."""

    label: str
    amounts: Sequence[float]


@dataclass(frozen=True)
class Part:
    """What a colour of stacked bars stands for."""

    name: str
    colour: str


def number(value: float) -> str:
    """A number for people: four significant digits at most, no exponent from 0.001 to 10 million."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2e}"


def _step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * (1 - 1e-9))


class Chart:
    """A drawing area with axes around it; marks are added in the axes' units."""

    def __init__(self, x: Axis, y: Axis, height: int, right: int = _RIGHT, left: int = 0, legend: int = 0) -> None:
        """Draw the axes; `right` and `left` are margins in pixels at least, `legend` what is kept free above."""
        self.x, self.y, self.height = x, y, height
        written = max((len(number(value)) for value in y.marks()), default=0)
        self.left, self.top = max(_LEFT, left, int(28 + written * _GLYPH)), _TOP + legend
        self.right, self.bottom = WIDTH - right, height - _BOTTOM
        self.parts: list[str] = []
        """Elements of the drawing, in order."""
        self._axes()

    def px(self, value: float) -> float:
        """Horizontal pixel of a value."""
        return self.left + self.x.place(value) * (self.right - self.left)

    def py(self, value: float) -> float:
        """Vertical pixel of a value."""
        return self.bottom - self.y.place(value) * (self.bottom - self.top)

    def _axes(self) -> None:
        for value in self.y.marks():
            self._line(self.left, self.py(value), self.right, self.py(value), "#dddddd")
            self.text(self.left - 6, self.py(value) + 4, number(value), anchor="end")
        for value in self.x.marks():
            self._line(self.px(value), self.bottom, self.px(value), self.bottom + 5, "#555555")
            self.text(self.px(value), self.bottom + 18, number(value), anchor="middle")
        self._line(self.left, self.bottom, self.right, self.bottom, "#555555")
        self.text((self.left + self.right) / 2, self.bottom + 38, self.x.label, anchor="middle")
        if self.y.label:
            self.text(14, (self.top + self.bottom) / 2, self.y.label, anchor="middle", turn=True)

    def _line(self, x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, dash: str = "") -> None:
        style = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
            f'stroke-width="{width}"{style}/>'
        )

    def text(self, x: float, y: float, text: str, anchor: str = "start", turn: bool = False) -> None:
        """Text at a pixel; `turn` writes it upwards."""
        turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(text)}</text>')

    def add(self, shape: str, title: str) -> None:
        """A shape, given as an element without its end, with a title to show where the pointer rests."""
        name = shape[1:].split(" ", 1)[0]
        self.parts.append(f"{shape}><title>{escape(title)}</title></{name}>")

    def line(self, line: Line, title: Callable[[float, float], str] | None = None) -> None:
        """A line, with a mark and a title at each point."""
        path = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in line.points)
        style = f' stroke-dasharray="{line.dash}"' if line.dash else ""
        self.add(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"{style}', line.name)
        for x, y in line.points if line.marks else ():
            shown = title(x, y) if title else f"{line.name}: {number(y)} at {number(x)}"
            self.add(f'<circle cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="4" fill="{line.colour}"', shown)

    def legend(self, items: Sequence[tuple[str, str, str]]) -> None:
        """Name, colour and dash of each; a block for dash "block"."""
        x, y = float(_LEFT), 14.0
        for name, colour, dash in items:
            width = 34 + len(name) * _GLYPH + 12
            if x + width > WIDTH and x > _LEFT:
                x, y = float(_LEFT), y + 18
            if dash == "block":
                self.parts.append(f'<rect x="{x + 8:.1f}" y="{y - 9:.1f}" width="16" height="11" fill="{colour}"/>')
            else:
                self._line(x, y - 4, x + 26, y - 4, colour, 2, dash)
            self.text(x + 32, y, name)
            x += width

    def __str__(self) -> str:
        """The SVG element."""
        style = 'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#1a1a1a"'
        body = "\n".join(self.parts)
        box = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {box} {style} role="img">\n{body}\n</svg>'


def legend_height(names: Sequence[str]) -> int:
    """Pixels that a legend of these names takes."""
    rows, x = 1, float(_LEFT)
    for name in names:
        width = 34 + len(name) * _GLYPH + 12
        if x + width > WIDTH and x > _LEFT:
            rows, x = rows + 1, float(_LEFT)
        x += width
    return rows * 18


def lines(x: Axis, y: Axis, drawn: Sequence[Line], height: int = 340) -> str:
    """Lines with a legend above them."""
    chart = Chart(x, y, height, legend=legend_height([line.name for line in drawn]))
    for line in drawn:
        chart.line(line, lambda px, py, name=line.name: f"{name}: {number(py)} at {number(px)}")  # type: ignore[misc]
    chart.legend([(line.name, line.colour, line.dash) for line in drawn])
    return str(chart)


def dots(x: Axis, y: Axis, roofs: Sequence[Line], drawn: Sequence[Dot]) -> str:
    """Points, labelled beside the area with a thin line to each, under the lines of a roof."""
    gap = 17
    wide = 12 + max((len(dot.label) for dot in drawn), default=0) * _GLYPH
    legend = legend_height([roof.name for roof in roofs])
    height = max(380, len(drawn) * gap + _TOP + _BOTTOM + legend)
    chart = Chart(x, y, height, right=int(wide) + 34, legend=legend)
    for roof in roofs:
        chart.line(roof)
    chart.legend([(roof.name, roof.colour, roof.dash) for roof in roofs])
    ordered = sorted(drawn, key=lambda dot: -dot.y)
    places = _spaced([chart.py(dot.y) for dot in ordered], gap, chart.top, chart.bottom)
    for dot, place in zip(ordered, places, strict=True):
        px, py, edge = chart.px(dot.x), chart.py(dot.y), chart.right + 8
        chart.parts.append(
            f'<polyline points="{px:.1f},{py:.1f} {chart.right:.1f},{place:.1f} {edge + 14:.1f},{place:.1f}" '
            f'fill="none" stroke="{dot.colour}" stroke-width="0.7"/>'
        )
    for dot, place in zip(ordered, places, strict=True):
        px, py = chart.px(dot.x), chart.py(dot.y)
        fill, radius = ("none", 7) if dot.hollow else (dot.colour, 4)
        title = f"{dot.label}: {number(dot.y)} at {number(dot.x)}"
        chart.add(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{radius}" fill="{fill}" stroke="{dot.colour}" stroke-width="2"',
            title,
        )
        chart.text(chart.right + 26, place + 4, dot.label)
    return str(chart)


def _spaced(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Places as near as possible to the wanted ones, in their order, at least `gap` apart."""
    places: list[float] = []
    for value in wanted:
        places.append(max(value, places[-1] + gap if places else top))
    limit = bottom
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - gap
    return places


def bars(x: Axis, parts: Sequence[Part], drawn: Sequence[Bar], unit: str) -> str:
    """Stacked bars that lie one below another, each with its label on the left and its sum at its end."""
    left = int(16 + max(len(bar.label) for bar in drawn) * _GLYPH)
    gap, legend = 24, legend_height([part.name for part in parts])
    height = len(drawn) * gap + _TOP + _BOTTOM + legend
    chart = Chart(x, Axis("", len(drawn), 0, ticks=()), height, left=left, right=80, legend=legend)
    for row, bar in enumerate(drawn):
        total = 0.0
        for part, amount in zip(parts, bar.amounts, strict=True):
            if amount > 0:
                place, width = chart.px(total), chart.px(total + amount) - chart.px(total)
                title = f"{bar.label}, {part.name}: {number(amount)} {unit}"
                chart.add(
                    f'<rect x="{place:.2f}" y="{chart.py(row) + 3:.1f}" width="{width:.2f}" height="{gap - 6}" '
                    f'fill="{part.colour}" stroke="white" stroke-width="0.5"',
                    title,
                )
                total += amount
        chart.text(chart.left - 6, chart.py(row + 0.5) + 4, bar.label, anchor="end")
        chart.text(chart.px(total) + 5, chart.py(row + 0.5) + 4, number(total))
    chart.legend([(part.name, part.colour, "block") for part in parts])
    return str(chart)


def columns(x_label: str, y: Axis, parts: Sequence[Part], drawn: Sequence[Bar], unit: str, height: int = 320) -> str:
    """Stacked bars that stand side by side; where they are many, only some have their label written."""
    count = len(drawn)
    legend = legend_height([part.name for part in parts])
    chart = Chart(Axis(x_label, 0, count, ticks=()), y, height, legend=legend)
    slot = (chart.right - chart.left) / count
    widest = max(len(bar.label) for bar in drawn) * _GLYPH + 6
    every = max(1, math.ceil(widest / slot))
    for index, bar in enumerate(drawn):
        total = 0.0
        for part, amount in zip(parts, bar.amounts, strict=True):
            if amount > 0:
                high, low = chart.py(total + amount), chart.py(total)
                chart.add(
                    f'<rect x="{chart.px(index) + slot * 0.08:.2f}" y="{high:.2f}" width="{slot * 0.84:.2f}" '
                    f'height="{low - high:.2f}" fill="{part.colour}"',
                    f"{bar.label}, {part.name}: {number(amount)} {unit}",
                )
                total += amount
        if index % every == 0 and (index + every <= count or index == count - 1):
            chart.text(chart.px(index + 0.5), chart.bottom + 18, bar.label, anchor="middle")
    chart.legend([(part.name, part.colour, "block") for part in parts])
    return str(chart)


def bins(x: Axis, y: Axis, values: Sequence[float], colour: str, roofs: Sequence[Line], height: int = 170) -> str:
    """Columns without gaps, of equal width over the whole x axis, under lines that they cannot cross."""
    chart = Chart(x, y, height, legend=legend_height([roof.name for roof in roofs]) if roofs else 0)
    width = (x.high - x.low) / len(values)
    for index, value in enumerate(values):
        first, last = chart.px(x.low + index * width), chart.px(x.low + (index + 1) * width)
        top = chart.py(min(value, y.high))
        if chart.bottom - top >= 0.05:
            chart.add(
                f'<rect x="{first:.2f}" y="{top:.2f}" width="{last - first:.2f}" height="{chart.bottom - top:.2f}" '
                f'fill="{colour}"',
                f"{y.label}: {number(value)} at {number(x.low + (index + 0.5) * width)}",
            )
    for roof in roofs:
        chart.line(roof)
    chart.legend([(roof.name, roof.colour, roof.dash) for roof in roofs])
    return str(chart)
