"""int8 K and V: a scale for each channel of a K/V head, found by running the model over a text, folded into weights.

A channel's range is the largest magnitude that the text shows, times `MARGIN`; its scale is the range over 127. Of the
two channels that a rotary position turns it is the largest length of the pair, which no other position exceeds. What
goes beyond the range saturates, and the machine reports it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from xdsl.ir import Operation, SSAValue

from typebar.compiler import ir
from typebar.compiler.frontend import DerivedSource, FrontendModel
from typebar.compiler.interpreter import StepInterpreter
from typebar.compiler.passes.scale_caches import Folded, ScaledCache, attentions, scale_caches, shared_channels
from typebar.isa.errors import TypebarError

F32 = NDArray[np.float32]
LARGEST = 127
MARGIN = 1.5
"""How far beyond the calibration's range a value may go."""
_SMALLEST = np.finfo(np.float32).smallest_normal
"""The machine takes smaller numbers as zero."""


@dataclass(frozen=True)
class Ranges:
    """The largest magnitudes of K and of V, [channels] each, by an attention's number and its layer in the loop."""

    found: Mapping[tuple[int, int], tuple[F32, F32]]

    def scales(self, number: int, cache: ScaledCache, layer: int) -> tuple[F32, F32]:
        """The scales of K and of V in a layer; layers that share tensors have the largest of all."""
        layers = range(len(cache.layers)) if cache.shared else (layer,)
        k, v = (np.max([self.found[number, item][side] for item in layers], axis=0) for side in (0, 1))
        return _scale(k), _scale(v)


def _scale(magnitude: F32) -> F32:
    scale = np.asarray(magnitude * np.float32(MARGIN / LARGEST), np.float32)
    return np.where(scale < _SMALLEST, np.float32(1), scale)


def calibrate(
    model: FrontendModel, texts: Sequence[Sequence[int]], progress: Callable[[int, int], None] | None = None
) -> Ranges:
    """Run a lowered model, in torch float32, over `texts`, token ids [T] each from position 0 on.

    `progress` is called with the tokens done and their number.

    Raises:
        TypebarError: no tokens, a text longer than the context, a token outside the vocabulary, a model whose K and V
            cannot be int8, or K or V that are not finite.
    """
    scale_caches(model.module.clone())  # refuses before anything long is done
    total = sum(len(text) for text in texts)
    if not total:
        raise TypebarError("a calibration needs a text of at least one token: give a longer one")
    watched: dict[Operation, list[tuple[int, int]]] = {}
    pairs: dict[int, NDArray[np.int64]] = {}
    for number, op in enumerate(attentions(model.module)):
        pairs[number] = shared_channels(op)
        for side, value in enumerate((op.k, op.v)):
            watched.setdefault(_owner(value), []).append((number, side))
    squares: dict[tuple[int, int, int], torch.Tensor] = {}

    def note(op: Operation, layer: int, value: torch.Tensor) -> None:
        for number, side in watched.get(op, ()):
            square = value.square()
            if side == 0:
                index = torch.from_numpy(pairs[number])
                square = torch.zeros_like(square).index_add_(0, index, square)[index]
            key = number, side, layer
            squares[key] = torch.maximum(squares[key], square) if key in squares else square

    step = StepInterpreter(model.module, lambda name: torch.from_numpy(model.lookup(name)), trace=note)
    done = 0
    for text in texts:
        for position, token in enumerate(text):
            step.step(int(token), position)
            done += 1
            if progress is not None:
                progress(done, total)
    made = {key: value.sqrt().numpy() for key, value in squares.items()}
    if any(not np.isfinite(value).all() for value in made.values()):
        raise TypebarError("the calibration's K or V are not finite in float32: mend the checkpoint")
    return Ranges({(number, layer): (made[number, 0, layer], made[number, 1, layer]) for number, _, layer in made})


def _owner(value: SSAValue) -> Operation:
    assert isinstance(value.owner, Operation)
    return value.owner


def int8_caches(model: FrontendModel, ranges: Ranges | None) -> FrontendModel:
    """The lowered model with int8 K and V; tensors with scales in them are computed when they are loaded.

    `model` itself stays as it is. Without ranges there are names and shapes, and no values.

    Raises:
        TypebarError: its K and V cannot be int8.
    """
    module, weights = model.module.clone(), DerivedSource(model.weights)
    for number, cache in enumerate(scale_caches(module)):
        for layer, place in enumerate(cache.layers):
            for item in cache.tensors:
                name = ir.layer_name(item.name, *place)
                source = None if item.source is None else ir.layer_name(item.source, *place)
                shape = (len(item.codes),) if source is None else weights.shape(source)
                weights.define(name, shape, _Make(weights, ranges, number, cache, layer, item, source))
    return replace(model, module=module, weights=weights)


@dataclass(frozen=True)
class _Make:
    """Computes one folded tensor in one layer."""

    weights: DerivedSource
    ranges: Ranges | None
    number: int
    cache: ScaledCache
    layer: int
    item: Folded
    source: str | None

    def __call__(self) -> F32:
        if self.ranges is None:
            raise TypebarError(f"{self.item.name!r} has a shape but no values: calibrate int8 K and V on a text")
        k, v = self.ranges.scales(self.number, self.cache, self.layer)
        one = np.ones(1, np.float32)
        factors = np.concatenate((one, self.cache.k_factor / k, self.cache.v_factor / v, k, v)).astype(np.float32)
        spread = factors[self.item.codes]
        if self.source is None:
            return spread
        values = np.asarray(self.weights.load(self.source), np.float32)
        shape = [1] * values.ndim
        shape[self.item.axis] = len(spread)
        return np.asarray(values * spread.reshape(shape), np.float32)
