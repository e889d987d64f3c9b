"""The native harness by itself: its memories, links and bus, to the cycle, around a kernel that only tries them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from typebar.hw.native.build import CACHE, WAVES, can_write_fst, library
from typebar.hw.native.model import ANTICLOCKWISE, CLOCKWISE, LINKS, READS, WRITES, Latencies, NativeRing
from typebar.isa.errors import TypebarError
from typebar.isa.machine import LINE_BYTES, Machine
from typebar.isa.timing import DDR_REQUEST, HBM_DATA, HBM_REQUEST, LINK_CCW, LINK_CW, stall
from typebar.tests.hw import native_probe
from typebar.tests.hw.native_probe import BLOCK, Command, Place

TINY = Machine.load("tiny")
LATENCIES = Latencies(hbm_read=29, hbm_write=23, ddr_read=31, ddr_write=17, link=19)
DDR = TINY.hbm.channels
WIDTHS = [TINY.hbm.channel_bytes] * DDR + [LINE_BYTES]
SEED = 12345


@pytest.fixture(scope="module")
def probe() -> Iterator[NativeRing]:
    built = library(TINY, text=lambda: native_probe.text(TINY), tag="probe")
    with NativeRing(built, TINY, 3, LATENCIES) as ring:
        yield ring


@pytest.fixture
def ring(probe: NativeRing) -> NativeRing:
    probe.reset()
    for rank in range(probe.devices):
        for port in range(DDR + 1):
            for side in (READS, WRITES):
                probe.fault(rank, port, side)
        for side in (CLOCKWISE, ANTICLOCKWISE):
            probe.fault(rank, LINKS, side)
    return probe


def order(
    ring: NativeRing, rank: int, command: Command, port: int, count: int, seed: int = 0, address: int = 0
) -> None:
    for place, value in (
        (Place.PORT, port),
        (Place.ADDRESS, address),
        (Place.ADDRESS_HIGH, address >> 32),
        (Place.COUNT, count),
    ):
        ring.write(place, value, rank)
    ring.start_run(seed)
    ring.write(Place.COMMAND, command, rank)


def log(ring: NativeRing, rank: int, place: Place) -> list[int]:
    entries = []
    for index in range(ring.read(Place.RESPONSES, rank)):
        ring.write(Place.INDEX, index, rank)
        entries.append(ring.read(place, rank))
    return entries


@pytest.mark.parametrize("seed", [0, SEED])
@pytest.mark.parametrize("port", range(DDR + 1))
def test_reads_come_when_they_are_due(ring: NativeRing, port: int, seed: int) -> None:
    rank, count, width = 1, 200, WIDTHS[port]
    memory = ring.memory(rank, port)
    memory[:] = 0
    memory[640 : 640 + count * width] = np.random.default_rng(port).integers(0, 256, count * width)
    order(ring, rank, Command.READ, port, count, seed, ring.pointer(rank, port) + 640)
    ring.run(3000)
    taken, came = log(ring, rank, Place.REQUEST), log(ring, rank, Place.RESPONSE)
    assert len(came) == count and ring.read(Place.CODE, rank) == 0
    requests = DDR_REQUEST if port == DDR else HBM_REQUEST
    latency = LATENCIES.ddr_read if port == DDR else LATENCIES.hbm_read
    before = came[0] - 1000
    for index in range(count):
        if index:
            assert taken[index] == taken[index - 1] + 1 + stall(seed, rank, requests, index)
        late = 0 if port == DDR else stall(seed, rank, HBM_DATA, index)
        before = max(taken[index] + latency + late, before + 1)
        assert came[index] == before
    firsts = memory[640 : 640 + count * width].reshape(count, width)[:, :4].copy().view(np.uint32)[:, 0]
    assert log(ring, rank, Place.WORD) == firsts.tolist()


@pytest.mark.parametrize("port", [0, DDR])
def test_writes_take_effect_with_their_response(ring: NativeRing, port: int) -> None:
    rank, count, width = 2, 5, WIDTHS[port]
    memory = ring.memory(rank, port)
    memory[:] = 0xEE
    ring.write(Place.DATA, 0x11223344, rank)
    ring.write(Place.STROBE, 0xFFFF00F2, rank)
    order(ring, rank, Command.WRITE, port, count, SEED, ring.pointer(rank, port) + width)
    ring.run(100)
    taken, came = log(ring, rank, Place.REQUEST), log(ring, rank, Place.RESPONSE)
    latency = LATENCIES.ddr_write if port == DDR else LATENCIES.hbm_write
    assert [b - a for a, b in zip(taken, came, strict=True)] == [latency] * count
    expected = np.full((7, width), 0xEE, np.uint8)
    for index in range(count):
        for byte in range(width):
            if 0xFFFF00F2 >> byte % 32 & 1:
                expected[index + 1, byte] = (0x11223344 + index) >> 8 * (byte % 4) & 255
    assert np.array_equal(memory[: 7 * width].reshape(7, width), expected)


@pytest.mark.parametrize("seed", [0, SEED])
@pytest.mark.parametrize(("direction", "port", "step"), [(CLOCKWISE, LINK_CW, 1), (ANTICLOCKWISE, LINK_CCW, -1)])
def test_links_lead_to_the_neighbour(ring: NativeRing, direction: int, port: int, step: int, seed: int) -> None:
    for rank in range(3):
        blocks = 30
        order(ring, rank, Command.SEND, direction, BLOCK * blocks, seed)
        ring.run(1500)
        other = (rank + step) % 3
        assert [ring.read(Place.RESPONSES, r) for r in range(3) if r != other] == [0, 0]
        came, words = log(ring, other, Place.RESPONSE), log(ring, other, Place.WORD)
        assert words == [beat + (beat << 16) for beat in range(BLOCK * blocks)]
        for r in (rank, other):
            ring.write(Place.COMMAND, Command.NONE, r)
        for block in range(1, blocks):
            first = BLOCK * block
            assert came[first] == came[first - 1] + 1 + stall(seed, rank, port, block)
            assert came[first : first + BLOCK] == list(range(came[first], came[first] + BLOCK))


def test_a_link_takes_its_latency(ring: NativeRing) -> None:
    order(ring, 0, Command.SEND, CLOCKWISE, 2 * BLOCK)
    ring.run(100)
    assert ring.read(Place.RESPONSES, 0) == 0
    ring.write(Place.INDEX, 0, 0)
    ring.write(Place.INDEX, 0, 1)
    # All kernels count cycles from the same reset.
    assert ring.read(Place.RESPONSE, 1) - ring.read(Place.REQUEST, 0) == LATENCIES.link
    last = log(ring, 1, Place.RESPONSE)[-1]
    assert ring.read(Place.CREDITS, 0) == 2 * BLOCK and ring.read(Place.CREDITED, 0) == last + LATENCIES.link


def withheld_read(ring: NativeRing) -> int:
    ring.fault(0, 1, READS, withheld=7)
    order(ring, 0, Command.READ, 1, 20, address=ring.pointer(0, 1))
    return 0


def withheld_write(ring: NativeRing) -> int:
    ring.fault(0, DDR, WRITES, withheld=7)
    order(ring, 0, Command.WRITE, DDR, 20, address=ring.pointer(0, DDR))
    return 0


def stuck_neighbour(ring: NativeRing) -> int:
    ring.fault(0, LINKS, ANTICLOCKWISE, withheld=7)
    order(ring, 0, Command.SEND, ANTICLOCKWISE, 100)
    return 2


@pytest.mark.parametrize(("begin", "events"), [(withheld_read, 7), (withheld_write, 7), (stuck_neighbour, 7 * BLOCK)])
def test_what_is_withheld_never_comes(ring: NativeRing, begin: Callable[[NativeRing], int], events: int) -> None:
    rank = begin(ring)
    ring.run(2000)
    assert ring.read(Place.RESPONSES, rank) == events


def test_errors_are_answered(ring: NativeRing) -> None:
    ring.fault(0, 0, READS, error=3)
    order(ring, 0, Command.READ, 0, 3, address=ring.pointer(0, 0))
    ring.run(100)
    assert ring.read(Place.CODE, 0) == 0
    order(ring, 0, Command.READ, 0, 4, address=ring.pointer(0, 0))
    ring.run(100)
    assert ring.read(Place.CODE, 0) == 2
    last = ring.pointer(0, 0) + ring.sizes[0] - WIDTHS[0]
    for command, count, code in ((Command.READ, 1, 0), (Command.READ, 2, 3), (Command.WRITE, 2, 3)):
        order(ring, 0, command, 0, count, address=last)
        ring.run(100)
        assert ring.read(Place.CODE, 0) == code


@pytest.mark.parametrize("ending", WAVES)
def test_a_waveform_is_written(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if ending == ".fst" and not can_write_fst():
        monkeypatch.setenv(CACHE, str(tmp_path))
        with pytest.raises(TypebarError, match=r"needs the headers zlib.h and lz4.h: install them, or name a .vcd"):
            library(TINY, ending, lambda: native_probe.text(TINY), "probe")
        return
    built, path = library(TINY, ending, lambda: native_probe.text(TINY), "probe"), tmp_path / f"wave{ending}"
    with NativeRing(built, TINY, 2, LATENCIES) as ring:
        ring.trace(path)
        ring.run(20)
    data = path.read_bytes()
    if ending == ".vcd":
        lines = data.decode().splitlines()
        assert any("device1" in line for line in lines) and sum(line.startswith("#") for line in lines) >= 40
    else:
        # The header's type and length, its first and last time: twenty cycles of two halves.
        kind, length, first, last = struct.unpack(">BQQQ", data[:25])
        period = 1_000_000 // TINY.clock_mhz
        assert (kind, length) == (0, 329) and last - first == 20 * period - period // 2


def test_a_waveform_needs_a_folder(tmp_path: Path) -> None:
    built = library(TINY, ".vcd", lambda: native_probe.text(TINY), "probe")
    with NativeRing(built, TINY, 1, LATENCIES) as ring, pytest.raises(TypebarError, match="cannot be written"):
        ring.trace(tmp_path / "none" / "wave.vcd")
