"""ONNX models as `tb.graph`: a decoder, or an encoder and a decoder, with weights bound by name and read lazily."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from typebar.compiler.frontend.assembly import FrontendModel, assemble, memory_width
from typebar.compiler.frontend.facts import facts_beside, facts_of, length_of, read_json
from typebar.compiler.frontend.onnx.module import OnnxModule
from typebar.compiler.frontend.onnx.values import Weight
from typebar.compiler.frontend.torch_import import Exported
from typebar.compiler.frontend.weights import WeightSource
from typebar.isa.errors import TypebarError

DEFAULT_CONTEXT = 512
"""The context of a decoder without a table of positions of which nothing says how long its texts may be."""

_ENDINGS = ("", "_quantized", "_int8", "_fp16")
_PAIRS = [
    (f"{encoder}{ending}.onnx", f"{decoder}{ending}.onnx")
    for ending in _ENDINGS
    for encoder, decoder in (("encoder_model", "decoder_model"), ("encoder", "decoder"))
] + [("encoder_model.onnx", "decoder_model_merged.onnx")]
_SINGLE = [
    f"{name}{ending}.onnx"
    for ending in _ENDINGS
    for name in ("model", "decoder_model", "decoder_model_merged", "decoder")
]

OnnxPaths = Path | tuple[Path, Path]
"""A decoder's file, or an encoder's and a decoder's."""


class OnnxSource(WeightSource):
    """The parameters of one or two ONNX graphs, read from their files or computed when they are loaded."""

    def __init__(self, modules: Sequence[tuple[OnnxModule, Mapping[str, str]]]) -> None:
        """Take the parameters of each graph, by their names or by those that go in their place."""
        self._places: dict[str, tuple[OnnxModule, Weight]] = {}
        for module, names in modules:
            self._places.update({names.get(n, n): (module, w) for n, w in module.named_weights().items()})

    def names(self) -> list[str]:
        """Every parameter's name."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The parameter's shape; raises TypebarError if there is no such parameter."""
        return self._place(name)[1].shape

    def load(self, name: str) -> np.ndarray:
        """The parameter's values, floating point as float32, whole numbers as they are."""
        module, weight = self._place(name)
        values = module.reader.values_of(weight)
        return values.astype(np.float32, copy=False) if values.dtype.kind == "f" else values

    def _place(self, name: str) -> tuple[OnnxModule, Weight]:
        if name not in self._places:
            raise TypebarError(f"there is no parameter {name!r} in the ONNX model; check that it belongs to this graph")
        return self._places[name]


def find_onnx(directory: Path) -> OnnxPaths | None:
    """The ONNX files of a directory, or of its folder `onnx`, by their usual names; None if there are none."""
    for folder in (directory, directory / "onnx"):
        for encoder, decoder in _PAIRS:
            if (folder / encoder).is_file() and (folder / decoder).is_file():
                return folder / encoder, folder / decoder
        for name in _SINGLE:
            if (folder / name).is_file():
                return folder / name
    return None


def missing_half(directory: Path) -> tuple[str, str] | None:
    """The encoder's file of a directory without its decoder, and the decoder's usual name; None if there is none."""
    for folder in (directory, directory / "onnx"):
        for encoder, decoder in _PAIRS:
            if (folder / encoder).is_file():
                return encoder, decoder
    return None


def import_onnx(paths: OnnxPaths, config: Mapping[str, Any] | None = None) -> FrontendModel:
    """A model of an ONNX file, or of an encoder's and a decoder's.

    What the graph does not say, context, source_context, eos_token_id, decoder_start_token_id, comes from `config` and
    from config.json and generation_config.json beside the file; so does tokenizer.json. Raises TypebarError, and
    LoweringError with everything in a graph that is wrong or unsupported.
    """
    encoder_path, path = paths if isinstance(paths, tuple) else (None, paths)
    for given in (encoder_path, path):
        if given is not None and not given.is_file():
            raise TypebarError(f"there is no file {given}; give the path of an ONNX model")
    folder = path.resolve().parent
    beside = folder.parent if folder.name == "onnx" and not (folder / "tokenizer.json").is_file() else folder
    facts: dict[str, Any] = {**facts_of(read_json(beside / "config.json")), **facts_beside(beside), **(config or {})}
    facts.pop("is_encoder_decoder", None)
    tokenizer = beside / "tokenizer.json"
    text = tokenizer.read_bytes() if tokenizer.is_file() else None
    name = str(facts.pop("name", None) or (path.stem if encoder_path is None and path.stem != "model" else beside.name))
    decoder = OnnxModule(path)
    if decoder.inputs.takes_memory != (encoder_path is not None):
        _refuse_half(path, decoder.inputs.takes_memory)
    if encoder_path is None:
        return _decoder_alone(name, decoder, facts, text)
    encoder = OnnxModule(encoder_path, encoder=True)
    encoded, decoded = encoder.exported(), decoder.exported()
    width = memory_width(encoded)
    if width != decoder.inputs.memory_width():
        raise TypebarError(
            f"{encoder_path.name} gives vectors of {width}, {path.name} takes {decoder.inputs.memory_width()}; "
            "give the two halves of one model"
        )
    prefixes = _prefixes(encoder, decoder)
    source = OnnxSource([(encoder, prefixes[0]), (decoder, prefixes[1])])
    return assemble(name, source, _named(decoded, prefixes[1]), facts, _named(encoded, prefixes[0]), text)


def _refuse_half(path: Path, takes_memory: bool) -> None:
    if takes_memory:
        raise TypebarError(f"{path} is the decoder of a pair; give the folder that holds its encoder.onnx as well")
    raise TypebarError(f"{path} takes no encoder's result and cannot be the decoder of a pair; give it alone")


def _decoder_alone(name: str, decoder: OnnxModule, facts: dict[str, Any], text: bytes | None) -> FrontendModel:
    declared = length_of(facts, "context")
    if decoder.inputs.static is not None:
        facts["context"] = min(declared or decoder.inputs.static, decoder.inputs.static)
    exported = decoder.exported()
    source = OnnxSource([(decoder, {})])
    return assemble(name, source, exported, facts, tokenizer=text, fallback=DEFAULT_CONTEXT)


def _prefixes(encoder: OnnxModule, decoder: OnnxModule) -> tuple[dict[str, str], dict[str, str]]:
    """Other names for the parameters that differ under one name in the two graphs."""
    ours, theirs = encoder.named_weights(), decoder.named_weights()
    differing = [n for n in ours if n in theirs and not _equal(encoder, ours[n], decoder, theirs[n])]
    return {n: f"encoder:{n}" for n in differing}, {n: f"decoder:{n}" for n in differing}


def _equal(encoder: OnnxModule, ours: Weight, decoder: OnnxModule, theirs: Weight) -> bool:
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return False
    return bool(np.array_equal(encoder.reader.values_of(ours), decoder.reader.values_of(theirs)))


def _named(exported: Exported, names: Mapping[str, str]) -> Exported:
    return replace(exported, aliases={slot: names.get(name, name) for slot, name in exported.aliases.items()})
