"""The area model: the points it was fitted to, shapes of memories, what cannot be built, and one point anew."""

from __future__ import annotations

import numpy as np
import pytest

from typebar.hw import area
from typebar.hw.report import UNITS
from typebar.hw.synthesis import KINDS, synthesise, total
from typebar.isa.errors import TypebarError
from typebar.isa.machine import Machine, MachineError

POINTS = area.load_points()


def test_units_are_those_of_the_report() -> None:
    assert list(area.UNITS) == list(UNITS)
    assert {point.unit for point in POINTS} == set(UNITS)


@pytest.mark.parametrize("unit", area.UNITS)
def test_points_are_met(unit: str) -> None:
    """Blocks of memory are exact, slices within 5 %, logic and registers within what the documentation states."""
    bounds = {"LUT": 0.10, "FF": 0.10, "DSP": 0.05, "BRAM": 1e-9, "URAM": 1e-9}
    for row in area.residuals([point for point in POINTS if point.unit == unit]):
        assert abs(row.error) <= bounds[row.kind], row


def test_a_point_is_what_synthesis_says() -> None:
    """The cheapest: if the hardware changed, `benchmarks/area_points.py --again UNIT` measures anew."""
    point = next(item for item in POINTS if item.unit == "control block")
    assert total(synthesise(UNITS[point.unit](point.machine()))) == point.resources


def test_shares_grow_with_what_is_added() -> None:
    machine = Machine.load("tiny")
    base = area.estimate(machine).kernel()
    wider = area.estimate(machine.override({"vector.lanes": "4"})).units["vector"]
    assert wider["LUT"] < area.estimate(machine).units["vector"]["LUT"]
    more = area.estimate(machine.override({"hbm.fifo_bytes": "1048576"})).kernel()
    # 2 channels x 2 banks of 8,192 words of 256 bits: 4 x 2 UltraRAMs each; they were LUTs before.
    assert more["URAM"] - base["URAM"] == 2 * 2 * 4 * 2
    assert more["LUT"] < base["LUT"]


def test_a_machine_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(MachineError, match=r"matrix.dot_latency = 2 is faster than the hardware's pipeline"):
        area.estimate(Machine.load("tiny").override({"matrix.dot_latency": "2"}))


def test_a_unit_without_points_is_refused() -> None:
    with pytest.raises(TypebarError, match=r"no point of the unit 'ring': run benchmarks/area_points\.py"):
        area._fit("ring", [])


def test_coefficients_are_found_again() -> None:
    random = np.random.default_rng(3)
    matrix = random.random((8, 4))
    wanted = np.array([2.0, 0.0, 5.0, 0.5])
    assert np.allclose(area._non_negative(matrix, matrix @ wanted), wanted)
    # A negative coefficient would fit best; none is given, and nothing fits better among those that are allowed.
    assert area._non_negative(np.array([[1.0], [2.0]]), np.array([-1.0, -2.0])).tolist() == [0.0]


def test_left_out_errors_are_of_fits_without_the_point() -> None:
    mine = [point for point in POINTS if point.unit == "fetch"]
    for row, point in zip(list(area.residuals(mine))[:: len(KINDS)], mine, strict=True):
        assert row.kind == KINDS[0] and row.measured == point.resources[row.kind] and row.left_out is not None
