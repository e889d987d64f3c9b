"""Images: what the compiler writes and every device runs. A safetensors file, checked before anything runs.

`write_image` (see `image_writer` for the file's structure) streams it; `Image.open` maps it into memory, so a
region can be handed to a simulator, or copied to a device, as one read-only array that is never loaded as a whole.
"""

from __future__ import annotations

import hashlib
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from typebar.isa.errors import TypebarError
from typebar.isa.image_manifest import (
    FORMAT_VERSION,
    TEXTS,
    Manifest,
    SourceTensor,
    TensorRecord,
    check_machine,
    check_tokenizer,
    loads,
    parse_manifest,
)
from typebar.isa.image_plan import (
    PACKED_REGIONS,
    PAGE_BYTES,
    AddressMap,
    ImageError,
    TensorPlan,
    file_name,
    file_places,
    plan_regions,
)
from typebar.isa.image_writer import HEADER_FORMAT, write_image
from typebar.isa.instructions import WORD_BYTES, Region
from typebar.isa.machine import Machine
from typebar.isa.program import Program, ProgramError, decode

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""
_REMEDY = "the file is corrupt or no image: compile the model again"


@dataclass(frozen=True)
class _Entry:
    """A tensor in the file's header: shape, and offsets in the data."""

    shape: tuple[int, ...]
    start: int
    end: int


