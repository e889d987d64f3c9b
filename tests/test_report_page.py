"""The report's page in a real browser: what it draws, says and asks for."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import WIDTH, open_page

import typebar
from typebar.host.charts import Axis, Bar, Dot, Line, Part, bars, bins, columns, dots, lines, number
from typebar.host.cli import main
from typebar.host.page import page
from typebar.host.study import Study
from typebar.isa.errors import TypebarError

PROBE = (Path(__file__).parent / "data" / "report_probe.js").read_text()
SECTIONS = ["configuration", "roofline", "causes", "layers", "timeline", "devices", "contexts", "commands"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("image") / "draft.safetensors"
    return typebar.compile("folio-draft", out, devices=2).path


@pytest.fixture(scope="module")
def written(image: Path) -> tuple[Path, Study]:
    """The page, and the study that it is of."""
    out = image.with_name("report.html")
    return out, typebar.report(image, out, prompt_tokens=9, new_tokens=7)


@pytest.fixture(scope="module")
def seen(written: tuple[Path, Study]) -> dict[str, Any]:
    """The page as the browser has it."""
    return open_page(written[0], PROBE)


def assert_drawn(seen: dict[str, Any]) -> None:
    """Nothing asked for, nothing complained of; every figure has its shapes, in sight, and text that can be read."""
    assert seen["requests"] == [] and seen["console"] == []
    for figure in seen["result"]["figures"]:
        where = figure["section"]
        assert figure["width"] > 600 and figure["height"] > 100, where
        assert figure["shapes"] >= 3 and figure["texts"] >= 5, where
        assert figure["titles"] > 0, where
        assert (where, figure["outside"], figure["overlaps"]) == (where, [], [])
    assert seen["result"]["scrollWidth"] <= WIDTH


def test_every_figure_is_drawn(seen: dict[str, Any]) -> None:
    assert_drawn(seen)
    assert seen["result"]["sections"] == SECTIONS
    figures = [figure["section"] for figure in seen["result"]["figures"]]
    assert figures == ["roofline", "causes", "layers", *["timeline"] * 6, "devices", "contexts"]


def figures_of(table: list[list[str]]) -> list[list[float | None]]:
    """A table's body, with None for cells that hold no number."""

    def value(text: str) -> float | None:
        return float(text.replace(",", "")) if re.fullmatch(r"-?[\d,]*\.?\d+(e[-+]\d+)?", text) else None

    return [[value(cell) for cell in row] for row in table[1:]]


def test_tables_have_the_studys_numbers(seen: dict[str, Any], written: tuple[Path, Study]) -> None:
    study = written[1]
    assert seen["result"]["data"] == json.loads(json.dumps(study.to_json()))
    tables = seen["result"]["tables"]
    products = figures_of(tables["roofline"][0])
    for row, item in zip(products, study.products, strict=True):
        assert row[2] == pytest.approx(item.operations_per_byte, rel=1e-5)
        assert row[3] == pytest.approx(item.operations_per_s / 1e9, rel=1e-5)
        assert row[4:] == [item.cycles, item.busy, item.macs, item.fetched_bytes, item.useful_bytes]
    mine = [item.cycles for item in study.products if item.phase == "decode"]
    assert [row[1] for row in figures_of(tables["causes"][0])] == [*mine, sum(mine)]
    layers = [layer["cycles"] for layer in study.layers]
    assert [row[1] for row in figures_of(tables["layers"][0])] == [*layers, sum(layers)]
    for table, line in zip(tables["timeline"], (study.timeline, study.detail), strict=True):
        rows = figures_of(table)
        for column, use in enumerate(("hbm", "ring", "matrix"), start=1):
            assert [row[column] for row in rows] == pytest.approx([100 * value for value in line[use]], rel=1e-5)
    for name, points in (("devices", study.devices), ("contexts", study.contexts)):
        for row, point in zip(figures_of(tables[name][0]), points, strict=True):
            assert row[:2] == [point.devices, point.context]
            times = (point.ms, point.limit_ms, point.bytes_ms, point.declared_ms, point.compute_ms, point.kv_ms)
            assert row[2:8] == pytest.approx(times, rel=1e-5)
    facts = {row[0]: row[1] for row in tables["configuration"][0]}
    decode = study.simulation["decode"]
    assert facts["time per token"].startswith(f"{decode['ms_per_token']:.4f} ms")
    assert facts["tokens per second"] == f"{decode['tokens_per_s']:.1f}"
    assert facts["HBM utilisation"].startswith(f"{decode['hbm_utilization']:.1%}")
    assert facts["time to first token"] == f"{study.ttft_ms:.3f} ms"
    assert study.program_sha256 in facts["program"]


def test_marks_stand_where_their_numbers_are(seen: dict[str, Any], written: tuple[Path, Study]) -> None:
    """Bars by layer are as high as their cycles; points over contexts as high as their times."""
    study, figures = written[1], {figure["section"]: figure for figure in seen["result"]["figures"]}
    heights = figures["layers"]["stacks"]
    totals = [layer["cycles"] for layer in study.layers]
    assert [height / heights[0] for height in heights] == pytest.approx([t / totals[0] for t in totals], rel=0.02)
    shown = [float(title.split(": ")[1].split(" at ")[0]) for title in figures["contexts"]["dots"]["simulated"]]
    assert shown == pytest.approx([point.ms for point in study.contexts], rel=1e-3)


