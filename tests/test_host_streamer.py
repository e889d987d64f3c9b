"""What `generate` takes from Hugging Face's users: their streamers, and numpy's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, TextStreamer

import typebar
from typebar.host.api import TextModel
from typebar.host.sampling import SamplingSettings
from typebar.isa.errors import TypebarError
from typebar.models import find

PROMPT, NEW = "And the king said", 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextModel]:
    made = typebar.compile("folio-draft", tmp_path_factory.mktemp("image") / "draft.safetensors", "tiny", 2)
    assert "manifest" not in repr(made)
    with typebar.load(made, "sim") as opened:
        yield opened


class Recorder:
    """A streamer of Hugging Face's kind that notes what it is fed."""

    def __init__(self) -> None:
        self.fed: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.fed.append(value)

    def end(self) -> None:
        self.ended += 1


def test_token_streamers_are_fed_as_hugging_face_feeds_them(model: TextModel) -> None:
    seen = Recorder()
    made = model.generate(PROMPT, max_new_tokens=NEW, streamer=seen)
    assert all(isinstance(item, torch.Tensor) and item.dtype == torch.int64 for item in seen.fed)
    assert seen.fed[0].tolist() == [made.prompt_tokens] and seen.ended == 1
    assert [item.tolist() for item in seen.fed[1:]] == [[token] for token in made.tokens]
    assert made == model.generate(PROMPT, max_new_tokens=NEW)


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_hugging_faces_text_streamer_works(
    model: TextModel, skip_prompt: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(find("folio-draft").path / "tokenizer.json"))
    made = model.generate(PROMPT, max_new_tokens=NEW, streamer=TextStreamer(tokenizer, skip_prompt=skip_prompt))
    whole = made.tokens if skip_prompt else [*made.prompt_tokens, *made.tokens]
    assert capsys.readouterr().out == tokenizer.decode(whole) + "\n"


def test_token_streamers_need_no_tokenizer(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = model.tokenizer.encode(PROMPT)
    monkeypatch.setattr(model, "_tokenizer", None)
    seen = Recorder()
    made = model.generate(input_ids=ids, max_new_tokens=2, streamer=seen)
    assert made.text is None and len(seen.fed) == 3 and seen.ended == 1
    with pytest.raises(TypebarError, match="has no tokenizer"):
        model.generate(input_ids=ids, max_new_tokens=2, streamer=print)


@pytest.mark.parametrize("streamer", [3, "text", [], object()])
def test_other_streamers_are_refused(model: TextModel, streamer: Any) -> None:
    with pytest.raises(TypebarError, match="give a function of text, or an object with put and end") as caught:
        model.generate(PROMPT, streamer=streamer)
    assert "\n" not in str(caught.value)


def test_numpys_numbers_are_numbers(model: TextModel) -> None:
    plain = {"temperature": 0.5, "top_k": 7, "top_p": 0.75, "seed": 3, "max_new_tokens": NEW, "eos_token_id": 5}
    kinds = [np.float32, np.int32, np.float16, np.uint64, np.int64, np.int16]
    numpys = {key: kind(value) for (key, value), kind in zip(plain.items(), kinds, strict=True)}
    made = model.generate(PROMPT, do_sample=True, **numpys)
    assert made == model.generate(PROMPT, do_sample=True, **plain) and type(made.seed) is int
    settings = SamplingSettings(np.float64(0.5), np.int8(7), np.float32(0.75), np.uint8(3))
    found = (settings.temperature, settings.top_k, settings.top_p, settings.seed)
    assert found == (0.5, 7, 0.75, 3) and [type(item) for item in found] == [float, int, float, int]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": True}, "max_new_tokens must be an integer, at least 1, not True"),
        ({"max_new_tokens": np.float32(3)}, "max_new_tokens must be an integer"),
        ({"eos_token_id": np.int64(4096)}, "eos_token_id must be from 0 to 4095"),
        ({"eos_token_id": False}, "eos_token_id must be from 0 to 4095, or -1 for none, not False"),
        ({"do_sample": True, "seed": np.int64(-1)}, "seed must be an integer, at least 0"),
        ({"do_sample": True, "top_k": np.True_}, "top_k must be an integer"),
        ({"do_sample": True, "temperature": 10**400}, "temperature must be a finite number"),
        ({"do_sample": True, "top_p": np.float32("nan")}, "top_p must be a number above 0"),
        ({"do_sample": True, "temperature": 1j}, "temperature must be a finite number above 0, not 1j"),
    ],
)
def test_numbers_out_of_range_are_one_line(model: TextModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypebarError, match=message) as caught:
        model.generate(PROMPT, **arguments)
    assert "\n" not in str(caught.value)
