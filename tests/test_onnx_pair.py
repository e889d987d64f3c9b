"""Encoder-decoders as two ONNX files: a small random T5 by torch's exporter, and the real FLAN-T5-small in int8."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from typebar.compiler import ir
from typebar.compiler.frontend import FrontendModel, load_model
from typebar.compiler.interpreter import StepInterpreter
from typebar.isa.errors import TypebarError

VOCAB = 61
TITLES = "traceforge_title_model"


def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=VOCAB,
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        eos_token_id=1,
        dropout_rate=0.0,
    )
    model = T5ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


class Encoder(nn.Module):
    def __init__(self, model: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.enc = model.encoder
        self.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.enc(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states


class Decoder(nn.Module):
    def __init__(self, model: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.m = model
        self.eval()

    def forward(self, input_ids: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out = self.m(
            encoder_outputs=BaseModelOutput(states), attention_mask=mask, decoder_input_ids=input_ids, use_cache=False
        )
        logits: torch.Tensor = out.logits
        return logits


def export_pair(model: nn.Module, folder: Path, fixed: bool = False, width: int = 24) -> None:
    source, target = torch.arange(2, 9)[None], torch.arange(3, 8)[None]
    states = torch.zeros(1, 7, width)
    mask = torch.ones_like(source)
    text = {0: "batch", 1: "source"}
    names = ["input_ids", "encoder_hidden_states", "encoder_attention_mask"]
    axes = {"input_ids": {0: "batch", 1: "target"}, names[1]: text, names[2]: text}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Encoder(model),
            (source, mask),
            folder / "encoder_model.onnx",
            dynamo=False,
            opset_version=18,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_axes=None if fixed else {"input_ids": text, "attention_mask": text},
        )
        torch.onnx.export(
            Decoder(model),
            (target, states, mask),
            folder / "decoder_model.onnx",
            dynamo=False,
            opset_version=18,
            input_names=names,
            output_names=["logits"],
            dynamic_axes=axes,
        )


def runner_of(brought: FrontendModel) -> StepInterpreter:
    return StepInterpreter(brought.module, lambda name: torch.from_numpy(np.array(brought.lookup(name))))


def test_a_pair_of_files_gives_what_torch_gives(tmp_path: Path) -> None:
    model = t5()
    export_pair(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"decoder_start_token_id": 0, "eos_token_id": 1}))
    brought = load_model(tmp_path, {"context": 24, "source_context": 32})
    assert isinstance(brought.module.body.block.first_op, ir.EncoderOp)
    assert (brought.config["decoder_start_token_id"], brought.config["source_context"]) == (0, 32)
    runner = runner_of(brought)
    for length in (1, 4, 19):
        source, target = [(5 * i + 2) % VOCAB for i in range(length)], [0, *((3 * i + 4) % VOCAB for i in range(17))]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target])).logits[0]
        runner.encode(source)
        found = torch.stack([runner.step(token, i) for i, token in enumerate(target)])
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_an_encoder_of_fixed_length_is_refused(tmp_path: Path) -> None:
    export_pair(t5(), tmp_path, fixed=True)
    with pytest.raises(TypebarError, match=r"encoder_model\.onnx takes texts of 7 tokens only; export it with dynamic"):
        load_model(tmp_path, {"decoder_start_token_id": 0})


def test_halves_given_alone_or_the_wrong_way_round_are_refused(tmp_path: Path) -> None:
    export_pair(t5(), tmp_path)
    with pytest.raises(TypebarError, match=r"decoder_model\.onnx is the decoder of a pair; give the folder"):
        load_model(tmp_path / "decoder_model.onnx")
    names = [tmp_path / f"{half}_model.onnx" for half in ("encoder", "decoder")]
    names[0].rename(tmp_path / "other")
    names[1].rename(names[0])
    (tmp_path / "other").rename(names[1])
    with pytest.raises(TypebarError, match="takes no encoder's result and cannot be the decoder of a pair"):
        load_model(tmp_path, {"decoder_start_token_id": 0})
    names[0].unlink()
    names[1].unlink()
    with pytest.raises(TypebarError, match=r"has no config\.json"):
        load_model(tmp_path)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec(TITLES) is None, reason=f"{TITLES} is not installed")
def test_the_real_pair_translates() -> None:
    from tokenizers import Tokenizer

    found = importlib.util.find_spec(TITLES)
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent / "data" / "span"
    facts = {"decoder_start_token_id": 0, "eos_token_id": 1, "context": 64, "source_context": 64}
    brought = load_model(folder, facts)
    linears = [op for op in brought.module.walk() if isinstance(op, ir.LinearOp)]
    assert all(op.scale is not None for op in linears) and len(linears) == 19
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    runner = runner_of(brought)
    runner.encode(tokenizer.encode("translate English to German: The house is wonderful.").ids)
    tokens = [0]
    while tokens[-1] != 1 and len(tokens) < 20:
        tokens.append(int(runner.step(tokens[-1], len(tokens) - 1).argmax()))
    assert tokenizer.decode(tokens) == "Das Haus ist wunderbar."
