"""The families through ONNX, to the bits that torch's route gives, and on the RTL, to the functional simulator's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Claim
from families import FAMILIES, VOCAB, Family, random_model
from test_families import CONFIG, PROMPT, SOURCE, Reference, check_error
from test_onnx_pair import export_pair

import typebar
from typebar.isa.image import Image
from typebar.isa.program import encode

STEPS = 6
SAME = "same instructions"


class Logits(torch.nn.Module):
    """A model as a function of token ids, as exporters like it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids)
        return out if isinstance(out, torch.Tensor) else out.logits


def export_onnx(family: Family, model: torch.nn.Module, folder: Path) -> Path:
    """Files of the model by torch's exporter, with axes of any length."""
    if family.encoder:
        export_pair(model, folder, width=model.config.d_model)
        (folder / "config.json").write_text(json.dumps({"decoder_start_token_id": 0}))
        return folder
    path, names = folder / "model.onnx", {"input_names": ["input_ids"], "output_names": ["logits"]}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        shapes = ({1: torch.export.Dim("T", min=2, max=CONFIG["context"])},)
        torch.onnx.export(
            Logits(model), (torch.arange(PROMPT)[None],), path, dynamo=True, dynamic_shapes=shapes,
            external_data=False, verbose=False, **names,
        )  # fmt: skip
    return path


def tokens_of(family: Family) -> tuple[list[int], list[int] | None]:
    rng = np.random.default_rng(5)
    source = rng.integers(3, VOCAB, SOURCE).tolist() if family.encoder else None
    return [0, *rng.integers(3, VOCAB, STEPS).tolist()], source


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_through_onnx(family: Family, tmp_path: Path, claim: Claim) -> None:
    """Equal bits; the program is the same to the byte unless the table says how it differs."""
    claim(family.name, "ONNX", "functional", "")
    model = random_model(family)
    tokens, source = tokens_of(family)
    (tmp_path / "files").mkdir()
    given = {"torch": model, "onnx": export_onnx(family, model, tmp_path / "files")}
    found, programs = {}, {}
    for name, origin in given.items():
        path = tmp_path / f"{name}.safetensors"
        typebar.compile(origin, path, machine="tiny", devices=3, config=CONFIG)
        programs[name] = encode(Image.open(path).program).tobytes()
        with typebar.load(path, device="sim") as image:
            found[name] = image.logits(tokens, source)
    same = programs["torch"] == programs["onnx"]
    claim(family.name, "ONNX", "functional", SAME if same else "other instructions, values within the format's error")
    if same:
        assert np.array_equal(found["torch"], found["onnx"])
    else:
        check_error(family.name, found["onnx"], *Reference(model, source).exact_and_explained(tokens))


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_on_the_rtl(family: Family, tmp_path: Path, claim: Claim) -> None:
    claim(family.name, "torch", "rtl", "")
    path = tmp_path / "image.safetensors"
    typebar.compile(random_model(family), path, machine="tiny", devices=1, config=CONFIG)
    tokens, source = tokens_of(family)
    found = []
    for device in ("sim", "rtl"):
        with typebar.load(path, device=device) as image:
            found.append(image.logits(tokens[:3], source and source[:4]))
    assert np.array_equal(*found)
