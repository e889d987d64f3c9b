"""The reproduction of DFX (benchmarks/dfx.py): held-out errors, the share of synchronisation, and the fit itself."""

from __future__ import annotations

import pytest

from typebar.benchmarks import dfx_fit
from typebar.isa.machine import Machine

HELD_OUT: list[dfx_fit.Target] = [target for target in dfx_fit.TARGETS if target not in dfx_fit.FITTED]


def test_what_is_held_out() -> None:
    assert HELD_OUT == [("dfx-345m", 2), ("dfx-345m", 4)]
    assert len(dfx_fit.CONSTANTS) == 3


@pytest.mark.parametrize("target", HELD_OUT, ids=dfx_fit.name_of)
def test_held_out_times_are_within_five_per_cent(target: dfx_fit.Target) -> None:
    assert abs(dfx_fit.error(target, dfx_fit.shipped_constants())) <= 0.05


def test_synchronisation_takes_the_papers_share_within_three_points() -> None:
    assert abs(dfx_fit.error(dfx_fit.SHARE, dfx_fit.shipped_constants())) <= 0.03
    split = dfx_fit.measure(dfx_fit.BREAKDOWN, dfx_fit.shipped_constants())[1]
    assert sum(split) == pytest.approx(1)


def test_a_pass_in_the_middle_stands_for_all_of_64_to_64() -> None:
    """What the fit measures, two passes, against the mean of the 128 passes that the paper's throughput covers."""
    config, machine = ("dfx-345m", 4), Machine.load("u280-dfx")
    cycles, _ = dfx_fit.generate(machine, config, 128)
    mean = cycles[127] / 128 / (machine.clock_mhz * 1e3)
    assert dfx_fit.measure(config, dfx_fit.shipped_constants())[0] == pytest.approx(mean, rel=2e-3)


def test_the_fit_gives_the_machine_files_constants() -> None:
    assert dfx_fit.fit(dfx_fit.FITTED).values == dfx_fit.shipped_constants()


def test_published_passes_agree_with_the_published_tables() -> None:
    """T = c (in + out), the law behind the fit: IANUS's copy within 0.1 %, StreamTensor's within 2."""
    for config, within in ((("dfx-1.5b", 4), 1e-3), (("dfx-345m", 1), 2e-2)):
        for (before, after), paper in dfx_fit.LATENCY[config].items():
            assert (before + after) * dfx_fit.published_pass_ms(config) == pytest.approx(paper, rel=within)
