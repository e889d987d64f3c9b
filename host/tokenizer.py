"""Text to token ids and back: the tokenizer inside an image, and decoding a stream without splitting characters."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from typebar.isa.errors import TypebarError

_CONTEXT_TOKENS = 8
"""Tokens of the prompt that a stream decodes with, so that spacing at the seam is as in the whole text."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextTokenizer:
    """A tokenizer.json."""

    def __init__(self, data: bytes) -> None:
        """Parse the file's contents.

        Raises:
            TypebarError: they are no tokenizer.
        """
        try:
            self._tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for what it cannot parse
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise TypebarError(f"the tokenizer cannot be read ({line}): compile with a valid tokenizer.json") from error

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, if `special` with the special tokens that the tokenizer itself adds.

        Raises:
            TypebarError: the text holds a lone surrogate, which no encoding of text has.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise TypebarError(f"the prompt is not valid Unicode text ({error}): give it as UTF-8") from None
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out and incomplete characters replaced."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


class TextStream:
    """Turns tokens into text as they come; the pieces joined are the text of the whole.

    A character whose bytes are spread over several tokens is held back until it is complete.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int] = ()) -> None:
        """A stream that continues `prompt`, whose own text is not repeated."""
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        # A prompt of token ids may end inside a character, which then belongs to the stream.
        self._shown = tokenizer.decode(self._tokens).removesuffix(_REPLACEMENT)

    def put(self, token: int) -> str:
        """The text that becomes certain with this token; often a word, sometimes nothing."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(_REPLACEMENT):
            return ""
        return self._advance(text)

    def end(self) -> str:
        """What was still held back: the replacement character for bytes that make none."""
        return self._advance(self._tokenizer.decode(self._tokens))

    def _advance(self, text: str) -> str:
        piece = text[len(self._shown) :]
        if piece:
            # What is shown ends with a whole character: older tokens matter only as context for spacing.
            self._tokens = self._tokens[-_CONTEXT_TOKENS:]
            self._shown = self._tokenizer.decode(self._tokens)
        return piece