class Image:
    """An open image; `open` has checked it. Also a context manager that closes it.

    Attributes:
        manifest: what the image says of itself.
        machine: the machine passed to `open`, else the one it was compiled for.
        program: its instructions, with labels and comments.
        graph: text of the step graph.
        tokenizer: contents of a tokenizer.json, or empty.
    """

    def __init__(
        self,
        manifest: Manifest,
        machine: Machine,
        program: Program,
        graph: str,
        tokenizer: bytes,
        data: NDArray[np.uint8],
    ) -> None:
        """Not for callers: use `Image.open`. `data` is the file's data, mapped."""
        self.manifest = manifest
        self.machine = machine
        self.program = program
        self.graph = graph
        self.tokenizer = tokenizer
        self._data: NDArray[np.uint8] | None = data
        self._places = file_places(manifest.tensors, manifest.addresses, manifest.devices)
        self._records = {file_name(record): record for record in manifest.tensors}

    @staticmethod
    def open(path: str | Path, machine: Machine | None = None, verify: bool = True) -> Image:
        """Open an image and check it.

        Args:
            path: the image file.
            machine: the machine to run on; must have the contract hash of the image's own, which is the default.
            verify: also read every packed tensor once and compare its SHA-256. Program, graph, tokenizer and
                manifest are always compared.

        Raises:
            ImageError: anything wrong with the file, in one line.
        """
        try:
            return _open(Path(path), machine, verify)
        except TypebarError as error:
            raise ImageError(f"image {str(path)!r}: {error}") from None

    def region(self, device: int, region: Region) -> NDArray[np.uint8]:
        """A region's bytes on a device, read-only and mapped; empty if it has no tensors.

        Raises:
            ImageError: no such device, a region that the image only gives a size (KV, IO), or a closed image.
        """
        if not 0 <= device < self.manifest.devices:
            raise ImageError(f"image is for {self.manifest.devices} devices: there is no device {device}")
        if region not in PACKED_REGIONS:
            raise ImageError(f"region {region.name} has only a size in the image: allocate manifest.regions of it")
        sizes = self.manifest.addresses.totals
        start = 0
        if region is not Region.PARAMS:
            start = sizes[Region.PARAMS] + device * (sizes[Region.WEIGHTS] + sizes[Region.LOCAL])
        if region is Region.LOCAL:
            start += sizes[Region.WEIGHTS]
        return self._slice(start, sizes[region])

    def tensor(self, name: str, device: int | None = None) -> NDArray[np.uint8]:
        """A packed tensor's bytes without padding, read-only and mapped; `device` is None for region PARAMS.

        Raises:
            ImageError: no such tensor, or a closed image.
        """
        record = self.record(name, device)
        return self._slice(self._places[file_name(record)], record.bytes)

    def record(self, name: str, device: int | None = None) -> TensorRecord:
        """A packed tensor's entry in the manifest.

        Raises:
            ImageError: no such tensor.
        """
        regions = [Region.PARAMS] if device is None else [Region.WEIGHTS, Region.LOCAL]
        for region in regions:
            found = self._records.get(file_name(TensorPlan(name, region, device, 0)))
            if found is not None:
                return found
        where = "PARAMS" if device is None else f"device {device}"
        raise ImageError(f"image has no tensor {name!r} on {where}: manifest.tensors lists them")

    def close(self) -> None:
        """Let go of the mapping; arrays handed out stay valid and keep it until they are gone."""
        self._data = None

    def __enter__(self) -> Image:
        """The image itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _slice(self, start: int, length: int) -> NDArray[np.uint8]:
        if self._data is None:
            raise ImageError("image is closed: open it again")
        return self._data[start : start + length]


def _open(path: Path, machine: Machine | None, verify: bool) -> Image:
    data, entries, digest = _map(path)
    if "manifest" not in entries:
        raise ImageError(f"tensor 'manifest' is missing: {_REMEDY}")
    raw = {name: _text(data, entries, name) for name in ("manifest", *TEXTS)}
    _compare("manifest", raw["manifest"], digest)
    manifest = parse_manifest(loads(raw["manifest"], "manifest"), len(raw["program"]) // WORD_BYTES)
    for name in TEXTS:
        _compare(name, raw[name], manifest.sha256[name])
    _check_places(manifest, entries)
    if machine is not None:
        check_machine(manifest, machine)
    check_tokenizer(raw["tokenizer"])
    try:
        graph = raw["graph"].decode("utf-8")
        program = decode(raw["program"])
    except UnicodeDecodeError as error:
        raise ImageError(f"graph is not UTF-8 text ({error.reason}): {_REMEDY}") from None
    except ProgramError as error:
        raise ImageError(f"program: {error}") from None
    program.labels, program.comments = dict(manifest.labels), dict(manifest.comments)
    if verify:
        for record in manifest.tensors:
            entry = entries[file_name(record)]
            _compare(file_name(record), data[entry.start : entry.end].data, record.sha256)
    return Image(manifest, machine or manifest.machine, program, graph, raw["tokenizer"], data)


def _map(path: Path) -> tuple[NDArray[np.uint8], dict[str, _Entry], str]:
    """Map the file: its data, the header's entries (contiguous, within the file), the manifest's checksum."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("it is no regular file: give the file that `typebar compile` wrote")
        with open(path, "rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ImageError(f"it has {status.st_size} bytes, too few for a safetensors file: {_REMEDY}")
            length = struct.unpack("<Q", prefix)[0]
            if length > min(status.st_size - 8, MAX_HEADER_BYTES):
                raise ImageError(f"its header cannot be {length} bytes long: {_REMEDY}")
            header = file.read(length)
            mapped = np.memmap(file, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise ImageError(f"it cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ImageError(f"it cannot be read: {error}") from None
    entries, digest = _parse_header(loads(header, "header"))
    end = max((entry.end for entry in entries.values()), default=0)
    if 8 + length + end != mapped.size:
        raise ImageError(f"it has {mapped.size} bytes but its header says {8 + length + end}: {_REMEDY}")
    if (8 + length) % PAGE_BYTES:
        raise ImageError(f"its data starts at byte {8 + length}, no multiple of {PAGE_BYTES}: {_REMEDY}")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ImageError(f"it is no safetensors file ({error}): {_REMEDY}") from None
    return mapped[8 + length :], entries, digest


def _parse_header(header: Any) -> tuple[dict[str, _Entry], str]:
    if not isinstance(header, dict):
        raise ImageError(f"header is no JSON object: {_REMEDY}")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != HEADER_FORMAT:
        raise ImageError("it is no Typebar image: compile the model first with `typebar compile`")
    digest = metadata.get("manifest_sha256")
    if not isinstance(digest, str):
        raise ImageError(f"header's metadata is damaged: {_REMEDY}")
    entries = {}
    for name, item in header.items():
        if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
            raise ImageError(f"header's entry {name!r} is damaged: {_REMEDY}")
        shape, offsets = item["shape"], item["data_offsets"]
        if item["dtype"] != "U8" or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            raise ImageError(f"tensor {name!r} must be bytes (U8) with a shape and two offsets: {_REMEDY}")
        entries[name] = _Entry(tuple(shape), *offsets)
    return entries, digest


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _text(data: NDArray[np.uint8], entries: dict[str, _Entry], name: str) -> bytes:
    if name not in entries:
        raise ImageError(f"tensor {name!r} is missing: {_REMEDY}")
    entry = entries[name]
    length = entry.end - entry.start
    wanted = (length // WORD_BYTES, WORD_BYTES) if name == "program" else (length,)
    if entry.shape != wanted or (name == "program" and not length):
        raise ImageError(f"tensor {name!r} has shape {entry.shape}, {length} bytes: {_REMEDY}")
    return data[entry.start : entry.end].tobytes()


def _compare(name: str, content: bytes | memoryview, digest: str) -> None:
    if hashlib.sha256(content).hexdigest() != digest:
        raise ImageError(f"checksum of {name!r} does not match its contents: {_REMEDY}")


def _check_places(manifest: Manifest, entries: dict[str, _Entry]) -> None:
    """The header's entries are exactly the manifest's tensors, each in its place."""
    addresses = manifest.addresses
    places = file_places(manifest.tensors, addresses, manifest.devices)
    for record in manifest.tensors:
        name = file_name(record)
        slot, start = addresses.slots[record.name], places[name]
        if name not in entries:
            raise ImageError(f"tensor {name!r} is missing: {_REMEDY}")
        if entries[name] != _Entry((slot,), start, start + slot):
            raise ImageError(f"tensor {name!r}: header and manifest disagree on its length or place: {_REMEDY}")
    extra = entries.keys() - places.keys() - {"manifest", *TEXTS}
    if extra:
        raise ImageError(f"tensor {min(extra)!r} is not in the manifest: {_REMEDY}")


__all__ = [
    "FORMAT_VERSION",
    "AddressMap",
    "Image",
    "ImageError",
    "Manifest",
    "SourceTensor",
    "TensorPlan",
    "TensorRecord",
    "plan_regions",
    "write_image",
]
