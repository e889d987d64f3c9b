"""Choosing a token from logits, in the order Hugging Face applies the settings: temperature, top-k, top-p."""

from __future__ import annotations

import contextlib
import numbers
import operator
import secrets
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from typebar.isa.errors import TypebarError

_SEED_BITS = 53


@dataclass(frozen=True)
class SamplingSettings:
    """How to draw a token.

    Raises:
        TypebarError: a value out of range.
    """

    temperature: float = 1.0
    """Logits are divided by it: finite and above 0."""
    top_k: int | None = None
    """Keep only tokens whose logit is no less than the k-th largest; None keeps all."""
    top_p: float | None = None
    """Keep the fewest most likely tokens whose probabilities reach it, at least one: above 0, at most 1."""
    seed: int | None = None
    """Seed of the generator; None draws one from the operating system."""

    def __post_init__(self) -> None:
        """Check every value, and keep it as Python's own number."""
        found: dict[str, Any] = {
            "temperature": _number("temperature", self.temperature, "a finite number above 0", sys.float_info.max)
        }
        if self.top_k is not None:
            found["top_k"] = checked_integer("top_k", self.top_k, 1, "at least 1; leave it out to keep every token")
        if self.top_p is not None:
            found["top_p"] = _number("top_p", self.top_p, "a number above 0 and at most 1", 1)
        if self.seed is not None:
            found["seed"] = checked_integer("seed", self.seed, 0, "at least 0")
        for name, value in found.items():
            object.__setattr__(self, name, value)


def _number(name: str, value: Any, rule: str, high: float) -> float:
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):
            if 0 < (plain := float(value)) <= high:
                return plain
    raise TypebarError(f"{name} must be {rule}, not {value!r}")


def as_integer(value: Any) -> int | None:
    """A value as a plain integer, also numpy's and torch's; None for what is no integer, and for booleans."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def checked_integer(name: str, value: Any, low: int, rule: str) -> int:
    """A value as a plain integer.

    Raises:
        TypebarError: it is no integer or less than `low`; the message names it and the `rule`.
    """
    plain = as_integer(value)
    if plain is None or plain < low:
        raise TypebarError(f"{name} must be an integer, {rule}, not {value!r}")
    return plain


class Sampler:
    """Draws tokens; equal settings, seed and logits give equal tokens, and every token takes one random number."""

    def __init__(self, settings: SamplingSettings) -> None:
        """Seed a PCG64 generator; `seed` is the one in use, also where the settings left it open."""
        self._settings = settings
        self.seed = secrets.randbits(_SEED_BITS) if settings.seed is None else settings.seed
        self._generator = np.random.Generator(np.random.PCG64(self.seed))

    def sample(self, logits: NDArray[np.float32]) -> int:
        """One token drawn from `logits` [vocab].

        Raises:
            TypebarError: a logit is NaN or plus infinity, or all are minus infinity.
        """
        chances = probabilities(logits, self._settings)
        total = np.cumsum(chances)
        drawn = self._generator.random() * total[-1]
        # The last token with a chance, should rounding carry the draw to the end.
        return int(min(np.searchsorted(total, drawn, side="right"), np.flatnonzero(chances)[-1]))


def probabilities(logits: NDArray[np.float32], settings: SamplingSettings) -> NDArray[np.float64]:
    """The distribution [vocab] that `settings` make of `logits` [vocab], in float64; it sums to about 1.

    Raises:
        TypebarError: a logit is NaN or plus infinity, or all are minus infinity.
    """
    values = logits.astype(np.float64)
    largest = values.max()
    if not np.isfinite(largest):
        raise TypebarError(f"cannot sample: the largest logit is {largest}; the model's weights are broken")
    with np.errstate(over="ignore"):  # to minus infinity: no chance at all
        scaled = (values - largest) / settings.temperature
    if settings.top_k is not None and settings.top_k < scaled.size:
        scaled[scaled < np.partition(scaled, -settings.top_k)[-settings.top_k]] = -np.inf
    chances: NDArray[np.float64] = np.exp(scaled)
    chances /= chances.sum()
    if settings.top_p is not None and settings.top_p < 1:
        order = np.argsort(-chances, kind="stable")
        before = np.cumsum(chances[order]) - chances[order]
        chances[order[1:][before[1:] >= settings.top_p]] = 0
        chances /= chances.sum()
    return chances
