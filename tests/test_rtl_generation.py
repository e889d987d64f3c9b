"""Whole generations on the RTL: tokens, memory and vector registers are the functional simulator's, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from typebar.compiler import driver
from typebar.compiler.frontend import load_model
from typebar.host.device import Device
from typebar.host.driver import DeviceEngine
from typebar.host.rtl import RtlDevice
from typebar.host.simulator import SimulatedDevice
from typebar.isa.image import Image
from typebar.isa.instructions import Format, Region
from typebar.isa.machine import Machine
from typebar.isa.program import Program, op
from typebar.models import find

TINY = Machine.load("tiny")
PROMPT = [40, 27, 60]


def image_of(model: str, devices: int, folder: Path) -> Path:
    path = folder / f"{model}-{devices}.safetensors"
    driver.write(driver.build(load_model(find(model).path), TINY, devices, Format.FP16), path)
    return path


def generate(image: Image, device: Device, count: int) -> tuple[list[int], list[np.ndarray]]:
    """Tokens, and every rank's KV and IO after them."""
    tokens: list[int] = []
    DeviceEngine(image, device, "test").greedy(PROMPT, count, None, tokens.append)
    sizes = image.manifest.regions
    ranks = range(device.ranks)
    return tokens, [device.read(rank, item, 0, sizes[item]) for rank in ranks for item in (Region.KV, Region.IO)]


def registers(device: RtlDevice) -> Sequence[np.ndarray]:
    """Vector registers of every rank, which a second program stores: they outlive a launch."""
    words = TINY.vector.words
    for rank in range(device.ranks):
        device.allocate(rank, Region.IO, 4 * words)
    program = [op("store", format=Format.FP32, region=Region.IO, outer=1, inner=words, inner_bytes=4), op("halt")]
    device.load(Program(program))
    device.launch(0)
    device.wait()
    return [device.read(rank, Region.IO, 0, 4 * words).view(np.int32) for rank in range(device.ranks)]


@pytest.mark.parametrize(
    ("model", "devices", "count"),
    [
        ("folio-draft", 1, 3),
        ("folio-draft", 3, 2),
        pytest.param("folio", 1, 32, marks=pytest.mark.long),
        pytest.param("folio", 2, 8, marks=pytest.mark.long),
        pytest.param("folio", 4, 8, marks=pytest.mark.long),
    ],
)
def test_everything_is_the_functional_simulators(model: str, devices: int, count: int, tmp_path: Path) -> None:
    with Image.open(image_of(model, devices, tmp_path)) as image:
        simulated = SimulatedDevice(TINY, devices)
        expected, memories = generate(image, simulated, count)
        hardware = RtlDevice(TINY, devices)
        tokens, found = generate(image, hardware, count)
        assert len(tokens) == count and tokens == expected
        for mine, theirs in zip(found, memories, strict=True):
            assert np.array_equal(mine, theirs)
        assert simulated._simulator is not None
        for mine, state in zip(registers(hardware), simulated._simulator.states, strict=True):
            assert np.array_equal(mine, state.words)
            assert mine.any()
        hardware.native.close()
