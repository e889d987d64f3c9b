"""Sampling against Hugging Face's own logits processors, and streams of text against decoding the whole."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process

from typebar.host.sampling import Sampler, SamplingSettings, probabilities
from typebar.host.tokenizer import TextStream, TextTokenizer
from typebar.isa.errors import TypebarError
from typebar.models import find

VOCAB = 300


def reference(logits: np.ndarray, chosen: SamplingSettings) -> np.ndarray:
    """The distribution that Hugging Face's processors make, in float64."""
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    steps: list[logits_process.LogitsProcessor] = [logits_process.TemperatureLogitsWarper(chosen.temperature)]
    if chosen.top_k is not None:
        steps.append(logits_process.TopKLogitsWarper(chosen.top_k))
    if chosen.top_p is not None:
        steps.append(logits_process.TopPLogitsWarper(chosen.top_p))
    for step in steps:
        scores = step(None, scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 7, VOCAB, 2 * VOCAB])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.5, 0.93, 1.0])
def test_probabilities_are_hugging_faces(temperature: float, top_k: int | None, top_p: float | None) -> None:
    chosen = SamplingSettings(temperature, top_k, top_p)
    logits = np.random.default_rng(5).normal(0, 3, VOCAB).astype(np.float32)
    wanted, got = reference(logits, chosen), probabilities(logits, chosen)
    assert np.array_equal(wanted > 0, got > 0)
    assert np.abs(wanted - got).max() < 1e-14


def test_equal_logits_all_survive_top_k() -> None:
    logits = np.array([1, 3, 3, 3, 0], np.float32)
    assert np.flatnonzero(probabilities(logits, SamplingSettings(top_k=2))).tolist() == [1, 2, 3]


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e300])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    got = probabilities(np.array([-3e38, 0, 3e38, -np.inf], np.float32), SamplingSettings(temperature))
    assert np.isfinite(got).all() and abs(got.sum() - 1) < 1e-12
    assert got.argmax() == (0 if temperature > 1 else 2) and got[3] == 0


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1, 0.0001], np.float32))
    chances = probabilities(logits, SamplingSettings())
    sampler, draws = Sampler(SamplingSettings(seed=3)), 20_000
    seen = np.bincount([sampler.sample(logits) for _ in range(draws)], minlength=5)
    deviation = np.sqrt(draws * chances * (1 - chances))
    assert (np.abs(seen - draws * chances) < 4 * deviation + 1).all()


def test_seeds_repeat_and_differ() -> None:
    logits = np.zeros(1000, np.float32)
    first, again, other = (Sampler(SamplingSettings(seed=seed)) for seed in (1, 1, 2))
    a, b, c = ([sampler.sample(logits) for _ in range(20)] for sampler in (first, again, other))
    assert a == b and a != c
    free = Sampler(SamplingSettings())
    drawn = [free.sample(logits) for _ in range(20)]
    repeated = Sampler(SamplingSettings(seed=free.seed))
    assert drawn == [repeated.sample(logits) for _ in range(20)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0}, "temperature must be a finite number above 0, not 0"),
        ({"temperature": -1.5}, "not -1.5"),
        ({"temperature": float("inf")}, "not inf"),
        ({"temperature": float("nan")}, "not nan"),
        ({"temperature": "hot"}, "not 'hot'"),
        ({"top_k": 0}, "top_k must be an integer, at least 1"),
        ({"top_k": 2.5}, "not 2.5"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1, not 0"),
        ({"top_p": 1.01}, "not 1.01"),
        ({"seed": -1}, "seed must be an integer, at least 0, not -1"),
    ],
)
def test_settings_out_of_range(values: dict[str, float], message: str) -> None:
    with pytest.raises(TypebarError, match=message) as caught:
        SamplingSettings(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("logits", [[1, np.nan], [np.inf, 0], [-np.inf, -np.inf]])
def test_broken_logits_are_refused(logits: list[float]) -> None:
    with pytest.raises(TypebarError, match="cannot sample"):
        Sampler(SamplingSettings(seed=0)).sample(np.array(logits, np.float32))


# Text ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer((find("folio").path / "tokenizer.json").read_bytes())


def pieces(tokenizer: TextTokenizer, tokens: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.put(token) for token in tokens), stream.end()]


def test_characters_are_never_split(tokenizer: TextTokenizer) -> None:
    text = "Thou art näïve — 日本語 🙂👩‍👩‍👧 and\n\n  more."
    made = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(made) == text and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in made)
    assert made[-1] == "" and sum(map(bool, made)) > 5


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_streams_equal_the_whole(tokenizer: TextTokenizer, data: st.DataObject) -> None:
    """Also for tokens that are no valid UTF-8 and for special tokens; low ids are single bytes."""
    tokens = data.draw(st.lists(st.integers(0, 260) | st.integers(0, 4095), max_size=40))
    cut = data.draw(st.integers(0, len(tokens)))
    before, whole = tokenizer.decode(tokens[:cut]), tokenizer.decode(tokens)
    if before.endswith("\N{REPLACEMENT CHARACTER}"):
        cut, before = 0, ""
    assert before + "".join(pieces(tokenizer, tokens[cut:], tokens[:cut])) == whole


def test_a_prompt_may_end_inside_a_character(tokenizer: TextTokenizer) -> None:
    tokens = tokenizer.encode("it is 🙂 so")
    cut = next(i for i in range(len(tokens)) if tokenizer.decode(tokens[:i]).endswith("\N{REPLACEMENT CHARACTER}"))
    assert "".join(pieces(tokenizer, tokens[cut:], tokens[:cut])) == "🙂 so"


@pytest.mark.parametrize("data", [b"{}", b"not json", b"\xff\xfe", b'{"model": 3}'])
def test_a_broken_tokenizer_is_one_line(data: bytes) -> None:
    with pytest.raises(TypebarError, match="the tokenizer cannot be read") as caught:
        TextTokenizer(data)
    assert "\n" not in str(caught.value)


def test_a_lone_surrogate_is_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(TypebarError, match="not valid Unicode"):
        tokenizer.encode("\ud800")
