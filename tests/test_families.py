"""Every family from its configuration to logits, on one device and on three, bit for bit equal and near float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Claim
from families import FAMILIES, VOCAB, Family, random_model
from numpy.typing import NDArray

import typebar
from typebar.compiler import driver
from typebar.compiler.frontend import load_model
from typebar.host.rounding import rounded_operands
from typebar.isa.instructions import Format
from typebar.isa.machine import Machine

PROMPT, GENERATED, SOURCE = 9, 32, 13
RMS_BOUND, LARGEST_BOUND = 1.5, 3.0
"""The machine's error against float64, in units of what rounding the factors of products to the operand format does."""
CONTEXT = PROMPT + GENERATED


class Reference:
    """torch's own model, fed all tokens at once; with an encoder, after a source text."""

    def __init__(self, model: torch.nn.Module, source: list[int] | None) -> None:
        self.model = model
        self.given = {} if source is None else {"input_ids": torch.tensor([source])}

    def logits(self, tokens: list[int]) -> NDArray[np.float64]:
        """[T, vocab], in the model's own type."""
        ids = torch.tensor([tokens])
        with torch.no_grad():
            out = self.model(**self.given, decoder_input_ids=ids) if self.given else self.model(ids)
        logits = out if isinstance(out, torch.Tensor) else out.logits
        return np.asarray(logits[0].double().numpy())

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        made = list(tokens)
        for _ in range(count):
            made.append(int(self.logits(made)[-1].argmax()))
        return made[len(tokens) :]

    def exact_and_explained(self, tokens: list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """In float64, and in float64 with every factor of a product rounded to the operand format."""
        self.model.double()
        exact = self.logits(tokens)
        with rounded_operands():
            explained = self.logits(tokens)
        self.model.float()
        return exact, explained


def config_of(family: Family) -> dict[str, int]:
    """What a family's model does not say of itself."""
    return {"context": CONTEXT} | ({"source_context": 24, "decoder_start_token_id": 0} if family.encoder else {})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_families(family: Family, tmp_path: Path, claim: Claim) -> None:
    claim(family.name, "torch", "functional", "")
    claim(family.name, "torch", "timing", "")
    model = random_model(family)
    rng = np.random.default_rng(3)
    source = rng.integers(3, VOCAB, SOURCE).tolist() if family.encoder else None
    prompt = [0] if family.encoder else rng.integers(3, VOCAB, PROMPT).tolist()
    torch_model = Reference(model, source)
    expected = torch_model.greedy(prompt, GENERATED)
    tokens = prompt + expected
    found = []
    lowered = load_model(model, config_of(family))
    for devices in (1, 3):
        path = tmp_path / f"{devices}.safetensors"
        driver.write(driver.build(lowered, Machine.load("tiny"), devices, Format.FP16), path)
        with typebar.load(path, device=["sim"]) as image:
            found.append(image.logits(tokens, source))
            made = image.generate(input_ids=source or prompt, max_new_tokens=GENERATED, eos_token_id=-1)
            assert made.tokens == expected
            check_recomputed(image, found[0], tokens, source, rng)
        timed = typebar.simulate(path, prompt_tokens=PROMPT, new_tokens=GENERATED)
        assert timed.decode["cycles"] > 0
        claim(family.name, "torch", "timing", f"{round(timed.decode['cycles'] / (GENERATED - 1)):,} cycles a token")
    assert np.array_equal(found[0], found[1])
    largest = check_error(family.name, found[0], *torch_model.exact_and_explained(tokens))
    claim(family.name, "torch", "functional", f"error {largest:.2f} of the format's")


def check_recomputed(
    image: typebar.TextModel,
    logits: NDArray[np.float32],
    tokens: list[int],
    source: list[int] | None,
    rng: np.random.Generator,
) -> None:
    """A cache that grew token by token gives the bits that reading everything again gives, other texts in between."""
    for length in rng.integers(1, len(tokens) + 1, 3).tolist():
        image.logits(rng.integers(0, VOCAB, 5).tolist(), source and source[:3])
        again = image.logits(tokens[:length], source)
        assert np.array_equal(again, logits[:length]), length


def check_error(
    name: str, found: NDArray[np.float32], exact: NDArray[np.float64], explained: NDArray[np.float64]
) -> float:
    """The stated bound; prints, and returns for the largest error, how near the family came to it."""
    error, unit = np.abs(found - exact), np.abs(explained - exact)
    rms, largest = (np.sqrt(np.mean(error**2)) / np.sqrt(np.mean(unit**2)), error.max() / unit.max())
    print(f"{name}: error {error.max():.2e}, {largest:.2f} of the format's largest, {rms:.2f} of its rms")
    assert rms <= RMS_BOUND and largest <= LARGEST_BOUND
    assert np.abs(exact).max() > 1, "the model's logits must be worth comparing"
    return float(largest)
