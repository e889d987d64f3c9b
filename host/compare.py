"""`compare`: an image's values on the functional simulator against torch, layer by layer: which layer is wrong?

Values are compared wherever the graph adds two vectors: after the embeddings, and after the attention and the
feed-forward part of every layer. The program's own comments say which instruction makes such a sum; torch runs the
image's graph in float64, float32 and float16, and in float64 with rounded operands (`host.rounding`), which shows the
error that the number formats explain.

A point diverges where the image's error exceeds `FACTOR` times the explained one and a floor of `FLOOR` of the value,
both as root mean squares over all positions and elements: error <= FACTOR * explained + FLOOR * value.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from xdsl.dialects.builtin import SymbolRefAttr

from typebar.compiler import ir
from typebar.compiler.interpreter import StepInterpreter
from typebar.compiler.packing import unpack_weights
from typebar.host.facts import image_facts
from typebar.host.generation import check_tokens
from typebar.host.probes import Fed, Lookup, Point, Points, Values, find_points, interpret, simulate_points
from typebar.host.rounding import OPERAND_BITS, rounded, rounded_operands
from typebar.host.tokenizer import TextTokenizer
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image

FACTOR = 2.0
"""The machine's roundings and the explained ones are two draws of one kind, so their sizes agree within less."""
FLOOR = 2.0**-16
"""Of the value: 2^-24 for each float32 operation, some hundred of them one after another in a layer."""
_STORED_BITS = {"bf16": 8}
"""Significant bits of formats coarser than an operand, which K, V and weights are stored in."""


@dataclass(frozen=True)
class Errors:
    """Against float64 over all positions: the largest error, the same relative to the position's largest value, RMS."""

    largest: float
    relative: float
    rms: float


@dataclass(frozen=True)
class Row:
    """One point of comparison, in the order of computation."""

    name: str
    layer: str
    node: str
    value: float
    """Largest magnitude in float64."""
    image: Errors
    explained: Errors
    float32: Errors
    float16: Errors
    bound: float
    """Root mean square that the image's error may have."""

    @property
    def diverges(self) -> bool:
        """Whether the formats do not explain the image's error."""
        return not self.image.rms <= self.bound


@dataclass(frozen=True)
class Comparison:
    """All points; `against` says whose weights the references have."""

    image: str
    against: str
    positions: int
    rows: tuple[Row, ...]

    @property
    def first(self) -> Row | None:
        """The first point that diverges: the layer to look at."""
        return next((row for row in self.rows if row.diverges), None)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        rows = [{**asdict(row), "diverges": row.diverges} for row in self.rows]
        first = None if self.first is None else {"name": self.first.name, "layer": self.first.layer}
        return {**asdict(self), "rows": rows, "first_divergence": first, "ok": self.first is None}


def compare(
    image: str | os.PathLike[str],
    prompt: str | None = None,
    input_ids: Sequence[int] | None = None,
    against: str | os.PathLike[str] | None = None,
    new_tokens: int = 4,
) -> Comparison:
    """Run a prompt through an image and through torch, and compare layer by layer.

    Args:
        image: the image.
        prompt: text; or give `input_ids` [T].
        against: a model whose weights torch takes, as in `compile`; None for the image's own, which leaves out errors
            that the image's weights have. With int8 weights the errors then are what quantising them costs.
        new_tokens: for a model with an encoder, the tokens of torch float32's answer that its decoder is given.

    Raises:
        TypebarError: no prompt or two, too long a one, a model that is not the image's, or one given for an image with
            int8 K and V.
    """
    with Image.open(os.fspath(image)) as opened:
        lookup = packed = unpack_weights(opened)
        if against is not None:
            if opened.manifest.accounting.get("kv_format") == "int8":
                raise TypebarError(
                    "int8 K and V have their scales in the image's weights, which a model's own are not comparable "
                    "with: leave out against"
                )
            lookup, packed = _source_lookups(against, opened.manifest.weights_format)
        points = find_points(opened)
        fed = _feed(opened, points, lookup, prompt, input_ids, new_tokens)
        exact = interpret(points, fed, lookup, torch.float64)
        explained = _explained(opened, points, fed, packed)
        single, half = (interpret(points, fed, lookup, kind) for kind in (torch.float32, torch.float16))
        found = simulate_points(opened, points, fed)
    runs = (found, explained, single, half)
    rows = tuple(_row(p, exact[p], *(_errors(run[p], exact[p]) for run in runs)) for p in exact if p in found)
    references = "the image's own weights" if against is None else os.fspath(against)
    return Comparison(os.fspath(image), references, fed.positions, rows)


