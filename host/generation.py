"""Generation: from a prompt's tokens to new ones, on the first engine of a chain that lives to finish them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from typebar.host.device import DeviceError
from typebar.host.engine import Engine, OnToken
from typebar.host.facts import EncoderFacts, ImageFacts
from typebar.host.sampling import Sampler, checked_integer
from typebar.host.select import Candidate
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image

Result = TypeVar("Result")
_BURST = 16
"""Tokens that a device generates before the host looks for ends that the device does not know."""


class Chain:
    """Engines for one image, opened when they are first needed; one that fails is given up for good."""

    def __init__(self, image: Image, candidates: Sequence[Candidate], reasons: Sequence[str]) -> None:
        """Open the first engine that works.

        Raises:
            DeviceError: none does; the message says why each did not.
        """
        self.image = image
        self.reasons = list(reasons)
        self._waiting = list(candidates)
        self._engine: Engine | None = None
        self._current = ""
        self.engine()

    def engine(self) -> Engine:
        """The engine in use; the next one of the chain after a failure.

        Raises:
            DeviceError: none is left; the message says why.
        """
        while self._engine is None:
            if not self._waiting:
                raise DeviceError(f"no device is left to run the image: {'; '.join(self.reasons)}")
            candidate = self._waiting.pop(0)
            try:
                self._engine, self._current = candidate.open(self.image), candidate.name
            except DeviceError as error:
                self.reasons.append(f"{candidate.name} not taken: {error}")
        return self._engine

    def attempt(self, work: Callable[[Engine], Result], done: Callable[[], str]) -> Result:
        """Do `work` on a reset engine; if that fails, again on the next, until one succeeds.

        `done` says what had been done so far, for the report. Raises DeviceError when no engine is left.
        """
        while True:
            engine = self.engine()
            try:
                engine.reset()
                return work(engine)
            except DeviceError as error:
                at, self._engine = len(self.reasons), None
                self.reasons.append(f"{self._current}: failed after {done()} ({error})")
                self.engine()
                self.reasons[at] += f"; continued on {self._current}"


@dataclass
class Request:
    """What to generate: the prompt's token ids, how many tokens at most, the tokens that end it, and how to choose.

    With an encoder `source` has the source text's token ids, and `prompt` those that decoding starts from.
    """

    prompt: Sequence[int]
    count: int
    ends: Collection[int] = ()
    sampler: Sampler | None = None
    """None for greedy decoding."""
    source: Sequence[int] | None = None
    tokens: list[int] = field(default_factory=list)
    """New tokens so far."""


def check_tokens(facts: ImageFacts | EncoderFacts, tokens: Sequence[int]) -> list[int]:
    """The token ids as plain integers: a prompt's, or with `EncoderFacts` a source text's.

    Raises:
        TypebarError: there are none, one is no integer or is outside the vocabulary, or they exceed the context.
    """
    what, whose = ("prompt", "model") if isinstance(facts, ImageFacts) else ("source text", "encoder")
    if not len(tokens):
        raise TypebarError(f"the {what} is empty: give at least one token of text")
    if len(tokens) > facts.context:
        raise TypebarError(f"{len(tokens)} tokens exceed the {whose}'s context of {facts.context}: shorten the {what}")
    ids: list[int] = []
    for item in tokens:
        try:
            ids.append(operator.index(item))
        except TypeError:
            raise TypebarError(f"token {item!r} is not an integer: give a flat sequence of token ids") from None
        if not 0 <= ids[-1] < facts.vocab:
            raise TypebarError(f"token {ids[-1]} is outside the vocabulary: ids go from 0 to {facts.vocab - 1}")
    return ids


def check_length(context: int, prompt_tokens: int, new_tokens: int) -> int:
    """`new_tokens` as a plain integer; refuses to generate nothing, or beyond the model's context.

    Raises:
        TypebarError: names both numbers, and how many new tokens there is room for.
    """
    new_tokens = checked_integer("max_new_tokens", new_tokens, 1, "at least 1")
    if prompt_tokens >= context:
        raise TypebarError(
            f"the prompt has {prompt_tokens} tokens and leaves no room in the model's context of {context}: shorten it"
        )
    if prompt_tokens + new_tokens > context:
        raise TypebarError(
            f"{prompt_tokens} tokens of prompt and max_new_tokens = {new_tokens} exceed the model's context of"
            f" {context}: ask for at most {context - prompt_tokens}"
        )
    return new_tokens


def run(chain: Chain, request: Request, on_token: OnToken) -> None:
    """Fill `request.tokens`, telling `on_token` of each; a failing engine costs none that are there already.

    Raises:
        DeviceError: no engine of the chain is left.
        TypebarError: the logits cannot be sampled.
    """

    def take(token: int) -> None:
        request.tokens.append(token)
        on_token(token)

    def work(engine: Engine) -> None:
        if _finished(request):
            return
        if request.source is not None:
            engine.encode(request.source)
        fed = [*request.prompt, *request.tokens]
        if request.sampler is None:
            _greedy(engine, request, fed, take)
            return
        while not _finished(request):
            token = request.sampler.sample(engine.logits(fed))
            take(token)
            fed = [token]

    chain.attempt(work, lambda: count_of(len(request.tokens), "token"))


def _greedy(engine: Engine, request: Request, fed: Sequence[int], take: OnToken) -> None:
    """Generate on the device, which knows one token that ends a text; where there are several, some tokens a time."""
    ends = [*request.ends]
    end, more = (ends[0], ends[1:]) if ends else (None, [])
    while not _finished(request):
        left = request.count - len(request.tokens)
        burst: list[int] = []

        def keep(token: int, burst: list[int] = burst) -> None:
            if not any(item in more for item in burst):
                take(token)
            burst.append(token)

        engine.greedy(fed, min(left, _BURST) if more else left, end, keep)
        fed = burst[-1:]


def _finished(request: Request) -> bool:
    ended = bool(request.tokens) and request.tokens[-1] in request.ends
    return ended or len(request.tokens) >= request.count


def count_of(number: int, thing: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
