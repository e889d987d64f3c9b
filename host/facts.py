"""What the host needs to know of an image, from the parts of its manifest that the compiler writes for the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from typebar.compiler.memory import IoMap
from typebar.isa.image import Image, ImageError

_ENTRY, _ENCODE = "main", "encode"
_ACCOUNTS = (
    "weight_bytes",
    "head_bytes",
    "tail_bytes",
    "kv_bytes_per_position",
    "macs_per_token",
    "prompt_rows",
    "prompt_groups",
)
_SOURCE_ACCOUNTS = ("source_weight_bytes", "source_kv_bytes_per_position", "cross_kv_bytes_per_position")


@dataclass(frozen=True)
class EncoderFacts:
    """What a model with an encoder has besides.

    `context` is the largest number of source tokens, `vocab` theirs, `start` the token that decoding starts from, and
    `entry` the instruction at which a new source text is encoded.
    """

    vocab: int
    context: int
    start: int
    entry: int


@dataclass(frozen=True)
class ImageFacts:
    """Sizes in tokens; `ends` are the tokens that end a text; `entry` an instruction index.

    `accounting` has the bytes of unpadded weights that one pass reads, of the logits' matrix and of all after the last
    attention among them, and of the K and V that one position adds, over all devices, the multiply-accumulates of a
    pass with weights, and how many tokens of a prompt share a reading of the weights; with an encoder also the bytes
    of a source position's pass.
    `encoder` is None for a model without one. `chat_template` is Jinja text, or None; `special_tokens` are texts by
    name for it, such as `bos_token`.
    """

    vocab: int
    context: int
    ends: tuple[int, ...]
    entry: int
    io: IoMap
    accounting: Mapping[str, int]
    encoder: EncoderFacts | None = None
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)


def image_facts(image: Image) -> ImageFacts:
    """The facts of an open image.

    Raises:
        ImageError: its manifest lacks one, or has it with an impossible value.
    """
    manifest = image.manifest
    model, io = manifest.model, manifest.io
    encoder = None
    if model.get("is_encoder_decoder"):
        encoder = EncoderFacts(
            vocab=_number(model, "model", "source_vocab", 1),
            context=_number(model, "model", "source_context", 1),
            start=_number(model, "model", "decoder_start_token_id", 0),
            entry=_number(manifest.entries, "entries", _ENCODE, 0),
        )
    accounts = _ACCOUNTS if encoder is None else _ACCOUNTS + _SOURCE_ACCOUNTS
    template, special = model.get("chat_template"), model.get("special_tokens")
    known = {item.name for item in fields(IoMap) if item.default is MISSING or item.name in io}
    return ImageFacts(
        vocab=_number(model, "model", "vocab", 1),
        context=_number(model, "model", "context", 1),
        ends=_ends(model),
        entry=_number(manifest.entries, "entries", _ENTRY, 0),
        io=IoMap(**{name: _number(io, "io", name, 0) for name in known}),
        accounting={name: _number(manifest.accounting, "accounting", name, 0) for name in accounts},
        encoder=encoder,
        chat_template=template if isinstance(template, str) else None,
        special_tokens=special if isinstance(special, dict) else {},
    )


def _ends(model: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text: `eos` is one, several or none."""
    found = model.get("eos")
    given = found if isinstance(found, list) else [] if found is None else [found]
    return tuple(_number({"eos": item}, "model", "eos", 0) for item in given)


def _number(table: Mapping[str, Any], where: str, key: str, low: int) -> int:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ImageError(f"manifest: {where}: {key} must be an integer, at least {low}, not {value!r}: compile again")
    return value
