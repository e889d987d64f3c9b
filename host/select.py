"""Which engines may run an image, in what order, and why one was not taken."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from typebar.host.device import DeviceError
from typebar.host.engine import Engine
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image

NAMES = ("auto", "sim", "rtl", "torch")
"""What users may ask for."""


@dataclass(frozen=True)
class Candidate:
    """A way to run an image: `open` makes the engine, and raises DeviceError where it turns out not to work."""

    name: str
    open: Callable[[Image], Engine]


@dataclass(frozen=True)
class Availability:
    """A device in the order in which `auto` tries them; `reason` says why it can or cannot be used."""

    name: str
    available: bool
    reason: str


def survey() -> list[Availability]:
    """Look for every device that `auto` considers."""
    from typebar.host.torch_device import cuda_absent

    hardware, cuda = _hardware_absent(), cuda_absent()
    return [
        Availability("xrt", False, hardware),
        Availability("torch-cuda", cuda is None, cuda or "torch can use a GPU"),
        Availability("torch-cpu", True, "torch runs everywhere"),
    ]


def candidates(device: str | Sequence[str | Candidate]) -> tuple[list[Candidate], list[str]]:
    """The engines to try in order, and for `auto` the reasons for those that are left out from the start.

    `auto` is hardware, then torch on a GPU, then torch on the CPU; `sim` the functional simulator, with torch to carry
    on if it fails; `rtl` the hardware's source, alone; `torch` a GPU, else the CPU. A sequence is a chain of `sim`,
    `rtl`, `torch` and Candidates.

    Raises:
        TypebarError: a name that is none of these, or an empty sequence.
    """
    if isinstance(device, str):
        return _named(device, [f"xrt not taken: {_hardware_absent()}"] if device == "auto" else [])
    chain: list[Candidate] = []
    reasons: list[str] = []
    for item in device:
        if isinstance(item, Candidate):
            chain.append(item)
        elif item == "sim":
            chain.append(Candidate("sim", simulated))
        elif item == "rtl":
            chain.append(Candidate("rtl", compiled))
        else:
            more, why = _named(item, [])
            chain += more
            reasons += why
    if not chain:
        raise TypebarError(f"the list of devices is empty: name at least one of {', '.join(NAMES[1:])}")
    return chain, reasons


def simulated(image: Image) -> Engine:
    """The functional simulator of the image's machine, fresh."""
    from typebar.host.driver import DeviceEngine
    from typebar.host.simulator import SimulatedDevice

    return DeviceEngine(image, SimulatedDevice(image.machine, image.manifest.devices), "sim")


def compiled(image: Image, wave: Path | None = None, progress: Callable[[int, float], None] | None = None) -> Engine:
    """The RTL of the image's machine, compiled to native code, fresh; options as in `host.rtl.RtlDevice`.

    Raises:
        TypebarError: what it takes to compile it is not installed.
    """
    from typebar.host.driver import DeviceEngine
    from typebar.host.rtl import RtlDevice

    return DeviceEngine(image, RtlDevice(image.machine, image.manifest.devices, wave=wave, progress=progress), "rtl")


def _named(device: str, reasons: list[str]) -> tuple[list[Candidate], list[str]]:
    if device not in NAMES:
        raise TypebarError(f"there is no device {device!r}: choose one of {', '.join(NAMES)}")
    if device == "sim":
        # Not the list below: asking for a GPU imports torch, which the simulator does not need.
        return [Candidate("sim", simulated), Candidate("torch", _torch_best)], reasons
    if device == "rtl":
        return [Candidate("rtl", compiled)], reasons
    from typebar.host.torch_device import cuda_absent

    absent = cuda_absent()
    if absent is not None:
        passed = [f"torch-cuda not taken: {absent}"] if device == "auto" else []
        return [Candidate("torch-cpu", _torch("cpu"))], [*reasons, *passed]
    return [Candidate("torch-cuda", _torch("cuda")), Candidate("torch-cpu", _torch("cpu"))], reasons


def _torch(where: str) -> Callable[[Image], Engine]:
    def make(image: Image) -> Engine:
        from typebar.host.torch_device import TorchEngine

        return TorchEngine(image, where)

    return make


def _torch_best(image: Image) -> Engine:
    """Torch on a GPU if there is one that works, else on the CPU."""
    from typebar.host.torch_device import cuda_absent

    if cuda_absent() is None:
        try:
            return _torch("cuda")(image)
        except DeviceError as error:
            engine = _torch("cpu")(image)
            engine.name += f" (torch-cuda not taken: {error})"
            return engine
    return _torch("cpu")(image)


def _hardware_absent() -> str:
    """Why there is no accelerator card to drive."""
    if importlib.util.find_spec("pyxrt") is None:
        return "no XRT device found (the XRT runtime's Python module pyxrt is not installed)"
    return "no XRT device found (this version of Typebar has no bitstream to load onto a card)"
