"""Explorations: fronts on made-up points, a small grid on real programs, where they run, and how they fail."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from typebar.host import explore_run
from typebar.host.cli import main
from typebar.host.cli_errors import INTERRUPTED
from typebar.host.explore import Figures, Point, explore, mark_fronts, pareto
from typebar.host.explore_run import Executor, WorkerError, run_all
from typebar.host.report import simulate
from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine

pytest.importorskip("amaranth", reason="the area model needs the extra `rtl`")
INLINE = Executor("inline", 1)
MODEL = "folio-draft"
COSTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=24)


def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


@given(COSTS)
def test_nothing_on_the_front_is_beaten_and_everything_else_is(costs: list[tuple[float, float]]) -> None:
    for cost, chosen in zip(costs, pareto(costs), strict=True):
        assert chosen != any(beats(other, cost) for other in costs)


def point(shape: str, ms: float, area: float, fits: bool = True) -> Point:
    return Point({}, shape, 1, Figures(ms, 1.0, 1.0, 0.5), {"LUT": area}, area, fits)


def test_models_have_fronts_of_their_own_and_what_does_not_fit_has_no_part() -> None:
    points = [point("a", 2, 1), point("a", 1, 2, fits=False), point("a", 3, 3), point("b", 9, 9)]
    assert [item.front for item in mark_fronts(points)] == [True, False, False, True]
    assert [item.front for item in mark_fronts(points, everything=True)] == [True, True, False, True]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Two timings of one program, two device counts; a queue too many is refused by the machine's rules."""
    path = tmp_path_factory.mktemp("explore") / "front.svg"
    words = [
        "explore", "--machine", "tiny", "--shape", MODEL, "--vary", "hbm.latency=32,200",
        "--vary", "control.queue_depth=8,65", "--devices", "1", "--devices", "2", "--prompt-tokens", "4",
        "--new-tokens", "3", "--limit", "1", "--executor", "inline", "-o", str(path), "--json",
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(words) == 0
    return json.loads(printed.getvalue()), path


def test_points_are_the_simulator_s_with_the_areas_of_the_model(found: tuple[Any, Path]) -> None:
    from typebar.hw import area

    data = found[0]
    assert set(data) == {
        "machine", "weights", "prompt_tokens", "new_tokens", "limit", "area", "executor", "points", "refused",
    }  # fmt: skip
    assert set(data["points"][0]) == {
        "varied", "shape", "devices", "ms_per_token", "limit_ms_per_token", "first_token_ms", "hbm_utilization",
        "shares", "area", "fits", "front",
    }  # fmt: skip
    assert data["machine"] == "tiny" and data["executor"] == "this process" and data["area"] == "LUT"
    grid = [(item["devices"], item["varied"]["hbm.latency"]) for item in data["points"]]
    assert grid == list(itertools.product((1, 2), (32, 200)))
    for place, item in enumerate(data["points"]):
        machine = Machine.load("tiny").override({key: str(value) for key, value in item["varied"].items()})
        if place in (1, 2):
            report = simulate(MODEL, machine, item["devices"], prompt_tokens=4, new_tokens=3)
            assert item["ms_per_token"] == report.decode["ms_per_token"]
            assert item["first_token_ms"] == report.prefill["ms"]
        assert item["shares"] == area.estimate(machine).shares()
        assert item["area"] == item["devices"] * item["shares"]["LUT"] and item["fits"]
    # More latency costs time and no area: the slower machine of each pair is beaten.
    assert [item["front"] for item in data["points"]] == [True, False, True, False]


def test_combinations_against_the_rules_are_told_with_their_reason(found: tuple[Any, Path]) -> None:
    refused = found[0]["refused"]
    assert [item["varied"]["hbm.latency"] for item in refused] == ["32", "200"]
    for item in refused:
        assert item["reason"] == "tiny: machine parameter control.queue_depth = 65 is outside 1 to 64"
        assert item["shape"] is None and item["devices"] is None


def test_the_drawing_has_every_point(found: tuple[Any, Path]) -> None:
    data, path = found
    tree = ElementTree.parse(path)
    titles = [item.findtext("{*}title") or "" for item in tree.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(titles) == len(data["points"])
    for item in data["points"]:
        wanted = f"hbm.latency = {item['varied']['hbm.latency']}, control.queue_depth = 8; {item['devices']} devices"
        assert sum(title.startswith(wanted) for title in titles) == 1


def test_what_exceeds_the_chip_is_shown_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explore", "--machine", "tiny", "--shape", MODEL, "--devices", "1", "--prompt-tokens", "2",
             "--new-tokens", "2", "--limit", "0.1", "--executor", "inline"]  # fmt: skip
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "over in" in table and "front" not in table
    assert main([*words, "--all"]) == 0
    assert "front, over in" in capsys.readouterr().out


def test_a_model_that_a_machine_cannot_hold_is_told_not_raised() -> None:
    vary = {"hbm.capacity_bytes": [65536, 2**26]}
    found = explore("tiny", vary, [MODEL], [1], prompt_tokens=2, new_tokens=2, executor=INLINE)
    assert [item.varied for item in found.points] == [{"hbm.capacity_bytes": 2**26}]
    assert [(item.varied, item.shape, item.devices) for item in found.refused] == [
        ({"hbm.capacity_bytes": 65536}, MODEL, 1)
    ]
    assert "65,536" in found.refused[0].reason or "65536" in found.refused[0].reason


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--vary", "matrix.columns"], "--vary 'matrix.columns' is no range: write KEY=V,V,..., for example"),
        (["--vary", "matrix.columns=4,,8"], "is no range"),
        (["--vary", "hbm.latency=1", "--vary", "hbm.latency=2"], "--vary gives hbm.latency twice: give it once"),
        (["--vary", "hbm.latency=40,40"], "vary hbm.latency = 40, 40 has a value twice: give it once"),
        (["--vary", "matrix.colums=4"], "unknown machine parameter 'matrix.colums': `typebar machines --json`"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2, not 1: the first ends the prompt's time"),
        (["--limit", "1.5"], "limit must be a share of the chip, above 0 and at most 1, not 1.5"),
        (["--weights", "int3"], "int3"),
        (["--devices", "65"], "a ring has 1 to 64 devices, not 65"),
        (["--workers", "0"], "workers must be at least 1, not 0"),
        (["--executor", "inline", "--address", "a:1"], "address is a Ray cluster's, and inline has none"),
        (["--vary", f"hbm.latency={','.join(map(str, range(1, 4097)))}", "--vary", "hbm.fifo_bytes=1,2,3"],
         "12,288 combinations are more than 10,000: give fewer values"),
        (["-o", "/nowhere/front.svg"], "No such folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "--machine", "tiny", "--shape", MODEL, *words]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_a_model_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore"]) == 2
    assert "give --shape NAME" in capsys.readouterr().err
    assert main(["explore", "--shape", "gpt9", "--machine", "tiny", "--executor", "inline"]) == 0
    assert "gpt9" in capsys.readouterr().out


def test_without_ray_processes_do_it_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore_run, "find_spec", lambda name: None)
    results, ran = run_all(Executor(workers=2), len, ["a", "bc", "def"])
    assert sorted(results) == [1, 2, 3]
    assert ran() == "2 processes (Ray is not installed: pip install 'typebar[explore]' to use many machines)"
    assert Executor(workers=1).chosen() == "inline"
    monkeypatch.setattr(explore_run, "find_spec", lambda name: object())
    assert Executor(workers=2).chosen() == "ray"