def test_a_name_can_do_nothing_but_be_read(written: tuple[Path, Study]) -> None:
    """Neither a model's name nor a weight's becomes markup, in text, titles, attributes or data."""
    out, study = written
    evil = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">&amp;"
    products = [replace(item, role=evil, node=evil) for item in study.products[:1]]
    points = [replace(study.devices[0], ms=None, refused=evil, command=evil), *study.devices[1:]]
    changed = replace(study, source=evil, command=evil, products=[*products, *study.products[1:]], devices=points)
    other = out.with_name("evil.html")
    other.write_text(page(changed))
    found = open_page(other, PROBE)
    assert found["requests"] == [] and found["console"] == []
    result = found["result"]
    assert result["title"] == f"{evil} on 2 x u280" and result["scripts"] == 1 and result["images"] == 0
    assert result["data"]["source"] == evil and result["data"]["products"][0]["node"] == evil
    assert evil in [cell for row in result["tables"]["devices"][0] for cell in row]


def test_the_probe_sees_bad_drawings(tmp_path: Path) -> None:
    """Text on text, text cut off, a request and a complaint are found: the checks above can fail."""
    text = '<text x="20" y="{}" font-size="12">some words</text>'
    svg = "".join(text.format(y) for y in (50, 55)) + '<text x="590" y="90" font-size="12">cut off</text>'
    box = f'<svg width="600" height="200" viewBox="0 0 600 200">{svg}<rect x="5" y="5" width="0" height="9"/></svg>'
    bad = tmp_path / "bad.html"
    bad.write_text(f'<section id="a">{box}</section><img src="none.png"><script>console.error("no")</script>')
    found = open_page(bad, PROBE)
    figure = found["result"]["figures"][0]
    assert figure["overlaps"] == [["some words", "some words"]] and figure["outside"] == ["cut off"]
    assert figure["shapes"] == 0 and found["console"][0] == "no"
    assert [address.rpartition("/")[2] for address in found["requests"]] == ["none.png"]


def test_extreme_charts_are_drawn(tmp_path: Path) -> None:
    """Many long labels, one bar, zero and tiny amounts, ranges over many decades."""
    x, y = Axis("x, units", 0.001, 5e6, log=True), Axis("y, units", 1e-5, 1e4, log=True)
    crowd = [Dot(f"a product with a long name, number {n}", "#0072B2", 1.0, 100.0, n % 2 == 0) for n in range(30)]
    parts = [Part("one", "#0072B2"), Part("a cause with a rather long name", "#D55E00"), Part("third", "#009E73")] * 3
    made = {
        "dots": dots(x, y, [Line("roof", "#000000", [(0.001, 1e-5), (5e6, 1e4)])], crowd),
        "bars": bars(Axis("microseconds", 0, 1e-4), parts, [Bar("only", [1e-5] * 9), Bar("none", [0.0] * 9)], "us"),
        "columns": columns("layer", Axis("ms", 0, 3e6), parts, [Bar(str(n), [1e5] * 9) for n in range(200)], "ms"),
        "bins": bins(Axis("time", 10, 10.5), Axis("%", 0, 100), [0, 100, 50], "#0072B2", []),
        "lines": lines(x, Axis("ms", 0, 0.031), [Line(f"series {n}", "#000000", [(1, 0.01)]) for n in range(12)]),
    }
    out = tmp_path / "charts.html"
    body = "".join(f'<section id="{name}">{svg}</section>' for name, svg in made.items())
    out.write_text(f"<!DOCTYPE html><body style='width: 960px'>{body}</body>")
    assert_drawn(open_page(out, PROBE))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00012345, "1.23e-04"),
        (0.0123456, "0.01235"),
        (2.5, "2.5"),
        (999.96, "1000"),
        (1234567.8, "1,234,568"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


# The command ---------------------------------------------------------------------------------------------------
def test_the_command_writes_the_page(
    image: Path, written: tuple[Path, Study], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["report", str(image), "--prompt-tokens", "9", "--new-tokens", "7"]
    out = tmp_path / "here.html"
    out.write_text("the older file")
    assert main([*options, "-o", str(out)]) == 0
    assert out.read_bytes() == written[0].read_bytes() and capsys.readouterr().err == f"typebar: wrote {out}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["here.html"]
    assert main([*options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(written[1].to_json()))


def test_what_cannot_be_written_is_found_first(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typebar.host.page.study", lambda *_, **__: pytest.fail("the simulation has started"))
    before = image.read_bytes()
    with pytest.raises(TypebarError, match="is the image itself: name another file"):
        typebar.report(image, image)
    with pytest.raises(TypebarError, match="No such folder; create it or name another"):
        typebar.report(image, tmp_path / "none" / "x.html")
    with pytest.raises(TypebarError, match="is a directory: name a file"):
        typebar.report(image, tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(TypebarError, match="its folder is not writable; name another"):
        typebar.report(image, tmp_path / "x.html")
    assert image.read_bytes() == before and list(tmp_path.iterdir()) == []
