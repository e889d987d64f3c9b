"""What generation asks of whatever computes the model: logits, or the greedy continuation, after some tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from typebar.isa.errors import TypebarError

OnToken = Callable[[int], None]
"""Called with each new token as soon as the host can see it."""


class Engine(ABC):
    """A model on a device with the K/V cache of one sequence, and with an encoder those of one source text.

    `position` tokens are in the cache; both calls feed tokens at the positions from there on. Callers keep tokens
    within the vocabulary and positions within the context (`generation` checks them). Any call may raise DeviceError,
    after which the engine is of no more use.
    """

    kind: str
    """`sim`, `rtl` or `torch`: the name under which users choose it."""
    name: str
    """What it is, in words."""
    position: int = 0

    def reset(self) -> None:
        """Forget every token: the next one has position 0."""
        self.position = 0

    def encode(self, source: Sequence[int]) -> None:
        """Take a source text's token ids, at least one, for a model with an encoder; call it after `reset`.

        Raises:
            TypebarError: the model has no encoder.
        """
        raise TypebarError(f"{self.name} runs a model without an encoder: it takes no source text")

    @abstractmethod
    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Feed `tokens`, at least one; the logits [vocab] after the last."""

    @abstractmethod
    def greedy(self, tokens: Sequence[int], count: int, end: int | None, on_token: OnToken) -> None:
        """Feed `tokens`, at least one, then generate up to `count` tokens, each the first of the largest logit.

        Stops after a token equal to `end`. The last token generated is not fed.
        """

    def flags(self) -> list[str]:
        """Numeric conditions met since the engine was made, in words; none by default."""
        return []
