"""Run a whole sequence through a step: the reference that tests compare with the source model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from xdsl.dialects.builtin import ModuleOp

from typebar.compiler.frontend.weights import WeightSource
from typebar.compiler.interpreter import StepInterpreter


def evaluate_step(
    module: ModuleOp | str,
    weights: WeightSource,
    tokens: Sequence[int],
    dtype: torch.dtype = torch.float32,
    source: Sequence[int] | None = None,
) -> torch.Tensor:
    """Logits [T, V] of `tokens`, fed one by one from position 0, after the tokens of a `source` text for an encoder.

    Raises TypebarError as StepInterpreter does.
    """
    interpreter = StepInterpreter(module, lambda name: torch.from_numpy(weights.load(name)), dtype)
    if source is not None:
        interpreter.encode(source)
    return torch.stack([interpreter.step(int(token), position) for position, token in enumerate(tokens)])
