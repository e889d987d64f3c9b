"""Checkpoints of kinds that no machine runs: one line that says what and the way out, from every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

from typebar.compiler.frontend import import_model
from typebar.compiler.problems import UnsupportedError
from typebar.host.cli import main

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3}


def _switch() -> nn.Module:
    config = tf.SwitchTransformersConfig(**T5, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    return tf.SwitchTransformersForConditionalGeneration(config)


EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "Mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4)),
    "Qwen2-MoE": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**SHAPE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    ),
    "Switch": _switch,
}
ALONE: dict[str, Callable[[], nn.Module]] = {
    "BERT": lambda: tf.BertModel(tf.BertConfig(**SHAPE)),
    "BERT that fills gaps": lambda: tf.BertForMaskedLM(tf.BertConfig(**SHAPE)),
    "DistilBERT": lambda: tf.DistilBertForMaskedLM(
        tf.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    ),
    "T5's encoder": lambda: tf.T5EncoderModel(tf.T5Config(**T5)),
}


def saved(build: Callable[[], nn.Module], folder: Path) -> Path:
    torch.manual_seed(0)
    build().save_pretrained(folder)
    return folder


def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The one finding of `check`; `compile` says the same in one line and writes nothing."""
    capsys.readouterr()
    assert main(["check", str(folder), "--machine", "tiny", "--devices", "2", "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    image = folder / "image.safetensors"
    assert main(["compile", str(folder), "-o", str(image), "--machine", "tiny"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{finding['node']}: {finding['reason']}; {finding['remedy']}")
    assert not image.exists()
    return dict(finding)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finding = said(saved(EXPERTS[name], tmp_path / "model"), capsys)
    assert finding["reason"].startswith("a mixture of experts") and "dense model" in finding["remedy"]
    assert finding["module"].endswith(".mlp.experts")


@pytest.mark.parametrize("name", ALONE)
def test_an_encoder_alone(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ALONE[name]
    finding = said(saved(model, tmp_path / "model"), capsys)
    assert finding["reason"].startswith("an encoder alone") and "encoder-decoder" in finding["remedy"]
    assert finding["node"] == type(model()).__name__


def test_a_model_of_no_text(tmp_path: Path) -> None:
    shape = {k: v for k, v in SHAPE.items() if k != "vocab_size"}
    folder = saved(lambda: tf.ViTModel(tf.ViTConfig(**shape, image_size=32, patch_size=8)), tmp_path)
    with pytest.raises(UnsupportedError, match=r"^ViTModel: a model that does not generate text from text; give a dec"):
        import_model(folder)


def test_an_encoder_made_a_decoder_is_none_alone(tmp_path: Path) -> None:
    folder = saved(lambda: tf.RobertaForCausalLM(tf.RobertaConfig(**SHAPE, is_decoder=True)), tmp_path)
    assert import_model(folder).config["vocab"] == SHAPE["vocab_size"]
