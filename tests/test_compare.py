"""`typebar compare`: it finds a wrong layer, and calls nothing wrong that the formats explain."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, random_model
from pytest import MonkeyPatch
from safetensors.torch import load_file, save_file

import typebar
from typebar.host import compare as compare_module
from typebar.host.cli import main
from typebar.host.probes import Fed, Lookup, find_points, simulate_points
from typebar.host.rounding import rounded, rounded_operands
from typebar.isa.errors import TypebarError
from typebar.isa.image import Image
from typebar.isa.machine import Machine
from typebar.models import find

MODEL, PROMPT, LAYERS = "folio-draft", "And the king said unto them", 3


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "draft.safetensors"
    typebar.compile(MODEL, path, machine="tiny", devices=2)
    return path


def test_a_sum_inside_a_chain_is_found_with_its_value(image: Path, tmp_path: Path) -> None:
    apart = tmp_path / "apart.safetensors"
    typebar.compile(MODEL, apart, machine=Machine.load("tiny").override({"vector.chains": "false"}), devices=2)
    kinds, found = [], []
    for path in (image, apart):
        with Image.open(path) as opened:
            points = find_points(opened)
            assert points.sites.keys() == points.sums.keys()
            kinds.append({opened.program.ops[site.pc].kind.name for site in points.sites.values()})
            found.append(simulate_points(opened, points, Fed([40, 27, 60])))
    assert "vchain" in kinds[0] and kinds[1] == {"vadd"}
    assert found[0].keys() == found[1].keys() and len(found[0]) == 2 * LAYERS + 2
    assert all(np.array_equal(value, found[1][point]) for point, value in found[0].items())


def perturbed(folder: Path, name: str, relative: float) -> Path:
    """A copy of the model with one parameter off by about `relative` of itself, each element its own way."""
    folder.mkdir()
    for file in find(MODEL).path.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(find(MODEL).path / "model.safetensors")
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(5))
    tensors[name] = (tensors[name].float() * (1 + relative * noise)).half()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_right_image_diverges_nowhere(image: Path) -> None:
    for against in (None, MODEL):
        found = typebar.compare(image, PROMPT, against=against)
        assert found.first is None
        names = [row.name for row in found.rows]
        blocks = [f"transformer.h.{i}.{part}.c_proj" for i in range(LAYERS) for part in ("attn", "mlp")]
        assert names == ["transformer.wpe", *blocks, "logits"]
        assert [row.layer for row in found.rows[1:-1:2]] == [f"layer {i}" for i in range(LAYERS)]
        for row in found.rows[1:]:
            assert row.float32.rms < row.image.rms < row.bound < math.inf
            assert 0.2 < row.image.rms / row.explained.rms < 2


@pytest.mark.parametrize(
    ("layer", "part"), [(0, "attn.c_attn"), (1, "mlp.c_fc"), (2, "attn.c_proj"), (2, "mlp.c_proj")]
)
def test_the_wrong_layer_is_named(image: Path, layer: int, part: str, tmp_path: Path) -> None:
    model = perturbed(tmp_path / "wrong", f"transformer.h.{layer}.{part}.weight", 0.01)
    first = typebar.compare(image, PROMPT, against=model).first
    assert first is not None
    assert first.layer == f"layer {layer}"
    assert first.name == f"transformer.h.{layer}.{part.split('.')[0]}.c_proj"


def test_rounding_alone_is_no_divergence(image: Path, tmp_path: Path) -> None:
    model = perturbed(tmp_path / "rounded", "transformer.h.1.mlp.c_fc.weight", 2.0**-13)
    assert typebar.compare(image, PROMPT, against=model).first is None


def test_the_command(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = tmp_path / "errors.svg"
    assert main(["compare", str(image), "--prompt", PROMPT, "--plot", str(drawing)]) == 0
    assert "no layer diverges" in capsys.readouterr().out
    lines = ElementTree.parse(drawing).getroot().findall("{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 4 and all(len(line.attrib["points"].split()) == 2 * LAYERS + 2 for line in lines)
    model = perturbed(tmp_path / "wrong", "transformer.h.1.mlp.c_proj.weight", 0.05)
    command = ["compare", str(image), "--prompt", PROMPT, "--against", str(model), "--json"]
    assert main(command) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["first_divergence"] == {"name": "transformer.h.1.mlp.c_proj", "layer": "layer 1"}
    assert [row["diverges"] for row in report["rows"]].index(True) == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", "a", "--prompt-ids", "1"], "exactly one"),
        ([], "exactly one"),
        (["--prompt", "a", "--plot", "x.png"], ".svg"),
        (["--prompt-ids", "999999"], "vocabulary"),
    ],
)
def test_bad_input(image: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(image), *arguments]) == 2
    assert says in capsys.readouterr().err


def test_another_models_weights_are_refused(image: Path) -> None:
    with pytest.raises(TypebarError, match=r"transformer\.wte\.weight"):
        typebar.compare(image, PROMPT, against="folio")


def test_rounded_operands_rounds_factors_and_nothing_else() -> None:
    x = torch.tensor([1 + 2.0**-12, 1 + 2.0**-11 + 2.0**-13, -3.0], dtype=torch.float64)
    assert rounded(x).tolist() == [1.0, 1 + 2.0**-10, -3.0]
    one = torch.ones(3, 1, dtype=torch.float64)
    with rounded_operands():
        assert (x @ one).item() == 1.0 + 1 + 2.0**-10 - 3
        assert (x + x).tolist() == (2 * x).tolist()
    assert (x @ one).item() == x.sum().item()


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image of a small T5 with random weights."""
    path = tmp_path_factory.mktemp("compare") / "t5.safetensors"
    model = random_model(next(family for family in FAMILIES if family.name == "T5 v1.1"))
    typebar.compile(model, path, machine="tiny", devices=2, config={"context": 8, "source_context": 8})
    return path


def test_an_encoder_is_compared_too(translator: Path) -> None:
    found = typebar.compare(translator, input_ids=[5, 9, 17, 33, 2], new_tokens=3)
    assert found.first is None and found.positions == 5 + 4
    assert [row.layer for row in found.rows[:4]] == [f"encoder layer {i // 2}" for i in range(4)]
    assert found.rows[5].name == "decoder.block.0.layer.1.EncDecAttention.o"
    assert all(0 < row.image.rms < row.bound for row in found.rows)


def test_a_wrong_encoder_layer_is_named(translator: Path, monkeypatch: MonkeyPatch) -> None:
    name = "encoder.block.1.layer.0.SelfAttention.v.weight"
    right = compare_module.unpack_weights

    def wrong(image: Image) -> Lookup:
        lookup = right(image)
        return lambda asked: lookup(asked) * (np.float32(1.05) if asked == name else np.float32(1))

    monkeypatch.setattr(compare_module, "unpack_weights", wrong)
    first = typebar.compare(translator, input_ids=[5, 9, 17, 33, 2], new_tokens=1).first
    assert first is not None
    assert (first.layer, first.name) == ("encoder layer 1", "encoder.block.1.layer.0.SelfAttention.o")
