"""Trained models against torch, by the command that publishes the figures; only where the models are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from typebar.isa.errors import TypebarError
from typebar.models.flan import NAME, write_checkpoint
from typebar.models.real import find_real, real_models

ROOT = Path(__file__).parent.parent
installed = pytest.mark.skipif(
    any(model.installed() is None for model in real_models()), reason="the real models are not installed (README.md)"
)


def figures(model: str) -> dict[str, Any]:
    command = [sys.executable, "benchmarks/real_models.py", model, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)[model]
    return report


@installed
@pytest.mark.long
def test_flan_from_its_checkpoint() -> None:
    report = figures("flan")
    assert report["prompts"] >= 20
    assert all(item["given"] == item["wanted"] for item in report["quoted"])
    assert report["torch float32"]["agreement"] >= 0.99


@installed
@pytest.mark.long
def test_flan_from_its_int8_onnx_pair() -> None:
    report = figures("flan-int8")
    assert all(item["given"] == item["wanted"] for item in report["quoted"])
    # The weights are the checkpoint's, exactly; ONNX Runtime rounds activations to int8 too, and so it is as far from
    # the image as from torch.
    assert report["torch float32"]["agreement"] >= 0.99
    apart = report["ONNX Runtime"]["agreement"] - report["torch float32 with ONNX Runtime"]["agreement"]
    assert abs(apart) <= 0.02


@installed
@pytest.mark.long
def test_smollm2_through_its_chat_template() -> None:
    report = figures("smollm2")
    assert (report["prompts"], report["devices"]) == (10, 4)
    assert report["torch float32"]["agreement"] >= 0.99


@installed
def test_the_checkpoint_has_every_tensor_of_the_pair(tmp_path: Path) -> None:
    shapes = write_checkpoint(find_real(NAME).path(), tmp_path)
    assert len(shapes) == 190
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == find_real(NAME).parameters
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["d_model"], config["d_kv"], config["d_ff"], config["num_heads"]) == (512, 64, 1024, 6)
    assert (config["num_layers"], config["num_decoder_layers"], config["vocab_size"]) == (8, 8, 32128)
    tensors = load_file(tmp_path / "model.safetensors")
    steps = np.unique(tensors["lm_head.weight"][:64])
    assert len(steps) <= 256 and np.allclose(
        np.diff(steps) / np.diff(steps).min(), np.rint(np.diff(steps) / np.diff(steps).min())
    )


def test_a_folder_without_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypebarError, match=r"encoder\.onnx"):
        write_checkpoint(tmp_path, tmp_path / "out")
