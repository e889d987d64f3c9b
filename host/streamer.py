"""Whom `generate` tells what it makes: a function of text, or an object that takes tokens as Hugging Face's do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from typebar.isa.errors import TypebarError


@runtime_checkable
class TokenStreamer(Protocol):
    """The interface of Hugging Face's streamers, such as `transformers.TextStreamer`."""

    def put(self, value: Any) -> object:
        """Take a torch tensor of token ids: the prompt [1, T] first, then each new token [1]."""

    def end(self) -> object:
        """Hear that no more come."""


Streamer = Callable[[str], object] | TokenStreamer
"""Called with each piece of text as it becomes certain (the pieces joined are the generated text), or fed tokens."""


class Listener:
    """A streamer of either kind, or none; `text` is the function of text if it is one."""

    def __init__(self, streamer: Streamer | None) -> None:
        """Find out which kind it is.

        Raises:
            TypebarError: it is of neither.
        """
        self.text: Callable[[str], object] | None = None
        self._tokens: TokenStreamer | None = None
        if callable(streamer):
            self.text = streamer
        elif isinstance(streamer, TokenStreamer):
            self._tokens = streamer
        elif streamer is not None:
            raise TypebarError(
                f"the streamer cannot be {streamer!r}: give a function of text, or an object with put and end"
            )

    def prompt(self, tokens: Sequence[int]) -> None:
        """The prompt's tokens, before any new one."""
        self._put([list(tokens)])

    def token(self, token: int) -> None:
        """A new token."""
        self._put([token])

    def end(self) -> None:
        """The last token has come."""
        if self._tokens is not None:
            self._tokens.end()

    def _put(self, tokens: list[Any]) -> None:
        if self._tokens is not None:
            import torch

            self._tokens.put(torch.tensor(tokens, dtype=torch.int64))
