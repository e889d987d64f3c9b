"""Writes an image: one safetensors file, streamed, so that no more than one tensor is in memory at a time.

The file is an 8-byte length, a JSON header padded with spaces to a whole number of pages, and the data: the packed
tensors (see `image_plan.file_places`), then program, graph, tokenizer and manifest. The header's metadata holds the
SHA-256 of the manifest, and the manifest that of everything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from typebar.isa.image_manifest import (
    FORMAT_VERSION,
    TEXTS,
    UNKNOWN_DIGEST,
    Manifest,
    TensorRecord,
    check_tokenizer,
    dumps,
    loads,
    machine_json,
    parse_manifest,
    tensor_json,
)
from typebar.isa.image_plan import (
    PACKED_REGIONS,
    PAGE_BYTES,
    ImageError,
    TensorPlan,
    file_name,
    file_places,
    plan_regions,
)
from typebar.isa.instructions import ISA_VERSION, WORD_BYTES
from typebar.isa.machine import Machine, MachineError
from typebar.isa.numerics import NUMERICS_VERSION
from typebar.isa.program import ProgramError, decode

HEADER_FORMAT = "typebar image"
GIVEN_FIELDS = frozenset(
    {
        *("name", "machine", "devices", "weights_format", "entries", "labels", "comments", "regions", "io"),
        *("model", "accounting", "sources", "source_hash"),
    }
)
"""What `write_image` expects in `manifest_fields`; it works out the other fields."""

Progress = Callable[[int, int], None]


def write_image(
    path: str | Path,
    manifest_fields: Mapping[str, Any],
    program: NDArray[np.uint8],
    graph: str,
    tokenizer: bytes,
    plans: Sequence[TensorPlan],
    payload: Callable[[TensorPlan], NDArray[np.uint8]],
    progress: Progress | None = None,
) -> Manifest:
    """Write an image; the file appears complete or not at all.

    Args:
        path: the file to create or replace.
        manifest_fields: exactly `GIVEN_FIELDS`. `machine` is a Machine or its mapping, `regions` the bytes of `kv` and
            `io` on each device, `comments` text by instruction index, `sources` {symbol: {shape, dtype}}.
        program: encoded instructions, 64 bytes each, any shape.
        graph: text of the step graph.
        tokenizer: contents of a tokenizer.json, or nothing.
        plans: the packed tensors; their order gives the addresses (`plan_regions` gives the same ones beforehand).
        payload: called once for each plan, in order; returns its `bytes` bytes.
        progress: called with bytes done and in total after each tensor.

    Returns:
        The manifest as written.

    Raises:
        ImageError: fields that break a rule of the format (found before any file is made), a payload of the wrong
            length, or a file that cannot be written.
    """
    texts = {"program": _program_bytes(program), "graph": graph.encode(), "tokenizer": tokenizer}
    check_tokenizer(tokenizer)
    data = _manifest_json(manifest_fields, texts, plans)
    draft = dumps(data, "manifest")
    manifest = parse_manifest(loads(draft, "manifest"), len(texts["program"]) // WORD_BYTES)
    shape = _Shape(manifest, texts, len(draft))
    with _replacing(Path(path)) as put:
        written = _write_tensors(put, shape, manifest.tensors, payload, progress)
        manifest = replace(manifest, tensors=tuple(written))
        data["tensors"] = [tensor_json(record) for record in written]
        texts["manifest"] = dumps(data, "manifest")
        header = shape.header(hashlib.sha256(texts["manifest"]).hexdigest())
        for name, text in texts.items():
            put(shape.data_start + shape.offsets[name], text)
        put(0, struct.pack("<Q", len(header)) + header)
    if progress:
        progress(shape.file_bytes, shape.file_bytes)
    return manifest


class _Shape:
    """Where everything is in the file, known before the first tensor is packed."""

    def __init__(self, manifest: Manifest, texts: Mapping[str, bytes], manifest_bytes: int) -> None:
        addresses = manifest.addresses
        self.offsets = file_places(manifest.tensors, addresses, manifest.devices)
        self.slots = {file_name(record): addresses.slots[record.name] for record in manifest.tensors}
        totals = addresses.totals
        params, weights, local = (totals[region] for region in PACKED_REGIONS)
        end = params + manifest.devices * (weights + local)
        lengths = {**{name: len(text) for name, text in texts.items()}, "manifest": manifest_bytes}
        for name, length in lengths.items():
            self.offsets[name], self.slots[name] = end, length
            end += length
        self.data_start = 8 + len(self.header(UNKNOWN_DIGEST))
        self.file_bytes = self.data_start + end

    def header(self, manifest_digest: str) -> bytes:
        """The JSON header, padded; its length does not depend on the digest."""
        metadata = {"format": HEADER_FORMAT, "manifest_sha256": manifest_digest}
        entries: dict[str, Any] = {"__metadata__": metadata}
        for name, offset in sorted(self.offsets.items(), key=lambda item: (item[1], self.slots[item[0]])):
            length = self.slots[name]
            shape = [length // WORD_BYTES, WORD_BYTES] if name == "program" else [length]
            entries[name] = {"dtype": "U8", "shape": shape, "data_offsets": [offset, offset + length]}
        text = dumps(entries, "header")
        return text + b" " * (-(8 + len(text)) % PAGE_BYTES)


def _manifest_json(given: Mapping[str, Any], texts: Mapping[str, bytes], plans: Sequence[TensorPlan]) -> dict[str, Any]:
    if given.keys() != GIVEN_FIELDS:
        wrong = ", ".join(sorted(given.keys() ^ GIVEN_FIELDS))
        raise ImageError(f"manifest fields missing or unknown: {wrong}; write_image wants each of GIVEN_FIELDS")
    machine = given["machine"]
    if not isinstance(machine, Machine):
        try:
            machine = Machine.from_mapping(machine)
        except MachineError as error:
            raise ImageError(str(error)) from None
    addresses = plan_regions(plans, machine, given["devices"])
    packed = {region.name.lower(): size for region, size in addresses.totals.items()}
    return {
        "format_version": FORMAT_VERSION,
        "isa_version": ISA_VERSION,
        "numerics_version": NUMERICS_VERSION,
        **given,
        **machine_json(machine),
        "comments": {str(index): text for index, text in given["comments"].items()},
        "regions": {**given["regions"], **packed},
        "sha256": {name: hashlib.sha256(texts[name]).hexdigest() for name in TEXTS},
        "tensors": [
            tensor_json(
                TensorRecord(plan.name, plan.region, plan.device, plan.bytes, plan.meta, addresses.lines[plan.name])
            )
            for plan in plans
        ],
    }


def _program_bytes(program: NDArray[np.uint8]) -> bytes:
    if program.dtype != np.uint8:
        raise ImageError(f"program must be bytes (uint8), not {program.dtype}: encode it first")
    data = program.tobytes()
    try:
        if not decode(data).ops:
            raise ImageError("program has no instructions: an image needs at least one")
    except ProgramError as error:
        raise ImageError(str(error)) from None
    return data


Put = Callable[[int, bytes | memoryview], None]
"""Writes bytes at an offset of the new file; bytes never written read as zeros."""


def _write_tensors(
    put: Put,
    shape: _Shape,
    records: Sequence[TensorRecord],
    payload: Callable[[TensorPlan], NDArray[np.uint8]],
    progress: Progress | None,
) -> list[TensorRecord]:
    """Fill every tensor's slot; padding is left to the file's holes. Returns the records with their checksums."""
    written, done = [], 0
    for record in records:
        slot = shape.slots[file_name(record)]
        digest = _write_tensor(put, shape.data_start + shape.offsets[file_name(record)], slot, record, payload)
        written.append(replace(record, sha256=digest))
        done += slot
        if progress:
            progress(done, shape.file_bytes)
    return written


def _write_tensor(
    put: Put, offset: int, slot: int, record: TensorRecord, payload: Callable[[TensorPlan], NDArray[np.uint8]]
) -> str:
    data = np.ascontiguousarray(payload(record))
    if data.dtype != np.uint8 or data.size != record.bytes:
        raise ImageError(
            f"tensor {file_name(record)!r} came as {data.size} elements of {data.dtype}; its plan says"
            f" {record.bytes} bytes"
        )
    view = data.reshape(-1).data
    put(offset, view)
    digest = hashlib.sha256(view)
    digest.update(bytes(slot - record.bytes))
    return digest.hexdigest()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Put]:
    """A new file beside `path` that takes its place if the block ends well and is removed if it does not."""
    if path.exists() and not path.is_file():
        raise ImageError(f"image {str(path)!r} cannot be written: it exists and is no regular file; name another")
    temporary = path.parent / f".typebar-{secrets.token_hex(8)}.tmp"
    try:
        with _explained(path):
            file = open(temporary, "xb", buffering=0)  # noqa: SIM115 (closed below, before the rename)
        with file:

            def put(offset: int, data: bytes | memoryview) -> None:
                with _explained(path):
                    file.seek(offset)
                    view = memoryview(data)
                    while view:
                        view = view[file.write(view) :]

            yield put
            with _explained(path):
                os.fsync(file.fileno())
        with _explained(path):
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into one line; errors of the caller's payload are not caught here."""
    try:
        yield
    except OSError as error:
        raise ImageError(
            f"image {str(path)!r} cannot be written: {error.strerror}; name a folder that exists, is writable and"
            " has room"
        ) from error
