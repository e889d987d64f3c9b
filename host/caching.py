"""How a command or a call says in what format K and V are stored, and from which text int8's scales come."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typebar.host.tokenizer import TextTokenizer
from typebar.isa.errors import TypebarError

if TYPE_CHECKING:
    from typebar.compiler.frontend import FrontendModel

INT8 = "int8"
Text = str | os.PathLike[str] | Sequence[Sequence[int]]
"""A file of text, or token ids of texts."""


def check_kv(kv: str | None) -> None:
    """Refuse a format that K and V cannot be given.

    Raises:
        TypebarError: it is not int8.
    """
    if kv not in (None, INT8):
        raise TypebarError(f"kv cannot be {kv!r}: choose int8, or leave it out for the format that embeddings have")


@dataclass(frozen=True)
class Caching:
    """What a caller asks of K and V: None for the format that embeddings have, or int8 with scales from a text."""

    kv: str | None = None
    calibrate: Text | None = None

    def __post_init__(self) -> None:
        """Refuse what does not go together, before anything long is done.

        Raises:
            TypebarError: an unknown format, int8 without a text, or a text without int8.
        """
        check_kv(self.kv)
        if self.kv is None and self.calibrate is not None:
            raise TypebarError("calibrate finds the scales of int8 K and V: give kv int8 too, or leave it out")
        if self.kv is not None and self.calibrate is None:
            raise TypebarError("kv int8 needs the ranges of K and V: give calibrate a text like those to be run")

    def of(self, model: FrontendModel) -> FrontendModel:
        """A lowered model that stores K and V so.

        Raises:
            TypebarError: its K and V cannot be int8, or the text cannot be read or encoded.
        """
        if self.calibrate is None:
            return model
        from typebar.compiler.caches import calibrate, int8_caches

        return int8_caches(model, calibrate(model, _texts(self.calibrate, model)))


def _texts(given: Text, model: FrontendModel) -> list[list[int]]:
    """Token ids, in pieces no longer than the model's context."""
    if not isinstance(given, str | os.PathLike):
        return [[int(token) for token in text] for text in given]
    from typebar.host.cli_output import read_text

    text = read_text(os.fspath(given), "the calibration text")
    if model.tokenizer_json is None:
        raise TypebarError("the model has no tokenizer to calibrate with a text: give calibrate token ids")
    ids, context = TextTokenizer(model.tokenizer_json).encode(text), int(model.config["context"])
    return [ids[start : start + context] for start in range(0, len(ids), context)]