def test_ray_s_local_cluster_gives_the_same_and_ends() -> None:
    ray = pytest.importorskip("ray")
    results, ran = run_all(Executor("ray", workers=1), json.dumps, ["a", "bc", "def"])
    assert sorted(results) == ['"a"', '"bc"', '"def"']
    assert ran() == "Ray, 1 CPUs on 1 machine"
    assert not ray.is_initialized()


def test_ray_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    results, _ = run_all(Executor("ray"), len, ["a"])
    with pytest.raises(TypebarError, match=r"pip install 'typebar\[explore\]', or choose processes"):
        next(results)


def test_a_lost_process_is_one_line() -> None:
    results, _ = run_all(Executor("processes", workers=1), os._exit, [3])
    with pytest.raises(WorkerError, match="a worker process was lost"):
        next(results)


def test_an_interruption_ends_the_processes() -> None:
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background job\n"
        "from typebar.host.cli_errors import guarded\n"
        "from typebar.host.explore_run import Executor, run_all\n"
        "def wait():\n"
        "    results, _ = run_all(Executor('processes', 2), time.sleep, [0, 600, 601])\n"
        "    print(next(results), flush=True); list(results)\n"
        "if __name__ == '__main__': sys.exit(guarded(wait))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "None\n"
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    _, error = child.communicate(timeout=60)
    assert child.returncode == INTERRUPTED and error == "typebar: error: interrupted\n"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("processes were left behind")
