"""What the host needs to know of an image, from the parts of its manifest that the compiler writes for the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from typebar.compiler.memory import IoMap
from typebar.isa.image import Image, ImageError

_ENTRY = "main"
_ACCOUNTS = ("weight_bytes", "head_bytes", "kv_bytes_per_position")


@dataclass(frozen=True)
class ImageFacts:
    """Sizes in tokens; `end` is the token that ends a text, or None; `entry` an instruction index.

    `accounting` has the bytes of unpadded weights that one pass reads, of the logits' matrix among them, and of the K
    and V that one position adds, over all devices.
    """

    vocab: int
    context: int
    end: int | None
    entry: int
    io: IoMap
    accounting: Mapping[str, int]


def image_facts(image: Image) -> ImageFacts:
    """The facts of an open image.

    Raises:
        ImageError: its manifest lacks one, or has it with an impossible value.
    """
    manifest = image.manifest
    model, io = manifest.model, manifest.io
    end = model.get("eos")
    return ImageFacts(
        vocab=_number(model, "model", "vocab", 1),
        context=_number(model, "model", "context", 1),
        end=None if end is None else _number(model, "model", "eos", 0),
        entry=_number(manifest.entries, "entries", _ENTRY, 0),
        io=IoMap(**{item.name: _number(io, "io", item.name, 0) for item in fields(IoMap)}),
        accounting={name: _number(manifest.accounting, "accounting", name, 0) for name in _ACCOUNTS},
    )


def _number(table: Mapping[str, Any], where: str, key: str, low: int) -> int:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ImageError(f"manifest: {where}: {key} must be an integer, at least {low}, not {value!r}: compile again")
    return value
