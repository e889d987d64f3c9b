"""The families through ONNX, to the bits that torch's route gives, and on the RTL, to the functional simulator's."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Claim
from families import FAMILIES, VOCAB, Family, random_model
from test_families import CONTEXT, PROMPT, SOURCE, config_of
from test_onnx_pair import export_pair

import typebar
from typebar.isa.image import Image
from typebar.isa.program import Program, disassemble, encode

STEPS = 6
_START = "sadd rd=r22 a=r22"  # added to a row of a table
SAME = "same instructions"
APART = "same bits; instructions differ in addresses, as each of the two files holds its embedding"


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
        shapes = ({1: torch.export.Dim("T", min=2, max=CONTEXT)},)
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
    """Equal bits; the program is the same to the byte, but of a pair of files, which hold a table twice."""
    claim(family.name, "ONNX", "functional", "")
    model = random_model(family)
    tokens, source = tokens_of(family)
    (tmp_path / "files").mkdir()
    given = {"torch": model, "onnx": export_onnx(family, model, tmp_path / "files")}
    found, programs = {}, {}
    for name, origin in given.items():
        path = tmp_path / f"{name}.safetensors"
        typebar.compile(origin, path, machine="tiny", devices=3, config=config_of(family))
        programs[name] = Image.open(path).program
        with typebar.load(path, device=["sim"]) as image:
            found[name] = image.logits(tokens, source)
    same = np.array_equal(encode(programs["torch"]), encode(programs["onnx"]))
    claim(family.name, "ONNX", "functional", SAME if same else APART)
    assert without_addresses(programs["torch"]) == without_addresses(programs["onnx"])
    assert same or family.encoder
    assert np.array_equal(found["torch"], found["onnx"])


def without_addresses(program: Program) -> list[str]:
    """The program as text without comments, constants and the start of a table that is not the first in its region."""
    plain = [line.partition(";")[0].rstrip() for line in disassemble(program).splitlines()]
    return [re.sub(r"(line|value|b)=\S+", "", text) for text in plain if "=" in text and _START not in text]


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_on_the_rtl(family: Family, tmp_path: Path, claim: Claim) -> None:
    claim(family.name, "torch", "rtl", "")
    path = tmp_path / "image.safetensors"
    typebar.compile(random_model(family), path, machine="tiny", devices=1, config=config_of(family))
    tokens, source = tokens_of(family)
    found = []
    for device in ("sim", "rtl"):
        with typebar.load(path, device=[device]) as image:
            found.append(image.logits(tokens[:3], source and source[:4]))
    assert np.array_equal(*found)
