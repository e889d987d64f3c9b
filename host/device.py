"""The abstract device: what a driver needs of a ring of accelerators, whatever is behind it.

A simulator, an RTL model and a card implement the same few operations; `host.driver` is written once, above them.
Addresses are (rank, region, byte offset), as in the programs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from typebar.isa.errors import TypebarError
from typebar.isa.instructions import Region
from typebar.isa.program import Program

Bytes = NDArray[np.uint8]
Poll = Callable[[], None]


class DeviceError(TypebarError):
    """A device stopped, vanished or broke while it worked; another one may carry on with the same request."""


class Device(ABC):
    """A ring of `ranks` accelerators that run one program together.

    Any operation raises DeviceError if the hardware behind it fails, and TypebarError for arguments that break a rule.
    """

    name: str
    ranks: int

    @abstractmethod
    def load(self, program: Program) -> None:
        """Put a program into every rank's program memory."""

    @abstractmethod
    def allocate(self, rank: int, region: Region, size: int, contents: Bytes | None = None) -> None:
        """Bind `size` bytes of a rank's memory to a region, replacing what was bound.

        `contents` are the region's bytes, and only for regions that programs cannot write: a simulator may use the
        array itself instead of a copy. Without it the region is zero.
        """

    @abstractmethod
    def write(self, rank: int, region: Region, offset: int, data: Bytes) -> None:
        """Copy bytes from the host into a region."""

    @abstractmethod
    def read(self, rank: int, region: Region, offset: int, size: int) -> Bytes:
        """Copy bytes of a region to the host; also while a program runs."""

    @abstractmethod
    def register(self, rank: int, index: int) -> int:
        """Value of a control register (`Register`)."""

    @abstractmethod
    def launch(self, entry: int) -> None:
        """Start every rank at instruction `entry`; returns at once. `wait` must follow."""

    @abstractmethod
    def wait(self, poll: Poll | None = None) -> None:
        """Block until every rank has halted.

        `poll` is called whenever host-visible memory may have changed, in the caller's thread. Raises DeviceError if a
        rank traps or is lost.
        """

    @abstractmethod
    def reset(self) -> None:
        """Back to idle after an error or an abandoned launch; memory and program stay."""


def check_span(rank: int, ranks: int, region: Region, offset: int, size: int, capacity: int) -> None:
    """Refuse an access outside a region.

    Raises:
        TypebarError: no such rank, or bytes beyond `capacity`.
    """
    if not 0 <= rank < ranks:
        raise TypebarError(f"the ring has {ranks} devices: there is no device {rank}")
    if offset < 0 or size < 0 or offset + size > capacity:
        raise TypebarError(
            f"bytes {offset} to {offset + size} are outside region {region.name} of {capacity} bytes on device {rank}"
        )