def _feed(
    image: Image,
    points: Points,
    lookup: Lookup,
    prompt: str | None,
    input_ids: Sequence[int] | None,
    new_tokens: int,
) -> Fed:
    if (prompt is None) == (input_ids is None):
        raise TypebarError("give exactly one of prompt (text) and input_ids (token ids)")
    if prompt is not None:
        if not image.tokenizer:
            raise TypebarError("the image has no tokenizer: give input_ids, or compile with a tokenizer.json")
        input_ids = TextTokenizer(image.tokenizer).encode(prompt)
    facts, given = image_facts(image), list(input_ids or ())
    if facts.encoder is None:
        return Fed(check_tokens(facts, given))
    source = check_tokens(facts.encoder, given)
    step = StepInterpreter(points.module, lambda name: torch.from_numpy(lookup(name)))
    step.encode(source)
    tokens = [facts.encoder.start]
    while len(tokens) < min(1 + new_tokens, facts.context):
        tokens.append(int(step.step(tokens[-1], len(tokens) - 1).argmax()))
    return Fed(tokens, source)


def _source_lookups(model: str | os.PathLike[str], weights: str) -> tuple[Lookup, Lookup]:
    """The weights of a model as an image in the format `weights` names them: as they are, and as it quantises them."""
    from typebar.compiler.frontend import load_model
    from typebar.compiler.quantisation import quantise
    from typebar.host.api import model_source

    source, config = model_source(model, None)
    loaded = load_model(source, config)
    if weights != "int8":
        return loaded.lookup, loaded.lookup
    made = quantise(loaded)

    def exact(name: str) -> NDArray[np.float32]:
        if name in made.scales:
            return np.ones(made.model.weights.shape(name), np.float32)
        return loaded.lookup(made.origins.get(name, name))

    return exact, made.model.lookup


def _explained(image: Image, points: Points, fed: Fed, lookup: Lookup) -> Values:
    """The values in float64 with what the image's formats round: factors of products, and tables in memory.

    `lookup` gives int8 weights as integers and scales, so what quantising them costs is explained, too.
    """
    bits = _STORED_BITS.get(image.manifest.weights_format, OPERAND_BITS)
    tables = {
        name.split("{")[0]
        for op in points.module.walk()
        if isinstance(op, ir.EmbeddingOp) and isinstance(op.weight, SymbolRefAttr)
        for name in [ir.text(op.weight)]
    }

    def stored(name: str) -> NDArray[np.float32]:
        values = lookup(name)
        if name not in tables:
            return values
        return np.asarray(rounded(torch.from_numpy(values), bits).numpy())

    with rounded_operands(bits):
        return interpret(points, fed, stored, torch.float64)


def _errors(found: NDArray[np.float64], exact: NDArray[np.float64]) -> Errors:
    error, value = np.abs(found - exact), np.abs(exact).max(-1)
    relative = error.max(-1) / np.where(value > 0, value, 1)
    return Errors(float(error.max()), float(relative.max()), _rms(error))


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _row(
    point: Point, exact: NDArray[np.float64], image: Errors, explained: Errors, single: Errors, half: Errors
) -> Row:
    bound = FACTOR * explained.rms + FLOOR * _rms(exact)
    value = float(np.abs(exact).max())
    return Row(point.name, point.layer, point.node, value, image, explained, single, half, bound)
