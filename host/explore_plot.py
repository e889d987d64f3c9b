"""An exploration as a drawing: a chart for each model, time of a token over area, its front as a line; SVG."""

from __future__ import annotations

from html import escape

from typebar.host.charts import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, WIDTH, Axis, Chart, Line, number
from typebar.host.explore import Exploration, Point

_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
_HEIGHT, _HEADING, _MARGIN = 400, 26, 1.08


def describe(point: Point) -> str:
    """A point's machine, by the parameters varied."""
    return ", ".join(f"{name} = {value}" for name, value in point.varied.items()) or "as it is"


def draw(found: Exploration) -> str:
    """An SVG document: dots by number of devices, hollow where a design does not fit its chip."""
    parts: list[str] = []
    for row, (shape, front) in enumerate(found.fronts().items()):
        points = [point for point in found.points if point.shape == shape]
        top = row * (_HEIGHT + _HEADING)
        title = f"{shape}, {found.weights}, on {found.machine}: {found.prompt_tokens} + {found.new_tokens} tokens"
        parts.append(f'<text x="16" y="{top + 18}" font-size="14" font-weight="bold">{escape(title)}</text>')
        parts.append(f'<g transform="translate(0 {top + _HEADING})">{_chart(found.area, points, front)}</g>')
    height = max(1, len(found.fronts())) * (_HEIGHT + _HEADING)
    frame = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    font = 'font-family="Helvetica, Arial, sans-serif" fill="#1a1a1a"'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {frame} {font}>\n{paper}\n' + "\n".join(parts) + "\n</svg>\n"


def _chart(area: str, points: list[Point], front: list[Point]) -> str:
    what = "largest share of a resource" if area == "largest" else f"share of {area}s"
    x = Axis(f"area: {what}, times devices (chips)", 0, max(point.area for point in points) * _MARGIN)
    y = Axis("ms per token", 0, max(point.ms_per_token for point in points) * _MARGIN)
    counts = sorted({point.devices for point in points})
    colours = {count: _COLOURS[index % len(_COLOURS)] for index, count in enumerate(counts)}
    chart = Chart(x, y, _HEIGHT, legend=18)
    if front:
        chart.line(Line("front", GREY, [(point.area, point.ms_per_token) for point in front], "4 3", marks=False))
    for point in points:
        fill = colours[point.devices] if point.fits else "none"
        edge = BLACK if point.front else colours[point.devices]
        chart.add(
            f'<circle cx="{chart.px(point.area):.1f}" cy="{chart.py(point.ms_per_token):.1f}" r="5" fill="{fill}" '
            f'stroke="{edge}" stroke-width="2"',
            f"{describe(point)}; {point.devices} devices: {number(point.ms_per_token)} ms, area {number(point.area)}"
            + ("" if point.fits else ", does not fit"),
        )
    legend = [(f"{count} device{'s' * (count != 1)}", colours[count], "block") for count in counts]
    chart.legend([("front", GREY, "4 3"), *legend])
    chart.text(chart.right, 14, "black edge: on the front; hollow: does not fit", anchor="end")
    return str(chart)
